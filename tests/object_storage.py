# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""An S3 server in a process of its own: `python object_storage.py` prints its port and ends when its input does.

Moto keeps the objects. Around it, what each answer sends is counted before it is sent, and an upload can be held until
the client that sends it is gone.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs
from urllib.request import urlopen

WAIT = 300.0  # seconds; never reached unless something is broken
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class CountedApplication:
    """A WSGI application around another, with a few addresses of its own below `/_test/`."""

    def __init__(self, application):
        self.application = application
        self.served: list[tuple[str, int]] = []
        self.uploads_before_hold: int | None = None
        self.lock = threading.Lock()
        self.holding, self.released = threading.Event(), threading.Event()

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path.startswith("/_test/"):
            return self.control(path.removeprefix("/_test/"), environ, start_response)
        if environ["REQUEST_METHOD"] == "PUT" and "/volumes/" in path and self.is_held():
            self.holding.set()
            self.released.wait(WAIT)
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        body = b"".join(self.application(environ, start_response))
        if environ["REQUEST_METHOD"] == "GET":
            with self.lock:
                self.served.append((path, len(body)))
        return [body]

    def is_held(self) -> bool:
        with self.lock:
            if self.uploads_before_hold is None:
                return False
            self.uploads_before_hold -= 1
            return self.uploads_before_hold < 0

    def control(self, name, environ, start_response):
        answer = None
        with self.lock:
            if name == "served":
                answer, self.served = self.served, []
            elif name == "hold":
                self.uploads_before_hold = int(parse_qs(environ["QUERY_STRING"])["after"][0])
        if name == "held":
            answer = self.holding.wait(WAIT)
        elif name == "release":
            self.uploads_before_hold = None
            self.released.set()
        body = json.dumps(answer).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]


class ObjectStorage:
    """The server as a test sees it."""

    def __init__(self):
        # Not the tests' folder: it would come before the installed packages.
        command = [sys.executable, str(Path(__file__).resolve())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line.strip().isdigit():
            raise RuntimeError(f"the server did not start: {line!r}")
        self.url = f"http://127.0.0.1:{int(line)}"

    def ask(self, name: str):
        """The answer of one of the addresses below `/_test/`."""
        with urlopen(f"{self.url}/_test/{name}", timeout=2 * WAIT) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(WAIT)


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = CountedApplication(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    import logging

    logging.getLogger("werkzeug").disabled = True
    main()
