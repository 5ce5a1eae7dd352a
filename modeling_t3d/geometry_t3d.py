# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Affine, spacing and orientation arithmetic and the plans that say where views lie, in numpy alone.

Files belong to `volume_io_t3d`, resampling and intensities to `volume_transforms_t3d`; nothing here opens a file.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

# Bounds of a believable voxel size. The lower one admits electron microscopy (4 nm = 4e-6 mm), the upper one is wider
# than any slice distance of a clinical scan.
MINIMUM_SPACING = 1e-6
MAXIMUM_SPACING = 50.0
MAXIMUM_SPACING_RATIO = 200.0
# Cosine between two array axes above which a grid counts as sheared: 0.06 degrees, half a millimetre over 500 mm.
SHEAR_TOLERANCE = 1e-3
# How much better (in summed cosines) the nearest axis assignment must be than the runner-up.
ORIENTATION_TOLERANCE = 1e-4
# Voxel sizes are rounded (by at most 8e-6 of their value) to a grid that holds every k/512 and every four-digit
# decimal, so that the usual values (0.7, 0.78125, 1.25) are not moved and float noise of 1e-7 is removed.
SPACING_STEPS = 64_000

AXIS_LETTERS = ("LR", "PA", "IS")  # negative, positive direction of world x, y, z


class VolumeError(ValueError):
    """Base of every error about a volume; the message names the item and the remedy in one line."""


class VolumeGeometryError(VolumeError):
    """The affine, spacing or shape of a volume cannot be right or cannot be handled."""


class VolumeIntensityError(VolumeError):
    """The values of a volume are not what the caller declared (not HU, NaN)."""


class VolumeReadError(VolumeError):
    """A file or folder cannot be read right; the message begins with the path as the user gave it."""


def _round_spacing(value: float) -> float:
    scale = 10.0 ** -math.floor(math.log10(value))
    return round(value * scale * SPACING_STEPS) / (SPACING_STEPS * scale)


