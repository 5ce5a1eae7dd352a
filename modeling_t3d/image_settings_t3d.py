# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The settings of the image processor: their types, their checks and their description in plain words.

What the settings do is in `image_processing_t3d`.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from numbers import Real
from typing import Any

import numpy as np
from transformers.processing_utils import ImagesKwargs

from .intensity_t3d import INTENSITIES

GLOBAL_FITS = ("body", "crop", "resize")
VIEW_SAMPLINGS = ("independent", "overlapping", "aligned")
# Fields that are one number: which it may be, for a check and in words. No comparison holds for NaN.
NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "global_crop_extent": (lambda extent: 0 < extent < math.inf, "a positive number of mm"),
    "num_local_views": (lambda number: _whole(number) is not None and number >= 0, "a whole number, 0 or more"),
    "view_overlap": (lambda share: 0 <= share <= 1, "a share from 0 to 1"),
    "view_jitter": (lambda move: 0 <= move < math.inf, "a number, 0 or more"),
    "grid_overlap": (lambda share: 0 <= share < 1, "a share from 0 to less than 1"),
}


class T3DImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict, unread by mypy
    """Fields of [`T3DImageProcessor`] and arguments of its call; see there."""

    spacing: list[float | int] | tuple[float | int, ...] | None
    global_size: list[int] | tuple[int, ...] | None
    local_size: list[int] | tuple[int, ...] | None
    global_fit: str | None
    global_crop_extent: float | int | None
    intensity: str | None
    check_intensity: bool | None
    windows: list[list[float | int]] | tuple[tuple[float | int, ...], ...] | list[tuple[float | int, ...]] | None
    num_local_views: int | None
    view_sampling: str | None
    view_overlap: float | int | None
    view_jitter: float | int | None
    grid_overlap: float | int | None
    antialias: bool | None
    deoblique: bool | None
    affine: Any
    volume_spacing: Any
    volume_axes: Any
    series: Any
    time_index: Any
    views: Any
    seed: int | None
    return_geometry: bool | None


# Arguments of a call, never saved.
CALL_ARGUMENTS = (
    *("affine", "volume_spacing", "volume_axes", "series", "time_index", "views", "seed", "return_geometry"),
    "return_tensors",
)
# Two-dimensional settings that Transformers' base class offers, and what takes their place here.
REPLACED_ARGUMENTS = {
    "size": "global_size",
    "crop_size": "local_size",
    "do_resize": "global_fit and spacing",
    "do_center_crop": 'global_fit="crop"',
    "do_pad": "global_size",
    "pad_size": "global_size",
    "resample": "nothing (it is trilinear; read_volume(path, resample=False) refuses tilted and sheared scans)",
    "do_convert_rgb": "windows",
    "input_data_format": "volume_axes",
}
LOADER_ARGUMENTS = ("image_processor_type", "processor_class", "auto_map", "feature_extractor_type")


def refuse_unknown(given: Iterable[str], known: Sequence[str], kind: str, owner: str = "T3DImageProcessor") -> None:
    """Raises for a name that is not a setting, with the nearest one that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{owner} has no {kind} {key!r}{hint}")


def checked_views(views: Any) -> Any:
    """What is asked of local views, NumPy's number of them as Python's; raises for what asks nothing."""
    if _holds_none(views):
        raise ValueError(
            f'views gives None for one image of several: give each a number, "grid" or points, got {views!r}'
        )
    views = int(views) if isinstance(views, np.integer) else views
    if isinstance(views, int | str):
        known = views == "grid" if isinstance(views, str) else views >= 1
    else:
        known = views is None or (isinstance(views, Sized) and len(views) > 0)
    if not known:
        raise ValueError(
            'views must be None, a positive number of random views, "grid", or points (x, y, z) in RAS mm, '
            f"got {views!r}"
        )
    return views


def _holds_none(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(entry is None for entry in value)


def _num_axes(value: Any) -> int:
    return 1 + _num_axes(value[0]) if isinstance(value, list | tuple) and value else np.ndim(value)


def has_axes(count: int) -> Callable[[Any], bool]:
    """What tells whether a value has that many axes: an array, or nested lists, of which the first items count alone.

    Lists whose items differ, which numpy makes no array of, have axes too.
    """
    return lambda value: _num_axes(value) == count


def per_image(
    value: Any, count: int, name: str, is_single: Callable[[Any], bool], images: str = "images"
) -> list[Any]:
    """One entry per image, from one value for all or a list of them, in which `None` stands for no value.

    Args:
        value: of the argument.
        count: of the images.
        name: of the argument, for messages.
        is_single: whether a value is one for all.
        images: what messages call the images.

    Raises:
        ValueError: the list has another length.

    Example:
        >>> per_image((3, 3, 3), 2, "spacing", has_axes(1))
        [(3, 3, 3), (3, 3, 3)]
        >>> per_image([None, (3, 3, 3)], 2, "spacing", has_axes(1))
        [None, (3, 3, 3)]
    """
    if value is None or (not _holds_none(value) and is_single(value)):
        return [value] * count
    entries = list(value)
    if len(entries) != count:
        raise ValueError(f"{name} has {len(entries)} entries for {count} {images}; give one each, or one for all")
    return entries


def _whole(value: Any) -> int | None:
    """A whole number as an int, also one that is written as a float; `None` for anything else."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return int(value) if is_number and value == int(value) else None


