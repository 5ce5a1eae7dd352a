# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tiles back to one array: exact without resampling, within half a voxel with it, equal to the plain way."""

import doctest
import itertools

import nibabel
import numpy as np
import pytest
import torch
from body_phantom import body_array, orientations, rotation, upright_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from process_memory import allocated_peak
from scipy.ndimage import map_coordinates
from testing_utils import shared_data

from modeling_t3d import reassembly_t3d
from modeling_t3d.geometry_t3d import Box, Grid, Volume, VolumeGeometryError, scale_affine
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.reassembly_t3d import reassemble
from modeling_t3d.tile_plan_t3d import grid_plan
from modeling_t3d.volume_io_t3d import write_nifti

AFFINE = upright_affine((2.0, 1.3, 0.9), (13.7, -21.1, 301.3))


def make_processor(**changes) -> T3DImageProcessor:
    fields = {"spacing": None, "global_size": (8, 8, 8), "local_size": (9, 12, 14), "intensity": "percentile"}
    return T3DImageProcessor(**{**fields, **changes})


def tiles_of(array: np.ndarray, boxes) -> list[torch.Tensor]:
    """What a model that knows the truth says about each tile: (..., d, h, w) cut out of (..., D, H, W)."""
    tiles = []
    for box in boxes:
        bounds = zip(box.start, box.stop, array.shape[-3:], strict=True)
        index = np.ix_(*(np.arange(start, stop).clip(0, size - 1) for start, stop, size in bounds))
        tiles.append(torch.from_numpy(array[(..., *index)].copy()))
    return tiles


def world_of(grid: Grid) -> np.ndarray:
    """World coordinates (3, axes of the grid) of its voxels."""
    index = np.stack(np.meshgrid(*[np.arange(size) for size in grid.shape], indexing="ij"))
    return np.tensordot(grid.affine[:3, :3], index, 1) + grid.affine[:3, 3].reshape(3, 1, 1, 1)


# ------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_all_48_orientations_come_back_exactly(overlap, dtype):
    """Without resampling nothing is lost: the input's own voxels, in its own axis order and direction."""
    array = np.random.default_rng(0).integers(-1000, 1000, (21, 16, 25)).astype(np.int16)
    processor = make_processor(grid_overlap=overlap)
    for volume in orientations(array, rotation(20, (1, 2, 3)) @ AFFINE):
        prepared = processor.prepare(volume)
        features = tiles_of(prepared.array.astype(dtype)[None], processor.plan_views(prepared))
        result = processor.reassemble(iter(features), prepared, "features")
        assert result.array.dtype == dtype
        assert np.array_equal(result.array[0], volume.array), volume.axis_codes
        assert np.array_equal(result.affine, volume.affine)
        labels = tiles_of(prepared.array.astype(np.int16), processor.plan_views(prepared))
        result = processor.reassemble(labels, prepared, "labels")
        assert result.array.dtype == np.int16
        assert np.array_equal(result.array, volume.array)


def test_logits_come_back_as_their_labels_exactly():
    array = np.random.default_rng(0).integers(-1000, 1000, (21, 16, 25)).astype(np.int16)
    truth = np.random.default_rng(1).integers(0, 7, array.shape)
    for volume in itertools.islice(orientations(array, AFFINE), 0, 48, 5):
        processor = make_processor(grid_overlap=0.3)
        prepared = processor.prepare(volume)
        logits = tiles_of(np.eye(7, dtype=np.float32)[truth].transpose(3, 0, 1, 2), processor.plan_views(prepared))
        processed = processor.reassemble(logits, prepared, target="processed")
        assert processed.array.dtype == np.uint8
        assert np.array_equal(processed.array, truth)
        stored = processor.reassemble(logits, prepared)
        expected = Volume(processed.array, processed.affine)
        again = Volume(*stored).to_canonical()
        assert np.array_equal(again.array, expected.array)
        np.testing.assert_allclose(again.affine, expected.affine, atol=1e-9)


