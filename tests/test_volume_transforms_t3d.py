# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Resampling and crops keep the affine true (measured on volumes that hold their own coordinates); the body mask."""

import numpy as np
import pytest
import torch
from body_phantom import body_array, rotation, upright_affine

from modeling_t3d.geometry_t3d import Box
from modeling_t3d.volume_transforms_t3d import (
    AxisSampling,
    crop,
    deoblique,
    find_body,
    label_components,
    resample,
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


def test_deoblique_puts_voxels_at_their_world_places():
    affine = rotation(20, (1, 0.4, -0.3)) @ upright_affine((2.0, 1.5, 1.5), (10, 20, -30))
    shape = (24, 30, 28)
    inside = None
    for axis in range(3):
        source = torch.from_numpy(world_coordinate(shape, affine, axis))
        values, aligned = deoblique(source, affine, (2.0, 1.5, 1.5), -5000.0)
        expected = world_coordinate(values.shape, aligned, axis)
        if inside is None:
            index = np.stack(np.meshgrid(*[np.arange(size) for size in values.shape], indexing="ij"), -1)
            world = index @ aligned[:3, :3].T + aligned[:3, 3]
            old = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
            inside = ((old > 0.1) & (old < np.array(shape) - 1.1)).all(-1)
            assert inside.sum() > 0.9 * 22 * 28 * 26  # all of the volume is in the new grid
        np.testing.assert_allclose(values.numpy()[inside], expected[inside], atol=5e-3)
    assert aligned[2, 0] == 2.0
    assert aligned[1, 1] == aligned[0, 2] == 1.5
    assert np.count_nonzero(aligned[:3, :3]) == 3


@pytest.mark.parametrize("start", [(0, 0, 0), (-2, 1, 3), (3, -4, 5), (-1, -1, -1), (20, 0, 0), (-9, 0, 0)])
def test_crop_equals_a_cut_from_the_padded_array(start):
    array = np.arange(6 * 5 * 7, dtype=np.int16).reshape(6, 5, 7)
    size = (4, 8, 3)
    box = Box(start, tuple(s + n for s, n in zip(start, size, strict=True)))
    padded = np.pad(array, 30, constant_values=-1024)
    expected = padded[tuple(slice(30 + s, 30 + s + n) for s, n in zip(start, size, strict=True))]
    result = crop(array, box, -1024.0)
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result.numpy(), expected)


def flood_labels(mask: np.ndarray) -> np.ndarray:
    """The plain reference for `label_components`: one flood fill after the other."""
    labels = np.zeros(mask.shape, dtype=int)
    for seed in np.argwhere(mask):
        if labels[tuple(seed)]:
            continue
        stack, number = [tuple(seed)], labels.max() + 1
        while stack:
            voxel = stack.pop()
            if min(voxel) < 0 or any(v >= n for v, n in zip(voxel, mask.shape, strict=True)):
                continue
            if mask[voxel] and not labels[voxel]:
                labels[voxel] = number
                for axis in range(3):
                    for step in (-1, 1):
                        stack.append(tuple(v + step * (a == axis) for a, v in enumerate(voxel)))
    return labels


@pytest.mark.parametrize("density", [0.2, 0.35, 0.6])
def test_components_equal_flood_fill(density):
    mask = np.random.default_rng(1).random((9, 11, 8)) < density
    labels, expected = label_components(mask), flood_labels(mask)
    assert np.array_equal(labels > 0, mask)
    pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_body_holds_the_trunk_and_its_lungs_without_the_table():
    array = body_array((40, 60, 70))
    trunk = (np.linspace(-1, 1, 60)[:, None] / 0.8) ** 2 + (np.linspace(-1, 1, 70) / 0.85) ** 2 < 1
    with_table = array.copy()
    with_table[:, 1:3, 5:65] = 0  # a plate below the back, 10 mm thick
    body = find_body(array, (5.0, 5.0, 5.0), -500.0)
    mask = np.asarray(body)
    assert mask.shape == array.shape
    assert mask[30, 30, 20]  # lung
    assert (mask & trunk).sum() > 0.95 * trunk.sum() * 40
    assert mask[:, :5].sum() == 0
    assert body.box.start[0] == 0
    assert body.box.stop[0] == 40
    assert find_body(with_table, (5.0, 5.0, 5.0), -500.0).box == body.box
    rows, columns = np.flatnonzero(trunk.any(1)), np.flatnonzero(trunk.any(0))
    assert body.box.start[1] <= rows[0]
    assert body.box.stop[1] > rows[-1]
    assert body.box.start[2] <= columns[0]
    assert body.box.stop[2] > columns[-1]


def test_body_mask_answers_like_its_voxel_mask():
    body = find_body(body_array((33, 29, 37)), (3.0, 2.0, 2.0), -500.0)
    mask = np.asarray(body)
    for voxel in np.random.default_rng(0).integers(0, mask.shape, (50, 3)):
        assert body[tuple(voxel)] == mask[tuple(voxel)]


def test_two_legs_are_one_body_and_air_is_none():
    array = np.full((20, 30, 60), -1000, dtype=np.int16)
    array[:, 5:25, 4:26] = 30
    array[:, 5:25, 34:54] = 30
    box = find_body(array, (4.0, 4.0, 4.0), -500.0).box
    assert box.start[2] <= 4
    assert box.stop[2] >= 54
    assert find_body(np.full((8, 8, 8), -1000, dtype=np.int16), (4.0, 4.0, 4.0), -500.0) is None
