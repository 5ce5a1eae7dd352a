# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the processes of a run settle among themselves: a block that all of them finish or none, one value for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class OtherProcessError(RuntimeError):
    """Another process of the run failed; the message says which and why."""


class ProcessGroup:
    """
    The processes of a run; without a process group, this one alone.

    Example:

    ```python
    >>> from modeling_t3d.training.processes import ProcessGroup

    >>> processes = ProcessGroup()
    >>> processes.gather("here")
    ['here']

    ```"""

    @property
    def rank(self) -> int:
        """Of this process."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes what all share."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of ranks; all wait for all."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's `value`."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the block after all have finished it; if one fails, all raise, each with the cause."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = self.gather(None if error is None else describe_error(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise OtherProcessError(f"rank {rank}: {failure}")


def describe_error(error: BaseException) -> str:
    """
    An error in one line.

    Example:

    ```python
    >>> from modeling_t3d.training.processes import describe_error

    >>> describe_error(FileNotFoundError(2, "No such file or directory", "scan.nii.gz"))
    "FileNotFoundError: [Errno 2] No such file or directory: 'scan.nii.gz'"

    ```"""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # What a loader's worker raised arrives with its whole traceback, whose last line is the error.
    if any(line.startswith("Traceback") or line.startswith("Original Traceback") for line in lines):
        return lines[-1].strip()
    return f"{type(error).__name__}: {lines[0].strip()}"


__all__ = ["OtherProcessError", "ProcessGroup", "describe_error"]
