# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The path from a volume to tensors: orientation, coverage, positions, seeds, intensities, settings and errors."""

import doctest
import itertools
import json
import pickle
import time

import nibabel
import numpy as np
import pytest
import torch
from body_phantom import body_array, orientations, rotation, upright_affine
from testing_utils import shared_data
from transformers import AutoImageProcessor

import modeling_t3d.image_processing_t3d as image_processing
from modeling_t3d.geometry_t3d import Volume, VolumeError, VolumeGeometryError, VolumeIntensityError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.tile_plan_t3d import aligned_positions

AFFINE = upright_affine((4.0, 4.0, 4.0), (10.0, -20.0, 300.0))


def make_processor(**changes) -> T3DImageProcessor:
    settings = {"spacing": (4, 4, 4), "global_size": (16, 16, 16), "local_size": (8, 12, 10)}
    return T3DImageProcessor(**{**settings, **changes})


def test_doctest():
    results = doctest.testmod(image_processing)
    assert results.attempted > 0
    assert results.failed == 0


# ------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("intensity", ["hu", "percentile"])
@pytest.mark.parametrize("view_sampling", ["independent", "overlapping", "aligned"])
def test_48_orientations_give_identical_tensors(degrees, intensity, view_sampling):
    affine = rotation(degrees, (1, 2, 3)) @ upright_affine((2.0, 1.3, 0.9), (13.7, -21.1, 301.3))
    # The body is off centre and the volume has no symmetry: a wrong flip cannot go unseen.
    array = np.pad(body_array((24, 22, 30)), ((0, 3), (5, 0), (0, 7)), constant_values=-1000)
    array[18:22, 8:11, 20:24] = 300
    processor = make_processor(
        spacing=(2.5, 1.5, 1.5), local_size=(6, 7, 8), intensity=intensity, view_sampling=view_sampling
    )
    first = None
    for volume in orientations(array, affine):
        views = processor(volume, views=3, seed=5)
        grid = processor(volume, views="grid")
        assert torch.equal(grid["pixel_values"], views["pixel_values"])
        outputs = {f"{name} {key}": value for name, out in (("r", views), ("g", grid)) for key, value in out.items()}
        if first is None:
            first = outputs
        for key, value in outputs.items():
            assert torch.equal(value, first[key]), (volume.axis_codes, key)


def test_origin_does_not_matter():
    array = body_array()
    processor = make_processor()
    outputs = [
        processor(array, affine=upright_affine((3.0, 2.7, 2.7), origin), views=2, seed=0)
        for origin in [(0, 0, 0), (1e4 / 3, -777.77, 123.456)]
    ]
    for key in outputs[0]:
        assert torch.equal(outputs[0][key], outputs[1][key])


def world_volume(axis: int, affine: np.ndarray, shape=(40, 36, 44)) -> Volume:
    index = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1)
    return Volume((index @ affine[axis, :3] + affine[axis, 3]).astype(np.float32), affine)


@pytest.mark.parametrize("global_fit", ["body", "crop", "resize"])
@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("deoblique", [False, True])
def test_every_output_affine_is_true(global_fit, degrees, deoblique):
    """The voxels hold a world coordinate, so every output tells where it really lies."""
    affine = rotation(degrees, (1, 2, 3)) @ upright_affine((3.0, 2.0, 2.0), (5, -7, 300))
    processor = make_processor(
        spacing=(2.5, 2.2, 2.2),
        global_fit=global_fit,
        global_crop_extent=60.0,
        intensity="percentile",
        do_rescale=False,
        deoblique=deoblique,
    )
    for axis in range(3):
        output = processor(world_volume(axis, affine), views=3, seed=1, return_geometry=True)
        geometry = output["geometry"][0]
        assert geometry.shape == tuple(processor.prepare(world_volume(axis, affine)).array.shape)
        views = [(output["pixel_values"][0, 0], geometry.global_affine)]
        views += [
            (view[0], view_affine)
            for view, view_affine in zip(output["local_pixel_values"][0], geometry.local_affines, strict=True)
        ]
        for values, view_affine in views:
            index = np.stack(np.meshgrid(*[np.arange(size) for size in values.shape], indexing="ij"), -1)
            world = index @ view_affine[:3, :3].T + view_affine[:3, 3]
            # Only samples well within the source volume and the body's box: beyond lies padding.
            source = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
            inside = ((source > 4) & (source < np.array([40, 36, 44]) - 5)).all(-1)
            grid = (world - geometry.affine[:3, 3]) @ np.linalg.inv(geometry.affine[:3, :3]).T
            low, high = np.array(geometry.body_box.start), np.array(geometry.body_box.stop)
            inside &= ((grid > low + 4) & (grid < high - 5)).all(-1)
            assert inside.sum() > 20
            np.testing.assert_allclose(values.numpy()[inside], world[..., axis][inside], atol=0.02)


