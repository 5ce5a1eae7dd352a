# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Plans that say where local views lie on a volume, as plain boxes of voxels; no voxel value is read.

Cutting the views is left to `image_processing_t3d`, putting what a model says about them together to
`reassembly_t3d`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .geometry_t3d import Box, VolumeGeometryError


def _box_around(center: Sequence[float], size: Sequence[int], shape: Sequence[int]) -> Box:
    """The view of `size` nearest to `center` that stays inside the volume (centred where the volume is smaller)."""
    starts = []
    for middle, length, extent in zip(center, size, shape, strict=True):
        start = math.floor(middle - length / 2 + 0.5)
        starts.append(min(max(start, 0), extent - length) if extent >= length else -((length - extent) // 2))
    return Box(tuple(starts), tuple(start + length for start, length in zip(starts, size, strict=True)))


def grid_plan(shape: Sequence[int], size: Sequence[int], overlap: float = 0.0) -> tuple[Box, ...]:
    """Tiles that cover a whole volume, in z, y, x order, spread evenly so that the last one ends at the border.

    Args:
        shape: voxels (D, H, W) of the uncropped volume.
        size: voxels (d, h, w) of one tile; an axis where the volume is smaller gets one centred tile that sticks out.
        overlap: least fraction of a tile's length shared with the next one, 0 <= overlap < 1.

    Example:
        >>> [tile.start[0] for tile in grid_plan((100, 8, 8), (40, 8, 8))]
        [0, 30, 60]
    """
    if not 0.0 <= overlap < 1.0:
        raise VolumeGeometryError(f"overlap is {overlap}; it must be at least 0 and below 1")
    axes = []
    for extent, length in zip(shape, size, strict=True):
        if extent <= length:
            axes.append([-((length - extent) // 2)])
            continue
        stride = max(1, math.floor(length * (1.0 - overlap)))
        gaps = math.ceil((extent - length) / stride)
        # Whole-number arithmetic: no rounding rule decides where a tile lies, and the last start is extent - length.
        axes.append([(2 * index * (extent - length) + gaps) // (2 * gaps) for index in range(gaps + 1)])
    return tuple(
        Box(start, tuple(s + length for s, length in zip(start, size, strict=True)))
        for start in itertools.product(*axes)
    )


class VoxelMask(Protocol):
    """A (D, H, W) boolean array, or what is indexed by a voxel and turned into an array as one."""

    def __getitem__(self, voxel: Any, /) -> Any: ...

    def __array__(self) -> np.ndarray: ...


def _random_center(box: Box, mask: VoxelMask | None, generator: np.random.Generator) -> tuple[float, ...]:
    if mask is None:
        return tuple(s + float(u) * n for s, u, n in zip(box.start, generator.random(3), box.size, strict=True))
    for _ in range(64):  # a body fills half of its box or more: a miss 64 times in a row means a very odd mask
        voxel = tuple(int(v) for v in generator.integers(box.start, box.stop))
        if mask[voxel]:
            return tuple(v + 0.5 for v in voxel)
    inside = np.argwhere(mask)
    return tuple(float(v) + 0.5 for v in inside[generator.integers(len(inside))])


def independent_plan(
    shape: Sequence[int],
    size: Sequence[int],
    num_views: int,
    box: Box,
    generator: np.random.Generator,
    mask: VoxelMask | None = None,
) -> tuple[Box, ...]:
    """Random views whose centres are uniform inside the body, moved inwards where they would leave the volume.

    Args:
        shape: voxels (D, H, W) of the volume.
        size: voxels (d, h, w) of one view.
        num_views: how many.
        box: the body box; centres are drawn inside it.
        generator: source of randomness.
        mask: (D, H, W) body mask; when given, centres are body voxels.
    """
    return tuple(_box_around(_random_center(box, mask, generator), size, shape) for _ in range(num_views))


def overlapping_plan(
    shape: Sequence[int],
    size: Sequence[int],
    num_views: int,
    box: Box,
    generator: np.random.Generator,
    mask: VoxelMask | None = None,
    *,
    minimum_overlap: float = 0.25,
) -> tuple[Box, ...]:
    """Random views of which every two share at least `minimum_overlap` of their volume.

    All lie within a window around one random centre; moving a view back inside the volume only brings them closer.
    The other arguments are those of `independent_plan`.
    """
    if not 0.0 <= minimum_overlap <= 1.0:
        raise VolumeGeometryError(f"minimum_overlap is {minimum_overlap}; it must lie in 0..1")
    anchor = _box_around(_random_center(box, mask, generator), size, shape).center
    reach = [math.floor(length * (1.0 - minimum_overlap ** (1 / 3)) / 2 + 1e-9) for length in size]
    offsets = generator.integers(np.negative(reach), reach, size=(num_views, 3), endpoint=True)
    return tuple(
        _box_around([middle + int(step) for middle, step in zip(anchor, offset, strict=True)], size, shape)
        for offset in offsets
    )


def aligned_positions(num_views: int, generator: np.random.Generator) -> np.ndarray:
    """Normalised centres (num_views, 3) float64 in (z, y, x), [-1, 1] of the body box, to share over a whole batch.

    In the axial plane they lie within the ellipse that touches the box, because a trunk fills its box like one.
    """
    heights = generator.uniform(-1.0, 1.0, num_views)
    radii, angles = np.sqrt(generator.random(num_views)), generator.uniform(0.0, 2.0 * np.pi, num_views)
    return np.stack([heights, radii * np.sin(angles), radii * np.cos(angles)], axis=1)


def aligned_plan(
    shape: Sequence[int],
    size: Sequence[int],
    positions: np.ndarray,
    box: Box,
    generator: np.random.Generator,
    *,
    jitter: float = 0.05,
) -> tuple[Box, ...]:
    """Views at given normalised positions of the body box, each moved by up to `jitter` (same unit) per axis.

    With the same `positions` (from `aligned_positions`) for every volume of a batch, anatomical place cannot tell the
    volumes apart. The other arguments are those of `independent_plan`.
    """
    moved = np.clip(positions + generator.uniform(-jitter, jitter, np.shape(positions)), -1.0, 1.0)
    centers = np.asarray(box.center) + moved * np.asarray(box.size) / 2.0
    return tuple(_box_around(center.tolist(), size, shape) for center in centers)


def normalised_positions(views: Sequence[Box], box: Box) -> np.ndarray:
    """Where views lie: (S, 6) float32, centre (z, y, x) in [-1, 1] of the body box, then extent as a fraction of it.

    Tiles of a grid over the uncropped volume may lie outside [-1, 1], beside the body.

    Example:
        >>> normalised_positions([Box((0, 0, 0), (2, 4, 4))], Box((0, 0, 0), (4, 4, 4))).tolist()
        [[-0.5, 0.0, 0.0, 0.5, 1.0, 1.0]]
    """
    middle, size = np.asarray(box.center), np.asarray(box.size, dtype=np.float64)
    rows = [np.concatenate([(np.asarray(view.center) - middle) * 2.0 / size, view.size / size]) for view in views]
    return np.asarray(rows, dtype=np.float32).reshape(-1, 6)


__all__ = [
    "aligned_plan",
    "aligned_positions",
    "grid_plan",
    "independent_plan",
    "normalised_positions",
    "overlapping_plan",
]
