# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""One run per folder: a lock with a fencing number, so that a run that was taken for dead cannot write over its
successor. Works on any file system that creates files exclusively, shared ones included; needs no lock service."""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0


class RunLockError(RuntimeError):
    """Another run holds the folder, or took it over; the message names it and the remedy."""


class RunLock:
    """
    The right to write into a folder, held by one run at a time.

    Every holder creates a file with the next number, the fencing number, in `lock/`; the highest number holds. A
    holder touches its file every few seconds. Whoever finds one that was not released looks whether its process lives
    where that can be told (the same machine), and else watches the file: touched, the folder is refused; untouched for
    `stale_seconds`, it is taken over. No clocks of two machines are compared. A former holder that wakes up finds a
    higher number at [`RunLock.check`], or when it next touches its file.

    Args:
        output_dir (`str` or `Path`): the folder; made if there is none.
        machine (`str`, *optional*): identity of this machine and its process numbers; found by default.
        heartbeat_seconds (`float`, defaults to 5): how often a holder touches its file [choice].
        stale_seconds (`float`, defaults to 120):
            How long a file must stay untouched; longer than shared file systems keep attributes [choice].
        on_loss (callable, *optional*): called once, from a thread, with what `check` would raise.

    Example:

    ```python
    >>> import tempfile
    >>> from modeling_t3d.training.run_lock import RunLock

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lock = RunLock(folder)
    ...     lock.acquire()
    ...     lock.release()
    1

    ```"""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        machine: str | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        on_loss: Callable[[RunLockError], Any] = lambda error: None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "lock"
        self.machine = machine or _this_machine()
        self.heartbeat_seconds = heartbeat_seconds
        self.stale_seconds = stale_seconds
        self.on_loss = on_loss
        self.number: int | None = None
        self._stopped = threading.Event()

    def acquire(self) -> int:
        """Take the folder and return the fencing number, or raise if a run that lives holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self._newest()
        if newest:
            self._wait_until_dead(self._claim(newest))
        number = newest + 1
        try:
            descriptor = os.open(self._claim(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            raise RunLockError(f"{self.output_dir}: another run took it at this moment; {_REMEDY}") from None
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(self._record(released=False))
        if self._newest() != number:
            self._claim(number).unlink(missing_ok=True)
            raise RunLockError(f"{self.output_dir}: another run took it at this moment; {_REMEDY}")
        self.number = number
        for claim in self.folder.glob("*.json"):
            if int(claim.stem) < number:
                claim.unlink(missing_ok=True)
        self._stopped.clear()
        threading.Thread(target=self._beat, args=(number,), name="run lock", daemon=True).start()
        return number

    def check(self) -> None:
        """Raise if another run has taken the folder over; stands before whatever is renamed into it."""
        if self.number is None or self._newest() != self.number:
            raise self._loss()

    def release(self) -> None:
        """Give the folder back."""
        self._stopped.set()
        if self.number is not None and self._newest() == self.number:
            # On a full disk the record stays: the next run looks for the process instead.
            with suppress(OSError):
                self._claim(self.number).write_text(self._record(released=True), encoding="utf-8")
        self.number = None

    def _beat(self, number: int) -> None:
        while not self._stopped.wait(self.heartbeat_seconds):
            newest = number
            # A file system may be away for a while: that it shows no number means nothing, a higher one does.
            with suppress(OSError):
                os.utime(self._claim(number))
            with suppress(OSError):
                newest = self._newest()
            if newest > number:
                self._stopped.set()
                self.on_loss(self._loss())

    def _loss(self) -> RunLockError:
        return RunLockError(
            f"{self.output_dir}: this run was taken for dead and another has taken over; it stops without writing"
        )

    def _wait_until_dead(self, claim: Path) -> None:
        """Return once the holder is known not to live; raise if it does."""
        record, touched = _look(claim)
        who = f"process {record.get('process', '?')} on {record.get('host', 'an unknown machine')}"
        refusal = RunLockError(f"{self.output_dir}: a run lives in it, {who}; {_REMEDY}")
        if record.get("released"):
            return
        if self._is_here(record):
            if _is_alive(record):
                raise refusal
            return
        logger.warning("%s: %s was not released by %s; waiting to see whether it lives", self.output_dir, claim, who)
        deadline = time.monotonic() + self.stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.stale_seconds / 20))
            record, touched_now = _look(claim)
            if record.get("released"):
                return
            if touched_now != touched or (self._is_here(record) and _is_alive(record)):
                raise refusal
        logger.warning("%s: no sign of life for %g s, taken over", self.output_dir, self.stale_seconds)

    def _is_here(self, record: dict[str, Any]) -> bool:
        """Whether a holder's process can be looked for."""
        return self.machine is not None and record.get("machine") == self.machine

    def _newest(self) -> int:
        """The highest number; 0 if there is none."""
        try:
            return max((int(path.stem) for path in self.folder.glob("*.json")), default=0)
        except FileNotFoundError:
            return 0

    def _claim(self, number: int) -> Path:
        return self.folder / f"{number:08d}.json"

    def _record(self, *, released: bool) -> str:
        process = os.getpid()
        return json.dumps(
            {
                "host": socket.gethostname(),
                "machine": self.machine,
                "process": process,
                "started": _process_start(process),
                "released": released,
            }
        )


_REMEDY = "wait for it to end, stop it, or choose another training.output_dir"


def _look(claim: Path) -> tuple[dict[str, Any], int]:
    """
    What a claim says and when it was touched. Opening it has a shared file system ask its server.

    A claim that cannot be read yet is being written: nothing is known of its holder.
    """
    try:
        with claim.open(encoding="utf-8") as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
            return json.load(file), touched
    except FileNotFoundError:
        # Removed by its successor, whose number is found when the next one is to be created.
        return {"released": True}, 0
    except ValueError:
        return {}, touched


def _this_machine() -> str | None:
    """What two processes share if one can tell whether the other lives; `None` where that cannot be told."""
    if sys.platform != "linux":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _is_alive(record: dict[str, Any]) -> bool:
    """Whether a holder on this machine lives."""
    return _process_start(record["process"]) == record["started"] is not None


def _process_start(process: int) -> int | None:
    """When a process of this machine started, in ticks since boot; numbers are given again. `None` if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    # The third field, the first here, is the state: a zombie has ended. The 22nd is the start.
    return None if fields[0] in "ZX" else int(fields[19])


__all__ = ["RunLock", "RunLockError"]
