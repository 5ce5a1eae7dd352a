# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Crops and the body mask of a volume in (z, y, x) order.

Resampling is in `resample_t3d`, what the values mean in `intensity_t3d`, files are in `volume_io_t3d`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .geometry_t3d import Box
from .volume_memory_t3d import empty_voxels

BODY_CELL = 6.0  # mm; edge of the cells on which the body mask is computed


# ---------------------------------------------------------------------------------------------- crops


def crop(array: np.ndarray, box: Box, outside: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copies a box out of an array; what reaches beyond the array is `outside`.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): may be memory-mapped; only the box is read.
        box (`Box`): its start may be negative.
        outside (`float`): value beyond the array.
        out (`torch.Tensor` of the box's size, *optional*): takes the copy.

    Returns:
        `torch.Tensor` of the box's size, float32 unless `out` has another type.
    """
    low = [max(0, first) for first in box.start]
    high = [max(a, min(end, limit)) for a, end, limit in zip(low, box.stop, array.shape, strict=True)]
    values = empty_voxels(*box.size) if out is None else out
    if any(b - a != size for a, b, size in zip(low, high, box.size, strict=True)):
        values.fill_(outside)
    where = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, box.start, strict=True))
    values.numpy()[where] = array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    return values


# ---------------------------------------------------------------------------------------------- body


@dataclass(frozen=True, eq=False)
class BodyMask:
    """Where the body lies, on cells of several voxels; it answers like the (depth, height, width) mask of its voxels.

    Args:
        cells (`np.ndarray` of shape `(cells_z, cells_y, cells_x)`, bool): cells inside the body, lungs included.
        cell (three ints, z y x): voxels per cell.
        box (`Box`): bounding box, in voxels.
        shape (three ints, z y x): of the volume, in voxels.
        dense (`np.ndarray`, bool, like `cells`, *optional*): cells denser than air, table and arms included; the
            body's where not given. What is in neither is air.
    """

    cells: np.ndarray
    cell: tuple[int, int, int]
    box: Box
    shape: tuple[int, int, int]
    dense: np.ndarray | None = None

    def __getitem__(self, voxel: tuple[int, int, int]) -> bool:
        return bool(self.cells[tuple(index // size for index, size in zip(voxel, self.cell, strict=True))])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        mask = self.cells
        for axis, size in enumerate(self.cell):
            mask = np.repeat(mask, size, axis=axis)
        return mask[: self.shape[0], : self.shape[1], : self.shape[2]]


def whole_volume_mask(shape: Sequence[int]) -> BodyMask:
    """The mask of a volume that is body throughout."""
    depth, height, width = shape
    whole = (depth, height, width)
    return BodyMask(np.ones((1, 1, 1), dtype=bool), whole, Box((0, 0, 0), whole), whole)


def _neighbours(mask: np.ndarray, beyond: bool) -> list[np.ndarray]:
    """The mask moved by one cell along each direction; cells from beyond the border are `beyond`."""
    padded = np.pad(mask, 1, constant_values=beyond)
    moved = []
    for axis in range(3):
        for offset in (0, 2):
            index = [slice(1, -1)] * 3
            index[axis] = slice(offset, offset + mask.shape[axis])
            moved.append(padded[tuple(index)])
    return moved


def label_components(mask: np.ndarray) -> np.ndarray:
    """Labels face-connected components of a 3-D boolean mask; 0 outside, equal positive numbers inside a component.

    Every true cell starts with a number of its own; runs along each axis in turn take their largest number until
    nothing changes, which for bodies is a handful of sweeps.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    runs = []
    for axis in range(3):
        lines = np.ascontiguousarray(np.moveaxis(mask, axis, -1))
        begins = np.ones(lines.shape, dtype=bool)
        begins[..., 1:] = lines[..., 1:] != lines[..., :-1]
        starts = np.flatnonzero(begins)
        runs.append((starts, np.diff(np.append(starts, mask.size))))
    while True:
        before = labels
        for axis, (starts, lengths) in enumerate(runs):
            lines = np.moveaxis(labels, axis, -1)
            largest = np.maximum.reduceat(np.ascontiguousarray(lines).ravel(), starts)
            labels = np.moveaxis(np.repeat(largest, lengths).reshape(lines.shape), -1, axis)
        if np.array_equal(before, labels):
            return labels


def _fill_axial(mask: np.ndarray) -> np.ndarray:
    """Adds the cells that have body on all four sides within their axial slice: lungs, bowel gas, airways."""
    inside = np.ones_like(mask)
    for axis in (1, 2):
        inside &= np.logical_or.accumulate(mask, axis=axis)
        inside &= np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis=axis), axis)
    return mask | inside