def test_geometry_of_a_call_serves_like_the_prepared_volume():
    processor = make_processor()
    volume = Volume(body_array((21, 24, 30)), AFFINE)
    batch = processor(volume, views="grid", return_geometry=True)
    geometry = batch["geometry"][0]
    result = processor.reassemble(batch["local_pixel_values"][0], geometry, "features")
    prepared = processor.prepare(volume)
    streamed = (tile for views in processor.iterate_views(prepared, batch_size=3) for tile in views.pixel_values)
    other = processor.reassemble(streamed, prepared, "features")
    assert np.array_equal(result.array, other.array)
    low, high = prepared.value_range
    expected = (np.clip(volume.array, low, high) - (low + high) / 2) * 2 / (high - low)
    covered = result.array[0] != 0
    assert covered.mean() > 0.9
    np.testing.assert_allclose(result.array[0][covered], expected[covered], atol=1e-5)


# ------------------------------------------------------------------------------------------ half a voxel


@settings(max_examples=20, deadline=None)
@given(
    number=st.integers(0, 47),
    axis=st.integers(0, 2),
    spacing=st.tuples(*[st.sampled_from([0.8, 1.0, 1.5, 2.3])] * 3),
    model_spacing=st.tuples(*[st.sampled_from([1.0, 1.7])] * 3),
    shape=st.tuples(*[st.integers(5, 24)] * 3),
    overlap=st.sampled_from([0.0, 0.4]),
    degrees=st.sampled_from([0, 17]),
    deoblique=st.booleans(),
)
def test_round_trip_is_within_half_a_voxel(number, axis, spacing, model_spacing, shape, overlap, degrees, deoblique):
    """Every voxel says where it is: world coordinates as features, the number of a voxel along each axis as labels."""
    array = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    affine = rotation(degrees, (1, 2, 3)) @ upright_affine(spacing, (13.7, -21.1, 301.3))
    volume = next(itertools.islice(orientations(array, affine), number, None))
    processor = make_processor(spacing=model_spacing, grid_overlap=overlap, deoblique=deoblique)
    prepared = processor.prepare(volume)
    # All of it: what the body is in noise is not the question.
    prepared.body = type(prepared.body)(np.ones((1, 1, 1), bool), prepared.array.shape, prepared.body_box, shape)
    boxes = processor.plan_views(prepared)
    processed = Grid(prepared.array.shape, prepared.affine)
    tolerance = 0.5 + 1e-3

    def offsets(found: np.ndarray, places: np.ndarray) -> np.ndarray:
        """World mm between two fields of places, in voxels of the model grid."""
        return np.abs(np.tensordot(np.linalg.inv(processed.affine[:3, :3]), found - places, 1))

    # Features relative to the centre: float32 of coordinates of 300 mm is exact to 3e-5.
    features = tiles_of(world_of(processed).astype(np.float32), boxes)
    result = processor.reassemble(features, prepared, "features")
    assert result.array.shape == (3, *volume.shape)
    assert np.array_equal(result.affine, volume.affine)
    here = world_of(Grid(volume.shape, volume.affine))
    assert offsets(result.array, here).max() < tolerance
    places = np.tensordot(np.linalg.inv(processed.affine)[:3], np.concatenate([here, here[:1] * 0 + 1]), 1)
    length = processed.shape[axis]
    numbers = np.arange(length).reshape([-1 if other == axis else 1 for other in range(3)])
    labels = np.broadcast_to(numbers, processed.shape)
    found = processor.reassemble(tiles_of(labels, boxes), prepared, "labels").array
    assert np.abs(found - places[axis]).max() < tolerance
    logits = np.eye(length, dtype=np.float32)[labels].transpose(3, 0, 1, 2)
    found = processor.reassemble(tiles_of(logits, boxes), prepared, "logits").array
    assert np.abs(found - places[axis]).max() < tolerance


