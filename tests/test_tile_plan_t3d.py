# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""View plans against brute force: cover, overlap, air, seeds and places in the world."""

import doctest
import hashlib
import itertools
import tracemalloc

import nibabel
import numpy as np
import pytest
import torch
from body_phantom import body_array, rotation, upright_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from process_memory import allocated_peak

from modeling_t3d import local_views_t3d, tile_plan_t3d
from modeling_t3d.geometry_t3d import Box, VolumeGeometryError, body_box
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.tile_plan_t3d import (
    aligned_plan,
    aligned_positions,
    grid_plan,
    independent_plan,
    normalised_positions,
    overlapping_plan,
    point_plan,
)
from modeling_t3d.volume_transforms_t3d import BodyMask


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


# ------------------------------------------------------------------------------------------ air, points, cost


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    size=st.tuples(*[st.integers(2, 16)] * 3),
    cell=st.tuples(*[st.integers(1, 6)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.6]),
    seed=st.integers(0, 99),
)
def test_grid_without_air_covers_every_voxel_that_is_not_air(shape, size, cell, overlap, seed):
    num_cells = [-(-extent // width) for extent, width in zip(shape, cell, strict=True)]
    cells = np.random.default_rng(seed).random(num_cells) < 0.05
    dense = np.kron(cells, np.ones(cell, dtype=bool))[tuple(slice(0, extent) for extent in shape)]
    whole, tiles = grid_plan(shape, size, overlap), grid_plan(shape, size, overlap, cells, cell)
    covered = np.zeros(shape, dtype=bool)
    for tile in tiles:
        covered[tuple(slice(max(0, a), b) for a, b in zip(tile.start, tile.stop, strict=True))] = True
    assert covered[dense].all()
    # The others stay where they were, in the same order, and what was left out is air.
    assert set(tiles) <= set(whole)
    assert list(tiles) == sorted(tiles, key=lambda tile: tile.start)
    for tile in set(whole) - set(tiles):
        assert not dense[tuple(slice(max(0, a), b) for a, b in zip(tile.start, tile.stop, strict=True))].any()


def test_tiles_of_pure_air_are_left_out_and_arms_and_table_are_not():
    array = np.full((40, 60, 120), -1000, dtype=np.int16)
    array[:, 20:40, 6:60] = 40  # the trunk; an arm, too small to belong to the body, and air beyond it
    array[:30, 28:34, 72:80] = 60
    processor = T3DImageProcessor(spacing=(3, 3, 3), local_size=(20, 20, 20))
    prepared = processor.prepare(array, upright_affine((3.0, 3.0, 3.0)))
    assert not np.asarray(prepared.body)[:30, 28:34, 72:80].any()
    starts = {box.start for box in processor.plan_views(prepared, "grid")}
    assert (0, 20, 60) in starts, "the arm is in no tile"
    assert not {start for start in starts if start[2] > 80}
    covered = np.zeros(array.shape, dtype=bool)
    for start in starts:
        covered[tuple(slice(first, first + 20) for first in start)] = True
    assert covered[array > -500].all()


def test_plan_of_a_large_volume_reads_no_voxel_and_allocates_little():
    class Unread:
        shape = (1000, 512, 512)
        dtype = np.dtype(np.int16)

        def __getitem__(self, index):
            raise AssertionError("a plan reads voxels")

    shape, cell = Unread.shape, (6, 8, 8)
    z, y, x = np.ogrid[:167, :64, :64]
    cells = ((y - 32) / 24) ** 2 + ((x - 32) / 28) ** 2 + 0 * z < 1
    body = BodyMask(cells, cell, Box((0, 64, 32), (1000, 448, 480)), shape)
    prepared = PreparedVolume(Unread(), upright_affine((1.0, 0.75, 0.75)), body)
    processor = T3DImageProcessor(grid_overlap=0.5)
    tracemalloc.start()
    boxes = processor.plan_views(prepared, "grid")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(boxes) == 31 * 49
    # Milliseconds: what is allocated, and so what is computed on, is below a hundredth of the volume's bytes.
    assert peak < 0.01 * 2 * np.prod(shape)


@settings(max_examples=30, deadline=None)
@given(degrees=st.sampled_from([0, 25]), fraction=st.tuples(*[st.floats(0, 1)] * 3))
def test_views_around_points_hold_them(degrees, fraction):
    shape, size = (30, 40, 50), (8, 9, 10)
    affine = rotation(degrees, (1, 2, 3)) @ upright_affine((2.0, 1.5, 0.7), (-50.0, 20.0, 300.0))
    index = np.multiply(fraction, shape) - 0.5
    point = affine[:3, :3] @ index + affine[:3, 3]
    (box,) = point_plan(shape, size, [point], affine)
    assert box.size == size
    for axis in range(3):
        assert box.start[axis] >= 0
        assert box.stop[axis] <= shape[axis]
        assert box.start[axis] - 1e-6 <= index[axis] + 0.5 <= box.stop[axis] + 1e-6
        if size[axis] / 2 + 1 < index[axis] < shape[axis] - size[axis] / 2 - 2:  # not moved: the point is its middle
            assert abs(box.center[axis] - 0.5 - index[axis]) <= 0.5 + 1e-6


def test_points_are_nibabels_world_coordinates():
    affine = np.array([[-0.8, 0, 0, 30.0], [0, -0.8, 0, 10.0], [0, 0, 2.5, -100.0], [0, 0, 0, 1]])
    data = np.full((60, 50, 30), -1000, dtype=np.int16)
    data[10:50, 5:45] = 40
    data[22, 31, 17] = 900
    image = nibabel.Nifti1Image(data, affine)
    point = nibabel.affines.apply_affine(image.affine, (22, 31, 17))
    processor = T3DImageProcessor(spacing=None, global_size=(8, 8, 8), local_size=(5, 7, 9))
    output = processor([image, image], views=[point])
    assert output["local_pixel_values"].shape == (2, 1, 1, 5, 7, 9)
    assert output["local_pixel_values"][0, 0, 0, 2, 3, 4] == pytest.approx(0.9)
    assert output["local_pixel_values"][0].max() == output["local_pixel_values"][0, 0, 0, 2, 3, 4]
    # One list of points per image, of different lengths.
    output = processor([image, image], views=[[point], [point, point + 1]])
    assert output["local_mask"].tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match="views has 1 entries for 2 images"):
        processor([image, image], views=[[point]])


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            (0.0, 0.0, 900.0),
            r"point 1 of views, \(0, 0, 900\), lies outside the volume, which spans x .* z 298.5..358.5 mm",
        ),
        ((0.0, np.nan, 310.0), "point 1 of views"),
        ((0.0, 310.0), r"point 1 of views is not \(x, y, z\) in mm"),
        ("abc", r"point 1 of views is not \(x, y, z\) in mm"),
    ],
)
def test_a_point_outside_the_volume_is_named_by_its_index(point, message):
    affine = upright_affine((2.0, 1.5, 1.5), (-20.0, -30.0, 299.5))
    with pytest.raises(VolumeGeometryError, match=message):
        point_plan((30, 40, 50), (8, 8, 8), [(0.0, 0.0, 310.0), point], affine)