def test_lesion_in_the_last_50_mm_of_700_mm_is_in_the_global_view_and_in_the_grid():
    array = body_array((280, 40, 48), noise=5.0)  # 2.5 x 8 x 8 mm: 700 mm high
    for z in (272, 8):  # the lesion's centre lies 20 mm from an end
        lesion = array.copy()
        lesion[z - 5 : z + 5, 18:22, 23:27] = 900
        world = np.array([8 * 24.5, 8 * 19.5, 2.5 * (z - 0.5)])
        processor = make_processor(spacing=(5, 5, 5), global_size=(64, 32, 32), local_size=(24, 24, 24))
        affine = upright_affine((2.5, 8.0, 8.0))
        output = processor(lesion, affine=affine, views="grid", return_geometry=True)
        geometry = output["geometry"][0]
        assert geometry.discarded_body_voxels == 0
        assert geometry.discarded_mm[0] == (0.0, 0.0)
        views = [(output["pixel_values"][0, 0], geometry.global_affine)]
        views += zip(output["local_pixel_values"][0][:, 0], geometry.local_affines, strict=True)
        found = []
        for values, view_affine in views:
            peak = np.unravel_index(int(values.argmax()), values.shape)
            near = np.linalg.norm((view_affine @ [*peak, 1])[:3] - world) < 25
            found.append(bool(values.max() > 0.4) and bool(near))
        assert found[0], "not in the global view"
        assert any(found[1:]), "not in the grid"
        # What a fixed cube does to it, and says.
        cropped = make_processor(spacing=(5, 5, 5), global_size=(64, 32, 32), global_fit="crop")
        output = cropped(lesion, affine=affine, return_geometry=True)
        assert output["pixel_values"].max() < 0.3
        assert output["geometry"][0].discarded_body_voxels > 0
        assert output["geometry"][0].discarded_mm[0] == pytest.approx((158, 158), abs=6)


def test_discarding_body_voxels_warns(caplog, monkeypatch):
    monkeypatch.setattr(image_processing.logger, "propagate", True)
    volume = nibabel.Nifti1Image(body_array().transpose(2, 1, 0), np.diag([4.0, 4.0, 4.0, 1.0]))
    make_processor(global_fit="crop", global_crop_extent=50.0)(volume)
    assert "voxels of the body out of the global view" in caplog.text


def test_grid_covers_every_voxel_of_the_uncropped_volume():
    array = body_array((21, 30, 27))
    processor = make_processor(local_size=(8, 12, 40), grid_overlap=0.25)
    prepared = processor.prepare(array, AFFINE)
    views = processor.make_views(prepared, "grid")
    seen = np.zeros(array.shape, dtype=bool)
    for box, values in zip(views.boxes, views.pixel_values, strict=True):
        low = np.maximum(box.start, 0)
        high = np.minimum(box.stop, array.shape)
        seen[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
        inner = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, box.start, strict=True))
        source = array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        np.testing.assert_allclose(values[0].numpy()[inner], np.clip(source / 1000, -1, 1), atol=1e-6)
    assert seen.all()
    assert (views.pixel_values[0, 0, :, :, 0] == -1).all()  # the tile is wider than the volume: air on both sides
    assert (views.pixel_values[0, 0, :, :, -1] == -1).all()


def test_positions_are_centres_and_extents_of_the_body_box():
    processor = make_processor()
    prepared = processor.prepare(body_array((40, 36, 44)), AFFINE)
    views = processor.make_views(prepared, 5, 3)
    box = prepared.body_box
    for row, view in zip(views.positions.double().numpy(), views.boxes, strict=True):
        for axis in range(3):
            length = box.stop[axis] - box.start[axis]
            center = (view.start[axis] + view.stop[axis]) / 2
            assert row[axis] == pytest.approx(2 * (center - box.start[axis]) / length - 1, abs=1e-6)
            assert row[3 + axis] == pytest.approx(processor.local_size[axis] / length)
    assert views.positions.dtype == torch.float32


