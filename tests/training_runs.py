# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Runs of the training stub in processes of their own, to be stopped and killed, and what they leave.

`TrainingRuns` forks them from one server that has imported everything (`python training_runs.py`): a start costs a
fraction of a second instead of several. `launch` starts them with a launcher as users do.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

STUB = Path(__file__).with_name("training_stub.py")
ROOT = STUB.parents[1]
# Waits end long before, also on a machine that does much else.
PATIENCE_SECONDS = 600.0


class Run:
    """The processes of a run, by rank."""

    def __init__(self, server: "TrainingRuns", processes: list[int], outputs: list[Path], store: Any) -> None:
        self.server = server
        self.processes = processes
        self.outputs = outputs
        self.store = store
        self.statuses: list[int | None] = [None] * len(processes)

    def poll(self) -> list[int | None]:
        """Exit statuses as `subprocess` has them; `None` of what still runs."""
        for rank, process in enumerate(self.processes):
            if self.statuses[rank] is None:
                self.statuses[rank] = self.server.ask(poll=process)
        return self.statuses

    def wait(self) -> list[int | None]:
        """Exit statuses of all, once they have them."""
        wait_until(lambda: None not in self.poll(), describe=self.output, at_failure=self.kill)
        return self.statuses

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Until `condition()` holds; fails if a process ends before."""

        def holds() -> bool:
            if condition():
                return True
            assert self.poll() == [None] * len(self.processes), self.output()
            return False

        wait_until(holds, describe=self.output, at_failure=self.kill)

    def loaders(self, rank: int) -> list[psutil.Process]:
        """The processes that load data for a rank."""
        children = psutil.Process(self.processes[rank]).children()
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process, number)

    def kill(self) -> None:
        """Kill what still runs."""
        for process, status in zip(self.processes, self.poll(), strict=True):
            if status is None:
                os.kill(process, signal.SIGKILL)

    def output(self) -> str:
        """What all printed."""
        return "\n".join(path.read_text() for path in self.outputs)


class TrainingRuns:
    """Starts runs by forking a server; a context."""

    def __enter__(self) -> "TrainingRuns":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.runs: list[Run] = []
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for run in self.runs:
            # Of a test that failed: what it held waits for ever.
            run.kill()
        self.server.stdin.close()
        self.server.wait()

    def ask(self, **request: Any) -> Any:
        """The server's answer."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self, output_dir: Path, num_processes: int = 1, *, limits: dict[str, int] | None = None, **settings: Any
    ) -> Run:
        """
        Start a run of the stub.

        Args:
            output_dir (`Path`): its folder.
            num_processes (`int`): how many.
            limits (`dict[str, int]`, *optional*): of the system's resources, for the last rank alone.
            settings: of `training_stub.build_trainer`, and `resume`.
        """
        environment, store = {}, None
        settings = {**asked_for(num_processes), **settings}
        if num_processes > 1:
            # The store lives here, as it does in a launcher: no port is chosen that something else may take.
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment = {
                "WORLD_SIZE": num_processes,
                "LOCAL_WORLD_SIZE": num_processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": 0,
            }
        processes, outputs = [], []
        for rank in range(num_processes):
            outputs.append(output_dir.with_name(f"{output_dir.name}-{time.time_ns()}-{rank}.txt"))
            outputs[-1].touch()
            ranks = {"RANK": rank, "LOCAL_RANK": rank} if environment else {}
            processes.append(
                self.ask(
                    output_dir=str(output_dir),
                    output=str(outputs[-1]),
                    environment={name: str(value) for name, value in {**environment, **ranks}.items()},
                    limits=(limits or {}) if rank == num_processes - 1 else {},
                    settings=settings,
                )
            )
        self.runs.append(Run(self, processes, outputs, store))
        return self.runs[-1]


@cache
def shared_runs() -> TrainingRuns:
    """One server for all test files."""
    server = TrainingRuns().__enter__()
    atexit.register(server.__exit__)
    return server


def wait_until(
    condition: Callable[[], Any], *, describe: Callable[[], str], at_failure: Callable[[], Any] = lambda: None
) -> None:
    """Until `condition()` holds; fails with `describe()` after ten minutes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            text = describe()
            at_failure()
            pytest.fail(f"it did not get there: {text}")
        time.sleep(0.01)


def asked_for(num_processes: int) -> dict[str, Any]:
    """Settings for which the trainer refuses to run as anything else."""
    return {"num_processes": num_processes, "strategy": "ddp" if num_processes > 1 else "single"}


def launch(output_dir: Path, num_processes: int, **settings: Any) -> subprocess.Popen:
    """A run of the stub under a launcher (`python -m ...`)."""
    settings = {**asked_for(num_processes), **settings}
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher_words(num_processes), str(STUB), str(output_dir), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launcher_words(num_processes: int) -> Sequence[str]:
    """For `launch`: torchrun, and Accelerate for one process, which torchrun would start as one of a group."""
    if num_processes == 1:
        return ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes))


# ---------------------------------------------------------------------------------------------- what runs leave


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """Of a completed run."""
    return load_file(output_dir / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    """Weights bit for bit, and with `record` the samples of every step, rank by rank."""
    assert_same_weights(one, other)
    assert samples_by_step(one) == samples_by_step(other)


def status(output_dir: Path) -> dict[str, Any]:
    """`status.json`."""
    return json.loads((output_dir / "status.json").read_text())


def log_of(output_dir: Path) -> list[dict[str, Any]]:
    """`log.jsonl`, less a line that is being written; empty if there is none."""
    path = output_dir / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def samples_by_step(output_dir: Path) -> dict[int, list[int]]:
    """
    Of runs with `record`: step -> samples of its batch in the order of ranks, as the last run that took it had. No
    rank may have had another's.
    """
    taken: dict[int, tuple[int, dict[int, list[int]]]] = {}
    for path in output_dir.glob("samples_*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                fence, step, samples = json.loads(line)
                if step not in taken or taken[step][0] < fence:
                    taken[step] = (fence, {})
                if taken[step][0] == fence:
                    taken[step][1][int(path.stem.split("_")[1])] = samples
    batches = {
        step: [sample for rank in sorted(shares) for sample in shares[rank]] for step, (_, shares) in taken.items()
    }
    for step, batch in batches.items():
        assert len(set(batch)) == len(batch), f"step {step} has samples twice"
    return batches


# ---------------------------------------------------------------------------------------------- server


def _serve() -> None:
    import training_stub  # noqa: F401 - what every child needs

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = _exit_status(request["poll"])
        else:
            answer = os.fork()
            if not answer:
                _become(request)
        print(json.dumps(answer), flush=True)


def _exit_status(process: int) -> int | None:
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _become(request: dict[str, Any]) -> None:
    """The rest of a child's life."""
    import resource
    import traceback

    import training_stub

    descriptor = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        os.environ.update(request["environment"])
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        code = training_stub.main(request["output_dir"], request["settings"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Loader processes are left to see for themselves that this one is gone, as after a kill.
        os._exit(code)


if __name__ == "__main__":
    _serve()
