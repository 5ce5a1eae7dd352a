# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Work side by side on a CPU where each piece is too small for torch's own threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def run_single_threaded(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs tasks side by side, each in a thread whose torch operators do not start further threads.

    Planes and small volumes are too small to be split, and threads of threads wait for each other. torch keeps the
    setting per thread; what it hands to threads started later is put back.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(tasks), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()
    finally:
        torch.set_num_threads(num_threads)


__all__ = ["run_single_threaded"]
