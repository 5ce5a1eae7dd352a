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
from .volume_memory_t3d import empty_voxels

AIR = -1024.0  # HU of air and of everything outside the scan
PADDING_BELOW = -1100.0  # HU; a constant minimum below this is padding that the scanner wrote, not a measurement
PADDING_SHARE = 1e-4  # a minimum shared by fewer voxels than this is a measurement (resampling undershoot)
GAS_BELOW = -500.0  # HU; splits air and lung from tissue, bone and contrast
TISSUE_MODES = (-150.0, 150.0)  # HU; where the most frequent tissue value of a body may lie (fat to enhanced organs)
AIR_MODES = (-1100.0, -900.0)  # HU
SAMPLE_SIZE = 1_000_000  # voxels; statistics need no more
INTENSITIES = ("hu", "unit", "uint8", "zscore", "percentile")


class ValueSurvey:
    """What the checks need to know of a volume's values, gathered block by block in any order.

    Args:
        shape (three ints): of the volume.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.size = math.prod(shape)
        # Statistics use at most about a million voxels, on a regular sub-grid.
        self.step = max(1, math.ceil((self.size / SAMPLE_SIZE) ** (1 / 3)))
        self.minimum, self.maximum = math.inf, -math.inf
        self.num_not_finite = 0
        self._floor = math.inf  # the lowest value that is no candidate for padding
        self._low: dict[float, int] = {}  # the lowest values below PADDING_BELOW and how many voxels have each
        self._sample: dict[int, np.ndarray] = {}

    def count(self, block: np.ndarray) -> None:
        """Takes the values of a block (any shape) into account."""
        low, high = block.min(), block.max()
        if not np.isfinite(float(low) + float(high)):  # minimum and maximum propagate NaN
            finite = np.isfinite(block)
            self.num_not_finite += int(block.size - np.count_nonzero(finite))
            block = block[finite]
            if block.size == 0:
                return
            low, high = block.min(), block.max()
        self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
        if low >= PADDING_BELOW:
            self._floor = min(self._floor, float(low))
            return
        below = block < PADDING_BELOW
        num_below = int(np.count_nonzero(below))
        num_lowest = int(np.count_nonzero(block == low))
        if num_lowest == num_below:  # the usual case: one padding value
            self._low[float(low)] = self._low.get(float(low), 0) + num_below
        else:
            for value, number in zip(*np.unique(block[below], return_counts=True), strict=True):
                self._low[float(value)] = self._low.get(float(value), 0) + int(number)
        if len(self._low) > 1000:  # more are never looked at
            self._low = dict(sorted(self._low.items())[:100])
        if num_below < block.size:
            above = block[~below] if block.dtype.kind == "f" else np.where(below, high, block)
            self._floor = min(self._floor, float(above.min()))

    def sample_plane(self, z: int, plane: np.ndarray) -> None:
        """Keeps what belongs to the sample of plane `z` (height x width)."""
        if z % self.step == 0:
            self._sample[z] = np.asarray(plane[:: self.step, :: self.step], dtype=np.float32)

    @property
    def sample(self) -> np.ndarray:
        """Every `step`-th voxel along each axis, float32, in the order of the planes."""
        return np.concatenate([self._sample[z].ravel() for z in sorted(self._sample)])

    def padding(self) -> list[float]:
        """Constant minima below -1100 HU, lowest first: values outside the reconstructed circle, not measurements."""
        found = []
        for value, number in sorted(self._low.items()):
            if number < PADDING_SHARE * self.size:
                break
            found.append(value)
        return found

    def minimum_above(self, value: float) -> float:
        """The lowest voxel above `value`; infinity when there is none."""
        return min((low for low in (*self._low, self._floor) if low > value), default=math.inf)


def survey_values(array: np.ndarray) -> ValueSurvey:
    """The survey of a whole array (depth, height, width), read in the order in which it lies in memory."""
    survey = ValueSurvey(array.shape)
    if array.size:
        slowest = int(np.argmax(np.abs(array.strides)))
        for block in np.moveaxis(array, slowest, 0):
            survey.count(block)
        for z in range(0, array.shape[0], survey.step):
            survey.sample_plane(z, array[z])
    return survey


def _surveyed(values: np.ndarray | ValueSurvey) -> ValueSurvey:
    return values if isinstance(values, ValueSurvey) else survey_values(values)


def padding_values(array: np.ndarray) -> list[float]:
    """`ValueSurvey.padding` of an array (depth, height, width) in HU."""
    return survey_values(array).padding()


def check_modality(modality: str | None, name: str) -> None:
    """Raises when the header says that a volume declared `"hu"` comes from another machine than a CT scanner."""
    if modality not in (None, "CT"):
        raise VolumeIntensityError(
            f"{name}: its header says {modality}, where intensity='hu' expects CT; declare what the values are with "
            "intensity='percentile' or 'zscore' (check_intensity=False if they are HU after all)"
        )


def check_finite(values: np.ndarray | ValueSurvey, name: str) -> None:
    """Raises when a volume is empty, or holds NaN or infinite values."""
    survey = _surveyed(values)
    if survey.size == 0:
        raise VolumeIntensityError(f"{name}: the volume has no voxels (shape {survey.shape})")
    if survey.num_not_finite:
        raise VolumeIntensityError(
            f"{name}: {survey.num_not_finite} of {survey.size} voxels are NaN or infinite; "
            f"replace them, for example by {AIR:.0f} HU (air)"
        )


def _mode(values: np.ndarray) -> float:
    """The most frequent value, from a histogram of 10-HU bins smoothed over three of them."""
    bins = np.floor(values / 10.0).astype(np.int64)
    lowest = bins.min()
    counts = np.bincount(bins - lowest)
    smoothed = np.convolve(counts, [1, 1, 1], mode="same")
    return float((int(smoothed.argmax()) + lowest) * 10.0 + 5.0)


def check_hounsfield(values: np.ndarray | ValueSurvey, name: str) -> list[float]:
    """Refuses a volume whose values cannot be Hounsfield units.

    Scanner padding (see `ValueSurvey.padding`) is left out of every test. The *gas* voxels (below -500 HU) are tested
    only when they make up at least 1 % of the volume; a mode inside the lung is accepted as long as 5 % of the gas
    lies within -1100..-900, as it does in the airways of a scan cropped to the chest.

    Args:
        values (`np.ndarray` of shape `(depth, height, width)`, or its `ValueSurvey`): to test.
        name (`str`): what the message calls the volume.

    Returns:
        `list[float]`: the padding values, to be replaced by -1024 HU.
    """
    remedy = (
        "apply the header's slope and intercept exactly once, or declare what the values are with "
        "intensity='unit', 'uint8', 'zscore' or 'percentile' (check_intensity=False if they are HU after all)"
    )
    survey = _surveyed(values)
    padding = survey.padding()
    highest_padding = padding[-1] if padding else -math.inf
    minimum, maximum = survey.minimum_above(highest_padding), survey.maximum
    if maximum - minimum <= 255 or math.isinf(minimum):
        raise VolumeIntensityError(
            f"{name}: not HU, the values span only {min(minimum, maximum):g}..{maximum:g}, 255 or less; {remedy}"
        )
    if minimum >= 0:
        raise VolumeIntensityError(
            f"{name}: not HU, no value is negative ({minimum:g}..{maximum:g}) though air is -1000 HU; {remedy}"
        )
    sample = survey.sample
    sample = sample[sample > highest_padding]
    tissue = sample[sample > GAS_BELOW]
    if tissue.size < 1e-3 * sample.size or tissue.size == 0:
        raise VolumeIntensityError(
            f"{name}: no body in the volume, {sample.size - tissue.size} of {sample.size} sampled voxels lie below "
            f"{GAS_BELOW:.0f} HU; check that the right series was given, and if so {remedy}"
        )
    mode = _mode(tissue)
    if not TISSUE_MODES[0] <= mode <= TISSUE_MODES[1]:
        raise VolumeIntensityError(
            f"{name}: not HU, the most frequent soft-tissue value is {mode:g} instead of -150..150; {remedy}"
        )
    gas = sample[sample <= GAS_BELOW]
    if gas.size >= 0.01 * sample.size:
        mode = _mode(gas)
        in_range = np.count_nonzero((gas >= AIR_MODES[0]) & (gas <= AIR_MODES[1]))
        if not AIR_MODES[0] <= mode <= AIR_MODES[1] and in_range < 0.05 * gas.size:
            raise VolumeIntensityError(
                f"{name}: not HU, the most frequent air value is {mode:g} instead of -1100..-900; {remedy}"
            )
    return padding


def check_declared_range(values: np.ndarray | ValueSurvey, intensity: str, name: str) -> None:
    """Refuses a volume declared `"unit"` (0..1) or `"uint8"` (0..255) with values beyond, and a constant volume."""
    survey = _surveyed(values)
    minimum, maximum = survey.minimum, survey.maximum
    upper = {"unit": 1.0, "uint8": 255.0}.get(intensity)
    if upper is not None and (minimum < -1e-3 * upper or maximum > 1.001 * upper):
        raise VolumeIntensityError(
            f"{name}: intensity={intensity!r} means 0..{upper:g}, but the values span {minimum:g}..{maximum:g}; "
            "rescale them, or use intensity='percentile' or 'zscore'"
        )
    if minimum == maximum:
        raise VolumeIntensityError(f"{name}: every voxel is {minimum:g}; there is no image in this volume")


def value_range(values: np.ndarray | ValueSurvey, intensity: str, name: str = "the volume") -> tuple[float, float]:
    """The values that become -1 and 1 under a declared intensity other than `"hu"`.

    `"zscore"` gives mean -+ standard deviation of the voxels above a tenth of the way from the 0.5th to the 99.5th
    percentile (the background of an MR scan would dominate both), `"percentile"` these two percentiles. `name` is
    what messages call the volume.

    Raises:
        VolumeIntensityError: `"zscore"` of a volume without a foreground, or with a constant one, as masks have.
    """
    if intensity == "unit":
        return 0.0, 1.0
    if intensity == "uint8":
        return 0.0, 255.0
    survey = _surveyed(values)
    sample = survey.sample
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    if high <= low:
        low, high = survey.minimum, survey.maximum
    if intensity == "percentile":
        return low, high
    foreground = sample[sample > low + 0.1 * (high - low)]
    if foreground.size == 0 or foreground.min() == foreground.max():
        raise VolumeIntensityError(
            f"{name}: intensity='zscore' finds no contrast in the foreground; use 'unit' or 'percentile'"
        )
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
    channels = empty_voxels(len(windows), *values.shape) if out is None else out
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
    "ValueSurvey",
    "apply_windows",
    "check_declared_range",
    "check_finite",
    "check_hounsfield",
    "check_modality",
    "padding_values",
    "survey_values",
    "value_range",
]
