# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Resampling against float64 references, the affine on volumes that hold their own coordinates, and equal bits."""

import doctest
import itertools

import numpy as np
import pytest
import torch
from body_phantom import body_array, rotation, upright_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from modeling_t3d import resample_t3d
from modeling_t3d.resample_t3d import (
    AxisSampling,
    PlaneResampler,
    resample,
    resample_array,
    sampled_affine,
    spacing_sampling,
)


def world_coordinate(shape: tuple[int, ...], affine: np.ndarray, axis: int) -> np.ndarray:
    """World coordinate (0 x, 1 y, 2 z; mm) of every voxel."""
    index = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1)
    return index @ affine[axis, :3] + affine[axis, 3]


def resample_by_loop(line: np.ndarray, sampling: AxisSampling, points: int = 4000) -> np.ndarray:
    """The plain reference: the linear interpolant averaged over a box by brute force."""
    width = np.sqrt(max(sampling.step**2 - 1, 0))
    result = []
    for i in range(sampling.count):
        center = sampling.start + sampling.step * i
        at = center + width * ((np.arange(points) + 0.5) / points - 0.5)
        result.append(np.interp(at, np.arange(len(line)), line).mean())
    return np.array(result)


@pytest.mark.parametrize("target", [0.5, 0.83, 1.0, 1.3, 2.0, 3.7, 40.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resampling_equals_the_brute_force_average(target, axis):
    generator = np.random.default_rng(0)
    shape = [3, 3, 3]
    shape[axis] = 150
    array = generator.normal(size=shape).astype(np.float32)
    samplings = [AxisSampling(0.0, 1.0, 3)] * 3
    samplings[axis] = spacing_sampling(150, 1.0, target)
    result = resample(torch.from_numpy(array), samplings)
    lines = np.moveaxis(array, axis, -1).reshape(-1, 150)
    expected = np.stack([resample_by_loop(line, samplings[axis]) for line in lines])
    np.testing.assert_allclose(np.moveaxis(result.numpy(), axis, -1).reshape(9, -1), expected, atol=2e-4)


@pytest.mark.parametrize("affine", [upright_affine((2.0, 0.7, 1.1), (5, -7, 300)), None], ids=["upright", "oblique"])
@pytest.mark.parametrize("target", [(1.5, 0.75, 0.75), (3.1, 2.9, 4.0)])
def test_resampled_voxels_are_where_the_affine_says(affine, target):
    spacing, shape = (2.0, 0.7, 1.1), (30, 41, 36)
    if affine is None:
        affine = rotation(20, (1, 2, 3)) @ upright_affine(spacing, (5, -7, 300))
    samplings = [spacing_sampling(*axis) for axis in zip(shape, spacing, target, strict=True)]
    moved = sampled_affine(affine, samplings)
    for axis in range(3):
        values = resample(torch.from_numpy(world_coordinate(shape, affine, axis)), samplings).numpy()
        expected = world_coordinate(values.shape, moved, axis)
        inner = (slice(4, -4),) * 3  # at the border the outermost voxel is repeated
        np.testing.assert_allclose(values[inner], expected[inner], atol=2e-3)


def test_sampling_covers_the_extent_and_ignores_the_origin():
    for num_voxels, spacing, target in [(69, 4.0, 1.5), (512, 0.78125, 0.75), (7, 1.0, 20.0), (100, 0.7, 1.4)]:
        sampling = spacing_sampling(num_voxels, spacing, target)
        assert sampling.count * target >= num_voxels * spacing - 0.01 * target
        middle = sampling.start + sampling.step * (sampling.count - 1) / 2
        assert middle == pytest.approx((num_voxels - 1) / 2)
    assert spacing_sampling(10, 0.75, 0.7500001).is_identity


def test_resampling_is_float32_under_autocast():
    values = torch.from_numpy(body_array().astype(np.float32))
    samplings = [spacing_sampling(size, 1.0, 1.7) for size in values.shape]
    expected = resample(values, samplings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample(values, samplings), expected)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    steps=st.tuples(*[st.floats(0.2, 5.0)] * 3),
    counts=st.tuples(*[st.integers(1, 40)] * 3),
    starts=st.tuples(*[st.floats(-3.0, 10.0)] * 3),
    seed=st.integers(0, 99),
)
def test_plain_resampling_is_trilinear_interpolation(shape, steps, counts, starts, seed):
    array = np.random.default_rng(seed).normal(0, 500, shape)
    samplings = [AxisSampling(*axis) for axis in zip(starts, steps, counts, strict=True)]
    axes = [sampling.start + sampling.step * np.arange(sampling.count) for sampling in samplings]
    expected = map_coordinates(array, np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")
    result = resample(torch.from_numpy(array), samplings, antialias=False)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-2)


@settings(max_examples=25, deadline=None)
@given(steps=st.tuples(*[st.floats(0.3, 4.0)] * 3), seed=st.integers(0, 99))
def test_averaging_equals_a_dense_product_in_float64(steps, seed):
    """Hat of interpolation times box of sqrt(step^2 - 1), integrated numerically on 400 points per voxel."""
    shape = (18, 21, 24)
    array = np.random.default_rng(seed).normal(0, 500, shape)
    samplings = [AxisSampling(1.5, step, 6) for step in steps]
    expected = array
    for axis, sampling in enumerate(samplings):
        width = np.sqrt(max(sampling.step**2 - 1, 0))
        offsets = width * ((np.arange(400) + 0.5) / 400 - 0.5)
        at = (sampling.start + sampling.step * np.arange(6))[:, None] + offsets
        voxels = np.arange(-30, shape[axis] + 30)
        hats = np.clip(1 - np.abs(at[..., None] - voxels), 0, None).mean(axis=1)
        matrix = np.zeros((6, shape[axis]))
        np.add.at(matrix.T, np.clip(voxels, 0, shape[axis] - 1), hats.T)
        expected = np.moveaxis(np.tensordot(matrix, expected, (1, axis)), 0, axis)
    np.testing.assert_allclose(resample(torch.from_numpy(array), samplings).numpy(), expected, atol=0.1)


def test_averaging_removes_what_the_new_grid_cannot_hold():
    """A wave of 2.5 voxels, sampled every 4: plain interpolation turns it into a slow wave that is not there."""
    wave = torch.from_numpy(1000 * np.sin(2 * np.pi * np.arange(240) / 2.5)).expand(4, 4, 240)
    samplings = [AxisSampling(0.0, 1.0, 4), AxisSampling(0.0, 1.0, 4), spacing_sampling(240, 1.0, 4.0)]
    assert resample(wave, samplings, antialias=False).std() > 0.3 * wave.std()
    assert resample(wave, samplings).std() < 0.15 * wave.std()
    # and what it can hold stays: a wave of 40 voxels
    wave = torch.from_numpy(1000 * np.sin(2 * np.pi * np.arange(240) / 40)).expand(4, 4, 240)
    assert resample(wave, samplings).std() > 0.95 * wave.std()


CASES = {
    "down": ((40, 50, 60), (2.0, 1.3, 1.7)),
    "slices up": ((12, 50, 60), (0.3, 1.3, 1.7)),
    "mixed": ((31, 70, 20), (1.2, 2.5, 0.6)),
    "planes as they are": ((30, 20, 20), (0.4, 1.0, 1.0)),
    "slices as they are": ((30, 40, 41), (1.0, 1.4, 1.0)),
    "as it is": ((9, 20, 20), (1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_threads_direction_or_memory_order(case, antialias, monkeypatch):
    shape, steps = CASES[case]
    array = np.random.default_rng(0).normal(0, 500, shape).astype(np.float32)
    samplings = [spacing_sampling(size, 1.0, step) for size, step in zip(shape, steps, strict=True)]
    expected = resample(torch.from_numpy(array), samplings, antialias)
    monkeypatch.setattr(resample_t3d, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        for threads, order in itertools.product((1, 3), ("C", "F")):
            torch.set_num_threads(threads)
            stored = torch.from_numpy(np.asarray(array, order=order))
            assert torch.equal(resample(stored, samplings, antialias), expected)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    found = torch.full_like(expected, float("nan"))
    resampler = PlaneResampler(
        shape, samplings, lambda z, plane: found[z].copy_(plane), antialias=antialias, descending=True
    )
    for z in reversed(range(shape[0])):
        resampler.push(z, array[z])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_what_is_delivered_may_be_changed(case):
    shape, steps = CASES[case]
    array = np.random.default_rng(0).normal(0, 500, shape).astype(np.float32)
    before = array.copy()
    samplings = [spacing_sampling(size, 1.0, step) for size, step in zip(shape, steps, strict=True)]
    expected = resample(torch.from_numpy(array), samplings)
    found = torch.empty_like(expected)

    def deliver(z, plane):
        found[z] = plane
        plane.fill_(1e9)

    resample_array(array, samplings, deliver)
    assert torch.equal(found, expected)
    np.testing.assert_array_equal(array, before)


def test_an_error_in_a_thread_is_raised_and_the_threads_setting_is_put_back(monkeypatch):
    monkeypatch.setattr(resample_t3d, "SMALL", 0)
    before = torch.get_num_threads()

    def deliver(z, plane):
        raise KeyError(z)

    with pytest.raises(KeyError):
        resample_array(np.zeros((8, 8, 8), np.float32), [spacing_sampling(8, 1.0, 2.0)] * 3, deliver)
    assert torch.get_num_threads() == before


def test_examples_in_the_docstrings():
    results = doctest.testmod(resample_t3d)
    assert results.attempted > 0
    assert results.failed == 0
