# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What voxel values mean: the tests that a volume is in Hounsfield units, other declared ranges, and windows.

It stands beside `volume_transforms_t3d`, which moves voxels without asking what they mean.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .geometry_t3d import VolumeIntensityError

AIR = -1024.0  # HU of air and of everything outside the scan
PADDING_BELOW = -1100.0  # HU; a constant minimum below this is padding that the scanner wrote, not a measurement
PADDING_SHARE = 1e-4  # a minimum shared by fewer voxels than this is a measurement (resampling undershoot)
GAS_BELOW = -500.0  # HU; splits air and lung from tissue, bone and contrast
TISSUE_MODES = (-150.0, 150.0)  # HU; where the most frequent tissue value of a body may lie (fat to enhanced organs)
AIR_MODES = (-1100.0, -900.0)  # HU
INTENSITIES = ("hu", "unit", "uint8", "zscore", "percentile")


def _minimum_above(array: np.ndarray, value: float) -> float:
    """The lowest voxel above `value`; infinity when there is none."""
    maximum = array.max()
    return float(np.min(array, where=array > value, initial=maximum)) if maximum > value else math.inf


def padding_values(array: np.ndarray) -> list[float]:
    """Constant minima below -1100 HU, lowest first: values outside the reconstructed circle, not measurements.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): HU.
    """
    found: list[float] = []
    minimum = float(array.min())
    while minimum < PADDING_BELOW and np.count_nonzero(array == minimum) >= PADDING_SHARE * array.size:
        found.append(minimum)
        minimum = _minimum_above(array, minimum)
    return found


def check_modality(modality: str | None, name: str) -> None:
    """Raises when the header says that a volume declared `"hu"` comes from another machine than a CT scanner."""
    if modality not in (None, "CT"):
        raise VolumeIntensityError(
            f"{name}: its header says {modality}, where intensity='hu' expects CT; declare what the values are with "
            "intensity='percentile' or 'zscore' (check_intensity=False if they are HU after all)"
        )


def check_finite(array: np.ndarray, name: str) -> None:
    """Raises when a volume is empty, or holds NaN or infinite values."""
    if array.size == 0:
        raise VolumeIntensityError(f"{name}: the volume has no voxels (shape {array.shape})")
    # The sum of the extremes is finite exactly when every voxel is: minimum and maximum propagate NaN.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(float(array.min()) + float(array.max()))
    if not finite:
        count = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise VolumeIntensityError(
            f"{name}: {count} of {array.size} voxels are NaN or infinite; "
            f"replace them, for example by {AIR:.0f} HU (air)"
        )


def _sample(array: np.ndarray, limit: int = 1_000_000) -> np.ndarray:
    """At most about `limit` voxels on a regular sub-grid: statistics need no more."""
    step = max(1, math.ceil((array.size / limit) ** (1 / 3)))
    return np.asarray(array[::step, ::step, ::step], dtype=np.float32).ravel()


def _mode(values: np.ndarray) -> float:
    """The most frequent value, from a histogram of 10-HU bins smoothed over three of them."""
    bins = np.floor(values / 10.0).astype(np.int64)
    lowest = bins.min()
    counts = np.bincount(bins - lowest)
    smoothed = np.convolve(counts, [1, 1, 1], mode="same")
    return float((int(smoothed.argmax()) + lowest) * 10.0 + 5.0)


