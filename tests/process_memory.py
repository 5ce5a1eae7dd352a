# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The peak memory of this process; `getrusage` would start from that of the process which launched it (Linux)."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def reset_peak() -> int:
    """Bytes that are resident now, from which the peak counts again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that were resident since the process began, or since the last reset."""
    return _status("VmHWM")


def allocated_peak(function: Callable[[], Any]) -> int:
    """Most bytes that torch and numpy allocated at once above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tracemalloc.start()
        function()
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak + numpy_peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
