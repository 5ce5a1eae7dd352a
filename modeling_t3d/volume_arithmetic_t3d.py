# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What readers do to voxels in memory: apply a header's rescale and bring a sheared grid to right angles.

Which numbers apply is decided by the readers; orientation is left to `Volume.to_canonical`.
"""

import math
from dataclasses import replace

import numpy as np

from .geometry_t3d import Volume, check_spacing, factor_shear, shear


def rescale(stored: np.ndarray, slope: float, intercept: float, *, overwrite: bool = False) -> np.ndarray:
    """Stored numbers to values: int16 (or int32) where nothing is lost by it, else float32; never float64.

    Args:
        stored: any shape, integer or floating point.
        slope: factor of the header.
        intercept: what the header adds after it.
        overwrite: whether the values may take the memory of the stored numbers, where their size is the same.

    Example:
        >>> rescale(np.array([0, 4095], dtype=np.uint16), 1.0, -1024.0)
        array([-1024,  3071], dtype=int16)
    """
    stored = np.asarray(stored)  # a plain array, where a reader hands out a memory map
    if stored.dtype.kind in "iub" and float(slope).is_integer() and float(intercept).is_integer():
        factor, offset = int(slope), int(intercept)
        lowest, highest = int(stored.min()), int(stored.max())
        bounds = (lowest, highest, lowest * factor + offset, highest * factor + offset, factor, offset)
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= min(bounds) and max(bounds) <= np.iinfo(dtype).max:
                if overwrite and stored.dtype.itemsize == np.dtype(dtype).itemsize and stored.dtype.isnative:
                    values = stored.view(dtype)  # both bounds fit, so the bits are those of the signed type
                else:
                    values = stored.astype(dtype)  # always a copy: never the memory map of a file
                # Integer arithmetic wraps: a product outside the type comes back when the offset brings it inside.
                if factor != 1:
                    np.multiply(values, factor, out=values)
                if offset != 0:
                    np.add(values, offset, out=values)
                return values
    with np.errstate(over="ignore", invalid="ignore"):
        values = stored.astype(np.float32, copy=not overwrite)
        if slope != 1:
            np.multiply(values, np.float32(slope), out=values)
        if intercept != 0:
            np.add(values, np.float32(intercept), out=values)
    return values


def widened(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An array that is filled part by part, copied to a type that also holds the rescaled `values` of the next part.

    Example:
        >>> widened(np.zeros(2, dtype=np.int16), np.zeros(1, dtype=np.int32)).dtype
        dtype('int32')
    """
    if values.dtype == array.dtype:
        return array
    # Every part may differ from an array that is wide enough: it is copied once.
    return array.astype("float32" if "f" in (values.dtype.kind, array.dtype.kind) else "int32", copy=False)


def _shift_lines(
    array: np.ndarray, along: int, by: int, voxels: float, fill: float, whole: bool
) -> tuple[np.ndarray, float]:
    """Move the lines along one axis by `voxels` per index of axis `by`, linearly interpolated, or by the nearest
    `whole` number of voxels; also the new start."""
    moved = np.moveaxis(array, (by, along), (0, 2))
    shifts = voxels * np.arange(moved.shape[0])
    first = math.floor(min(0.0, shifts[-1]))
    size = math.ceil(max(0.0, shifts[-1])) - first + moved.shape[2]
    result = np.full((*moved.shape[:2], size), fill, dtype=array.dtype)
    for plane, target, shift in zip(moved, result, np.floor(shifts + 0.5) if whole else shifts, strict=True):
        start = math.floor(shift)
        weight = np.float32(shift - start)
        position = start - first
        if weight == 0.0:
            target[:, position : position + plane.shape[1]] = plane
            continue
        padded = np.pad(plane.astype(np.float32), ((0, 0), (1, 1)), constant_values=fill)
        mixed = padded[:, 1:] * (1.0 - weight) + padded[:, :-1] * weight
        target[:, position : position + mixed.shape[1]] = mixed if array.dtype.kind == "f" else np.rint(mixed)
    return np.moveaxis(result, (0, 2), (by, along)), float(first)


def shear_note(affine: np.ndarray) -> str:
    """What `warnings` says of a sheared grid that was brought to right angles."""
    return f"axes {math.degrees(math.asin(min(1.0, shear(affine)))):.1f} degrees off a right angle: resampled"


def remove_shear(volume: Volume, *, labels: bool = False) -> Volume:
    """Resample a sheared volume (gantry tilt) to a right-angled grid; a right-angled volume is returned as it is.

    The two axes nearest to a right angle (the slice planes) stay, and each slice is moved within its own plane by
    linear interpolation, so nothing is interpolated between slices. New voxels outside the slices take the volume's
    minimum. The voxel size across slices becomes their perpendicular distance.

    Args:
        volume: any axis order.
        labels: whether the values are labels, whose mean is another label: each voxel keeps the nearest one, and new
            voxels are background (0).
    """
    if not volume.is_sheared:
        return volume
    order, rotation, upper = factor_shear(volume.affine)
    sizes = np.diag(upper)
    check_spacing(sizes.tolist())
    array, origin = volume.array, volume.affine[:3, 3].copy()
    fill = 0 if labels else array.min().item()
    for row, column in ((0, 1), (0, 2), (1, 2)):
        voxels = upper[row, column] / sizes[row]
        if abs(voxels) > 1e-6:
            array, start = _shift_lines(array, order[row], order[column], voxels, fill, labels)
            origin += rotation[:, row] * sizes[row] * start
    affine = np.eye(4)
    affine[:3, order] = rotation * sizes
    affine[:3, 3] = origin
    return replace(
        volume,
        array=np.ascontiguousarray(array),
        affine=affine,
        warnings=(*volume.warnings, shear_note(volume.affine)),
        stored_grid=volume.input_grid,
    )


__all__ = ["remove_shear", "rescale", "shear_note", "widened"]