# ------------------------------------------------------------------------------------------ views


def test_seed_decides_the_views():
    processor, array = make_processor(), body_array((40, 36, 44))
    first, again, other = (processor(array, affine=AFFINE, views=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["local_pixel_values"], again["local_pixel_values"])
    assert not torch.equal(first["local_positions"], other["local_positions"])
    torch.manual_seed(3)
    free = processor(array, affine=AFFINE, views=4)
    assert not torch.equal(free["local_positions"], processor(array, affine=AFFINE, views=4)["local_positions"])
    torch.manual_seed(3)
    assert torch.equal(free["local_positions"], processor(array, affine=AFFINE, views=4)["local_positions"])


def test_numpys_whole_numbers_are_numbers_of_views():
    processor, array = make_processor(), body_array((40, 36, 44))
    ours, numpys = (processor(array, affine=AFFINE, views=count, seed=1) for count in (2, np.int64(2)))
    assert torch.equal(ours["local_pixel_values"], numpys["local_pixel_values"])


def test_view_centres_lie_in_the_body():
    processor = make_processor(local_size=(2, 2, 2))
    prepared = processor.prepare(body_array((40, 60, 70)), AFFINE)
    mask = np.asarray(prepared.body)
    views = processor.make_views(prepared, 200, 0)
    centers = np.array([box.center for box in views.boxes])
    near = np.clip(np.rint(centers).astype(int), 1, np.array(mask.shape) - 1)
    # A centre is a corner of 8 voxels; one of them was drawn from the body.
    touched = [mask[z - 1 : z + 1, y - 1 : y + 1, x - 1 : x + 1].any() for z, y, x in near]
    assert all(touched)
    assert np.ptp(centers[:, 0]) > 30


def test_overlapping_views_share_their_volume():
    processor = make_processor(view_sampling="overlapping", view_overlap=0.4, local_size=(12, 16, 14))
    prepared = processor.prepare(body_array((60, 50, 54)), AFFINE)
    for seed in range(20):
        boxes = processor.make_views(prepared, 4, seed).boxes
        for a, b in itertools.combinations(boxes, 2):
            shared = np.prod(np.minimum(a.stop, b.stop) - np.maximum(a.start, b.start).astype(float))
            assert shared >= 0.4 * np.prod(a.size) - 1e-9
    assert len({box.start for box in boxes}) > 1


def test_aligned_views_lie_at_the_same_places_in_every_volume_of_the_batch():
    processor = make_processor(view_sampling="aligned", view_jitter=0.05, local_size=(6, 6, 6))
    volumes = [body_array((60, 50, 54)), body_array((48, 60, 64), seed=1)]
    positions = processor(volumes, affine=AFFINE, views=6, seed=4)["local_positions"][..., :3]
    between = (positions[0] - positions[1]).abs().max()
    assert 0 < between < 0.1 + 0.05  # two jitters, and rounding to voxels
    assert (positions[0, 0] - positions[0, 1]).abs().max() > 0.15
    other = processor(volumes, affine=AFFINE, views=6, seed=5)["local_positions"][..., :3]
    assert (other[0] - positions[0]).abs().max() > 0.15
    # The way of a data set: one volume at a time, the batch's positions handed in.
    shared = aligned_positions(6, np.random.default_rng(9))
    single = [
        processor.make_views(processor.prepare(array, AFFINE), 6, index, shared).positions[:, :3].numpy()
        for index, array in enumerate(volumes)
    ]
    assert np.abs(single[0] - single[1]).max() < 0.15
    assert np.abs(np.clip(shared, -1, 1) - single[0]).max() < 0.25  # views are moved back inside the volume


def test_volumes_of_different_sizes_batch_with_a_mask():
    processor = make_processor()
    volumes = [body_array((16, 24, 30)), body_array((40, 36, 44), seed=1)]
    both = processor(volumes, affine=AFFINE, views="grid")
    counts = [len(processor.make_views(processor.prepare(array, AFFINE), "grid").boxes) for array in volumes]
    assert counts[0] < counts[1]
    assert both["local_mask"].dtype == torch.bool
    assert both["local_mask"].sum(1).tolist() == counts
    assert both["local_mask"][0, : counts[0]].all()
    alone = processor(volumes[0], affine=AFFINE, views="grid")
    assert alone["local_mask"].all()
    assert torch.equal(both["local_pixel_values"][:1, : counts[0]], alone["local_pixel_values"])
    assert torch.equal(both["local_positions"][:1, : counts[0]], alone["local_positions"])
    assert torch.equal(both["pixel_values"][:1], alone["pixel_values"])


# ------------------------------------------------------------------------------------------ inputs and intensities


def test_every_kind_of_input_gives_the_same_tensors(tmp_path):
    array = body_array((20, 24, 28))
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0).copy(), np.diag([4.0, 4.0, 4.0, 1.0]))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    affine = upright_affine((4.0, 4.0, 4.0))
    processor = make_processor()
    expected = processor(array, affine=affine)["pixel_values"]
    same = [
        processor(torch.from_numpy(array), affine=torch.from_numpy(affine)),
        processor(array.astype(np.float64), affine=affine),
        processor(array, volume_spacing=(4, 4, 4), volume_axes="SAR"),
        processor(array.transpose(2, 1, 0), affine=image.affine),
        processor(image),
        processor(Volume(array, affine)),
        processor(tmp_path / "scan.nii.gz"),
        processor(str(tmp_path / "scan.nii.gz")),
        processor([tmp_path / "scan.nii.gz"]),
        processor(processor.prepare(array, affine)),
    ]
    for output in same:
        assert torch.equal(output["pixel_values"], expected)
    nested = processor([[array], [], [array]], affine=[affine, affine])
    assert nested["pixel_values"].shape[0] == 2


