# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures tiles: the cost of a plan, the memory of a grid, and the way of many classes back to the scan's own grid.

    python benchmarks/tiling.py --output benchmarks/tiling.md   # the stated sizes; up to 12 GiB and some minutes
    python benchmarks/tiling.py --scale 0.25                    # a quarter along each axis, only printed

Peers run in turn in this process, their results compared first; memory is the process's peak above where it stood.
"""

import argparse
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import add_output_argument, medians, publish
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference

from modeling_t3d import T3DImageProcessor
from modeling_t3d.evaluation.protocol import processor_name
from modeling_t3d.geometry_t3d import Box, Grid, affine_from_axes, scale_affine
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.reassembly_t3d import reassemble
from modeling_t3d.tile_plan_t3d import grid_plan
from modeling_t3d.volume_transforms_t3d import BodyMask

LOCAL_SIZE = (64, 128, 128)


def peak_above(function: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result, seconds, and bytes by which the process's resident memory rose at most."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = status("VmRSS"), time.perf_counter()
    result = function()
    return result, time.perf_counter() - start, status("VmHWM") - before


def prepared_trunk(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> PreparedVolume:
    """A prepared volume of noise with an elliptic trunk through all slices, air around it."""
    cell = tuple(max(1, round(6.0 / step)) for step in spacing)
    counts = tuple(-(-extent // width) for extent, width in zip(shape, cell, strict=True))
    y, x = np.ogrid[-1 : 1 : counts[1] * 1j, -1 : 1 : counts[2] * 1j]
    cells = np.broadcast_to((y / 0.7) ** 2 + (x / 0.9) ** 2 < 1, counts).copy()
    array = np.random.default_rng(0).integers(-1000, 1000, shape, dtype=np.int16)
    affine = affine_from_axes(spacing, "SAR")
    return PreparedVolume(array, affine, BodyMask(cells, cell, Box((0, 0, 0), shape), shape))


def plan_rows(repetitions: int) -> list[tuple[str, str]]:
    """The plan of 512 x 512 x 1,000 voxels."""
    shape = (1000, 512, 512)
    cells = np.zeros((167, 64, 64), dtype=bool)
    cells[:, 10:54, 4:60] = True
    peers = {
        "t3d": lambda: grid_plan(shape, LOCAL_SIZE, 0.5, cells, (6, 8, 8)),
        "t3d, air kept": lambda: grid_plan(shape, LOCAL_SIZE, 0.5),
        "monai": lambda: dense_patch_slices(shape, LOCAL_SIZE, tuple(size // 2 for size in LOCAL_SIZE)),
    }
    for plan in (peers["t3d, air kept"](), peers["monai"]()):
        covered = [np.zeros(extent, dtype=bool) for extent in shape]
        for tile in plan:
            bounds = (
                zip(tile.start, tile.stop, strict=True) if isinstance(tile, Box) else ((s.start, s.stop) for s in tile)
            )
            for axis, (start, stop) in zip(covered, bounds, strict=True):
                axis[start:stop] = True
        assert all(axis.all() for axis in covered), "a plan leaves voxels out"
    found = medians(peers, repetitions)
    return [
        (f"plan, {name}: {len(peers[name]())} tiles", f"{1e3 * seconds:.2f} ms") for name, seconds in found.items()
    ]


def grid_rows(scale: float) -> list[tuple[str, str]]:
    """Memory of the tiles of 512 x 512 x 1,000 voxels, on the scan's own grid."""
    shape = tuple(max(8, round(extent * scale)) for extent in (1000, 512, 512))
    size = tuple(max(4, round(length * scale)) for length in LOCAL_SIZE)
    processor = T3DImageProcessor(local_size=size, spacing=None)
    prepared = prepared_trunk(shape, (1.0, 0.7, 0.7))

    def iterate() -> int:
        return sum(len(views.boxes) for views in processor.iterate_views(prepared, "grid"))

    iterate()  # what code and allocator take is taken
    num_tiles, seconds, lazy = peak_above(iterate)
    tile = 4 * int(np.prod(size))
    output = num_tiles * tile
    rows = [
        (f"grid of {shape}: tiles, float32 output", f"{num_tiles}, {output / 2**30:.2f} GiB"),
        ("lazily: peak above the input, in tiles", f"{lazy / tile:.2f} ({seconds:.1f} s)"),
    ]
    views, seconds, peak = peak_above(lambda: processor(prepared, views="grid")["local_pixel_values"])
    assert views.nbytes == output
    share = (peak + prepared.array.nbytes) / output
    rows.append(("materialised: peak with the input, over the output", f"{share:.2f} ({seconds:.1f} s)"))
    return rows