# ------------------------------------------------------------------------------------------ cut lazily


def grid_case(**changes):
    fields = {"spacing": (4, 4, 4), "global_size": (8, 8, 8), "local_size": (16, 20, 40), "grid_overlap": 0.25}
    processor = T3DImageProcessor(**{**fields, **changes})
    return processor, processor.prepare(body_array((48, 60, 36)), upright_affine((4.0, 4.0, 4.0)))


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("views", ["grid", 5, [(40.0, 60.0, 80.0), (90.0, 100.0, 120.0)]])
@pytest.mark.parametrize("changes", [{}, {"windows": [(-160, 240), (-1350, 150), (-1000, 1000)], "rescale_factor": 2}])
def test_lazy_views_are_the_views(batch_size, views, changes):
    processor, prepared = grid_case(**changes)
    whole = processor.make_views(prepared, views, 3)
    batches = list(processor.iterate_views(prepared, views, generator=3, batch_size=batch_size))
    assert max(len(batch.boxes) for batch in batches) == min(batch_size, len(whole.boxes))
    assert sum((batch.boxes for batch in batches), ()) == whole.boxes
    assert torch.equal(torch.cat([batch.pixel_values for batch in batches]), whole.pixel_values)
    assert torch.equal(torch.cat([batch.positions for batch in batches]), whole.positions)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        processor.iterate_views(prepared, views, batch_size=0)


def test_memory_of_grids():
    """Lazily: two tiles beyond the input. Materialised: not even the tiles twice, the input included."""
    processor, prepared = grid_case(local_size=(32, 48, 48), spacing=(2, 2, 2))
    tile = 4 * 32 * 48 * 48
    num_tiles = len(processor.plan_views(prepared, "grid"))
    assert num_tiles >= 8
    slack = 200_000  # Python objects; a tile is larger

    def iterate():
        for views in processor.iterate_views(prepared, "grid"):
            assert views.pixel_values.nbytes == tile

    assert tile < allocated_peak(iterate) <= 2 * tile + slack
    assert allocated_peak(lambda: processor.make_views(prepared, "grid")) <= num_tiles * tile + slack
    materialised = allocated_peak(lambda: processor(prepared, views="grid"))
    assert materialised + prepared.array.nbytes <= 2 * num_tiles * tile


# ------------------------------------------------------------------------------------------ random views never move


@pytest.mark.parametrize(
    ("view_sampling", "starts", "digest"),
    [
        ("independent", [(32, 5, 21), (13, 21, 11), (3, 10, 31), (18, 14, 33)], "8137f4f3fc021abc"),
        ("overlapping", [(32, 6, 21), (31, 5, 22), (32, 5, 22), (31, 4, 21)], "e2e94b811534f874"),
        ("aligned", [(6, 2, 16), (12, 2, 5), (9, 7, 8), (13, 23, 14)], "866890e2dcb8af37"),
    ],
)
def test_seeded_views_are_those_of_the_first_version(view_sampling, starts, digest):
    """Recorded once: trainings that were started with a seed continue with the same views."""
    processor = T3DImageProcessor(
        spacing=(4, 4, 4), global_size=(16, 16, 16), local_size=(8, 12, 10), view_sampling=view_sampling
    )
    prepared = processor.prepare(body_array((40, 36, 44)), upright_affine((4.0, 4.0, 4.0), (10, -20, 300)))
    views = processor.make_views(prepared, 4, np.random.default_rng((3, 1)))
    assert [box.start for box in views.boxes] == starts
    found = hashlib.sha256(views.pixel_values.numpy().tobytes() + views.positions.numpy().tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("module", [tile_plan_t3d, local_views_t3d])
def test_examples_in_the_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
