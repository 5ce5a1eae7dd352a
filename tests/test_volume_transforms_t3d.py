# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Crops against padded arrays, components against flood fill, and where the body is found."""

import numpy as np
import pytest
import torch
from body_phantom import body_array

from modeling_t3d.geometry_t3d import Box
from modeling_t3d.volume_transforms_t3d import (
    BodyMask,
    body_cell,
    cell_means,
    crop,
    find_body,
    label_components,
)


def body_of(array: np.ndarray, spacing: tuple[float, float, float]) -> BodyMask | None:
    return find_body(array.shape, spacing, -500.0, cell_means(array, body_cell(array.shape, spacing)))


def test_cell_means_are_those_of_the_voxels():
    array = body_array((11, 13, 17))
    means = cell_means(array, (3, 4, 5))
    assert means.shape == (4, 4, 4)
    for z, y, x in np.ndindex(means.shape):
        cell = array[z * 3 : z * 3 + 3, y * 4 : y * 4 + 4, x * 5 : x * 5 + 5]
        assert means[z, y, x] == pytest.approx(cell.mean(), rel=1e-5)


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
    body = body_of(array, (5.0, 5.0, 5.0))
    mask = np.asarray(body)
    assert mask.shape == array.shape
    assert mask[30, 30, 20]  # lung
    assert (mask & trunk).sum() > 0.95 * trunk.sum() * 40
    assert mask[:, :5].sum() == 0
    assert body.box.start[0] == 0
    assert body.box.stop[0] == 40
    assert body_of(with_table, (5.0, 5.0, 5.0)).box == body.box
    rows, columns = np.flatnonzero(trunk.any(1)), np.flatnonzero(trunk.any(0))
    assert body.box.start[1] <= rows[0]
    assert body.box.stop[1] > rows[-1]
    assert body.box.start[2] <= columns[0]
    assert body.box.stop[2] > columns[-1]


def test_body_mask_answers_like_its_voxel_mask():
    body = body_of(body_array((33, 29, 37)), (3.0, 2.0, 2.0))
    mask = np.asarray(body)
    for voxel in np.random.default_rng(0).integers(0, mask.shape, (50, 3)):
        assert body[tuple(voxel)] == mask[tuple(voxel)]


def test_two_legs_are_one_body_and_air_is_none():
    array = np.full((20, 30, 60), -1000, dtype=np.int16)
    array[:, 5:25, 4:26] = 30
    array[:, 5:25, 34:54] = 30
    box = body_of(array, (4.0, 4.0, 4.0)).box
    assert box.start[2] <= 4
    assert box.stop[2] >= 54
    assert body_of(np.full((8, 8, 8), -1000, dtype=np.int16), (4.0, 4.0, 4.0)) is None
