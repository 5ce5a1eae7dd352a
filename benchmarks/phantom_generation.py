# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures how fast phantoms are generated on one core, in memory, by resolution.

    python benchmarks/phantom_generation.py

The CPU time of the whole process counts, so the table is for one core however many threads there are.
"""

import argparse
import platform
import time

import numpy as np

from modeling_t3d.data.phantoms import PHANTOM_VERSION, generate_phantom, phantom_seeds


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="phantoms at 4 mm; fewer at finer grids")
    parser.add_argument("--resolutions", type=float, nargs="+", default=[6.0, 4.0, 3.0, 2.0], help="mm")
    arguments = parser.parse_args()
    print(f"phantom version {PHANTOM_VERSION}, Python {platform.python_version()}, numpy {np.__version__}, one core\n")
    print("| resolution mm | mean shape (z, y, x) | ms each, mean | 95 % below, ms | volumes per minute |")
    print("| --- | --- | --- | --- | --- |")
    for resolution in arguments.resolutions:
        count = max(5, round(arguments.count * min(1.0, (resolution / 4.0) ** 3)))
        seconds, shapes = measure(resolution, count)
        shape = ", ".join(f"{size:.0f}" for size in shapes.mean(axis=0))
        print(
            f"| {resolution:g} | ({shape}) | {1e3 * seconds.mean():.1f} | {1e3 * np.quantile(seconds, 0.95):.1f} "
            f"| {60 / seconds.mean():.0f} |"
        )


if __name__ == "__main__":
    main()