def spacing_from_affine(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size per array axis in mm, free of float noise.

    The squares of a column are summed in sorted order and the root is rounded (relative step 1.6e-5), so that every
    permutation and flip of one volume gives identical numbers.

    Args:
        affine: (4, 4), array indices to RAS+ world mm.

    Example:
        >>> spacing_from_affine(np.diag([-0.7, 0.7, 2.5, 1.0]))
        (0.7, 0.7, 2.5)
    """
    squares = np.sort(np.square(np.asarray(affine, dtype=np.float64)[:3, :3]), axis=0)
    lengths = [math.sqrt((float(a) + float(b)) + float(c)) for a, b, c in squares.T]
    first, second, third = (_round_spacing(length) if length > 0 else 0.0 for length in lengths)
    return first, second, third


def check_affine(affine: np.ndarray) -> np.ndarray:
    """Return `affine` as a (4, 4) float64 array, or raise `VolumeGeometryError` when it cannot describe a scan."""
    try:
        matrix = np.array(affine, dtype=np.float64)
    except (TypeError, ValueError):
        raise VolumeGeometryError("the affine is not a numeric matrix; pass a (4, 4) array in mm") from None
    if matrix.shape != (4, 4):
        raise VolumeGeometryError(f"the affine has shape {matrix.shape}; pass a (4, 4) matrix")
    if not np.isfinite(matrix).all():
        raise VolumeGeometryError("the affine holds NaN or infinite entries; mend the header or pass affine=")
    if not np.array_equal(matrix[3], (0.0, 0.0, 0.0, 1.0)):
        raise VolumeGeometryError(f"the last row of the affine is {matrix[3].tolist()}; it must be [0, 0, 0, 1]")
    check_spacing(np.sqrt(np.square(matrix[:3, :3]).sum(axis=0)).tolist())
    if abs(np.linalg.det(axis_directions(matrix))) < 0.1:
        raise VolumeGeometryError("the affine is singular: its axes (nearly) lie in one plane; mend the header")
    return matrix + 0.0  # turns -0.0 into 0.0


def check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """Return three believable voxel sizes in mm as floats, or raise `VolumeGeometryError`."""
    try:
        values = tuple(float(value) for value in spacing)
    except (TypeError, ValueError):
        raise VolumeGeometryError(f"spacing {spacing!r} is not three numbers in mm") from None
    if len(values) != 3:
        raise VolumeGeometryError(f"spacing has {len(values)} entries; three voxel sizes in mm are needed")
    shown = ", ".join(f"{value:g}" for value in values)
    if not all(math.isfinite(value) and MINIMUM_SPACING <= value <= MAXIMUM_SPACING for value in values):
        raise VolumeGeometryError(
            f"spacing ({shown}) mm is not believable: each must lie in {MINIMUM_SPACING:g}..{MAXIMUM_SPACING:g} mm; "
            "mend the header or pass the right affine or spacing"
        )
    if max(values) > MAXIMUM_SPACING_RATIO * min(values):
        raise VolumeGeometryError(
            f"spacing ({shown}) mm is not believable: one axis is over {MAXIMUM_SPACING_RATIO:g} times another; "
            "mend the header or pass the right affine or spacing"
        )
    return values


def axis_directions(affine: np.ndarray) -> np.ndarray:
    """Unit vectors (columns, in world x, y, z) along which the array indices grow."""
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    squares = np.sort(np.square(linear), axis=0)
    return linear / np.sqrt((squares[0] + squares[1]) + squares[2])


def shear(affine: np.ndarray) -> float:
    """Largest |cosine| between two array axes; 0 for a right-angled grid."""
    directions = axis_directions(affine)
    return max(abs(float(directions[:, i] @ directions[:, j])) for i, j in ((0, 1), (0, 2), (1, 2)))


def orientation(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nearest world axis (0, 1, 2 = x, y, z) and sign (+1, -1) of each array axis.

    Raises:
        VolumeGeometryError: two assignments are equally near, as at exactly 45 degrees.
    """
    directions = axis_directions(affine)
    scores = sorted(
        ((sum(abs(float(directions[world, axis])) for axis, world in enumerate(order)), order))
        for order in itertools.permutations(range(3))
    )
    (runner_up, _), (best, order) = scores[-2:]
    if best - runner_up < ORIENTATION_TOLERANCE:
        raise VolumeGeometryError(
            "the orientation is ambiguous: the axes lie 45 degrees between two anatomical directions; "
            "resample the volume to an upright grid first"
        )
    signs = tuple(1 if directions[world, axis] > 0 else -1 for axis, world in enumerate(order))
    return order, signs


def axis_codes(affine: np.ndarray) -> str:
    """Anatomical letters towards which the array axes grow, such as `"LPS"` (nibabel's convention).

    Example:
        >>> axis_codes(np.diag([-1.0, -1.0, 2.0, 1.0]))
        'LPS'
    """
    order, signs = orientation(affine)
    return "".join(AXIS_LETTERS[world][sign > 0] for world, sign in zip(order, signs, strict=True))


def affine_from_axes(spacing: Sequence[float], axes: str) -> np.ndarray:
    """Affine of an array without header, its first voxel at the world origin.

    Args:
        spacing: voxel size in mm per array axis, in the array's own order.
        axes: three letters, the anatomical direction in which each array axis grows: `"SAR"` is this package's tensor
            order (z, y, x); DICOM slices stacked upwards are `"SPL"`.

    Example:
        >>> affine_from_axes((2.0, 0.7, 0.7), "SAR")[2].tolist()
        [2.0, 0.0, 0.0, 0.0]
    """
    sizes = check_spacing(spacing)
    letters = axes.upper() if isinstance(axes, str) else ""
    worlds = [next((w for w, pair in enumerate(AXIS_LETTERS) if letter in pair), -1) for letter in letters]
    if sorted(worlds) != [0, 1, 2]:
        raise VolumeGeometryError(
            f"axes={axes!r} is not an axis order; give one letter per array axis from L/R, P/A, I/S for the direction "
            'in which it grows, e.g. axes="SAR" for an array in (z, y, x) order'
        )
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    for axis, (world, size) in enumerate(zip(worlds, sizes, strict=True)):
        affine[world, axis] = size if letters[axis] in "RAS" else -size
    return affine


def crop_affine(affine: np.ndarray, start: Sequence[int]) -> np.ndarray:
    """Affine of the sub-array that begins at voxel `start` (negative when padded), in the array's own axis order."""
    result = np.array(affine, dtype=np.float64)
    result[:3, 3] += result[:3, :3] @ np.asarray(start, dtype=np.float64)
    return result


def scale_affine(affine: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """Affine of a grid whose voxels are `factors` times as large, sharing the outer *edge* of the first voxel.

    Voxel k of the new grid covers the old edge coordinates [k * factor, (k + 1) * factor): cell-aligned resampling.
    """
    result = np.array(affine, dtype=np.float64)
    scale = np.asarray(factors, dtype=np.float64)
    result[:3, 3] += result[:3, :3] @ ((scale - 1.0) / 2.0)
    result[:3, :3] *= scale
    return result


@dataclass(frozen=True, eq=False)
class Volume:
    """One reconstruction: values with the affine that places them.

    Args:
        array: 3-D, in its own axis order, values after the header's rescale (HU for CT).
        affine: (4, 4) float64, indices of `array` in its own axis order to RAS+ world (x, y, z) in mm.
        modality: DICOM modality code such as `"CT"`, where a header said so.
        source: the path as the user gave it, for messages.
        warnings: what was noticed or changed while reading, in neutral words.

    Example:
        >>> volume = Volume(np.zeros((4, 5, 6), dtype=np.int16), np.diag([-1.0, -1.0, 2.0, 1.0]))
        >>> volume.axis_codes, volume.to_canonical().array.shape
        ('LPS', (6, 5, 4))
    """

    array: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    source: str | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.array, np.ndarray):
            raise VolumeGeometryError(f"a volume needs a numpy array, not {type(self.array).__name__}; use to_volume")
        if self.array.ndim != 3:
            raise VolumeGeometryError(f"a volume has 3 axes, this array has shape {self.array.shape}; pass one volume")
        if min(self.array.shape) == 0:
            raise VolumeGeometryError(f"a volume needs voxels, this array has shape {self.array.shape}")
        object.__setattr__(self, "affine", check_affine(self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels per array axis."""
        return self.array.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm per array axis."""
        return spacing_from_affine(self.affine)

    @property
    def axis_codes(self) -> str:
        """Anatomical letters towards which the array axes grow, such as `"LPS"`."""
        return axis_codes(self.affine)

    @property
    def is_sheared(self) -> bool:
        """Whether the array axes are not at right angles (gantry tilt)."""
        return shear(self.affine) > SHEAR_TOLERANCE

    def to_canonical(self) -> "Volume":
        """The same voxels in (z, y, x) order growing towards superior, anterior and right.

        Axes are permuted and flipped as exact index operations; an oblique volume goes to the nearest axes and keeps
        its rotation in the affine. Raises `VolumeGeometryError` when sheared or exactly between two orientations.
        """
        if self.is_sheared:
            raise VolumeGeometryError(
                "the volume's axes are not at right angles (sheared); pass it through to_volume first"
            )
        worlds, signs = orientation(self.affine)
        order = [worlds.index(world) for world in (2, 1, 0)]
        flipped = tuple(new for new, axis in enumerate(order) if signs[axis] < 0)
        array = np.ascontiguousarray(np.flip(self.array.transpose(order), flipped))
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, order]
        for axis in flipped:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1.0
        return replace(self, array=array, affine=affine)


@dataclass(frozen=True)
class Box:
    """A block of voxels `start <= index < stop` in (z, y, x); the start is negative where it sticks out (padding).

    Example:
        >>> Box((0, 0, 0), (4, 6, 8)).center
        (2.0, 3.0, 4.0)
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels per axis."""
        (z, y, x), (end_z, end_y, end_x) = self.start, self.stop
        return end_z - z, end_y - y, end_x - x

    @property
    def center(self) -> tuple[float, float, float]:
        """Centre in edge coordinates: voxel k covers [k, k + 1)."""
        (z, y, x), (end_z, end_y, end_x) = self.start, self.stop
        return (z + end_z) / 2, (y + end_y) / 2, (x + end_x) / 2


def body_box(mask: np.ndarray) -> Box:
    """Smallest box that holds every true voxel of a (D, H, W) body mask."""
    spans = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if inside.size == 0:
            raise VolumeIntensityError(
                "no body was found in the volume: no voxel is denser than air; check its values"
            )
        spans.append((int(inside[0]), int(inside[-1]) + 1))
    return Box(tuple(start for start, _ in spans), tuple(stop for _, stop in spans))


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
    "Box",
    "Volume",
    "VolumeError",
    "VolumeGeometryError",
    "VolumeIntensityError",
    "VolumeReadError",
    "affine_from_axes",
    "aligned_plan",
    "aligned_positions",
    "axis_codes",
    "axis_directions",
    "body_box",
    "check_affine",
    "check_spacing",
    "crop_affine",
    "grid_plan",
    "independent_plan",
    "normalised_positions",
    "orientation",
    "overlapping_plan",
    "scale_affine",
    "shear",
    "spacing_from_affine",
]
