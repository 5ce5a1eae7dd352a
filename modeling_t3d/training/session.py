# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What surrounds a run: the lock on its folder, the watch over its processes, `status.json`, and the one line that
says why it failed."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .checkpoints import CheckpointError, latest_checkpoint, remove_partial
from .files import is_disk_full, make_folder, write_text_atomically
from .process_watch import ProcessWatch
from .processes import OtherProcessError, ProcessGroup, describe_error
from .run_lock import RunLock, RunLockError

logger = logging.getLogger(__name__)

_CAUSE_SECONDS = 15.0
# Settings and volumes are refused with kinds of `ValueError`.
_EXPECTED = (OSError, ValueError, FloatingPointError, CheckpointError, OtherProcessError, RunLockError)


class RunSession:
    """
    While entered, this run owns `output_dir` and ends when a process of it does. Entered and left by all processes.

    `status.json` holds `status` (`running`, `completed`, `interrupted` or `failed`; `running` too if the run was
    killed), `cause` where there is one, and where the run stands; a scheduler can look there where a launcher hides
    the exit status.

    Args:
        output_dir (`Path`): the folder; made if there is none.
        processes ([`ProcessGroup`]): of the run.
        describe (callable): where the run stands, as JSON holds it.
    """

    def __init__(self, output_dir: Path, processes: ProcessGroup, describe: Callable[[], dict[str, Any]]) -> None:
        self.output_dir = output_dir
        self.processes = processes
        self.describe = describe
        self.lock = RunLock(output_dir, on_loss=self._lose)
        self.watch = ProcessWatch(processes, self._end)
        self.fence = 0
        self._close: Callable[[], Any] | None = None

    def __enter__(self) -> "RunSession":
        with self.processes.together():
            if self.processes.is_main:
                make_folder(self.output_dir)
                self.lock.acquire()
                # After the lock: a former run that wakes up finds nothing that it could rename.
                remove_partial(self.output_dir)
        self.fence = self.processes.from_main(self.lock.number)
        self.watch = ProcessWatch(self.processes, self._end)
        try:
            self.watch.__enter__()
        except BaseException:
            self.lock.release()
            raise
        return self

    def begin(self, close: Callable[[], Any]) -> None:
        """From here on `status.json` is this run's; `close` is called at its end, however it ends."""
        self._close = close
        self.write_status("running")

    def check(self) -> None:
        """Raise on the main process if another run has taken the folder over."""
        if self.processes.is_main and self.lock.number is not None:
            self.lock.check()

    def write_status(self, status: str, cause: str | None = None) -> None:
        """Say how the run stands."""
        if self.processes.is_main:
            self.lock.check()
            values = {"status": status, **({"cause": cause} if cause else {}), **self.describe()}
            write_text_atomically(self.output_dir / "status.json", json.dumps(values))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            if error is not None and self._close is None:
                self.watch.announce(describe_error(error))
            elif error is not None and self._close is not None:
                self._fail(error, self._close)
            elif self._close is not None:
                self._close()
        finally:
            self._close = None
            self.watch.__exit__(kind, error, traceback)
            if self.processes.is_main:
                self.lock.release()

    def _fail(self, error: BaseException, close: Callable[[], Any]) -> None:
        """Say in one line why the run ends; where another process is why, raise that in place of its consequences."""
        foreign = None
        if self.processes.size > 1 and isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            # A connection that broke: why the other side closed it is known already, or about to be.
            foreign = self.watch.wait_for_cause(_CAUSE_SECONDS)
        cause = foreign or describe_error(error)
        logger.error("%s", self._last_words(cause, error))
        self.watch.announce(cause)
        self._try_to_write_failure(cause)
        with suppress(Exception):
            close()
        reported: Any = OtherProcessError(foreign) if foreign else error
        reported.is_reported = True
        if foreign:
            raise reported from error

    def _lose(self, error: RunLockError) -> None:
        """End all processes: until the next log or checkpoint they would compute for nothing."""
        cause = describe_error(error)
        if self.watch.announce(cause):
            self._end(cause)

    def _end(self, cause: str) -> None:
        """End this process at once: its other threads may wait for one that is dead."""
        print(self._last_words(cause), file=sys.stderr, flush=True)
        self._try_to_write_failure(cause)
        os._exit(1)

    def _try_to_write_failure(self, cause: str) -> None:
        # A full disk, or another run's folder: the line that was printed has to do.
        with suppress(Exception):
            self.write_status("failed", cause)

    def _last_words(self, cause: str, error: BaseException | None = None) -> str:
        checkpoint = latest_checkpoint(self.output_dir)
        remedy = f"{checkpoint} is whole, resume from it" if checkpoint else "there is no checkpoint yet"
        if error is not None and is_disk_full(error):
            remedy = f"make room; {remedy}"
        if "DataLoader worker" in cause:
            remedy = f"out of memory if it was killed: lower training.dataloader_num_workers; {remedy}"
        step = self.describe().get("step", 0)
        return f"rank {self.processes.rank} stopped at step {step}: {cause}; {remedy}"


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """
    For a script: what data, disks, settings and other processes can do to a run ends it with status 1 and one line.

    Anything else is a defect and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        is_expected = isinstance(error, _EXPECTED) and type(error) is not ValueError
        if not is_expected and "DataLoader worker" not in str(error):
            raise
        if not getattr(error, "is_reported", False):
            print(describe_error(error), file=sys.stderr)
        sys.exit(1)


__all__ = ["RunSession", "errors_in_one_line"]
