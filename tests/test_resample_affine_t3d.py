# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Rotated and sheared grids against float64 interpolation by SciPy and SimpleITK, in one pass and with equal bits."""

import doctest
import itertools

import numpy as np
import pytest
import SimpleITK
import torch
from body_phantom import body_array, orientations, rotation, upright_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from modeling_t3d import preparation_t3d, resample_affine_t3d, resample_t3d
from modeling_t3d.geometry_t3d import Volume
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.resample_affine_t3d import affine_sampling, resample_affine, right_angles, sample_offsets

OUTSIDE = -1024.0


def sheared_affine(spacing, shear, degrees=0.0, origin=(5.0, -7.0, 300.0)) -> np.ndarray:
    """Slices that move by `shear` (mm along y and x per slice), then turned about an odd axis."""
    affine = upright_affine(spacing, origin)
    affine[1, 0], affine[0, 0] = shear
    return rotation(degrees, (1, 0.4, -0.3)) @ affine


def run(array, sampling, antialias=True) -> np.ndarray:
    result = torch.empty(sampling.shape)
    resample_affine(array, sampling, OUTSIDE, lambda z, plane: result[z].copy_(plane), antialias)
    return result.numpy()


def indices(shape) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1).astype(np.float64)


def by_scipy(array, affine, sampling, antialias=True) -> tuple[np.ndarray, np.ndarray]:
    """The float64 reference, from the two affines alone, and which samples lie clear of the volume's faces."""
    to_source = np.linalg.inv(affine) @ sampling.affine
    offsets = itertools.product(*[sample_offsets(step if antialias else 1.0) for step in sampling.steps])
    total, clear = 0.0, True
    offsets = list(offsets)
    for offset in offsets:
        place = (indices(sampling.shape) + offset) @ to_source[:3, :3].T + to_source[:3, 3]
        beside = np.maximum(-0.5 - place, place - (np.array(array.shape) - 0.5)).max(-1)
        values = map_coordinates(array.astype(np.float64), np.moveaxis(place, -1, 0), order=1, mode="nearest")
        total = total + np.where(beside <= 0, values, OUTSIDE)
        clear = clear & (np.abs(beside) > 2e-3)
    return total / len(offsets), clear


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    spacing=st.tuples(*[st.floats(0.6, 4.0)] * 3),
    target=st.one_of(st.none(), st.tuples(*[st.floats(0.7, 5.0)] * 3)),
    shear=st.tuples(*[st.floats(-0.6, 0.6)] * 2),
    degrees=st.floats(-35, 35),
    upright=st.booleans(),
    antialias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_interpolation_in_float64(shape, spacing, target, shear, degrees, upright, antialias, seed):
    array = np.random.default_rng(seed).normal(0, 500, shape)
    affine = sheared_affine(spacing, shear, degrees)
    sampling = affine_sampling(shape, affine, target, upright)
    expected, clear = by_scipy(array, affine, sampling, antialias)
    np.testing.assert_allclose(run(array, sampling, antialias)[clear], expected[clear], atol=0.05)


