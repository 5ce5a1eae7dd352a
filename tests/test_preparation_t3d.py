# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A file that is resampled while it is decompressed gives the bits of the same volume in memory, in less memory."""

import tracemalloc

import nibabel
import numpy as np
import pytest
import torch
from body_phantom import body_array, orientations, rotation, upright_affine

from modeling_t3d import preparation_t3d, resample_t3d
from modeling_t3d.geometry_t3d import Volume, VolumeError, VolumeGeometryError, VolumeIntensityError, VolumeReadError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import write_nifti

AFFINE = upright_affine((2.0, 1.5, 1.5), (10.0, -20.0, 300.0))


@pytest.fixture(autouse=True)
def threads_and_slabs_for_small_volumes(monkeypatch):
    monkeypatch.setattr(resample_t3d, "SMALL", 0)
    monkeypatch.setattr(preparation_t3d, "SMALL", 0)
    monkeypatch.setattr(preparation_t3d, "SLAB", 5000)


def scan(shape=(26, 28, 36)) -> np.ndarray:
    array = np.pad(body_array(shape), ((0, 3), (5, 0), (0, 7)), constant_values=-1000)
    array[18:22, 8:11, 20:24] = 300
    return array


def make_processor(**changes) -> T3DImageProcessor:
    settings = {"spacing": (3, 2, 2), "global_size": (8, 16, 16), "local_size": (4, 8, 8)}
    return T3DImageProcessor(**{**settings, **changes})


def save(path, array, affine=AFFINE) -> str:
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine @ np.eye(4)[[2, 1, 0, 3]]), path)
    return str(path)


def assert_same(first, second):
    assert first.array.dtype == second.array.dtype
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_array_equal(first.affine, second.affine)
    np.testing.assert_array_equal(first.body.cells, second.body.cells)
    np.testing.assert_array_equal(first.body.dense, second.body.dense)
    assert first.body.box == second.body.box
    assert (first.value_range, first.outside) == (second.value_range, second.outside)


@pytest.mark.parametrize("spacing", [(3, 2, 2), (0.7, 1.1, 4), (2, 1.5, 1.5), None])
@pytest.mark.parametrize("intensity", ["hu", "zscore"])
def test_all_48_orientations_from_disk(tmp_path, spacing, intensity, monkeypatch):
    affine = rotation(20, (1, 2, 3)) @ AFFINE
    processor = make_processor(spacing=spacing, intensity=intensity)
    streamed = 0
    stream = preparation_t3d.Preparation._stream

    def counted(*arguments):
        nonlocal streamed
        streamed += 1
        return stream(*arguments)

    monkeypatch.setattr(preparation_t3d.Preparation, "_stream", counted)
    expected = processor.prepare(scan(), affine)
    for number, volume in enumerate(orientations(scan(), affine)):
        if number % 3:  # every third: 16 of them, in all six orders
            continue
        write_nifti(volume, tmp_path / "scan.nii.gz")
        prepared = processor.prepare(tmp_path / "scan.nii.gz")
        np.testing.assert_allclose(prepared.affine, expected.affine, atol=1e-3)
        prepared.affine = expected.affine  # the header holds float32
        assert_same(prepared, expected)
        np.testing.assert_array_equal(prepared.input_grid.shape, volume.shape)
        assert torch.equal(processor.global_view(prepared), processor.global_view(expected))
    assert 4 <= streamed <= 8  # those whose slices lie one after the other


@pytest.mark.parametrize("where", ["everywhere", "last slices", "first slice alone"])
def test_padding_is_decided_by_the_whole_volume(tmp_path, where):
    array = scan()
    slices = {"everywhere": slice(None), "last slices": slice(20, None), "first slice alone": slice(0, 1)}[where]
    array[slices, :6, :6] = -2000
    array[slices, :3, :3] = -3024
    if where == "first slice alone":
        array[0, 2:, :] = scan()[0, 2:, :]
        array[0, 2, 5] = -2000  # too few voxels of the volume to be padding, though enough of the first slab
        array[0, :2, :6] = scan()[0, :2, :6]
    processor = make_processor()
    streamed, expected = processor.prepare(save(tmp_path / "scan.nii.gz", array)), processor.prepare(array, AFFINE)
    assert_same(streamed, expected)
    # The rounding and averaging of a voxel of -2000 HU shows where it was not replaced.
    assert (streamed.array.min() < -1024) == (where == "first slice alone")


@pytest.mark.parametrize("change", [{"intensity": "percentile"}, {"check_intensity": False}, {"antialias": False}])
def test_other_settings(tmp_path, change):
    processor = make_processor(**change)
    array = scan()
    assert_same(processor.prepare(save(tmp_path / "scan.nii.gz", array)), processor.prepare(array, AFFINE))
    assert processor.preparation_key() != make_processor(deoblique=True).preparation_key()


def test_antialias_is_a_setting_of_both_passes():
    averaged, plain = make_processor(), make_processor(antialias=False)
    noise = body_array((20, 40, 40), noise=300.0)
    first, second = averaged.prepare(noise, AFFINE), plain.prepare(noise, AFFINE)
    inside = (slice(2, 7), slice(12, 18), slice(13, 17))  # the abdomen
    assert first.array[inside].std() < 0.9 * second.array[inside].std()
    assert not torch.equal(averaged.global_view(first), plain.global_view(first))
    assert "antialias" not in averaged.preparation_key()
    assert plain.preparation_key()["antialias"] is False


