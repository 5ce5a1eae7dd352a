# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""View plans against brute force: cover, overlap, air, seeds and places in the world."""

import doctest
import itertools

import numpy as np
import pytest

from modeling_t3d import tile_plan_t3d
from modeling_t3d.geometry_t3d import Box, body_box
from modeling_t3d.tile_plan_t3d import (
    aligned_plan,
    aligned_positions,
    grid_plan,
    independent_plan,
    normalised_positions,
    overlapping_plan,
)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("extent", [1, 5, 7, 8, 9, 15, 16, 17, 33, 100, 233])
def test_grid_covers_the_volume_to_its_border(extent, overlap):
    tiles = grid_plan((extent, 8, 3), (8, 8, 8), overlap)
    starts = [tile.start[0] for tile in tiles]
    covered = np.zeros(extent, dtype=int)
    for tile in tiles:
        assert tile.size == (8, 8, 8)
        covered[max(tile.start[0], 0) : tile.stop[0]] += 1
    assert covered.min() >= 1
    if extent > 8:
        assert starts[0] == 0
        assert tiles[-1].stop[0] == extent
        gaps = np.diff(starts)
        assert gaps.max() <= max(1, int(8 * (1 - overlap)))
        assert gaps.max() - gaps.min() <= 1
    else:
        assert len(tiles) == 1
    assert all(tile.start[2] == -2 for tile in tiles)


def test_independent_views_are_seeded_inside_the_body_and_the_volume():
    mask = np.zeros((40, 60, 60), dtype=bool)
    mask[5:35, 20:50, 10:50] = True
    mask[:, 30:35, :] = False
    box = body_box(mask)
    draw = [independent_plan(mask.shape, (8, 16, 16), 200, box, np.random.default_rng(3), mask) for _ in range(2)]
    assert draw[0] == draw[1]
    for view in draw[0]:
        assert min(view.start) >= 0
        assert all(stop <= extent for stop, extent in zip(view.stop, mask.shape, strict=True))
        z, y, x = (int(middle) for middle in view.center)
        assert mask[z - 1 : z + 1, y - 1 : y + 1, x - 1 : x + 1].any()
    assert len({view.start for view in draw[0]}) > 150
    unmasked = independent_plan(mask.shape, (8, 16, 16), 200, box, np.random.default_rng(3))
    assert all(start <= m <= stop for v in unmasked for start, m, stop in zip(box.start, v.center, box.stop))  # noqa: B905


def test_a_mask_that_is_almost_empty_still_gives_views():
    mask = np.zeros((40, 60, 60), dtype=bool)
    mask[0, 0, 0] = mask[39, 59, 59] = True
    views = independent_plan(mask.shape, (4, 4, 4), 20, body_box(mask), np.random.default_rng(0), mask)
    assert {view.start for view in views} == {(0, 0, 0), (36, 56, 56)}


@pytest.mark.parametrize("minimum_overlap", [0.0, 0.25, 0.6, 1.0])
def test_overlapping_views_share_what_they_promise(minimum_overlap):
    shape, size = (30, 50, 90), (16, 17, 23)
    box = Box((0, 5, 0), (30, 45, 90))
    least = 1.0
    for seed in range(40):
        views = overlapping_plan(shape, size, 4, box, np.random.default_rng(seed), minimum_overlap=minimum_overlap)
        for one, other in itertools.combinations(views, 2):
            shared = [
                max(0, min(a_stop, b_stop) - max(a, b))
                for a, b, a_stop, b_stop in zip(one.start, other.start, one.stop, other.stop, strict=True)
            ]
            least = min(least, np.prod(shared) / np.prod(size))
    assert least >= minimum_overlap
    assert least < minimum_overlap + 0.35  # and the views are spread as far as allowed


def test_aligned_views_lie_at_the_same_place_of_every_body():
    positions = aligned_positions(6, np.random.default_rng(1))
    assert np.abs(positions).max() <= 1
    assert (np.hypot(positions[:, 1], positions[:, 2]) <= 1).all()
    boxes = [Box((10, 10, 10), (90, 90, 90)), Box((20, 30, 10), (180, 120, 190))]
    found = []
    for seed, box in enumerate(boxes):
        views = aligned_plan((200, 200, 200), (8, 8, 8), positions, box, np.random.default_rng(seed), jitter=0.05)
        found.append(normalised_positions(views, box)[:, :3])
    assert np.abs(found[0] - found[1]).max() <= 0.1 + 0.2  # jitter of both, and views moved inside the volume
    exact = aligned_plan((200, 200, 200), (8, 8, 8), positions, boxes[1], np.random.default_rng(0), jitter=0.0)
    np.testing.assert_allclose(normalised_positions(exact, boxes[1])[:, :3], positions, atol=0.02)


def test_normalised_positions():
    box = Box((10, 20, 30), (20, 40, 70))
    rows = normalised_positions([Box((10, 20, 30), (20, 40, 70)), Box((10, 20, 30), (15, 30, 40))], box)
    np.testing.assert_allclose(rows, [[0, 0, 0, 1, 1, 1], [-0.5, -0.5, -0.75, 0.5, 0.5, 0.25]])
    assert rows.dtype == np.float32
    assert normalised_positions([], box).shape == (0, 6)


def test_examples_in_the_docstrings():
    results = doctest.testmod(tile_plan_t3d)
    assert results.attempted > 0
    assert results.failed == 0
