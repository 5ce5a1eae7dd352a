# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Batches that are made while the step before them runs: by the loader's processes, or else by a thread."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch

PREFETCHED = 2  # batches that may wait

Item = TypeVar("Item")


def prefetched(items: Iterable[Item], depth: int = PREFETCHED) -> Generator[Item, None, None]:
    """
    The same items in the same order, made ahead of time by one thread.

    What making an item raises is raised where that item would have come. Closing the generator ends the thread; an
    item that it is making is finished and dropped. It must draw from no generator that is global to the process.

    Args:
        items (iterable): iterated in the thread alone; array libraries let other threads run while they work.
        depth (`int`, defaults to 2): how many items may wait.

    Example:

    ```python
    >>> from modeling_t3d.training.prefetch import prefetched

    >>> list(prefetched(range(5), depth=2))
    [0, 1, 2, 3, 4]

    ```"""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue()
    room = threading.Semaphore(depth)
    begun, stopped = threading.Event(), threading.Event()
    num_threads = torch.get_num_threads()

    def make() -> None:
        # Work ahead must not take the cores from the step. It holds for this thread, and for those begun later.
        torch.set_num_threads(1)
        begun.set()
        try:
            source: Iterator[Item] = iter(items)
            while room.acquire() and not stopped.is_set():
                ready.put((next(source), None))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    begun.wait()
    torch.set_num_threads(num_threads)
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            del item
            room.release()
    finally:
        stopped.set()
        room.release()
        thread.join()


__all__ = ["PREFETCHED", "prefetched"]