def test_users_array_is_left_alone():
    array = body_array((20, 24, 28)).astype(np.float32)
    array[:, :3, :3] = -3024
    before = array.copy()
    prepared = make_processor().prepare(array, AFFINE)
    make_processor()(array, affine=AFFINE, views=2)
    np.testing.assert_array_equal(array, before)
    integers = body_array((20, 24, 28))
    assert not np.shares_memory(make_processor().prepare(integers, AFFINE).array, integers)
    assert prepared.array.dtype == np.int16
    assert (prepared.array[:, :3, :3] == -1024).all()


def test_windows_are_channels():
    processor = make_processor(windows=[(-1000, 1000), (-160, 240), (-1350, 150)])
    output = processor(body_array(), affine=AFFINE, views=2)
    assert processor.num_channels == 3
    assert output["pixel_values"].shape[1] == output["local_pixel_values"].shape[2] == 3
    assert output["pixel_values"].min() == -1
    assert output["pixel_values"].max() <= 1
    wide = make_processor(windows=[(-1000, 1000)])(body_array(), affine=AFFINE, views=2)
    assert torch.equal(wide["pixel_values"][:, 0], output["pixel_values"][:, 0])


@pytest.mark.parametrize("intensity", ["unit", "uint8", "zscore", "percentile"])
def test_declared_intensities(intensity):
    unit = np.clip((body_array((24, 28, 30)).astype(np.float64) + 1024) / 4000, 0, 1)
    array = {"unit": unit, "uint8": np.rint(unit * 255).astype(np.uint8)}.get(intensity, unit * 3000 + 100)
    processor = make_processor(intensity=intensity, windows=[(-1, 0), (0, 1)])
    output = processor(array, affine=AFFINE, views=2, seed=0)
    assert output["pixel_values"].shape[1] == processor.num_channels == 1
    prepared = processor.prepare(array, AFFINE)
    assert prepared.array.dtype == np.float32
    if intensity == "zscore":
        body = np.asarray(prepared.body)
        views = processor.make_views(prepared, "grid").pixel_values
        assert views.max() > 0.5
        assert np.isfinite(views.numpy()).all()
        assert body.mean() < 0.95  # the background is not body
    else:
        assert output["pixel_values"].min() >= -1
        assert output["pixel_values"].max() <= 1
    with pytest.raises(VolumeIntensityError):
        make_processor()(array, affine=AFFINE)