def peer_rows(repetitions: int) -> list[tuple[str, str]]:
    """Against MONAI's sliding window, all logits interpolated by torch and arg-max'd, at a size where those fit."""
    shape, size, num_classes = (96, 160, 160), (32, 64, 64), 40
    grid = Grid(shape, affine_from_axes((1.5, 0.75, 0.75), "SAR"))
    target = Grid((144, 240, 240), scale_affine(grid.affine, (2 / 3, 2 / 3, 2 / 3)))
    volume = torch.nn.functional.interpolate(
        torch.rand(1, 1, 12, 20, 20, generator=torch.Generator().manual_seed(0)), size=shape, mode="trilinear"
    )
    slopes = torch.linspace(-1, 1, num_classes)[:, None, None, None]

    def model(values: torch.Tensor) -> torch.Tensor:
        """Voxel by voxel, so that the places of tiles do not matter: classes are ranges of values."""
        return 40 * (slopes * values - slopes**2 / 4)

    boxes = grid_plan(shape, size, 0.5)

    def stream() -> np.ndarray:
        tiles = (
            model(volume[0][(..., *(slice(a, b) for a, b in zip(box.start, box.stop, strict=True)))]) for box in boxes
        )
        return reassemble(tiles, boxes, grid, target).array

    def whole() -> np.ndarray:
        logits = sliding_window_inference(volume, size, 1, model, overlap=0.5, mode="gaussian")
        return torch.nn.functional.interpolate(logits, size=target.shape, mode="trilinear")[0].argmax(dim=0).numpy()

    peers = {"t3d, slab by slab": stream, "monai + torch": whole}
    labels, peaks = {}, {}
    for name, function in peers.items():
        labels[name], _, peaks[name] = peak_above(function)
    agreement = (labels["t3d, slab by slab"] == labels["monai + torch"]).mean()
    assert agreement > 0.999, f"results agree in {agreement:.4f} of the voxels alone"
    found = medians(peers, repetitions)
    rows = [(f"{num_classes} classes, {shape} -> {target.shape}: equal labels", f"{100 * agreement:.3f} %")]
    return rows + [(f"{name}", f"{found[name]:.1f} s, {peaks[name] / 2**20:.0f} MiB") for name in peers]


def reassembly_rows(scale: float, dtype: torch.dtype) -> list[tuple[str, str]]:
    """117 classes of 512 x 512 x 600 voxels of 0.7 x 0.7 x 1 mm, stored (x, y, z) as NIfTI stores them."""
    num_classes, (depth, height, width) = 117, (round(extent * scale) for extent in (600, 512, 512))
    stored = Grid((width, height, depth), affine_from_axes((0.7, 0.7, 1.0), "LPS"))
    shape = tuple(
        round(n * a / b) for n, a, b in zip((depth, height, width), (1.0, 0.7, 0.7), (1.5, 0.75, 0.75), strict=True)
    )
    size = tuple(max(8, round(length * scale)) for length in LOCAL_SIZE)
    processor = T3DImageProcessor(local_size=size)
    prepared = prepared_trunk(shape, (1.5, 0.75, 0.75))
    corner = stored.affine[:3, :3] @ np.array([width - 1, height - 1, 0])
    prepared.affine[:3, 3] += corner + stored.affine[:3, 3]
    prepared.input_grid = stored
    boxes = processor.plan_views(prepared)
    # One smooth tile for all: what is measured is what becomes of logits, not how they are made.
    coarse = torch.randn(1, num_classes, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tile = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")[0].to(dtype)
    result, seconds, peak = peak_above(lambda: processor.reassemble((tile for _ in boxes), prepared))
    assert result.array.shape == stored.shape
    on_input = num_classes * int(np.prod(stored.shape)) * tile.element_size()
    on_grid = num_classes * int(np.prod(shape)) * tile.element_size()
    return [
        (
            f"117 classes of {stored.shape} from {len(boxes)} tiles, {str(dtype).removeprefix('torch.')}",
            f"{seconds:.0f} s",
        ),
        ("peak above the start", f"{peak / 2**30:.2f} GiB"),
        ("all logits on the model grid, on the scan's grid", f"{on_grid / 2**30:.1f}, {on_input / 2**30:.1f} GiB"),
    ]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of every axis of the large volumes and tiles")
    parser.add_argument("--dtype", default="float16", help="of the 117 classes' logits; a model's autocast gives half")
    parser.add_argument("--repetitions", type=int, default=5)
    add_output_argument(parser)
    arguments = parser.parse_args()
    rows = plan_rows(arguments.repetitions) + grid_rows(arguments.scale) + peer_rows(arguments.repetitions)
    rows += reassembly_rows(arguments.scale, getattr(torch, arguments.dtype))
    command = f"python benchmarks/tiling.py --scale {arguments.scale:g} --dtype {arguments.dtype}"
    lines = [
        "# Tiles: plans, memory, and the way back",
        "",
        f"`{command} --repetitions {arguments.repetitions}`; {torch.get_num_threads()} threads of "
        f"{processor_name()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; seed 0.",
        "",
        "| what | measured |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