@pytest.mark.parametrize("upright", [True, False])
def test_equals_simple_itk(upright):
    """One resampling of a gantry-tilted volume by ITK, which knows the source by its own geometry alone."""
    array = body_array((14, 30, 34)).astype(np.float32)
    affine = sheared_affine((4.0, 1.5, 1.5), (1.4, 0.0), 12.0)
    sampling = affine_sampling(array.shape, affine, (1.5, 1.2, 1.2), upright)
    # ITK takes no sheared grids: the shear is given as the transform from new points to the source's index space.
    source = SimpleITK.GetImageFromArray(array)
    moving = SimpleITK.AffineTransform(3)
    matrix = sampling.matrix[::-1, ::-1]
    moving.SetMatrix(matrix.ravel())
    moving.SetTranslation(sampling.start[::-1])
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetSize([int(size) for size in sampling.shape[::-1]])
    resampler.SetTransform(moving)
    resampler.SetInterpolator(SimpleITK.sitkLinear)
    resampler.SetDefaultPixelValue(OUTSIDE)
    expected = SimpleITK.GetArrayFromImage(resampler.Execute(source))
    place = indices(sampling.shape) @ sampling.matrix.T + sampling.start
    inside = ((place > 0.01) & (place < np.array(array.shape) - 1.01)).all(-1)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(run(array, sampling, antialias=False)[inside], expected[inside], atol=0.02)
    beside = ((place < -0.51) | (place > np.array(array.shape) - 0.49)).any(-1)
    assert (run(array, sampling, antialias=False)[beside] == OUTSIDE).all()


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("target", [None, (1.1, 1.3, 1.7), (5.0, 4.0, 4.0)])
def test_voxels_are_where_the_affine_says(upright, target):
    shape, affine = (24, 30, 28), sheared_affine((2.0, 1.5, 1.5), (0.5, -0.2), 20.0)
    sampling = affine_sampling(shape, affine, target, upright)
    new = indices(sampling.shape) @ sampling.affine[:3, :3].T + sampling.affine[:3, 3]
    source = (new - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    margin = 2.5 if target == (5.0, 4.0, 4.0) else 0.6  # beyond it, points of an average lie outside
    inside = ((source > margin) & (source < np.array(shape) - 1 - margin)).all(-1)
    assert inside.sum() > 100
    for axis in range(3):
        array = indices(shape) @ affine[axis, :3] + affine[axis, 3]
        np.testing.assert_allclose(run(array, sampling)[inside], new[..., axis][inside], atol=5e-3)
    # All of the source lies in the new grid.
    corners = np.array(list(itertools.product(*[(-0.5, size - 0.5) for size in shape]))) @ affine[:3, :3].T
    found = (corners + affine[:3, 3] - sampling.affine[:3, 3]) @ np.linalg.inv(sampling.affine[:3, :3]).T
    assert (found > -0.502).all()
    assert (found < np.array(sampling.shape) - 0.498).all()


def test_new_axes_and_spacing():
    affine = sheared_affine((4.0, 0.8, 0.7), (1.2, 0.0), 15.0)
    upright = affine_sampling((10, 12, 14), affine, (1.5, 0.75, 0.6), upright=True)
    np.testing.assert_array_equal(upright.affine[:3, :3], np.diag([1.5, 0.75, 0.6])[:, ::-1].T)
    own = affine_sampling((10, 12, 14), affine, None, upright=False)
    linear = own.affine[:3, :3]
    np.testing.assert_allclose(linear.T @ linear, np.diag([4.0, 0.8, 0.7]) ** 2, atol=1e-9)  # right angles
    directions, _ = right_angles(affine)
    np.testing.assert_allclose(directions[:, 1:], affine[:3, 1:3] / [0.8, 0.7], atol=1e-12)  # the slice planes stay
    assert own.steps == pytest.approx((1.0, 1.0, 1.0))
    assert own.shape == (10, 27, 14)  # 12 rows of 0.8 mm and 10 shifts of 1.2 mm, in voxels of 0.8 mm


@pytest.mark.parametrize("step", [1.2, 1.5, 2.0, 3.3, 8.0])
def test_points_of_the_average_have_the_variance_of_its_box(step):
    offsets = step * sample_offsets(step)
    assert offsets.mean() == pytest.approx(0)
    assert offsets.var() == pytest.approx((step**2 - 1) / 12)
    assert np.diff(offsets).max() <= 1.0 + 1e-9


def test_averaging_removes_what_the_new_grid_cannot_hold():
    """A wave of 2.5 voxels, sampled every 4: plain interpolation turns it into a slow wave that is not there."""
    affine = rotation(5, (0, 0, 1)) @ upright_affine((1.0, 1.0, 1.0))
    wave = np.broadcast_to(1000 * np.sin(2 * np.pi * np.arange(120) / 2.5), (4, 40, 120))
    sampling = affine_sampling(wave.shape, affine, (1.0, 1.0, 4.0), upright=True)
    inside = (slice(1, 3), slice(18, 30), slice(6, 26))
    assert run(wave, sampling, antialias=False)[inside].std() > 0.3 * wave.std()
    assert run(wave, sampling)[inside].std() < 0.2 * wave.std()


def test_bits_do_not_depend_on_threads_or_memory_order(monkeypatch):
    array = body_array((20, 26, 30))
    sampling = affine_sampling(array.shape, sheared_affine((2.0, 1.0, 1.0), (0.4, 0.1), 10.0), (1.4, 1.4, 1.4), True)
    expected = run(array, sampling)
    monkeypatch.setattr(resample_affine_t3d, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        for threads, order in itertools.product((1, 3), ("C", "F")):
            torch.set_num_threads(threads)
            np.testing.assert_array_equal(run(np.asarray(array, order=order), sampling), expected)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------- the processor


def make_processor(**changes) -> T3DImageProcessor:
    sizes = {"spacing": (1.6, 1.3, 1.3), "global_size": (8, 16, 16), "local_size": (4, 8, 8)}
    return T3DImageProcessor(**{**sizes, **changes})


@pytest.mark.parametrize("deoblique", [True, False])
@pytest.mark.parametrize("intensity", ["hu", "percentile"])
def test_prepared_volumes_are_interpolated_once(deoblique, intensity):
    """Against SciPy from the two affines: a second interpolation, or rounding before, would show at once."""
    affine = sheared_affine((3.0, 1.5, 1.5), (0.9, 0.0), 14.0)
    array = body_array((22, 34, 40), noise=200.0)
    prepared = make_processor(deoblique=deoblique, intensity=intensity).prepare(Volume(array, affine))
    sampling = affine_sampling(array.shape, affine, (1.6, 1.3, 1.3), upright=deoblique)
    expected, clear = by_scipy(array, affine, sampling)
    np.testing.assert_allclose(prepared.affine, sampling.affine, atol=1e-9)
    clear &= expected != OUTSIDE
    assert clear.mean() > 0.3
    difference = np.abs(prepared.array[clear] - expected[clear])
    if intensity == "hu":
        assert difference.max() <= 0.55  # rounded once, to whole HU
    else:
        beside = clear & (indices(prepared.array.shape) > 3).all(-1)
        deep = by_scipy(np.ones(array.shape), affine, sampling)[0] == 1.0  # no point of the average is outside
        assert np.abs(prepared.array[beside & deep] - expected[beside & deep]).max() < 0.05
    assert any("off a right angle: resampled" in note for note in prepared.warnings)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("deoblique", [True, False])
def test_all_48_orientations_give_the_same_bits(deoblique, padded, monkeypatch):
    monkeypatch.setattr(preparation_t3d, "SMALL", 0)
    monkeypatch.setattr(resample_t3d, "SMALL", 0)
    monkeypatch.setattr(resample_affine_t3d, "SMALL", 0)
    array = body_array((14, 22, 26))
    if padded:
        array[:, :4, :] = -2000
    affine = sheared_affine((3.0, 1.5, 1.7), (0.7, 0.2), 11.0)
    processor = make_processor(deoblique=deoblique, spacing=(2.2, 2.0, 2.0))
    expected = None
    for volume in orientations(array, affine):
        prepared = processor.prepare(volume)
        if expected is None:
            expected = prepared
            assert (expected.array.min() >= -1024) or not padded
        np.testing.assert_array_equal(prepared.array, expected.array)
        np.testing.assert_array_equal(prepared.body.cells, expected.body.cells)
        np.testing.assert_allclose(prepared.affine, expected.affine, atol=1e-9)
        assert torch.equal(processor.global_view(prepared), processor.global_view(expected))


def test_examples_in_the_docstrings():
    results = doctest.testmod(resample_affine_t3d)
    assert results.attempted > 0
    assert results.failed == 0