def test_rescale_and_normalise_settings():
    processor, array = make_processor(), body_array()
    scaled = processor(array, affine=AFFINE)["pixel_values"]
    raw = processor(array, affine=AFFINE, do_rescale=False)["pixel_values"]
    torch.testing.assert_close(raw.clamp(-1000, 1000) / 1000, scaled)
    negative = processor(array, affine=AFFINE, rescale_factor=-1.0)["pixel_values"]
    assert torch.equal(negative, -scaled)
    normal = processor(array, affine=AFFINE, do_normalize=True, image_mean=[0.5], image_std=[2.0])["pixel_values"]
    torch.testing.assert_close(normal, (scaled - 0.5) / 2)
    assert torch.equal(processor(array, affine=AFFINE)["pixel_values"], scaled)  # a call's settings do not stay


def test_spacing_none_keeps_the_scans_grid():
    processor = make_processor(spacing=None)
    affine = upright_affine((5.0, 1.25, 1.25))
    prepared = processor.prepare(body_array((12, 28, 36)), affine)
    assert prepared.spacing == (5.0, 1.25, 1.25)
    np.testing.assert_array_equal(prepared.array, body_array((12, 28, 36)))
    assert processor(body_array((12, 28, 36)), affine=affine, spacing=(2, 2, 2), return_geometry=True)["geometry"][
        0
    ].spacing == (2.0, 2.0, 2.0)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (np.zeros((4, 5)), {"affine": np.eye(4)}, "volume 0: .*three axes"),
        (np.zeros((1, 4, 5, 6)), {"affine": np.eye(4)}, "volume 0: .*three axes"),
        (np.zeros((4, 5, 6)), {}, "volume 0: an array needs its geometry.*volume_axes"),
        (np.zeros((4, 0, 6)), {"affine": np.eye(4)}, "volume 0: .*needs voxels"),
        (np.zeros((4, 5, 6)), {"affine": np.eye(3)}, "volume 0: the affine has shape"),
        (np.zeros((4, 5, 6)), {"affine": np.zeros((4, 4))}, "volume 0"),
        (np.full((4, 5, 6), np.nan), {"affine": np.eye(4)}, "volume 0: 120 of 120 voxels are NaN"),
        (np.zeros((4, 5, 6)), {"affine": np.eye(4)}, "volume 0: not HU"),
        ("missing.nii.gz", {}, "missing.nii.gz"),
        (3, {}, "not a volume"),
    ],
)
def test_wrong_volume_is_one_clear_error(image, arguments, message):
    with pytest.raises(VolumeError, match=message) as error:
        make_processor()(image, **arguments)
    assert "\n" not in str(error.value)


def test_error_in_a_list_names_the_volume():
    array = body_array()
    with pytest.raises(VolumeIntensityError, match="volume 1"):
        make_processor()([array, array * 0 - 1000], affine=AFFINE)
    with pytest.raises(ValueError, match="affine has 3 entries for 2 images"):
        make_processor()([array, array], affine=[AFFINE] * 3)
    with pytest.raises(ValueError, match="no images were given"):
        make_processor()([])


def test_lists_of_arrays_and_files(tmp_path):
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(body_array().transpose(2, 1, 0), AFFINE @ np.eye(4)[[2, 1, 0, 3]]), path)
    array, processor = body_array(), make_processor()
    expected = processor([array, path], affine=[AFFINE.tolist(), None])["pixel_values"]
    assert torch.equal(expected[0], processor(array, affine=AFFINE)["pixel_values"][0])
    assert torch.equal(expected[1], processor(path)["pixel_values"][0])
    for affines in ([AFFINE, None], (torch.from_numpy(AFFINE), None)):
        assert torch.equal(processor([array, path], affine=affines)["pixel_values"], expected)
    assert torch.equal(processor([path, array], affine=[None, AFFINE])["pixel_values"], expected.flip(0))
    for spacings, axes in (([(4, 4, 4), None], ["SAR", None]), ((None, [4, 4, 4]), (None, "SAR"))):
        images = [path, array] if spacings[0] is None else [array, path]
        mixed = processor(images, volume_spacing=spacings, volume_axes=axes)["pixel_values"]
        assert torch.equal(mixed, expected.flip(0) if spacings[0] is None else expected)
    with pytest.raises(VolumeGeometryError, match="volume 1: the affine is not a numeric matrix"):
        processor([array, array], affine=[AFFINE, [[1, 2], [3]]])
    with pytest.raises(ValueError, match=r"views gives None for one image of several.*\[None, 2\]"):
        processor([array, array], affine=AFFINE, views=[None, 2])


