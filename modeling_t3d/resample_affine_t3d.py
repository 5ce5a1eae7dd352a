# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""From a rotated or sheared grid to a right-angled one of another spacing, in one interpolation.

Grids that are neither go the much faster way of `resample_t3d`, axis by axis.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .geometry_t3d import check_spacing, factor_shear, spacing_from_affine
from .resample_t3d import SMALL, Planes
from .threads_t3d import run_single_threaded

BLOCK = (8, 64, 64)  # samples interpolated together: their source voxels, as float32, stay in the cache
# Up to this many source voxels per step one point is enough: the box would be narrower than half a voxel, less than
# the interpolation averages anyway, and each further point costs as much as the first.
LARGEST_SINGLE_STEP = 1.1
# How far outside the outermost voxel's faces a sample may lie by rounding, in voxels.
FACE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class AffineSampling:
    """A right-angled grid whose samples lie anywhere in a source: sample i is at source index `start + matrix @ i`.

    Args:
        matrix (`np.ndarray` of shape `(3, 3)`): source voxels per step, a column per axis of the new grid.
        start (`np.ndarray` of shape `(3,)`): source index of the first sample.
        shape (three ints, z y x): samples.
        steps (three floats): how many source voxels one step along each axis of the new grid passes.
        affine (`np.ndarray` of shape `(4, 4)`): sample indices (z, y, x) to RAS+ world (x, y, z) in mm.
    """

    matrix: np.ndarray
    start: np.ndarray
    shape: tuple[int, int, int]
    steps: tuple[float, float, float]
    affine: np.ndarray