@pytest.mark.parametrize("stride", [(1, 2, 2), (4, 4, 4), (2, 3, 6)])
@pytest.mark.parametrize("overlap", [0.0, 0.4])
def test_outputs_at_a_stride_lie_where_they_should(stride, overlap):
    size, shape = (8, 12, 12), (21, 31, 40)
    grid = Grid(shape, rotation(20, (1, 2, 3)) @ AFFINE)
    boxes = grid_plan(shape, size, overlap)
    counts = [length // step for length, step in zip(size, stride, strict=True)]
    tiles = []
    for box in boxes:
        affine = grid.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ box.start
        tiles.append(world_of(Grid(tuple(counts), scale_affine(affine, stride))).astype(np.float32))
    result = reassemble(tiles, boxes, grid, mode="features")
    expected = world_of(Grid(result.array.shape[1:], result.affine))
    np.testing.assert_allclose(np.linalg.norm(result.affine[:3, :3], axis=0), np.multiply(stride, (2.0, 1.3, 0.9)))
    inner = (slice(None), *[slice(1, -1)] * 3)
    np.testing.assert_allclose(result.array[inner], expected[inner], atol=np.max(stride) * 2.0 * 0.5)
    if all((np.array([box.start for box in boxes]) % stride == 0).all(axis=0)):
        np.testing.assert_allclose(result.array, expected, atol=1e-3)
    full = reassemble(tiles, boxes, grid, grid, mode="features")
    to_cells = np.linalg.inv(result.affine[:3, :3])
    assert np.abs(np.tensordot(to_cells, full.array - world_of(grid), 1)).max() < 1.0  # half a cell, twice


# ------------------------------------------------------------------------------------------ the plain way


def plain_reassembly(tiles, boxes, grid: Grid, target: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Everything in memory, float64: logits on the target grid, and where a tile was."""
    shape = grid.shape
    total, weights = np.zeros((tiles[0].shape[0], *shape)), np.zeros(shape)
    size = boxes[0].size
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    gaussian = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    for tile, box in zip(tiles, boxes, strict=True):
        inside = [slice(max(0, a), min(b, n)) for a, b, n in zip(box.start, box.stop, shape, strict=True)]
        part = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, box.start, strict=True))
        total[(slice(None), *inside)] += tile.double().numpy()[(slice(None), *part)] * gaussian[part]
        weights[tuple(inside)] += gaussian[part]
    blended = total / np.where(weights > 0, weights, 1)
    index = np.tensordot(
        np.linalg.inv(grid.affine)[:3], np.concatenate([world_of(target), np.ones((1, *target.shape))]), 1
    )
    values = np.stack([map_coordinates(channel, index, order=1, mode="nearest") for channel in blended])
    return values, map_coordinates((weights > 0).astype(float), index, order=1, mode="nearest")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 30)] * 3),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
    num_labels=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_tiles_vote_on_labels(shape, overlap, num_labels, seed):
    """Against the votes for each label on the whole grid, in float64."""
    size = (8, 9, 10)
    grid = Grid(shape, upright_affine((2.0, 1.0, 1.0)))
    boxes = grid_plan(shape, size, overlap)
    generator = np.random.default_rng(seed)
    tiles = [generator.integers(0, num_labels, size) for _ in boxes]
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    gaussian = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    votes = np.zeros((num_labels, *shape))
    for tile, box in zip(tiles, boxes, strict=True):
        inside = [slice(max(0, a), min(b, n)) for a, b, n in zip(box.start, box.stop, shape, strict=True)]
        part = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, box.start, strict=True))
        for label in range(num_labels):
            votes[(label, *inside)] += gaussian[part] * (tile[part] == label)
    result = reassemble(iter(tiles), boxes, grid, mode="labels")
    ordered = np.sort(votes, axis=0)
    clear = ordered[-1] > (1 + 1e-5) * (ordered[-2] if num_labels > 1 else 0)
    assert clear.mean() > 0.8
    assert np.array_equal(result.array[clear], votes.argmax(axis=0)[clear])


def test_a_majority_outvotes_the_tile_in_the_middle():
    boxes = [Box((0, 0, start), (4, 4, start + 9)) for start in (0, 1, 2)]
    tiles = [np.full((4, 4, 9), label) for label in (1, 2, 1)]
    result = reassemble(tiles, boxes, Grid((4, 4, 11), np.eye(4)), mode="labels").array[0, 0]
    assert result[5] == 1, "the middle of the second tile, one voxel from those of the other two"
    result = reassemble(tiles[:2], boxes[:2], Grid((4, 4, 11), np.eye(4)), mode="labels").array[0, 0]
    assert result[:10].tolist() == [1] * 5 + [2] * 5


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 30)] * 3),
    target_shape=st.tuples(*[st.integers(3, 30)] * 3),
    overlap=st.sampled_from([0.0, 0.3, 0.7]),
    degrees=st.sampled_from([0, 0, 30, 90]),
    seed=st.integers(0, 9),
)
def test_streamed_logits_equal_the_plain_way(shape, target_shape, overlap, degrees, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(shape, upright_affine((2.0, 1.0, 1.0)))
    boxes = grid_plan(shape, (8, 9, 10), overlap)
    tiles = [torch.randn(5, 8, 9, 10, generator=generator) for _ in boxes]
    # A target of its own spacing, around the same middle.
    steps = [2.0 * shape[0] / target_shape[0], *(shape[a] / target_shape[a] for a in (1, 2))]
    target = Grid(target_shape, scale_affine(grid.affine, [steps[0] / 2, *steps[1:]]))
    target.affine[:] = rotation(degrees, (1.0, 2.0, 3.0)) @ target.affine
    expected, covered = plain_reassembly(tiles, boxes, grid, target)
    index = np.tensordot(
        np.linalg.inv(grid.affine)[:3], np.concatenate([world_of(target), np.ones((1, *target.shape))]), 1
    )
    faces = np.reshape(shape, (3, 1, 1, 1)) - 0.5
    inside = ((index > -0.5) & (index < faces)).all(axis=0)
    outside = ((index < -0.52) | (index > faces + 0.02)).any(axis=0)
    assert covered.min() > 1 - 1e-9
    features = reassemble(iter(tiles), boxes, grid, target, mode="features", background=-7)
    np.testing.assert_allclose(features.array[:, inside], expected[:, inside], atol=1e-4)
    assert (features.array[:, outside] == -7).all()
    labels = reassemble(iter(tiles), boxes, grid, target, mode="logits", background=9).array
    ranked = np.sort(expected, axis=0)
    clear = inside & (ranked[-1] - ranked[-2] > 1e-3)
    assert clear[inside].mean() > 0.9 if inside.sum() > 500 else True
    assert np.array_equal(labels[clear], expected.argmax(axis=0)[clear])
    assert (labels[outside] == 9).all()


def test_order_of_tiles_does_not_matter_but_for_memory():
    grid = Grid((30, 20, 20), upright_affine((1.0, 1.0, 1.0)))
    boxes = grid_plan(grid.shape, (8, 8, 8), 0.5)
    tiles = [torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(len(boxes))]
    order = np.random.default_rng(0).permutation(len(boxes))
    expected = reassemble(tiles, boxes, grid, mode="features").array
    shuffled = reassemble((tiles[n] for n in order), [boxes[n] for n in order], grid, mode="features").array
    np.testing.assert_allclose(shuffled, expected, atol=1e-5)


def test_gaussian_weights_are_those_of_the_field():
    """One tile against zeros next to it: the share of each is nnU-Net's and MONAI's importance map."""
    from monai.data.utils import compute_importance_map

    grid = Grid((12, 8, 8), np.eye(4))
    boxes = (Box((0, 0, 0), (8, 8, 8)), Box((4, 0, 0), (12, 8, 8)))
    tiles = [torch.ones(1, 8, 8, 8), torch.zeros(1, 8, 8, 8)]
    result = reassemble(tiles, boxes, grid, mode="features").array[0]
    importance = compute_importance_map((8, 8, 8), "gaussian", sigma_scale=0.125).numpy()
    shares = importance[4:] / (importance[4:] + importance[:4])
    free = np.minimum(importance[4:], importance[:4]) > importance.min()  # MONAI lifts the smallest weights
    assert free.sum() > 10
    np.testing.assert_allclose(result[4:8][free], shares[free], rtol=1e-4)


# ------------------------------------------------------------------------------------------ air, faults, memory


def test_what_no_tile_covers_is_background():
    array = np.full((40, 60, 120), -1000, dtype=np.int16)
    array[:, 20:40, 6:60] = 40
    processor = make_processor(intensity="hu", local_size=(20, 20, 20), spacing=(2, 1, 1))
    prepared = processor.prepare(array, upright_affine((1.5, 1.0, 1.0)))
    boxes = processor.plan_views(prepared)
    for mode, tile in (("labels", torch.ones(20, 20, 20).int()), ("logits", torch.eye(2)[1][:, None, None, None])):
        tile = tile.expand(2, 20, 20, 20) if mode == "logits" else tile
        result = processor.reassemble((tile for _ in boxes), prepared, mode, background=0).array
        assert result.shape == array.shape
        assert (result[:, :, :60] == 1)[:, 20:40].all()
        assert (result[:, :, 81:] == 0).all()
    result = processor.reassemble((tile.float() for _ in boxes), prepared, "features", background=np.nan).array
    assert np.isnan(result[..., 81:]).all()
    assert np.isfinite(result[:, :, 20:40, :60]).all()


def test_a_gap_between_tiles_is_background():
    grid = Grid((60, 4, 4), np.eye(4))
    boxes = (Box((2, 0, 0), (6, 4, 4)), Box((50, 0, 0), (54, 4, 4)))
    result = reassemble([np.full((4, 4, 4), n) for n in (1, 2)], boxes, grid, mode="labels", background=5).array
    assert result[:, 0, 0].tolist() == [5] * 2 + [1] * 4 + [5] * 44 + [2] * 4 + [5] * 6


@pytest.mark.parametrize("background", [-1, 255, 300])
def test_a_background_that_no_byte_holds_widens_the_labels(background):
    grid, boxes = Grid((12, 4, 4), np.eye(4)), (Box((0, 0, 0), (4, 4, 4)),)
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    for outputs, mode in ((np.stack([0.0 * labels, 1.0 * labels]), "logits"), (labels, "labels")):
        result = reassemble([outputs], boxes, grid, mode=mode, background=background).array
        assert result[:, 0, 0].tolist() == [1] * 4 + [background] * 8
        assert (result.dtype == np.uint8) == (background == 255)


def test_mirrored_arrays_and_those_of_another_byte_order_are_outputs():
    grid, boxes = Grid((4, 4, 4), np.eye(4)), (Box((0, 0, 0), (4, 4, 4)),)
    features = np.random.default_rng(0).random((2, 4, 4, 4)).astype(np.float32)
    for output in (features[:, ::-1], features[:, ::-1].astype(">f4")):
        result = reassemble([output], boxes, grid, mode="features").array
        np.testing.assert_array_equal(result, features[:, ::-1])


@pytest.mark.parametrize(
    ("outputs", "mode", "message"),
    [
        ([np.zeros((2, 4, 4, 4))] * 3, "logits", "outputs go on after the 2 tiles"),
        ([np.zeros((2, 4, 4, 4))], "logits", "outputs end after 1 of 2 tiles"),
        ([], "logits", "outputs end after 0 of 2 tiles"),
        (
            [np.zeros((4, 4, 4))] * 2,
            "logits",
            r"shape \(4, 4, 4\); mode='logits' takes \(channels, d, h, w\)",
        ),
        ([np.zeros((1, 4, 4, 4)), np.zeros((2, 4, 4, 4))], "features", "output of tile 1 has shape"),
        ([np.zeros((4, 4, 4))] * 2, "labels", "tile 0 is torch.float64: mode='labels' takes integers"),
        ([np.zeros((2, 4, 4, 4), dtype=int)] * 2, "logits", "tile 0 is torch.int64"),
        *(
            ([np.zeros((2, 4, 4, 4)), np.full((2, 4, 4, 4), value)], mode, "tile 1 holds NaN or infinite values")
            for value, mode in ((np.nan, "logits"), (-np.inf, "logits"), (np.inf, "features"))
        ),
        ([np.zeros((2, 4, 4, 4))] * 2, "probabilities", "mode must be one of logits, labels, features"),
    ],
)
def test_wrong_outputs_are_one_clear_error(outputs, mode, message):
    boxes = grid_plan((6, 4, 4), (4, 4, 4))
    with pytest.raises(ValueError, match=message):
        reassemble(outputs, boxes, Grid((6, 4, 4), np.eye(4)), mode=mode)


def test_unknown_targets_are_one_clear_error(tmp_path):
    processor = make_processor()
    prepared = processor.prepare(body_array((10, 12, 14)), AFFINE)
    with pytest.raises(ValueError, match="target must be"):
        processor.reassemble([], prepared, target="scan")
    prepared.input_grid = None  # as in a cache of an early version
    with pytest.raises(VolumeGeometryError, match="prepare it again, or pass the scan as target="):
        processor.reassemble([], prepared)


def test_input_grid_survives_the_cache(tmp_path):
    processor = make_processor(spacing=(2, 2, 2))
    image = nibabel.Nifti1Image(body_array((20, 24, 28)).transpose(2, 1, 0), np.diag([-1.0, -1.5, 2.0, 1.0]))
    prepared = processor.prepare(image)
    prepared.save(tmp_path / "volume")
    loaded = PreparedVolume.load(tmp_path / "volume")
    assert loaded.input_grid.shape == image.shape
    assert np.array_equal(loaded.input_grid.affine, image.affine)
    assert processor.plan_views(loaded) == processor.plan_views(prepared)


def test_logits_of_many_classes_are_never_all_in_memory():
    """A scan four tiles high: the peak is a slab of one tile's depth and what one tile needs, not all logits."""
    num_classes, shape, size = 40, (128, 64, 64), (16, 32, 32)
    grid = Grid(shape, upright_affine((2.0, 1.0, 1.0)))
    target = Grid((shape[0] * 2, 96, 96), scale_affine(grid.affine, (0.5, 64 / 96, 64 / 96)))
    boxes = grid_plan(shape, size)
    tile = 4 * num_classes * np.prod(size)
    slab = 4 * num_classes * (size[0] + 1) * shape[1] * shape[2]
    whole = 4 * num_classes * np.prod(shape)

    def logits():
        for number, _ in enumerate(boxes):
            level = torch.linspace(-1, 1, 32) * (number % 7)
            yield level.expand(num_classes, *size) * torch.arange(num_classes).reshape(-1, 1, 1, 1)

    peak = allocated_peak(lambda: reassemble(logits(), boxes, grid, target))
    result = np.prod(target.shape)
    assert slab < peak < slab + 3 * tile + result
    assert peak < 0.3 * whole


def test_a_real_scan_comes_back_on_its_own_grid(tmp_path):
    path = shared_data("totalsegmentator_abdomen/ct.nii.gz")
    processor = T3DImageProcessor(local_size=(48, 96, 96), spacing=(3, 2, 2), global_size=(16, 16, 16))
    prepared = processor.prepare(path)
    tiles = (tile for views in processor.iterate_views(prepared, batch_size=2) for tile in views.pixel_values)
    logits = (torch.cat([-tile - 0.5, tile + 0.5]) for tile in tiles)
    segmentation = Volume(*processor.reassemble(logits, prepared))
    write_nifti(segmentation, tmp_path / "tissue.nii.gz")
    scan, stored = nibabel.load(path), nibabel.load(tmp_path / "tissue.nii.gz")
    assert stored.shape == scan.shape
    np.testing.assert_allclose(stored.affine, scan.affine, atol=1e-5)
    # What is tissue in the scan is tissue in the result, but for its skin.
    agreement = (np.asarray(stored.dataobj) == (np.asarray(scan.dataobj) > -500)).mean()
    assert agreement > 0.97


def test_examples_in_the_docstrings():
    results = doctest.testmod(reassembly_t3d)
    assert results.attempted > 0
    assert results.failed == 0
