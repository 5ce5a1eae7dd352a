# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Slices with places in space to one grid: their order, their affine, and what is done where their steps are uneven.

Which slices belong together, and their pixels, are left to `volume_dicom_t3d`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Slices are one orientation while their direction cosines agree to this (0.06 degrees).
DIRECTION_TOLERANCE = 1e-3
# A slice that is missing is interpolated from its neighbours only where the gap is no wider than clinical slices are
# thick (mm), and where such gaps are rare: at most this share of the steps, never two in a row.
MAXIMUM_GAP = 5.0
MAXIMUM_GAP_SHARE = 0.1


class Refused(Exception):
    """Why a header or a series cannot be used, in words that quote no header text."""


@dataclass(frozen=True)
class Slice:
    """One frame: where its pixels are and where it lies (LPS world, mm); None where the header does not say."""

    file: int
    frame: int
    position: Any
    row_direction: Any
    column_direction: Any
    pixel_spacing: Any
    size: tuple[int, int]
    slope: float
    intercept: float
    thickness: float
    time: float = 0.0  # ordinal of its time point

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the slice."""
        return np.cross(self.row_direction, self.column_direction)

    @property
    def plane(self) -> str:
        """The anatomical plane nearest to the slice."""
        return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(self.normal)))]


@dataclass(frozen=True)
class Stack:
    """Slices in order of position on one grid.

    Args:
        slices: lowest along their normal first.
        affine: (4, 4), (slice, row, column) indices of the grid to RAS+ world mm.
        places: where each slice lies on the grid, in steps; None where the slices are the grid.
        notes: what was noticed, in neutral words.
    """

    slices: list[Slice]
    affine: np.ndarray
    places: np.ndarray | None
    notes: tuple[str, ...]


def _shown(positions: Sequence[float], around: int) -> str:
    """Up to eight positions in mm around an index."""
    first = max(0, min(around - 3, len(positions) - 8))
    part = [f"{value:.2f}" for value in positions[first : first + 8]]
    return ("... " if first else "") + ", ".join(part) + (" ..." if first + 8 < len(positions) else "") + " mm"


def _check_alike(slices: Sequence[Slice], heights: Sequence[float]) -> None:
    first = slices[0]
    for entry, height in zip(slices, heights, strict=True):
        cosines = np.concatenate([entry.row_direction - first.row_direction, entry.normal - first.normal])
        if np.abs(cosines).max() > DIRECTION_TOLERANCE:
            planes = sorted({one.plane for one in slices})
            turned = " + ".join(planes) if len(planes) > 1 else f"{planes[0]}, turned at {height:.2f} mm"
            raise Refused(f"its slices have mixed orientations ({turned}); keep one orientation per series")
        if entry.size != first.size or not np.allclose(entry.pixel_spacing, first.pixel_spacing, rtol=1e-3):
            raise Refused(f"the slice at {height:.2f} mm has another size or pixel spacing than the first one")


def stack_slices(slices: Sequence[Slice], *, resample: bool = True) -> Stack:
    """Order slices by position and place them on a grid.

    Args:
        slices: one series, in any order.
        resample: whether uneven steps may be evened out; False refuses them.

    Raises:
        Refused: the slices are not one right grid; the message gives the positions.
    """
    for name in ("position", "row_direction", "pixel_spacing"):
        missing = sum(getattr(entry, name) is None for entry in slices)
        if missing:
            keyword = {"position": "ImagePositionPatient", "row_direction": "ImageOrientationPatient"}
            raise Refused(f"{missing} of {len(slices)} slices have no {keyword.get(name, 'PixelSpacing')}")
    heights = [float(entry.position @ slices[0].normal) for entry in slices]
    _check_alike(slices, heights)
    order = sorted(range(len(slices)), key=heights.__getitem__)
    slices, heights = [slices[index] for index in order], [heights[index] for index in order]
    first = slices[0]
    places = None
    notes: tuple[str, ...] = ()
    if len(slices) == 1:
        if first.thickness <= 0:
            raise Refused("it holds one slice without a thickness, so its extent is unknown; pass the whole series")
        step = first.normal * first.thickness
        notes = ("one slice: there is no step between positions, its depth is the thickness of the slice",)
    else:
        places = _places(heights, resample)
        positions = np.stack([entry.position for entry in slices])
        count = len(slices) - 1 if places is None else round(places[-1])
        step = (positions[-1] - positions[0]) / count
        _check_line(positions, heights, np.arange(len(slices)) if places is None else places, step)
        if places is not None:
            steps = np.diff(heights)
            notes = (
                f"uneven slices ({steps.min():.2f} to {steps.max():.2f} mm apart): interpolated linearly to "
                f"{count + 1} slices {(heights[-1] - heights[0]) / count:.2f} mm apart",
            )
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = first.column_direction * first.pixel_spacing[0]
    affine[:3, 2] = first.row_direction * first.pixel_spacing[1]
    affine[:3, 3] = first.position
    return Stack(slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, places, notes)  # LPS to RAS


def _places(heights: Sequence[float], resample: bool) -> np.ndarray | None:
    """Places of uneven slices on an even grid between the outermost two, in steps of it; None for even slices."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    # Headers round positions: 5 % of the step or 0.05 mm is let through, a missing slice never is.
    tolerance = min(max(0.05 * usual, 0.05), 0.3 * usual)
    if steps.min() < 1e-3:
        around = int(np.argmin(steps))
        raise Refused(
            f"two or more slices lie at {heights[around]:.2f} mm (positions: {_shown(heights, around)}): several "
            "phases or copies in one series; keep one slice per position"
        )
    around = int(np.argmax(np.abs(steps - usual)))
    if abs(steps[around] - usual) <= tolerance:
        return None
    doubled = np.abs(steps - 2 * usual) <= tolerance
    rare = doubled.mean() <= MAXIMUM_GAP_SHARE and not (doubled[1:] & doubled[:-1]).any()
    if steps[doubled].max(initial=0.0) > MAXIMUM_GAP or not rare:
        doubled[:] = False
    regular = ((steps >= 0.5 * usual - tolerance) & (steps <= 1.5 * usual)) | doubled
    if not (resample and regular.all()):
        missing = steps[around] > 1.5 * usual
        remedy = "complete the series" + (
            " or resample it to even slices" if resample else ", or read it with resample=True"
        )
        raise Refused(
            f"{'a slice is missing' if missing else 'the slice spacing varies'}: the step from {heights[around]:.2f} "
            f"to {heights[around + 1]:.2f} mm is {steps[around]:.2f} mm where {usual:.2f} mm is usual (positions: "
            f"{_shown(heights, around)}); {remedy}"
        )
    extent = heights[-1] - heights[0]
    return (np.asarray(heights) - heights[0]) * (max(1, round(extent / usual)) / extent)


