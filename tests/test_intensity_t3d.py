# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Volumes that are not in HU are refused with the reason; right ones pass, padded, cropped and noisy ones too."""

import numpy as np
import pytest
import torch
from body_phantom import body_array

from modeling_t3d.geometry_t3d import VolumeIntensityError
from modeling_t3d.intensity_t3d import (
    apply_windows,
    check_declared_range,
    check_finite,
    check_hounsfield,
    check_modality,
    padding_values,
    value_range,
)


def with_corners(array: np.ndarray, value: float) -> np.ndarray:
    """Padding as around a reconstruction circle."""
    padded = array.copy()
    padded[:, :6, :6] = value
    return padded


def test_right_volumes_pass():
    assert check_hounsfield(body_array(), "v") == []
    assert check_hounsfield(body_array(noise=60.0).astype(np.float32), "v") == []


@pytest.mark.parametrize("value", [-1101, -2000, -2048, -3024, -8192])
def test_constant_minimum_below_air_is_padding(value):
    assert check_hounsfield(with_corners(body_array(), value), "v") == [value]


def test_two_padding_values_are_both_found_lowest_first():
    array = with_corners(body_array(), -2048)
    array[:, -3:, -3:] = -3024
    assert padding_values(array) == [-3024, -2048]


def test_lone_low_voxel_is_a_measurement():
    array = body_array((40, 40, 40))
    array[3, 3, 3] = -1207
    assert padding_values(array) == []


def test_constant_minimum_at_air_is_no_padding():
    assert padding_values(np.clip(body_array(), -1024, None)) == []
    assert padding_values(np.full((4, 4, 4), -1100, dtype=np.int16)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hu: (hu + 1024).clip(0), "no value is negative"),
        (lambda hu: with_corners((hu + 1024).clip(0), -2000), "no value is negative"),
        (lambda hu: ((hu + 1000) / 8).clip(0, 255), "255 or less"),
        (lambda hu: hu / 1000, "255 or less"),
        (lambda hu: hu - 1024, "soft-tissue|no body"),
        (lambda hu: with_corners(hu - 1024, -3000), "soft-tissue|no body"),
        (lambda hu: hu + 300, "soft-tissue"),
        (lambda hu: hu - 250, "soft-tissue"),
        (lambda hu: hu * 2.0, "air value"),
        (lambda hu: hu * 0.75, "air value"),
        (lambda hu: np.where(hu < -500, hu, hu - 1000), "no body"),
        (lambda hu: np.random.default_rng(0).normal(-1000, 60, hu.shape), "no body"),
        (lambda hu: np.full(hu.shape, -2000.0), "255 or less"),
    ],
)
def test_wrong_volume_is_refused_with_reason_and_remedy(change, reason):
    array = change(body_array((40, 40, 40)).astype(np.float64))
    with pytest.raises(VolumeIntensityError, match=reason) as error:
        check_hounsfield(array, "scan.nii.gz")
    message = str(error.value)
    assert message.startswith("scan.nii.gz: ")
    assert "slope and intercept" in message
    assert "\n" not in message


def test_scan_cropped_to_the_chest_passes_though_its_gas_is_lung():
    generator = np.random.default_rng(0)
    array = np.full((24, 24, 24), 40.0)
    array[4:20, 4:20, 4:20] = -850.0
    array[4:20, 10:14, 10:14] = -990.0  # airways
    check_hounsfield(array + generator.normal(0, 30, array.shape), "v")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_voxel_is_refused_and_counted(value):
    array = body_array().astype(np.float32)
    array[1, 2, 3] = value
    with pytest.raises(VolumeIntensityError, match=f"scan: 1 of {array.size} voxels are NaN or infinite"):
        check_finite(array, "scan")


def test_both_infinities_are_refused():
    array = body_array().astype(np.float32)
    array[0, 0, 0], array[0, 0, 1] = np.inf, -np.inf
    with pytest.raises(VolumeIntensityError, match="2 of"):
        check_finite(array, "scan")


def test_other_machines_than_ct_are_refused_by_their_header():
    check_modality(None, "scan")
    check_modality("CT", "scan")
    with pytest.raises(VolumeIntensityError, match=r"scan: its header says MR, where intensity='hu' expects CT"):
        check_modality("MR", "scan")


def test_declared_ranges():
    unit = np.linspace(0, 1, 64).reshape(4, 4, 4)
    check_declared_range(unit, "unit", "v")
    check_declared_range(unit * 255, "uint8", "v")
    with pytest.raises(VolumeIntensityError, match=r"'unit' means 0\.\.1, but the values span 0\.\.255"):
        check_declared_range(unit * 255, "unit", "v")
    with pytest.raises(VolumeIntensityError, match=r"'uint8' means 0\.\.255"):
        check_declared_range(unit * 4000, "uint8", "v")
    with pytest.raises(VolumeIntensityError, match="no image"):
        check_declared_range(unit * 0 + 7, "zscore", "v")


def test_value_ranges():
    array = np.random.default_rng(0).normal(500, 100, (20, 20, 20))
    array[:10] = 0.0  # background, left out of the statistics
    low, high = value_range(array, "zscore")
    assert (low + high) / 2 == pytest.approx(500, abs=10)
    assert (high - low) / 2 == pytest.approx(100, abs=10)
    assert value_range(array, "percentile") == pytest.approx(tuple(np.percentile(array, (0.5, 99.5))))
    assert value_range(array, "unit") == (0.0, 1.0)


def test_windows_become_channels():
    values = torch.tensor([-2000.0, -1000.0, 0.0, 40.0, 1000.0]).reshape(1, 1, 5)
    channels = apply_windows(values, ((-1000, 1000), (-160, 240)))
    assert channels.shape == (2, 1, 1, 5)
    torch.testing.assert_close(channels[0].flatten(), torch.tensor([-1.0, -1.0, 0.0, 0.04, 1.0]))
    torch.testing.assert_close(channels[1].flatten(), torch.tensor([-1.0, -1.0, -0.2, 0.0, 1.0]))
    assert values[0, 0, 0] == -2000.0  # the input stays
    assert apply_windows(values, ((-1000, 1000),), clip=False)[0, 0, 0, 0] == -2.0


@pytest.mark.parametrize("place", [(51, 51, 51), (slice(20, 44),) * 3], ids=["between the sample", "mask"])
def test_a_foreground_without_contrast_has_no_deviation(place):
    array = np.zeros((128, 128, 128), dtype=np.float32)  # every second voxel along an axis is in the sample
    array[place] = 1
    with pytest.raises(VolumeIntensityError, match=r"^v: .*no contrast in the foreground; use 'unit' or 'percentile'"):
        value_range(array, "zscore", "v")
    assert value_range(array, "percentile") == (0.0, 1.0)
