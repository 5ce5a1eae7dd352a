# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Arithmetic on voxels in (z, y, x) order: resampling with a true affine, crops, and the body mask.

Numpy and torch alone; what the values mean is left to `intensity_t3d`, files to `volume_io_t3d`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .geometry_t3d import Box

BODY_CELL = 6.0  # mm; edge of the cells on which the body mask is computed


# ---------------------------------------------------------------------------------------------- resampling


@dataclass(frozen=True)
class AxisSampling:
    """Sample positions along one axis, in voxel indices of the source: `start + step * i` for `i < count`."""

    start: float
    step: float
    count: int

    @property
    def is_identity(self) -> bool:
        """Whether the first `count` source voxels are taken as they are."""
        return self.start == 0.0 and self.step == 1.0


def spacing_sampling(num_voxels: int, spacing: float, target: float) -> AxisSampling:
    """Samples `target` mm apart that cover `num_voxels` voxels of `spacing` mm, centred on them.

    Nothing depends on the origin. The last sample may reach beyond the last voxel's edge by less than half a step.
    """
    step = round(target / spacing, 6)
    if abs(step - 1.0) < 1e-4:
        return AxisSampling(0.0, 1.0, num_voxels)
    count = max(1, math.ceil(num_voxels / step - 1e-3))
    return AxisSampling((num_voxels - 1) / 2 - step * (count - 1) / 2, step, count)


def sampled_affine(affine: np.ndarray, samplings: Sequence[AxisSampling]) -> np.ndarray:
    """Affine (4, 4) of the samples, given the affine of the array in the same axis order."""
    index = np.eye(4)
    index[:3, :3] = np.diag([sampling.step for sampling in samplings])
    index[:3, 3] = [sampling.start for sampling in samplings]
    return np.asarray(affine, dtype=np.float64) @ index


def _integrated_hat(x: np.ndarray) -> np.ndarray:
    """Integral of the triangle of half-width 1 and area 1, from minus infinity to x."""
    x = np.clip(x, -1.0, 1.0)
    return np.where(x < 0, (x + 1) ** 2 / 2, 1 - (1 - x) ** 2 / 2)


def _axis_weights(num_voxels: int, positions: np.ndarray, step: float) -> tuple[int, int, torch.Tensor]:
    """First voxel, end voxel and weights (positions, voxels) of linear interpolation averaged over a box.

    The box is sqrt(step^2 - 1) voxels wide when downsampling: together with the interpolation's own width that is
    about one output voxel, and at step 1 it vanishes. Linear intensities are reproduced exactly. Beyond the ends
    the outermost voxel is repeated.
    """
    width = math.sqrt(max(step * step - 1.0, 0.0))
    reach = width / 2 + 1
    taps = np.arange(math.floor(positions[0] - reach), math.ceil(positions[-1] + reach) + 1)
    distance = positions[:, None] - taps[None, :]
    if width > 0:
        weights = (_integrated_hat(distance + width / 2) - _integrated_hat(distance - width / 2)) / width
    else:
        weights = np.clip(1 - np.abs(distance), 0, None)
    inside = np.clip(taps, 0, num_voxels - 1)
    first, end = int(inside[0]), int(inside[-1]) + 1
    folded = np.zeros((len(positions), end - first))
    for column, voxel in enumerate(inside - first):
        folded[:, voxel] += weights[:, column]
    folded /= folded.sum(axis=1, keepdims=True)
    return first, end, torch.from_numpy(folded.astype(np.float32))


@lru_cache(maxsize=256)
def _axis_blocks(
    num_voxels: int, sampling: AxisSampling, block: int = 64
) -> tuple[tuple[int, int, torch.Tensor], ...]:
    """`_axis_weights` for runs of `block` samples: a band matrix in dense pieces, which matrix products like."""
    positions = sampling.start + sampling.step * np.arange(sampling.count)
    return tuple(
        _axis_weights(num_voxels, positions[begin : begin + block], sampling.step)
        for begin in range(0, sampling.count, block)
    )


