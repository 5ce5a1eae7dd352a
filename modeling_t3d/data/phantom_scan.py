# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How a phantom study is scanned: grid, field of view, contrast phase, kernel and noise, whatever the findings are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .phantom_canvas import BELL_DEVIATION, Canvas, RandomDraws

# In-plane filter of the noise, (neighbour, centre), by kernel: smooth noise, nearly white noise, edge-enhanced noise.
KERNELS = {"soft": (1, 2), "standard": (1, 5), "sharp": (-1, 5)}
NOMINAL_RESOLUTION = 4.0
FIELD_OF_VIEW = (416.0, 276.0, 366.0)  # mm, (z, y, x)


@dataclass(frozen=True)
class ScanSettings:
    """How one study was scanned; nothing here depends on what the patient has.

    Args:
        phase (`str`): a key of `TISSUE_HU`.
        kernel (`str`): a key of `KERNELS`.
        noise (`float`): standard deviation of the noise, HU.
        spacing (`tuple[float, float, float]`): mm along (z, y, x).
        shape (`tuple[int, int, int]`): voxels along (z, y, x).
        centre (`tuple[float, float, float]`): body-frame mm (z, y, x) of the field of view's middle.
        overlap (`float`): share of each neighbouring slice that a slice holds.
        breath (`float`): mm by which the diaphragm stands lower than usual.
        offset (`tuple[float, float, float]`): world (x, y, z) minus body-frame position, mm.
    """

    phase: str
    kernel: str
    noise: float
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    centre: tuple[float, float, float]
    overlap: float
    breath: float
    offset: tuple[float, float, float]


def draw_scan(draws: RandomDraws, shape: tuple[int, int, int] | None, resolution: float) -> ScanSettings:
    """The scan settings of a study; `shape` fixes the grid's size and takes the spacing from the field of view."""
    phase = draws.choice(("non-contrast", "arterial", "portal venous", "portal venous"))
    kernel = draws.choice(tuple(KERNELS))
    noise = draws.uniform(15.0, 30.0)
    view_z, view_y, view_x = (
        size * draws.uniform(low, high)
        for size, low, high in zip(FIELD_OF_VIEW, (0.97, 0.97, 0.98), (1.04, 1.04, 1.06), strict=True)
    )
    in_plane = draws.uniform(0.93, 1.07) * resolution
    between_slices = draws.uniform(0.90, 1.10) * resolution
    if shape is None:
        spacing = (round(between_slices, 3), round(in_plane, 3), round(in_plane, 3))
        shape = (round(view_z / spacing[0]), round(view_y / spacing[1]), round(view_x / spacing[2]))
    else:
        num_z, num_y, num_x = shape
        shape = (num_z, num_y, num_x)
        spacing = (round(view_z / num_z, 3), round(view_y / num_y, 3), round(view_x / num_x, 3))
    return ScanSettings(
        phase=phase,
        kernel=kernel,
        noise=noise,
        spacing=spacing,
        shape=shape,
        centre=(12.0 + draws.uniform(-8, 8), draws.uniform(-8, 2), draws.uniform(-6, 6)),
        overlap=draws.uniform(0.0, 0.14),
        breath=draws.uniform(-6, 8),
        offset=(
            round(draws.uniform(-25, 25), 1),
            round(draws.uniform(-60, 180), 1),
            round(draws.uniform(-900, 300), 1),
        ),
    )


def finish(canvas: Canvas, scan: ScanSettings, draws: RandomDraws) -> np.ndarray:
    """Overlap the slices, add the kernel's noise, clip to what a scanner stores and round: int16 HU."""
    hu = canvas.hu
    mixed = hu * np.float32(1.0 - 2.0 * scan.overlap)
    neighbours = hu[2:] + hu[:-2]
    neighbours *= np.float32(scan.overlap)
    mixed[1:-1] += neighbours
    mixed[0] = hu[0]
    mixed[-1] = hu[-1]
    side, centre = KERNELS[scan.kernel]
    noise = draws.bell_curve(mixed.size)
    for step in (1, canvas.shape[2]):
        # Neighbours in the flattened array: at a row's end the next row stands in, which noise does not mind.
        filtered = noise * np.int16(centre)
        beside = noise[2 * step :] + noise[: -2 * step]
        if side != 1:
            beside *= np.int16(side)
        filtered[step:-step] += beside
        noise = filtered
    gain = scan.noise / (BELL_DEVIATION * (2 * side * side + centre * centre))
    mixed.reshape(-1)[:] += noise * np.float32(gain)
    np.rint(mixed, out=mixed)
    np.clip(mixed, -1024, 3071, out=mixed)
    return mixed.astype(np.int16)


def world_affine(scan: ScanSettings, origin: Sequence[float]) -> np.ndarray:
    """(4, 4) matrix from array indices (z, y, x) to RAS+ world (x, y, z) mm."""
    affine = np.zeros((4, 4))
    for axis in range(3):
        affine[2 - axis, axis] = scan.spacing[axis]
        affine[2 - axis, 3] = origin[axis] + scan.offset[2 - axis]
    affine[3, 3] = 1.0
    return affine


__all__ = ["KERNELS", "NOMINAL_RESOLUTION", "ScanSettings", "draw_scan", "finish", "world_affine"]
