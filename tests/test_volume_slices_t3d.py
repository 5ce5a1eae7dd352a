# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Slices at uneven steps are evened out where that is right, and refused with their positions where it is not."""

import doctest

import numpy as np
import pytest
from dicom_writer import write_slice
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t3d import volume_slices_t3d
from modeling_t3d.volume_io_t3d import VolumeReadError, read_volume
from modeling_t3d.volume_slices_t3d import even_out

pytest.importorskip("pydicom")


def write_ramp(folder, heights):
    """Slices whose values grow by 40 per mm along z: linear interpolation is exact on them."""
    plane = np.arange(12).reshape(3, 4)
    for index, height in enumerate(heights):
        stored = np.rint(plane + 1000 + 40 * height).astype(np.uint16)
        write_slice(folder / f"{index:03d}", stored, (0, 0, height), RescaleIntercept=0)
    return plane


ONE_MISSING = [float(height) for height in range(22) if height != 7]


@pytest.mark.parametrize(
    ("heights", "spacing", "count"),
    [
        ([0, 2, 4.4, 6, 8], 2.0, 5),  # one slice moved
        ([0, 2, 3, 4.5, 6.5, 8.5, 10.5], 2.1, 6),  # steps of half and three quarters
        (ONE_MISSING, 1.0, 22),
        ([2 * height for height in ONE_MISSING], 2.0, 22),
    ],
)
def test_nearly_even_slices_are_interpolated(tmp_path, heights, spacing, count):
    plane = write_ramp(tmp_path, heights)
    volume = read_volume(tmp_path)
    assert volume.spacing[0] == pytest.approx(spacing)
    assert volume.shape == (count, 3, 4)
    assert volume.array.dtype == np.int16
    world = volume.affine[2, 0] * np.arange(count) + volume.affine[2, 3]
    assert (world[0], world[-1]) == pytest.approx((heights[0], heights[-1]))
    expected = plane + 1000 + 40 * world[:, None, None]
    assert np.abs(volume.array - expected).max() <= 1.0  # twice rounded
    assert "interpolated linearly" in volume.warnings[-1]
    with pytest.raises(VolumeReadError, match=r"resample=True.*") as caught:
        read_volume(tmp_path, resample=False)
    assert "positions: " in str(caught.value)


@pytest.mark.parametrize(
    ("heights", "reason"),
    [
        ([3.0 * height for height in ONE_MISSING], "a slice is missing: the step from 18.00 to 24.00 mm is 6.00 mm"),
        ([0, 1, 2, 4, 5], "a slice is missing"),  # a quarter of the steps
        ([height for height in ONE_MISSING if height != 9], "a slice is missing"),  # two wide steps in a row
        ([height for height in ONE_MISSING if height != 8], "a slice is missing"),  # two slices at one place
        ([0, 1.25, 2.5, 3.75, 8.75, 13.75], "a slice is missing"),  # two protocols in one series
        ([0, 5, 5.5, 10, 15], "slice spacing varies: the step from 5.00 to 5.50 mm is 0.50 mm"),
    ],
)
def test_gaps_are_refused_with_their_positions(tmp_path, heights, reason):
    write_ramp(tmp_path, heights)
    with pytest.raises(VolumeReadError) as caught:
        read_volume(tmp_path)
    assert reason in str(caught.value)
    assert "positions: " in str(caught.value)
    assert "resample=True" not in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.5, 1.5), min_size=2, max_size=20), st.floats(-50, 50))
def test_interpolation_keeps_a_ramp(steps, slope):
    places = np.concatenate([[0.0], np.cumsum(steps)])
    places *= max(1, round(places[-1])) / places[-1]
    array = (slope * places)[:, None, None].astype(np.float32)
    even = even_out(array, places)
    np.testing.assert_allclose(even.ravel(), slope * np.arange(round(places[-1]) + 1), atol=1e-3)


def test_examples_in_the_docstrings():
    assert doctest.testmod(volume_slices_t3d).failed == 0
