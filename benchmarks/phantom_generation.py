# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures how fast phantoms are generated on one core, in memory, by resolution.

    python benchmarks/phantom_generation.py --output benchmarks/phantom_generation.md

The CPU time of the whole process counts, so the table is for one core however many threads there are.
"""

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measuring import add_output_argument, publish

from modeling_t3d.data.phantoms import PHANTOM_VERSION, SPLIT_STARTS, generate_phantom, phantom_seeds
from modeling_t3d.evaluation.protocol import processor_name


def measure(resolution: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """CPU seconds (count,) and shapes (count, 3) of the first phantoms of the training split."""
    generate_phantom(0, resolution=resolution)
    seconds, shapes = [], []
    for seed in phantom_seeds("train", count):
        start = time.process_time()
        phantom = generate_phantom(seed, resolution=resolution)
        seconds.append(time.process_time() - start)
        shapes.append(phantom.volume.array.shape)
    return np.array(seconds), np.array(shapes)


def generation_rows(resolutions: Sequence[float], count: int) -> list[str]:
    """Rows of the table: `count` phantoms at 4 mm and coarser, fewer at finer grids."""
    rows = [
        "| voxels, mm | phantoms | mean shape (z, y, x) | ms each, mean | 95 % below | volumes per minute and core |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for resolution in resolutions:
        seconds, shapes = measure(resolution, max(5, round(count * min(1.0, (resolution / 4.0) ** 3))))
        shape = ", ".join(f"{size:.0f}" for size in shapes.mean(axis=0))
        rows.append(
            f"| {resolution:g} | {len(seconds)} | ({shape}) | {1e3 * seconds.mean():.1f} "
            f"| {1e3 * np.quantile(seconds, 0.95):.1f} | {60 / seconds.mean():.0f} |"
        )
    return rows


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="phantoms at 4 mm; fewer at finer grids")
    parser.add_argument("--resolutions", type=float, nargs="+", default=[6.0, 4.0, 3.0, 2.0], help="mm")
    add_output_argument(parser)
    arguments = parser.parse_args()
    resolutions = " ".join(f"{resolution:g}" for resolution in arguments.resolutions)
    lines = [
        "# Generating phantoms",
        "",
        f"`python benchmarks/{Path(__file__).name} --count {arguments.count} --resolutions {resolutions}` on "
        f"{processor_name()}, CPU time of the process; Python {platform.python_version()}, numpy {np.__version__}, "
        f"phantom version {PHANTOM_VERSION}, seeds of the training split from {SPLIT_STARTS['train']} on, in memory.",
        "",
        *generation_rows(arguments.resolutions, arguments.count),
    ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