def right_angles(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The right-angled grid nearest to a sheared one: unit vectors (columns) and voxel sizes in mm, per array axis."""
    order, rotation, upper = factor_shear(affine)
    directions, sizes = np.empty((3, 3)), np.empty(3)
    directions[:, order], sizes[order] = rotation, np.diag(upper)
    return directions, np.asarray(check_spacing(spacing_from_affine(directions * sizes)))


def affine_sampling(
    shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float] | None, upright: bool
) -> AffineSampling:
    """A grid that holds all of a source in the canonical axis order, centred on it.

    Nothing but the affine's last column depends on the origin.

    Args:
        shape (three ints, z y x): of the source.
        affine (`np.ndarray` of shape `(4, 4)`): (z, y, x) index of the source to RAS+ world (x, y, z) in mm.
        spacing (three floats, z y x, mm, or `None`): of the new grid; `None` keeps the distances of the source's
            planes.
        upright (`bool`): whether the new axes are those of the world; else they are the source's, at right angles.
    """
    directions, sizes = right_angles(affine)
    step = sizes if spacing is None else np.asarray(spacing, dtype=np.float64)
    new_directions = np.eye(3)[:, ::-1] if upright else directions
    linear, center = affine[:3, :3], (np.asarray(shape) - 1) / 2
    half = np.abs(new_directions.T @ linear) @ (np.asarray(shape) / 2)  # half the extent, in mm along the new axes
    counts = np.maximum(1, np.ceil(2 * half / step - 1e-3).astype(int))
    middle = (counts - 1) / 2
    matrix = np.linalg.solve(linear, new_directions * step)
    new_affine = np.eye(4)
    new_affine[:3, :3] = new_directions * step
    new_affine[:3, 3] = affine[:3, 3] + linear @ center - new_affine[:3, :3] @ middle
    # In voxels of the grid without its shear: slices that were moved within their planes are no closer for it.
    steps = np.linalg.norm((directions.T @ new_directions * step) / sizes[:, None], axis=0)
    return AffineSampling(
        matrix,
        center - matrix @ middle,
        (int(counts[0]), int(counts[1]), int(counts[2])),
        (float(steps[0]), float(steps[1]), float(steps[2])),
        new_affine,
    )


def sample_offsets(step: float) -> np.ndarray:
    """Where along one axis a sample is taken, in steps of the new grid: at its place alone, or averaged over several.

    As in `resample_t3d`, the average is over a box `sqrt(step^2 - 1)` source voxels wide. The points stand for it:
    evenly spaced, at most a source voxel apart, with the box's variance.

    Example:

    ```python
    >>> sample_offsets(1.0), sample_offsets(2.0)
    (array([0.]), array([-0.25,  0.25]))

    ```
    """
    if step <= LARGEST_SINGLE_STEP:
        return np.zeros(1)
    count = max(2, math.ceil(step))
    apart = math.sqrt((step * step - 1.0) / (count * count - 1.0)) / step
    return apart * (np.arange(count) - (count - 1) / 2)


def resample_affine(
    array: np.ndarray | Planes,
    sampling: AffineSampling,
    outside: float,
    deliver: Callable[[int, torch.Tensor], None],
    antialias: bool = True,
) -> None:
    """Trilinear interpolation between source voxels; within half a voxel of the border the outermost one is repeated.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): any real type and any memory order; only small boxes
            are copied at a time.
        sampling ([`AffineSampling`]): where to sample.
        outside (`float`): value beyond the outermost voxels' faces.
        deliver (`Callable`): called with index and values (float32, height x width) of each plane, which it may
            change; from several threads at once, for different planes.
        antialias (`bool`, defaults to `True`): average over several points where a step passes more than one voxel.
    """
    offsets = [sample_offsets(step if antialias else 1.0) for step in sampling.steps]
    shifts = np.stack(np.meshgrid(*offsets, indexing="ij"), -1).reshape(-1, 3) @ sampling.matrix.T
    depth, height, width = sampling.shape

    def task(slabs: Sequence[int]) -> None:
        with torch.autocast("cpu", enabled=False):
            for z in slabs:
                values = torch.empty(min(BLOCK[0], depth - z), height, width)
                for y, x in itertools.product(range(0, height, BLOCK[1]), range(0, width, BLOCK[2])):
                    part = values[:, y : y + BLOCK[1], x : x + BLOCK[2]]
                    _sample_block(array, sampling, (z, y, x), shifts, outside, part)
                for index, plane in enumerate(values, start=z):
                    deliver(index, plane)

    slabs = range(0, depth, BLOCK[0])
    if depth * height * width < SMALL:
        task(slabs)
        return
    num_runs = min(len(slabs), torch.get_num_threads())
    run_single_threaded([partial(task, slabs[first::num_runs]) for first in range(num_runs)])


def _sample_block(
    array: np.ndarray | Planes,
    sampling: AffineSampling,
    first: tuple[int, int, int],
    shifts: np.ndarray,
    outside: float,
    out: torch.Tensor,
) -> None:
    """Fills `out` with the samples from index `first` on, each the mean over `shifts` (source voxels)."""
    start = sampling.start + sampling.matrix @ np.asarray(first, dtype=np.float64)
    limits = np.asarray(array.shape)
    # The box of source voxels around the block's corners.
    reach = sampling.matrix * (np.asarray(out.shape) - 1)
    low = start + np.minimum(reach, 0).sum(axis=1) + shifts.min(axis=0)
    high = start + np.maximum(reach, 0).sum(axis=1) + shifts.max(axis=0)
    if (high < -0.5 - FACE_TOLERANCE).any() or (low > limits - 0.5 + FACE_TOLERANCE).any():
        out.fill_(outside)
        return
    begin = np.clip(np.floor(low).astype(int) - 1, 0, limits - 1)
    end = np.clip(np.ceil(high).astype(int) + 2, begin + 1, limits)
    box = array[begin[0] : end[0], begin[1] : end[1], begin[2] : end[2]]
    source = torch.from_numpy(np.ascontiguousarray(box, dtype=np.float32))[None, None]
    sticks_out = (low < -0.5).any() or (high > limits - 0.5).any()
    # Source index of each sample, in the box: a sum of what each of the three axes of the block contributes.
    along = [torch.arange(size, dtype=torch.float64)[:, None] for size in out.shape]
    columns = [(count * torch.from_numpy(sampling.matrix[:, axis].copy())).float() for axis, count in enumerate(along)]
    turned = columns[0][:, None, None] + columns[1][:, None] + columns[2]
    scale = torch.from_numpy(2.0 / (end - begin)).float()
    out.zero_()
    for shift in shifts:
        place = turned + torch.from_numpy(start + shift - begin).float()
        # grid_sample wants (x, y, z) in [-1, 1] between the outer faces of the box.
        grid = (place * scale + (scale / 2 - 1)).flip(-1)
        values = torch.nn.functional.grid_sample(source, grid[None], padding_mode="border", align_corners=False)[0, 0]
        if sticks_out:
            lowest = torch.from_numpy(-0.5 - FACE_TOLERANCE - begin).float()
            highest = torch.from_numpy(limits - 0.5 + FACE_TOLERANCE - begin).float()
            inside = ((place >= lowest) & (place <= highest)).all(dim=-1)
            values = torch.where(inside, values, outside)
        out.add_(values)
    if len(shifts) > 1:
        out.div_(len(shifts))


__all__ = ["AffineSampling", "affine_sampling", "resample_affine", "right_angles", "sample_offsets"]