def test_exactly_45_degrees_is_refused():
    affine = rotation(45, (0, 0, 1)) @ AFFINE
    with pytest.raises(VolumeGeometryError, match="45 degrees"):
        make_processor()(body_array(), affine=affine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spaceing": (1, 1, 1)}, "did you mean 'spacing'"),
        ({"spacing": (1, 1)}, "spacing must be three"),
        ({"spacing": (1, 1, 0)}, "spacing must be three"),
        ({"spacing": 1.0}, r"spacing must be three positive mm \(z, y, x\) or None, got 1.0"),
        ({"spacing": "1,1,1"}, "spacing must be three"),
        ({"global_size": 64}, "global_size must be three"),
        ({"global_size": (8, 8)}, "global_size must be three"),
        ({"local_size": (8, 8, 0)}, "local_size must be three"),
        ({"windows": ((1, -1),)}, "windows must be pairs"),
        ({"windows": ()}, "windows must be pairs"),
        ({"windows": 400}, "windows must be pairs"),
        ({"windows": (-160, 240)}, "windows must be pairs"),
        ({"global_fit": "stretch"}, "global_fit must be one of body, crop, resize"),
        ({"intensity": "HU"}, "intensity must be one of"),
        ({"view_sampling": "grid"}, "view_sampling must be one of"),
        ({"size": {"height": 8, "width": 8}}, "use global_size instead"),
        ({"do_normalize": True}, "needs image_mean"),
        ({"image_mean": (0.1, 0.2)}, r"image_mean must hold 1 or 1 \(one per channel\) finite numbers, got"),
        ({"image_mean": float("nan")}, "image_mean must hold"),
        ({"image_std": 0.0}, "image_std must hold .* finite numbers above 0"),
        ({"image_std": (1.0, -1.0), "windows": ((-1, 1), (-2, 2))}, "image_std must hold 1 or 2"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a finite number"),
        ({"seed": 1}, "no field 'seed'"),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        T3DImageProcessor(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": 0}, "views must be"),
        ({"views": "all"}, "views must be"),
        ({"views": 2.5}, "views must be"),
        ({"views": []}, "views must be"),
        ({"num_local_views": 2.5}, "'num_local_views' with value 2.5"),
        ({"global_fit": "x"}, "global_fit must be"),
        ({"vews": 2}, "did you mean 'views'"),
    ],
)
def test_wrong_argument_of_a_call_is_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make_processor()(body_array(), affine=AFFINE, **arguments)
    assert "\n" not in str(error.value)


def test_body_thinner_than_a_global_voxel_is_kept():
    array = body_array((2, 60, 70))
    output = make_processor(global_size=(8, 8, 8))(array, affine=upright_affine((1.0, 4.0, 4.0)))
    assert (output["pixel_values"].amax(dim=(3, 4)) > 0).sum() == 1  # in one slice of the view, the rest is air


# ------------------------------------------------------------------------------------------ settings on disk


def test_settings_survive_saving(tmp_path):
    first = make_processor(
        spacing=None, windows=[(-1000, 1000), (-160, 240)], view_sampling="aligned", global_fit="crop"
    )
    first.save_pretrained(tmp_path)
    second = T3DImageProcessor.from_pretrained(tmp_path)
    assert second.to_dict() == first.to_dict()
    assert second.spacing is None
    assert second.describe() == first.describe()
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "T3DImageProcessor"
    assert not {"affine", "views", "seed"} & set(saved)
    output = [processor(body_array(), affine=AFFINE, views=2, seed=0) for processor in (first, second)]
    for key in output[0]:
        assert torch.equal(output[0][key], output[1][key])
    assert pickle.loads(pickle.dumps(first)).to_dict() == first.to_dict()
    first.to_json_file(tmp_path / "settings.json")
    assert T3DImageProcessor.from_json_file(tmp_path / "settings.json").to_dict() == first.to_dict()
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(found, T3DImageProcessor)
    assert found.to_dict() == first.to_dict()
    assert T3DImageProcessor.from_pretrained(tmp_path, local_size=[4, 4, 4]).local_size == (4, 4, 4)


def test_defaults_are_the_documented_contract():
    processor = T3DImageProcessor()
    assert processor.spacing == (1.5, 0.75, 0.75)
    assert processor.global_size == (128, 256, 256)
    assert processor.local_size == (64, 128, 128)
    text = processor.describe()
    for fact in ("1.5 x 0.75 x 0.75 mm", "128 x 256 x 256", "64 x 128 x 128", "-1000..1000 HU", "superior", "-1024"):
        assert fact in text


def test_preparation_key_follows_what_prepare_depends_on():
    key = make_processor().preparation_key()
    assert json.loads(json.dumps(key))
    assert make_processor(global_size=(8, 8, 8), view_sampling="aligned").preparation_key() == key
    for change in ({"spacing": (3, 3, 3)}, {"intensity": "unit"}, {"deoblique": True}, {"check_intensity": False}):
        assert make_processor(**change).preparation_key() != key


def test_numpy_output():
    output = make_processor()(body_array(), affine=AFFINE, views=2, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in output.values())


def test_batch_is_cast_like_every_batch_of_transformers():
    output = make_processor()(body_array(), affine=AFFINE, views=2, return_geometry=True)
    assert output["pixel_values"].dtype == output["local_positions"].dtype == torch.float32
    half = output.to(torch.float16)
    assert half["pixel_values"].dtype == half["local_pixel_values"].dtype == torch.float16
    assert half["local_mask"].dtype == torch.bool
    assert len(half["geometry"]) == 1


def test_views_of_a_prepared_volume_cost_little_beside_preparing_it():
    processor = T3DImageProcessor(spacing=(4, 4, 4), global_size=(64, 64, 64), local_size=(32, 32, 32))
    volume, affine = body_array((104, 72, 96)), upright_affine((4.0, 4.0, 4.0))
    preparing, viewing = [], []
    for seed in range(8):
        begin = time.thread_time()
        prepared = processor.prepare(volume, affine)
        middle = time.thread_time()
        processor.global_view(prepared)
        processor.make_views(prepared, 4, seed)
        preparing.append(middle - begin)
        viewing.append(time.thread_time() - middle)
    assert min(viewing) < min(preparing) / 2


# ------------------------------------------------------------------------------------------ real scans


@pytest.mark.parametrize(
    "name",
    [
        "totalsegmentator_abdomen/ct.nii.gz",
        "totalsegmentator_dicom_j2k/series",
        "metaimage/lidc_idri_0003_slab.mha",
        "dcmqi_ct_seg/ct-3slice",
        "gantry_tilt_phantom/shear_uint8_slope.nii.gz",
        pytest.param("lidc_idri_0314_chest/ct_4mm.nii.gz", marks=pytest.mark.slow),
    ],
)
def test_real_scan_becomes_tensors(name):
    processor = T3DImageProcessor(spacing=(3, 1.5, 1.5), global_size=(32, 64, 64), local_size=(16, 32, 32))
    output = processor(shared_data(name), views=2, seed=0, return_geometry=True)
    assert output["pixel_values"].shape == (1, 1, 32, 64, 64)
    assert output["local_pixel_values"].shape == (1, 2, 1, 16, 32, 32)
    assert output["pixel_values"].min() == -1
    assert output["pixel_values"].max() > 0.1
    assert output["geometry"][0].discarded_body_voxels == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("orientations/RAS.nii.gz", "255 or less"),
        ("missing_slice_dicom", "slice is missing"),
        ("nifti_variants/example4d.nii.gz", "2 volumes"),
        ("broken/ct_small_truncated.nii.gz", "truncated"),
    ],
)
def test_real_scan_that_cannot_be_right_is_refused(name, reason):
    path = shared_data(name)
    with pytest.raises(VolumeError, match=reason) as error:
        T3DImageProcessor()(path)
    assert str(path) in str(error.value)


def test_liver_keeps_its_hu_through_the_processor():
    processor = T3DImageProcessor(spacing=(3, 3, 3), global_size=(8, 8, 8), local_size=(8, 8, 8))
    prepared = processor.prepare(shared_data("totalsegmentator_abdomen/ct.nii.gz"))
    labels = nibabel.load(shared_data("totalsegmentator_abdomen/labels_117.nii.gz"))
    liver = np.asarray(labels.dataobj).transpose(2, 1, 0) == 5
    assert prepared.array[liver].mean() == pytest.approx(44, abs=1)