def _resample_axis(volume: torch.Tensor, axis: int, sampling: AxisSampling) -> torch.Tensor:
    if sampling.is_identity and sampling.count == volume.shape[axis]:
        return volume
    pieces = []
    for first, end, weights in _axis_blocks(volume.shape[axis], sampling):
        source = volume.narrow(axis, first, end - first)
        if axis == 0:
            pieces.append((weights @ source.reshape(end - first, -1)).view(-1, *volume.shape[1:]))
        elif axis == 1:
            pieces.append(torch.matmul(weights, source))
        else:
            pieces.append(torch.matmul(source, weights.T))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def resample(volume: torch.Tensor, samplings: Sequence[AxisSampling]) -> torch.Tensor:
    """Separable trilinear resampling, averaged over the output voxel where an axis is downsampled.

    Args:
        volume (`torch.Tensor` of shape `(depth, height, width)`): any real dtype.
        samplings (three `AxisSampling`, z y x): where to sample, in voxel indices.

    Returns:
        `torch.Tensor`: float32, of the samplings' counts.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.volume_transforms_t3d import resample, spacing_sampling

    >>> samplings = [spacing_sampling(size, 1.0, 2.0) for size in (8, 8, 6)]
    >>> resample(torch.zeros(8, 8, 6), samplings).shape
    torch.Size([4, 4, 3])

    ```
    """
    volume = volume.to(torch.float32)
    # The axis that shrinks most goes first: the others then work on less.
    order = sorted(range(3), key=lambda axis: samplings[axis].count / volume.shape[axis])
    # Under a caller's autocast the products would run in bfloat16, which is 4 HU at 1000 HU.
    with torch.autocast("cpu", enabled=False):
        for axis in order:
            volume = _resample_axis(volume, axis, samplings[axis])
    return volume


def deoblique(
    volume: torch.Tensor, affine: np.ndarray, spacing: Sequence[float], outside: float
) -> tuple[torch.Tensor, np.ndarray]:
    """Resamples a rotated or sheared volume onto a grid parallel to the world axes that holds all of it.

    Args:
        volume (`torch.Tensor` of shape `(depth, height, width)`): values.
        affine (`np.ndarray` of shape `(4, 4)`): (z, y, x) index to world (x, y, z) in mm.
        spacing (three floats, z y x, mm): of the new grid.
        outside (`float`): value where the volume has no data.

    Returns:
        The resampled volume (float32) and its affine.
    """
    corners = np.stack(np.meshgrid(*[(-0.5, size - 0.5) for size in volume.shape], indexing="ij"), -1).reshape(-1, 3)
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    step = np.asarray(spacing, dtype=np.float64)
    low, high = world.min(axis=0)[::-1], world.max(axis=0)[::-1]  # z, y, x
    counts = np.maximum(1, np.ceil((high - low) / step - 1e-3).astype(int))
    first = (low + high) / 2 - step * (counts - 1) / 2
    aligned = np.eye(4)
    aligned[:3, :3] = np.diag(step)[::-1]
    aligned[:3, 3] = first[::-1]
    to_source = np.linalg.inv(affine) @ aligned  # new (z, y, x) index -> old (z, y, x) index
    source = (volume.to(torch.float32) - outside)[None, None]
    # grid_sample wants (x, y, z) in [-1, 1], edges at the outer faces of the outermost voxels.
    scale = 2.0 / np.asarray(volume.shape, dtype=np.float64)
    matrix = (to_source[:3, :3] * scale[:, None])[::-1]
    shift = (to_source[:3, 3] * scale + scale / 2 - 1.0)[::-1]
    y, x = np.meshgrid(np.arange(counts[1]), np.arange(counts[2]), indexing="ij")
    plane = y[..., None] * matrix[:, 1] + x[..., None] * matrix[:, 2] + shift
    slices = []
    with torch.autocast("cpu", enabled=False):
        for z in range(counts[0]):
            grid = torch.from_numpy((plane + z * matrix[:, 0]).astype(np.float32))[None, None]
            slices.append(torch.nn.functional.grid_sample(source, grid, align_corners=False)[0, 0])
    return torch.cat(slices) + outside, aligned


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
    values = torch.empty(box.size) if out is None else out
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


def find_body(array: np.ndarray, spacing: Sequence[float], threshold: float) -> BodyMask | None:
    """The body: cells of about 6 mm whose mean exceeds `threshold`, opened, its largest components, filled.

    The opening parts thin things that touch the body (table, blanket) from it. Components of at least a quarter of
    the largest stay: two legs are one body. The box gets a margin of half a cell, so that skin is not cut.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): values.
        spacing (three floats, z y x): mm.
        threshold (`float`): in the array's unit; -500 for HU.

    Returns:
        `BodyMask`, or `None` when no cell exceeds the threshold.
    """
    cell = tuple(min(size, max(1, round(BODY_CELL / step))) for size, step in zip(array.shape, spacing, strict=True))
    means = array
    for axis in range(3):
        starts = np.arange(0, array.shape[axis], cell[axis])
        counts = np.diff(np.append(starts, array.shape[axis])).astype(np.float32)
        counts = counts.reshape([-1 if other == axis else 1 for other in range(3)])
        means = np.add.reduceat(means, starts, axis=axis, dtype=np.float32) / counts
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
        stop.append(min(array.shape[axis], (int(used[-1]) + 1) * cell[axis] + margin))
    return BodyMask(body, cell, Box(tuple(start), tuple(stop)), tuple(array.shape), tissue)


__all__ = [
    "AxisSampling",
    "BodyMask",
    "crop",
    "deoblique",
    "find_body",
    "label_components",
    "resample",
    "sampled_affine",
    "spacing_sampling",
    "whole_volume_mask",
]
