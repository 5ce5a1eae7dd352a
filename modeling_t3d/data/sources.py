# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a row of a manifest gives to read: a path, or a Volume where the file does not say all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry_t3d import Volume
from ..volume_io_t3d import read_acquisition, to_volume, wrap_volume
from .builders.rad_chestct import read_rad_chestct
from .manifest import ManifestRow


def open_source(path: str | Path, rescale: tuple[float, float] | None = None) -> Path | Volume:
    """
    The source of a volume, as `prepare` takes it.

    Args:
        path (`str` or `Path`): file or DICOM folder; an `.npz` file is one of RAD-ChestCT.
        rescale (two floats, *optional*):
            Slope and intercept that the file's header lacks; used after the header's own.

    Returns:
        `Path` for a file that speaks for itself, so that it is decoded where it is resampled; else a [`Volume`].
    """
    path = Path(path)
    is_array = _is_array(path)
    if rescale is None:
        return read_rad_chestct(path) if is_array else path
    # Sheared grids stay so: the one interpolation is the image processor's.
    volume = read_rad_chestct(path) if is_array else wrap_volume(path)
    return apply_rescale(volume, rescale)


def _is_array(path: Path) -> bool:
    """Whether a file is one of RAD-ChestCT, which has no header."""
    return path.suffix == ".npz"


def read_row(row: ManifestRow) -> Volume:
    """
    The volume of a row as it is stored, with the row's rescale; a sheared grid is resampled to right angles.

    Args:
        row ([`ManifestRow`]): its `volume` is a file or DICOM folder.
    """
    return to_volume(open_source(row.volume, row.rescale))


def read_row_acquisition(row: ManifestRow) -> dict[str, Any]:
    """What the file of a row says of its acquisition, as [`~modeling_t3d.volume_io_t3d.read_acquisition`] gives it."""
    return {} if _is_array(row.volume) else read_acquisition(row.volume)


def apply_rescale(volume: Volume, rescale: tuple[float, float]) -> Volume:
    """
    Multiply a volume's values by a slope and add an intercept, both from outside its file.

    Whole numbers stay whole where slope and intercept are, so that HU are exact.
    """
    slope, intercept = rescale
    whole = volume.array.dtype.kind in "iu" and slope == int(slope) and intercept == int(intercept)
    array = volume.array.astype(np.int32 if whole else np.float32)
    np.multiply(array, np.asarray(slope, array.dtype), out=array)
    np.add(array, np.asarray(intercept, array.dtype), out=array)
    note = f"rescaled by {slope:g} and {intercept:g}, which the manifest names"
    return replace(volume, array=array, warnings=(*volume.warnings, note))


__all__ = ["apply_rescale", "open_source", "read_row", "read_row_acquisition"]
