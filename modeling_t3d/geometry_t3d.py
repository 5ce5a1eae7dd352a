# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Affine, spacing and orientation arithmetic on grids of voxels, in numpy alone.

Files belong to `volume_io_t3d`, resampling to `volume_transforms_t3d`, where views lie to `tile_plan_t3d`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def factor_shear(affine: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
    """What a sheared grid is made of: `affine[:3, order] = rotation @ upper`.

    Returns:
        The array axes, those of the slice planes first: the pair that is nearest to a right angle and, of several,
        has the finest voxels. Unit vectors (3, 3) at right angles, in the same order. An upper triangle (3, 3):
        distances of the planes in mm, and the shear beside them.
    """
    directions, spacing = axis_directions(affine), spacing_from_affine(affine)
    cosines = {(i, j): abs(float(directions[:, i] @ directions[:, j])) for i, j in ((0, 1), (0, 2), (1, 2))}
    area = {(i, j): spacing[i] * spacing[j] for i, j in cosines}
    first, second = min(cosines, key=lambda pair: (max(cosines[pair], SHEAR_TOLERANCE), area[pair]))
    order = [first, second, 3 - first - second]
    rotation, upper = np.linalg.qr(np.asarray(affine, dtype=np.float64)[:3, order])
    signs = np.sign(np.diag(upper))
    return order, rotation * signs, upper * signs[:, None]


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
class Grid:
    """Where the voxels of an array lie, without their values.

    Args:
        shape: voxels per array axis.
        affine: (4, 4) float64, indices in the array's own axis order to RAS+ world (x, y, z) in mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class Volume:
    """One reconstruction: values with the affine that places them.

    Args:
        array: 3-D, in its own axis order, values after the header's rescale (HU for CT).
        affine: (4, 4) float64, indices of `array` in its own axis order to RAS+ world (x, y, z) in mm.
        modality: DICOM modality code such as `"CT"`, where a header said so.
        source: the path as the user gave it, for messages.
        warnings: what was noticed or changed while reading, in neutral words.
        stored_grid: the grid of the file or array as it came, where axes were reordered or voxels resampled since.

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
    stored_grid: Grid | None = None

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
    def input_grid(self) -> Grid:
        """The grid on which the voxels came, in the axis order and direction of the file or array."""
        return self.stored_grid or Grid(self.shape, self.affine)

    @property
    def axis_codes(self) -> str:
        """Anatomical letters towards which the array axes grow, such as `"LPS"`."""
        return axis_codes(self.affine)

    @property
    def is_sheared(self) -> bool:
        """Whether the array axes are not at right angles (gantry tilt)."""
        return shear(self.affine) > SHEAR_TOLERANCE

    def to_canonical(self, contiguous: bool = True, sheared: bool = False) -> "Volume":
        """The same voxels in (z, y, x) order growing towards superior, anterior and right.

        Axes are permuted and flipped as exact index operations; an oblique volume goes to the nearest axes and keeps
        its rotation in the affine. Raises `VolumeGeometryError` when exactly between two orientations, or sheared
        without `sheared=True`. With `contiguous=False` the voxels stay where they are: the array is a view of them.
        """
        if self.is_sheared and not sheared:
            raise VolumeGeometryError(
                "the volume's axes are not at right angles (sheared); pass it through to_volume first"
            )
        worlds, signs = orientation(self.affine)
        order = [worlds.index(world) for world in (2, 1, 0)]
        flipped = tuple(new for new, axis in enumerate(order) if signs[axis] < 0)
        array = np.flip(self.array.transpose(order), flipped)
        array = np.ascontiguousarray(array) if contiguous else array
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, order]
        for axis in flipped:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1.0
        return replace(self, array=array, affine=affine, stored_grid=self.input_grid)


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


__all__ = [
    "Box",
    "Grid",
    "Volume",
    "VolumeError",
    "VolumeGeometryError",
    "VolumeIntensityError",
    "VolumeReadError",
    "affine_from_axes",
    "axis_codes",
    "axis_directions",
    "body_box",
    "check_affine",
    "check_spacing",
    "crop_affine",
    "factor_shear",
    "orientation",
    "scale_affine",
    "shear",
    "spacing_from_affine",
]
