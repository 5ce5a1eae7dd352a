# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Localisation: tokens against a brute-force overlap test, pointing and average precision by hand."""

import numpy as np
import pytest

from modeling_t3d.evaluation.localisation import (
    attention_volume,
    boxes_from_affines,
    score_attention,
    summarise_localisation,
    tokens_touching,
)

RAS_FROM_ZYX = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])


def scaled(spacing, origin=(0.0, 0.0, 0.0)):
    """Affine of a canonical (z, y, x) array with this spacing and the world position (x, y, z) of its first voxel."""
    affine = RAS_FROM_ZYX @ np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def touching_slowly(mask, box, grid):
    """Every cell against every lesion voxel: an overlap of positive length on all axes."""
    touched = np.zeros(grid, dtype=bool)
    cell = (box[3:] - box[:3]) / np.array(grid)
    for index in np.ndindex(*grid):
        low, high = box[:3] + cell * index, box[:3] + cell * (np.array(index) + 1)
        for voxel in np.argwhere(mask):
            touched[index] |= bool((np.minimum(high, voxel + 1) - np.maximum(low, voxel) > 2e-3).all())
    return touched


@pytest.mark.parametrize("seed", range(4))
def test_tokens_touching_agrees_with_every_cell_against_every_voxel(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((7, 9, 8)) < 0.02
    mask[2, 3, 4] = True
    starts = generator.uniform(-3, 4, (3, 3))
    boxes = np.concatenate([starts, starts + generator.uniform(2, 8, (3, 3))], axis=1)
    touched = tokens_touching(mask, boxes, (2, 3, 4))
    for view in range(3):
        np.testing.assert_array_equal(touched[view], touching_slowly(mask, boxes[view], (2, 3, 4)))


def test_a_view_outside_the_mask_touches_nothing():
    assert not tokens_touching(
        np.ones((4, 4, 4)), np.array([[4, 0, 0, 8, 4, 4], [-8, 0, 0, 0, 4, 4]]), (2, 2, 2)
    ).any()


def test_neighbouring_cells_do_not_touch_across_a_shared_face():
    mask = np.zeros((4, 4, 4))
    mask[:2] = 1
    touched = tokens_touching(mask, np.array([[0, 0, 0, 4 + 1e-9, 4, 4]]), (2, 1, 1))
    assert touched[0, :, 0, 0].tolist() == [True, False]


def test_boxes_follow_spacing_and_origin():
    # View: 1 mm voxels, first centre at world z = 10, y = 20, x = 30. Mask: 2 x 1 x 0.5 mm from the world origin.
    boxes = boxes_from_affines([scaled((1, 1, 1), (30, 20, 10))], (8, 8, 8), scaled((2, 1, 0.5)))
    # In z the view's lower face is 9.5 mm; the mask's voxel 0 starts at -1 mm: (9.5 + 1) / 2 = 5.25.
    np.testing.assert_allclose(boxes[0], [5.25, 20, 59.5, 5.25 + 4, 28, 59.5 + 16])


def test_boxes_refuse_a_mask_with_other_axes():
    flipped = scaled((1, 1, 1)) @ np.diag([-1, 1, 1, 1.0])
    with pytest.raises(ValueError, match="canonical"):
        boxes_from_affines([scaled((1, 1, 1))], (4, 4, 4), flipped)


def test_scores_by_hand():
    touched = np.zeros((2, 1, 2, 2), dtype=bool)
    touched[0, 0, 0, 0] = touched[1, 0, 1, 1] = True
    attention = np.array([[[[0.5, 0.2], [0.2, 0.1]]], [[[0.9, 0.05], [0.03, 0.02]]]])
    score = score_attention(attention, touched)
    # The maximum over both views (0.9) is outside the lesion; within view 0 it is inside, within view 1 outside.
    assert score.pointing == 0.0
    assert score.pointing_within_view == 0.5
    # Lesion tokens are 2nd and last (8th) of 8: (1/2 + 2/8) / 2.
    assert score.average_precision == pytest.approx((1 / 2 + 2 / 8) / 2)
    assert score.chance == 2 / 8
    assert score.chance_within_view == 1 / 4
    # A view weight can move the maximum to view 0.
    assert score_attention(attention, touched, view_weights=np.array([0.9, 0.1])).pointing == 1.0
    # Without view 1 the map is right.
    masked = score_attention(attention, touched, view_mask=np.array([True, False]))
    assert (masked.pointing, masked.average_precision, masked.chance) == (1.0, 1.0, 0.25)


def test_a_constant_map_scores_chance():
    generator = np.random.default_rng(0)
    touched = generator.random((3, 2, 4, 4)) < 0.1
    score = score_attention(np.full((3, 2, 4, 4), 1 / 32), touched)
    assert score.pointing == pytest.approx(score.chance)
    assert score.average_precision == pytest.approx(score.chance)
    assert score.pointing_within_view == pytest.approx(score.chance_within_view)


def test_a_lesion_outside_every_view_is_left_out_and_counted():
    attention = np.full((1, 1, 2, 2), 0.25)
    assert score_attention(attention, np.zeros((1, 1, 2, 2), dtype=bool)) is None
    inside = np.zeros((1, 1, 2, 2), dtype=bool)
    inside[0, 0, 0, 0] = True
    summary = summarise_localisation([score_attention(attention * inside, inside), None], ["p", "q"], num_resamples=20)
    assert (summary.num_scored, summary.num_left_out) == (1, 1)
    assert (summary.pointing.value, summary.average_precision.value, summary.chance) == (1.0, 1.0, 0.25)
    assert np.isnan(summarise_localisation([None], ["p"]).pointing.value)


def test_refusals():
    with pytest.raises(ValueError, match="must both be"):
        score_attention(np.zeros((1, 2, 2, 2)), np.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match="not finite"):
        score_attention(np.full((1, 1, 1, 2), np.nan), np.zeros((1, 1, 1, 2)))


def test_attention_volume_paints_cells_and_averages_overlaps():
    attention = np.arange(8, dtype=float).reshape(1, 2, 2, 2)
    volume = attention_volume(attention, np.array([[0, 0, 0, 4, 4, 4]]), (4, 4, 6))
    assert volume.shape == (4, 4, 6)
    assert volume[0, 0, 0] == 0
    assert volume[3, 0, 3] == 5
    assert np.isnan(volume[:, :, 4:]).all()
    two = attention_volume(
        np.array([[[[2.0]]], [[[4.0]]]]), np.array([[0, 0, 0, 2, 1, 1], [1, 0, 0, 3, 1, 1]]), (3, 1, 1)
    )
    assert two.ravel().tolist() == [2.0, 3.0, 4.0]