def _check_line(positions: np.ndarray, heights: Sequence[float], places: np.ndarray, step: np.ndarray) -> None:
    drift = np.abs(positions - positions[0] - places[:, None] * step).max(axis=1)
    if drift.max() > max(0.25 * float(np.median(np.diff(heights))), 0.1):
        around = int(np.argmax(drift))
        raise Refused(
            f"its slices do not lie on one line: the one at {heights[around]:.2f} mm is {drift[around]:.2f} "
            f"mm beside it (positions: {_shown(heights, around)})"
        )


def even_out(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Linear interpolation of slices at `places` (steps of the grid, ascending from 0) to the whole steps.

    Args:
        array: (slices, rows, columns).
        places: (slices,).

    Returns:
        (round(places[-1]) + 1, rows, columns), of the array's type.

    Example:
        >>> even_out(np.array([0, 10, 40]).reshape(3, 1, 1), np.array([0.0, 1.0, 3.0])).ravel()
        array([ 0, 10, 25, 40])
    """
    result = np.empty((round(places[-1]) + 1, *array.shape[1:]), dtype=array.dtype)
    for index in range(len(result)):
        upper = min(max(1, int(np.searchsorted(places, index))), len(places) - 1)
        share = float((index - places[upper - 1]) / (places[upper] - places[upper - 1]))
        # Rounding may leave the last step a hair beyond the last slice.
        weight = np.float32(min(max(share, 0.0), 1.0))
        mixed = array[upper - 1] * (1 - weight) + array[upper] * weight
        result[index] = mixed if array.dtype.kind == "f" else np.rint(mixed)
    return result


__all__ = ["Refused", "Slice", "Stack", "even_out", "stack_slices"]