def _numbers(values: Any) -> tuple[float, ...]:
    """Several numbers as floats; nothing for anything else."""
    entries = tuple(values) if isinstance(values, Iterable) else ()
    are_numbers = all(isinstance(entry, Real) and not isinstance(entry, bool) for entry in entries)
    return tuple(map(float, entries)) if are_numbers else ()


def standardise(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Lists become tuples; every field is checked, here and nowhere else."""
    for key, replacement in REPLACED_ARGUMENTS.items():
        if kwargs.get(key) is not None:
            raise ValueError(f"{key!r} is a setting of 2-D image processors; use {replacement} instead")
    for key in ("global_size", "local_size"):
        given = kwargs[key]
        kwargs[key] = tuple(_whole(extent) or 0 for extent in _numbers(given))
        if len(kwargs[key]) != 3 or min(kwargs[key]) < 1:
            raise ValueError(f"{key} must be three positive whole numbers of voxels (z, y, x), got {given}")
    if kwargs["spacing"] is not None:
        given = kwargs["spacing"]
        kwargs["spacing"] = _numbers(given)
        if len(kwargs["spacing"]) != 3 or not all(0 < step < math.inf for step in kwargs["spacing"]):
            raise ValueError(f"spacing must be three positive mm (z, y, x) or None, got {given}")
    given = kwargs["windows"]
    kwargs["windows"] = tuple(_numbers(window) for window in given) if isinstance(given, Iterable) else ()
    if not kwargs["windows"] or not all(
        len(window) == 2 and -math.inf < window[0] < window[1] < math.inf for window in kwargs["windows"]
    ):
        raise ValueError(f"windows must be pairs (low, high) of finite numbers, low < high, got {given}")
    for key, (allows, wanted) in NUMBERS.items():
        value = kwargs[key]
        if isinstance(value, bool) or not isinstance(value, Real) or not allows(value):
            raise ValueError(f"{key} must be {wanted}, got {value!r}")
    kwargs["num_local_views"] = _whole(kwargs["num_local_views"])
    choices = {"global_fit": GLOBAL_FITS, "intensity": INTENSITIES, "view_sampling": VIEW_SAMPLINGS}
    for key, allowed in choices.items():
        if kwargs[key] not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {kwargs[key]!r}")
    _check_normalisation(kwargs)
    if "views" in kwargs:
        kwargs["views"] = checked_views(kwargs["views"])
    return kwargs


def _check_normalisation(kwargs: dict[str, Any]) -> None:
    """One finite number, or one per channel, of which deviations are above 0, and a finite factor."""
    num_channels = len(kwargs["windows"]) if kwargs["intensity"] == "hu" else 1
    for key in ("image_mean", "image_std"):
        value = kwargs.get(key)
        if value is None:
            if kwargs.get("do_normalize"):
                raise ValueError("do_normalize=True needs image_mean and image_std")
            continue
        kwargs[key] = tuple(value) if isinstance(value, list) else value
        numbers = (float(value),) if isinstance(value, Real) else _numbers(value)
        is_allowed = key == "image_mean" or min(numbers, default=0) > 0
        if len(numbers) not in (1, num_channels) or not is_allowed or not all(map(math.isfinite, numbers)):
            wanted = "finite numbers" if key == "image_mean" else "finite numbers above 0"
            raise ValueError(f"{key} must hold 1 or {num_channels} (one per channel) {wanted}, got {value!r}")
    factor = kwargs.get("rescale_factor")
    if factor is not None and not (isinstance(factor, Real) and math.isfinite(factor)):
        raise ValueError(f"rescale_factor must be a finite number, got {factor!r}")


def _describe_values(processor: Any) -> list[str]:
    """What the voxel values are, how they are scaled, and what volumes are refused."""
    windows = ", ".join(f"{low:g}..{high:g} HU" for low, high in processor.windows)
    values = {
        "hu": f"Hounsfield units after the header's rescale; one channel per window: {windows}, scaled to [-1, 1] and "
        "clipped",
        "unit": "0..1, scaled to [-1, 1]",
        "uint8": "0..255, scaled to [-1, 1]",
        "zscore": "any unit (MR): mean 0 and deviation 1 over the foreground of each volume, not clipped",
        "percentile": "any unit (MR): 0.5th to 99.5th percentile of each volume, scaled to [-1, 1] and clipped",
    }[processor.intensity]
    lines = [f"intensity     {values}"]
    if processor.intensity == "hu":
        lines.append("padding       a constant minimum below -1100 HU becomes -1024 HU")
        lines.append(
            "HU check      refused: a header that says other than CT, a range of 255 or less, no negative value, most "
            "soft tissue outside -150..150 HU, most air outside -1100..-900 HU, no body"
            if processor.check_intensity
            else "HU check      off: values are taken as HU unseen"
        )
        lines.append("outside       what lies beyond the scan is air, -1024 HU")
    else:
        outside = {"unit": "0", "uint8": "0", "zscore": "the volume's minimum", "percentile": "the 0.5th percentile"}
        declared = {"unit": ", values outside 0..1", "uint8": ", values outside 0..255"}.get(processor.intensity, "")
        lines.append(f"value check   refused: a constant volume{declared}")
        lines.append(f"outside       what lies beyond the scan is {outside[processor.intensity]}")
    if not processor.do_rescale:
        lines.append("rescale       off: values stay as they are")
    elif processor.rescale_factor != 1.0:
        lines.append(f"rescale       scaled values are multiplied by {processor.rescale_factor:g}")
    if processor.do_normalize:
        lines.append(f"normalise     minus {processor.image_mean}, divided by {processor.image_std}")
    return lines


def describe(processor: Any) -> str:
    """The whole volume contract of a `T3DImageProcessor` in plain words, one line per subject."""
    spacing = "the scan's own"
    if processor.spacing is not None:
        spacing = " x ".join(f"{step:g}" for step in processor.spacing) + " mm"
    oblique = "resampled to the world axes" if processor.deoblique else "keep their rotation (nearest axes)"
    averaged = "averaged over the new voxel when downsampling" if processor.antialias else "never averaged"
    fit = {
        "body": "the body's bounding box, scaled by one factor and padded with what lies outside",
        "crop": f"a {processor.global_crop_extent:g} mm cube around the body's centre",
        "resize": "the whole volume, stretched",
    }[processor.global_fit]
    sampling = {
        "independent": "each placed at random in the body",
        "overlapping": f"placed in pairs that share at least {processor.view_overlap:g} of their volume",
        # The body's box is 2 units wide, from -1 to 1.
        "aligned": "at the same places of the body in every volume, moved by at most "
        f"{processor.view_jitter / 2:g} of its box per axis",
    }[processor.view_sampling]
    sizes = [" x ".join(str(extent) for extent in size) for size in (processor.global_size, processor.local_size)]
    lines = [
        "reads         NIfTI, NRRD, MetaImage, DICOM files and folders; arrays, tensors and images of other libraries "
        "with their affine",
        "axes          (z, y, x), growing towards superior, anterior, right; orientation from the affine alone",
        f"obliques      {oblique}; exactly 45 degrees is refused",
        "tilt, shear   resampled to right angles by the one interpolation; uneven slices to even ones, or refused "
        "with their positions",
        *_describe_values(processor),
        f"model grid    {spacing} (z y x), trilinear, {averaged}",
        f"global view   {sizes[0]} voxels: {fit}",
        f"local views   {sizes[1]} voxels on the uncropped model grid; {processor.num_local_views} per volume in "
        f"training, {sampling}",
        f'tiles         views="grid" covers all, neighbours share at least {processor.grid_overlap:g} of their length',
        f"tensors       float32, {processor.num_channels} channel(s); positions are centre in [-1, 1] and extent as a "
        "fraction, both of the body's box",
    ]
    return "\n".join(lines)


__all__ = [
    "CALL_ARGUMENTS",
    "LOADER_ARGUMENTS",
    "T3DImageProcessorKwargs",
    "checked_views",
    "describe",
    "has_axes",
    "per_image",
    "refuse_unknown",
    "standardise",
]
