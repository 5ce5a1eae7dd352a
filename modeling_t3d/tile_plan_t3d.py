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


def _axis_starts(extent: int, length: int, overlap: float) -> list[int]:
    """First voxels of the tiles along one axis, spread evenly so that the last tile ends at the border."""
    if extent <= length:
        return [-((length - extent) // 2)]
    stride = max(1, math.floor(length * (1.0 - overlap)))
    gaps = math.ceil((extent - length) / stride)
    # Whole-number arithmetic: no rounding rule decides where a tile lies, and the last start is extent - length.
    return [(2 * index * (extent - length) + gaps) // (2 * gaps) for index in range(gaps + 1)]


def _tiles_with_content(
    starts: Sequence[Sequence[int]], size: Sequence[int], cells: np.ndarray, cell: Sequence[int]
) -> np.ndarray:
    """Which tiles touch a true cell or a neighbour of one: (tiles_z, tiles_y, tiles_x) bool, axis by axis."""
    found = cells
    for axis in range(3):
        # One more cell on each side: the skin in a cell that is mostly air is not lost.
        spans = [
            slice(max(0, start // cell[axis] - 1), (start + size[axis] - 1) // cell[axis] + 2)
            for start in starts[axis]
        ]
        lines = np.moveaxis(found, axis, 0)
        found = np.moveaxis(np.stack([lines[span].any(axis=0) for span in spans]), 0, axis)
    return found


def grid_plan(
    shape: Sequence[int],
    size: Sequence[int],
    overlap: float = 0.0,
    cells: np.ndarray | None = None,
    cell: Sequence[int] = (1, 1, 1),
) -> tuple[Box, ...]:
    """Tiles that cover a whole volume, in z, y, x order, spread evenly so that the last one ends at the border.

    Args:
        shape: voxels (D, H, W) of the uncropped volume.
        size: voxels (d, h, w) of one tile; an axis where the volume is smaller gets one centred tile that sticks out.
        overlap: least fraction of a tile's length shared with the next one, 0 <= overlap < 1.
        cells: boolean blocks of the volume that hold more than air; tiles that touch none of them, nor a neighbour of
            one, are left out. The others stay where they are.
        cell: voxels (z, y, x) per block.

    Example:
        >>> [tile.start[0] for tile in grid_plan((100, 8, 8), (40, 8, 8))]
        [0, 30, 60]
        >>> low_end = np.arange(10).reshape(10, 1, 1) < 1
        >>> [tile.start[0] for tile in grid_plan((100, 8, 8), (40, 8, 8), cells=low_end, cell=(10, 8, 8))]
        [0]
    """
    if not 0.0 <= overlap < 1.0:
        raise VolumeGeometryError(f"overlap is {overlap}; it must be at least 0 and below 1")
    starts = [_axis_starts(extent, length, overlap) for extent, length in zip(shape, size, strict=True)]
    tiles = (
        Box(start, tuple(s + length for s, length in zip(start, size, strict=True)))
        for start in itertools.product(*starts)
    )
    if cells is None:
        return tuple(tiles)
    return tuple(itertools.compress(tiles, _tiles_with_content(starts, size, cells, cell).ravel()))


def point_plan(
    shape: Sequence[int], size: Sequence[int], points: Any, affine: np.ndarray, name: str = "the volume"
) -> tuple[Box, ...]:
    """Views around given places in the world, moved inwards where they would leave the volume.

    Args:
        shape: voxels (D, H, W) of the volume.
        size: voxels (d, h, w) of one view.
        points: (N, 3), x, y, z in RAS mm, as nibabel gives world coordinates.
        affine: (4, 4), (z, y, x) voxel index to RAS+ world (x, y, z) in mm.
        name: what the error calls the volume.

    Raises:
        VolumeGeometryError: a point is no three finite numbers or lies outside the volume; the message has its index.

    Example:
        >>> affine = np.array([[0, 0, 1.0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]])
        >>> point_plan((40, 30, 30), (7, 7, 7), [(12.0, 13.0, 40.0)], affine)
        (Box(start=(17, 10, 9), stop=(24, 17, 16)),)
    """
    to_voxels = np.linalg.inv(affine)
    corners = np.array(list(itertools.product(*[(-0.5, extent - 0.5) for extent in shape])))
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    boxes = []
    for index, point in enumerate(points):
        try:
            place = np.array(point, dtype=np.float64).reshape(3)
        except (TypeError, ValueError):
            raise VolumeGeometryError(f"{name}: point {index} of views is not (x, y, z) in mm: {point!r}") from None
        center = to_voxels[:3, :3] @ place + to_voxels[:3, 3] + 0.5  # edges: voxel k covers [k, k + 1)
        if not (np.isfinite(place).all() and (center > -1e-6).all() and (center < np.add(shape, 1e-6)).all()):
            spans = ", ".join(
                f"{axis} {low:.1f}..{high:.1f}"
                for axis, low, high in zip("xyz", world.min(axis=0), world.max(axis=0), strict=True)
            )
            shown = ", ".join(f"{value:g}" for value in place)
            raise VolumeGeometryError(
                f"{name}: point {index} of views, ({shown}), lies outside the volume, which spans {spans} mm; "
                "points are world coordinates (x, y, z) in RAS mm, x growing towards the right"
            )
        boxes.append(_box_around(center.tolist(), size, shape))
    return tuple(boxes)


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
    "point_plan",
]
