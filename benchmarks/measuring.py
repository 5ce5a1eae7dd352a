# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the benchmarks share: peers that take turns, and pages that are written only where `--output` says."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")


def synchronise(device: torch.device) -> None:
    """Wait for what was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(
    peers: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device = CPU, warm_up: int = 0
) -> dict[str, float]:
    """
    Seconds of each peer's call, the median of rounds in which they take turns, the device waited for.

    Args:
        peers (`Mapping[str, Callable[[], Any]]`): what is called, by name.
        repetitions (`int`): rounds that count.
        device (`torch.device`): that computes.
        warm_up (`int`): rounds before them that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(-warm_up, repetitions):
        for name, function in peers.items():
            synchronise(device)
            begun = time.perf_counter()
            function()
            synchronise(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """`--output`, without a default: a quick run must not replace a committed table."""
    parser.add_argument("--output", type=Path, help="Markdown file to write; without it the page is only printed")


def publish(lines: Sequence[str], output: Path | None) -> None:
    """Print a page, and write it where asked."""
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


__all__ = ["add_output_argument", "medians", "publish", "synchronise"]