def body_cell(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int, int]:
    """Voxels (z, y, x) per cell of about 6 mm of the body mask."""
    depth, height, width = (
        min(size, max(1, round(BODY_CELL / step))) for size, step in zip(shape, spacing, strict=True)
    )
    return depth, height, width


class CellMeans:
    """Mean value of each cell of a volume whose planes (height x width, float32) arrive in any order.

    Args:
        shape (three ints, z y x): of the volume.
        cell (three ints, z y x): voxels per cell; the last cell of an axis may be smaller.
    """

    def __init__(self, shape: Sequence[int], cell: Sequence[int]):
        self._starts = np.arange(0, shape[0], cell[0])
        self._depth = shape[0]
        self._cell = (cell[1], cell[2])
        self._planes = torch.empty(shape[0], math.ceil(shape[1] / cell[1]), math.ceil(shape[2] / cell[2]))

    def add(self, z: int, plane: torch.Tensor) -> None:
        """Takes plane `z` into account."""
        # Windows at the end that reach beyond the plane are divided by what they hold.
        pooled = torch.nn.functional.avg_pool2d(plane[None, None], self._cell, ceil_mode=True)
        self._planes[z] = pooled[0, 0]

    def result(self) -> np.ndarray:
        """The means (cells_z, cells_y, cells_x), float32."""
        sums = np.add.reduceat(self._planes.numpy(), self._starts, axis=0)
        return sums / np.diff(np.append(self._starts, self._depth)).astype(np.float32)[:, None, None]


def cell_means(array: np.ndarray, cell: Sequence[int]) -> np.ndarray:
    """`CellMeans` of an array (depth, height, width)."""
    means = CellMeans(array.shape, cell)
    for z, plane in enumerate(array):
        means.add(z, torch.from_numpy(plane.astype(np.float32)))
    return means.result()


def find_body(shape: Sequence[int], spacing: Sequence[float], threshold: float, means: np.ndarray) -> BodyMask | None:
    """The body: cells of about 6 mm whose mean exceeds `threshold`, opened, its largest components, filled.

    The opening parts thin things that touch the body (table, blanket) from it. Components of at least a quarter of
    the largest stay: two legs are one body. The box gets a margin of half a cell, so that skin is not cut.

    Args:
        shape (three ints, z y x): of the volume.
        spacing (three floats, z y x): mm.
        threshold (`float`): in the values' unit; -500 for HU.
        means (`np.ndarray` of shape `(cells_z, cells_y, cells_x)`): of the cells of `body_cell(shape, spacing)`.

    Returns:
        `BodyMask`, or `None` when no cell exceeds the threshold.
    """
    cell = body_cell(shape, spacing)
    tissue = means > threshold
    if not tissue.any():
        return None
    core = np.logical_and.reduce([tissue, *_neighbours(tissue, beyond=True)])
    labels = label_components(core if core.any() else tissue)
    sizes = np.bincount(labels.ravel())[1:]
    body = np.isin(labels, np.flatnonzero(sizes >= 0.25 * sizes.max()) + 1)
    for _ in range(2):
        body = tissue & np.logical_or.reduce([body, *_neighbours(body, beyond=False)])
    # Filled last: before, the air between back and table would tie the two together.
    body = _fill_axial(body)
    start, stop = [], []
    for axis in range(3):
        used = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = math.ceil(cell[axis] / 2)
        start.append(max(0, int(used[0]) * cell[axis] - margin))
        stop.append(min(shape[axis], (int(used[-1]) + 1) * cell[axis] + margin))
    return BodyMask(body, cell, Box(tuple(start), tuple(stop)), (shape[0], shape[1], shape[2]), tissue)


__all__ = [
    "BodyMask",
    "CellMeans",
    "body_cell",
    "cell_means",
    "crop",
    "find_body",
    "label_components",
    "whole_volume_mask",
]