def check_hounsfield(array: np.ndarray, name: str) -> list[float]:
    """Refuses a volume whose values cannot be Hounsfield units.

    Scanner padding (see `padding_values`) is left out of every test. The *gas* voxels (below -500 HU) are tested
    only when they make up at least 1 % of the volume; a mode inside the lung is accepted as long as 5 % of the gas
    lies within -1100..-900, as it does in the airways of a scan cropped to the chest.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): values to test.
        name (`str`): what the message calls the volume.

    Returns:
        `list[float]`: the padding values, to be replaced by -1024 HU.
    """
    remedy = (
        "apply the header's slope and intercept exactly once, or declare what the values are with "
        "intensity='unit', 'uint8', 'zscore' or 'percentile' (check_intensity=False if they are HU after all)"
    )
    padding = padding_values(array)
    highest_padding = padding[-1] if padding else -math.inf
    minimum = _minimum_above(array, highest_padding)
    maximum = float(array.max())
    if maximum - minimum <= 255 or math.isinf(minimum):
        raise VolumeIntensityError(
            f"{name}: not HU, the values span only {min(minimum, maximum):g}..{maximum:g}, 255 or less; {remedy}"
        )
    if minimum >= 0:
        raise VolumeIntensityError(
            f"{name}: not HU, no value is negative ({minimum:g}..{maximum:g}) though air is -1000 HU; {remedy}"
        )
    values = _sample(array)
    values = values[values > highest_padding]
    tissue = values[values > GAS_BELOW]
    if tissue.size < 1e-3 * values.size or tissue.size == 0:
        raise VolumeIntensityError(
            f"{name}: no body in the volume, {values.size - tissue.size} of {values.size} sampled voxels lie below "
            f"{GAS_BELOW:.0f} HU; check that the right series was given, and if so {remedy}"
        )
    mode = _mode(tissue)
    if not TISSUE_MODES[0] <= mode <= TISSUE_MODES[1]:
        raise VolumeIntensityError(
            f"{name}: not HU, the most frequent soft-tissue value is {mode:g} instead of -150..150; {remedy}"
        )
    gas = values[values <= GAS_BELOW]
    if gas.size >= 0.01 * values.size:
        mode = _mode(gas)
        in_range = np.count_nonzero((gas >= AIR_MODES[0]) & (gas <= AIR_MODES[1]))
        if not AIR_MODES[0] <= mode <= AIR_MODES[1] and in_range < 0.05 * gas.size:
            raise VolumeIntensityError(
                f"{name}: not HU, the most frequent air value is {mode:g} instead of -1100..-900; {remedy}"
            )
    return padding


def check_declared_range(array: np.ndarray, intensity: str, name: str) -> None:
    """Refuses a volume declared `"unit"` (0..1) or `"uint8"` (0..255) with values beyond, and a constant volume."""
    minimum, maximum = float(array.min()), float(array.max())
    upper = {"unit": 1.0, "uint8": 255.0}.get(intensity)
    if upper is not None and (minimum < -1e-3 * upper or maximum > 1.001 * upper):
        raise VolumeIntensityError(
            f"{name}: intensity={intensity!r} means 0..{upper:g}, but the values span {minimum:g}..{maximum:g}; "
            "rescale them, or use intensity='percentile' or 'zscore'"
        )
    if minimum == maximum:
        raise VolumeIntensityError(f"{name}: every voxel is {minimum:g}; there is no image in this volume")


def value_range(array: np.ndarray, intensity: str) -> tuple[float, float]:
    """The values that become -1 and 1 under a declared intensity other than `"hu"`.

    `"zscore"` gives mean -+ standard deviation of the voxels above a tenth of the way from the 0.5th to the 99.5th
    percentile (the background of an MR scan would dominate both), `"percentile"` these two percentiles.
    """
    if intensity == "unit":
        return 0.0, 1.0
    if intensity == "uint8":
        return 0.0, 255.0
    values = _sample(array)
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
    if high <= low:
        low, high = float(array.min()), float(array.max())
    if intensity == "percentile":
        return low, high
    foreground = values[values > low + 0.1 * (high - low)]
    mean, deviation = float(foreground.mean()), max(float(foreground.std()), 1e-6 * (high - low))
    return mean - deviation, mean + deviation


def apply_windows(
    values: torch.Tensor, windows: Sequence[Sequence[float]], clip: bool = True, out: torch.Tensor | None = None
) -> torch.Tensor:
    """One channel per window: its lower end becomes -1, its upper end 1; `clip` holds the rest within.

    Args:
        values (`torch.Tensor` of shape `(depth, height, width)`): float32.
        windows (pairs of floats): lower and upper end, in the values' unit.
        out (`torch.Tensor` of the result's shape, *optional*): takes the result; its last channel may be `values`.

    Returns:
        `torch.Tensor` of shape `(channels, depth, height, width)`.
    """
    channels = torch.empty((len(windows), *values.shape), dtype=torch.float32) if out is None else out
    for channel, (low, high) in zip(channels, windows, strict=True):
        if clip:
            torch.clamp(values, low, high, out=channel)
        else:
            channel.copy_(values)
        channel.sub_((low + high) / 2).mul_(2 / (high - low))
    return channels


__all__ = [
    "AIR",
    "GAS_BELOW",
    "INTENSITIES",
    "apply_windows",
    "check_declared_range",
    "check_finite",
    "check_hounsfield",
    "check_modality",
    "padding_values",
    "value_range",
]
