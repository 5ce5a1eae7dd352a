# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How a run hears that it should stop: signals and a limit of hours; and what keeps its data loader's workers alive
until it has."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# sysexits' "temporary failure, try again": what a scheduler may requeue on.
EXIT_STATUS_INTERRUPTED = 75
_POLL_SECONDS = 2.0


class StopRequest:
    """
    While entered, SIGTERM and SIGINT ask for a stop after the step instead of ending the process.

    SIGTERM may come any number of times: a scheduler and a launcher both pass it on. A second SIGINT, which is a
    person's, ends the process. Signals reach only the main thread; elsewhere nothing is installed.

    Args:
        deadline (`float`, *optional*): value of `time.monotonic()` from which on the run should stop too.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.signal_number: int | None = None
        self._former: dict[int, Any] = {}

    @property
    def cause(self) -> str | None:
        """The name of the signal, or `"max_hours"`; `None` as long as nothing asks for a stop."""
        if self.signal_number is not None:
            return signal.Signals(self.signal_number).name
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "max_hours"
        return None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            logger.warning("%s: a checkpoint is written after this step", signal.Signals(number).name)
        elif number == self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """
    While a data loader starts its workers: what asks this process to stop arrives afterwards, and workers start with
    the signals held, for [`obey_parent_alone`].
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone(worker: int) -> None:
    """
    `worker_init_fn` of a data loader: its workers end when the process that they serve says so, or dies.

    Launchers and schedulers signal whole groups of processes. A worker that died of it would leave its process without
    the batches of the step after which it wants to stop.
    """
    if sys.platform != "linux":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    """SIGTERM is held in all threads of a worker; here it is taken, and its sender known. Ends the worker."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


__all__ = ["EXIT_STATUS_INTERRUPTED", "StopRequest", "obey_parent_alone", "stop_signals_held"]