def test_tilted_and_sheared_files(tmp_path):
    array, affine = scan(), rotation(20, (1, 2, 3)) @ AFFINE
    processor = make_processor(deoblique=True)
    prepared = processor.prepare(save(tmp_path / "tilted.nii.gz", array, affine))
    expected = processor.prepare(nibabel.load(tmp_path / "tilted.nii.gz"))
    assert_same(prepared, expected)
    sheared = AFFINE.copy()
    sheared[:3, 0] += (0.0, 0.4, 0.0)
    prepared = make_processor().prepare(save(tmp_path / "sheared.nii.gz", array, sheared))
    assert_same(prepared, make_processor().prepare(nibabel.load(tmp_path / "sheared.nii.gz")))
    assert "resampled" in prepared.warnings[0]
    assert prepared.input_grid.shape == array.shape[::-1]


def test_errors_come_out_of_the_threads(tmp_path):
    path = save(tmp_path / "scan.nii.gz", scan())
    packed = (tmp_path / "scan.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "checksum.nii.gz").write_bytes(packed[:-8] + b"\0\0\0\0" + packed[-4:])
    before = torch.get_num_threads()
    for name in ("cut", "checksum"):
        with pytest.raises(VolumeReadError, match=f"{name}.nii.gz: .*truncated"):
            make_processor().prepare(tmp_path / f"{name}.nii.gz")
    values = scan().astype(np.float32)
    values[4, 5, 6] = np.nan
    with pytest.raises(VolumeIntensityError, match=r"nan.nii.gz: 1 of \d+ voxels are NaN"):
        make_processor().prepare(save(tmp_path / "nan.nii.gz", values))
    with pytest.raises(VolumeIntensityError, match=r"unit.nii.gz: not HU"):
        make_processor().prepare(save(tmp_path / "unit.nii.gz", values[5:] / 1000))
    with pytest.raises(VolumeError, match=r"between.nii.gz: .*45 degrees"):
        make_processor().prepare(save(tmp_path / "between.nii.gz", scan(), rotation(45, (0, 0, 1)) @ AFFINE))
    assert torch.get_num_threads() == before
    assert make_processor().prepare(path).array.dtype == np.int16


def test_an_error_of_the_resampler_stops_the_reader(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyError("deliver")

    monkeypatch.setattr(preparation_t3d._ModelGrid, "deliver", fail)
    with pytest.raises(KeyError):
        make_processor().prepare(save(tmp_path / "scan.nii.gz", scan()))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Four times the slices: the voxels of the additional ones are never in memory together."""
    processor = make_processor(spacing=(6, 4, 4))
    monkeypatch.setattr(preparation_t3d, "SLAB", 2 * 64 * 64 * 2)
    peaks, sizes = [], []
    for depth in (120, 480):
        path = save(tmp_path / "scan.nii.gz", body_array((depth, 64, 64)))
        processor.prepare(path)
        tracemalloc.start()
        processor.prepare(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(2 * depth * 64 * 64)
    assert peaks[1] - peaks[0] < 0.4 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("deoblique", [False, True])
def test_a_damaged_voxel_size_is_refused_before_anything_is_allocated(tmp_path, monkeypatch, deoblique):
    """64 voxels of 40 mm along each axis would take 37 GiB."""
    monkeypatch.setattr(preparation_t3d, "CellMeans", None)  # what follows the grid
    affine = upright_affine((40.0, 40.0, 40.0))
    affine = rotation(20, (1, 2, 3)) @ affine if deoblique else affine
    processor = make_processor(spacing=(1.5, 0.75, 0.75), deoblique=deoblique)
    path = save(tmp_path / "scan.nii.gz", body_array((64, 64, 64)), affine)
    for image, arguments, name in ((path, {}, path), (body_array((64, 64, 64)), {"affine": affine}, "volume 0")):
        with pytest.raises(VolumeGeometryError) as caught:
            processor(image, **arguments)
        message = str(caught.value)
        assert message.startswith(f"{name}: it extends over 2560 x 2560 x 2560 mm")
        assert "voxels of 40 x 40 x 40 mm" in message
        assert "on the model grid of 1.5 x 0.75 x 0.75 mm" in message
        assert ("1707 x 3414 x 3414 voxels" in message) == (not deoblique)


def test_large_scans_are_no_damage():
    def check(shape, spacing, new_spacing):
        nothing = np.broadcast_to(np.zeros(1, dtype=np.int16), shape)
        new_shape = [round(count * old / new) for count, old, new in zip(shape, spacing, new_spacing, strict=True)]
        preparation_t3d._check_extent(Volume(nothing, upright_affine(spacing)), new_shape, new_spacing)

    check((2000, 512, 512), (1.0, 1.5, 1.5), (0.75, 0.75, 0.75))  # a whole body, 2 m
    check((64, 64, 64), (40.0, 40.0, 40.0), (40.0, 40.0, 40.0))  # no more voxels than there are
    for spacing in ((50.0, 1.0, 1.0), (20.0, 20.0, 20.0)):  # along one axis, along all
        with pytest.raises(VolumeGeometryError, match="more than any body"):
            check((100, 100, 100), spacing, (0.75, 0.75, 0.75))


def test_memory_that_is_not_there_is_a_typed_error(tmp_path, monkeypatch):
    path = save(tmp_path / "scan.nii.gz", scan())

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(preparation_t3d, "CellMeans", fail)
    for image, affine, name in ((path, None, path), (scan(), AFFINE, "the volume")):
        with pytest.raises(VolumeError) as caught:
            make_processor().prepare(image, affine)
        assert (
            str(caught.value) == f"{name}: the volume does not fit in memory on the model grid; use a coarser spacing"
        )
