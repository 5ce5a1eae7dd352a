# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""NIfTI, NRRD and MetaImage from disk, arrays and images in memory, writing, and damaged files."""

import doctest
import gzip
import itertools
import os
import struct
import sys

import nibabel
import numpy as np
import pytest
import torch
from transformers.utils.logging import warning_once

from modeling_t3d import volume_arithmetic_t3d, volume_io_t3d
from modeling_t3d.geometry_t3d import Volume, VolumeError, VolumeGeometryError
from modeling_t3d.volume_arithmetic_t3d import remove_shear, rescale
from modeling_t3d.volume_io_t3d import (
    VolumeReadError,
    list_series,
    read_label_map,
    read_volume,
    to_volume,
    volume_files,
    write_nifti,
)
from modeling_t3d.volume_itk_t3d import LPS_TO_RAS

SimpleITK = pytest.importorskip("SimpleITK")

AFFINE = np.array([[0, -0.7, 0.1, 3.5], [0.8, 0, 0, -7.25], [0, 0.0875, 0.8, 11.0], [0, 0, 0, 1]])
AFFINE[:3, 1] = np.cross(AFFINE[:3, 2], AFFINE[:3, 0])
AFFINE[:3, 1] *= 0.7 / np.linalg.norm(AFFINE[:3, 1])


@pytest.fixture
def scan():
    return np.random.default_rng(0).integers(-1024, 2000, (5, 6, 7)).astype(np.int16)


def write_image(path, array, affine=AFFINE, slope=None, intercept=None, kind=nibabel.Nifti1Image):
    image = kind(array, affine, dtype=array.dtype)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    if slope is not None:  # nibabel scales on saving: put the stored numbers and the wanted factors back
        header = image.header.copy()
        header.set_slope_inter(slope, intercept)
        header["vox_offset"] = 352
        payload = header.binaryblock + b"\0" * 4 + array.tobytes(order="F")
        path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_values_and_affine(tmp_path, scan, suffix, kind):
    volume = read_volume(write_image(tmp_path / f"scan{suffix}", scan, kind=kind))
    np.testing.assert_array_equal(volume.array, scan)
    assert volume.array.dtype == np.int16
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.source == str(tmp_path / f"scan{suffix}")
    assert volume.warnings == ()


@pytest.mark.parametrize(
    ("stored", "slope", "intercept", "expected"),
    [
        ("uint8", None, None, "int16"),
        ("int8", None, None, "int16"),
        ("uint16", 1.0, -1024.0, "int16"),
        ("uint16", 16.0, 0.0, "int16"),
        ("int32", None, None, "int16"),
        ("int64", None, None, "int16"),
        (">i2", None, None, "int16"),
        ("uint16", 40.0, 0.0, "int32"),
        ("int16", 2.5, 0.0, "float32"),
        ("uint8", 7.1098, -1024.0, "float32"),
        ("float32", None, None, "float32"),
        ("float64", 2.0, 1.0, "float32"),
    ],
)
def test_nifti_storage_types_and_rescale(tmp_path, stored, slope, intercept, expected):
    array = (
        np.arange(120).reshape(4, 5, 6).astype(stored) * 17 % 2000
        if stored[-1] != "8"
        else np.arange(120).reshape(4, 5, 6).astype(stored)
    )
    array = array.astype(stored)
    path = write_image(tmp_path / "scan.nii", array, slope=slope, intercept=intercept)
    volume = read_volume(path)
    wanted = array.astype(np.float64) * (1.0 if slope is None else np.float32(slope)) + (intercept or 0.0)
    assert volume.array.dtype == expected
    np.testing.assert_allclose(volume.array, wanted, rtol=1e-6)
    np.testing.assert_allclose(volume.array, np.asarray(nibabel.load(path).dataobj), rtol=1e-6)


def test_rescale_is_exact_near_the_limits_of_the_types():
    for stored, slope, intercept in itertools.product(
        ([0, 65535], [-32768, 32767], [0, 40000], [-(2**31), 2**31 - 1]), (1.0, -1.0, 3.0), (0.0, -1024.0, 40000.0)
    ):
        values = rescale(np.array(stored, dtype=np.int64), slope, intercept)
        wanted = np.array(stored, dtype=np.int64) * int(slope) + int(intercept)
        if values.dtype.kind == "i":
            np.testing.assert_array_equal(values, wanted)
        else:
            np.testing.assert_allclose(values, wanted, rtol=1e-6)
            assert max(abs(wanted.min()), abs(wanted.max()), 2**31 - 1) >= 2**31 - 1


def test_nifti_orientation_codes(tmp_path, scan, caplog):
    image = nibabel.Nifti1Image(scan, None)
    image.set_qform(AFFINE, code=1)
    image.set_sform(None, code=0)
    nibabel.save(image, tmp_path / "qform.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "qform.nii").affine, AFFINE, atol=1e-5)
    image.set_qform(None, code=0)
    nibabel.save(image, tmp_path / "neither.nii")
    assert not caplog.records
    warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="modeling_t3d"):
        volume = read_volume(tmp_path / "neither.nii")
    assert "no orientation" in volume.warnings[0]
    assert "no orientation" in caplog.text
    assert "neither" not in caplog.text
    np.testing.assert_array_equal(volume.affine, nibabel.load(tmp_path / "neither.nii").affine)


def test_nifti_lengths_in_other_units(tmp_path, scan):
    image = nibabel.Nifti1Image(scan, np.diag([0.001, 0.001, 0.002, 1]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "meter.nii")
    volume = read_volume(tmp_path / "meter.nii")
    assert volume.spacing == (1.0, 1.0, 2.0)
    assert "mm" in volume.warnings[0]


def test_only_dicom_has_series(tmp_path, scan):
    for name in ("scan.nii.gz", "scan.mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(tmp_path / name))
        with pytest.raises(VolumeReadError, match="has no series, as only DICOM has"):
            list_series(tmp_path / name)


def test_four_dimensions(tmp_path, scan):
    four = np.stack([scan, scan[::-1]], axis=-1)
    path = write_image(tmp_path / "four.nii.gz", four)
    with pytest.raises(
        VolumeReadError, match=r"four.nii.gz: holds 2 volumes \(4-D\); choose one with time_index=0..1"
    ):
        read_volume(path)
    np.testing.assert_array_equal(read_volume(path, time_index=1).array, scan[::-1])
    for wrong in (2, -1, True, 0.5, "1"):
        with pytest.raises(VolumeReadError, match="time_index="):
            read_volume(path, time_index=wrong)
    np.testing.assert_array_equal(read_volume(write_image(path, scan[..., None])).array, scan)
    with pytest.raises(VolumeReadError, match="several values per voxel"):
        read_volume(write_image(path, np.stack([scan] * 3, axis=-1)[:, :, :, None]))
    with pytest.raises(VolumeReadError, match="needs three"):
        read_volume(write_image(path, scan[0]))
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(scan), SimpleITK.GetImageFromArray(scan + 1)])
    for suffix in ("mha", "nrrd"):
        path = tmp_path / f"four.{suffix}"
        SimpleITK.WriteImage(image, str(path))
        with pytest.raises(VolumeReadError, match="time_index=0"):
            read_volume(path)
        np.testing.assert_array_equal(read_volume(path, time_index=1).array, scan + 1)


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd", "nii.gz"])
@pytest.mark.parametrize("compressed", [False, True])
def test_itk_formats_agree_with_nifti(tmp_path, scan, suffix, compressed):
    image = SimpleITK.GetImageFromArray(scan)  # x is the last axis
    directions = LPS_TO_RAS[:3, :3] @ AFFINE[:3, :3] / np.linalg.norm(AFFINE[:3, :3], axis=0)
    image.SetDirection(directions.ravel().tolist())
    image.SetSpacing((0.8, 0.7, 1.25))
    image.SetOrigin((3.0, -4.5, 6.0))
    SimpleITK.WriteImage(image, str(tmp_path / f"scan.{suffix}"), useCompression=compressed)
    SimpleITK.WriteImage(image, str(tmp_path / "reference.nii"))
    volume, reference = read_volume(tmp_path / f"scan.{suffix}"), nibabel.load(tmp_path / "reference.nii")
    assert volume.array.dtype == np.int16
    assert volume.warnings == ()
    canonical = volume.to_canonical()
    expected = Volume(np.asarray(reference.dataobj), reference.affine).to_canonical()
    np.testing.assert_array_equal(canonical.array, expected.array)
    np.testing.assert_allclose(canonical.affine, expected.affine, atol=1e-5)


def test_numbers_written_as_text_and_lines_before_packed_voxels(tmp_path):
    """Both take fewer bytes than the header's type times its size."""
    values = np.arange(24.0).reshape(2, 3, 4)
    text = " ".join(f"{value:g}" for value in values.ravel())
    nrrd = "NRRD0004\ntype: double\ndimension: 3\nsizes: 4 3 2\nencoding: ascii\n\n"
    meta = "NDims = 3\nBinaryData = False\nDimSize = 4 3 2\nElementType = MET_DOUBLE\nElementDataFile = LOCAL\n"
    (tmp_path / "text.nrrd").write_text(nrrd + text)
    (tmp_path / "text.mha").write_text(meta + text + "\n")
    packed = b"a line to skip\n" + gzip.compress(values.astype("<f8").tobytes())
    (tmp_path / "skip.raw.gz").write_bytes(packed)
    header = nrrd.replace("encoding: ascii\n\n", "encoding: gzip\nendian: little\n")
    (tmp_path / "skip.nhdr").write_text(f"{header}line skip: 1\ndata file: skip.raw.gz\n")
    for name in ("text.nrrd", "text.mha", "skip.nhdr"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, values)


def test_colour_and_complex_are_refused(tmp_path, scan):
    for array in (scan.astype(np.complex64), np.zeros((2, 3, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])):
        with pytest.raises(VolumeReadError, match="not one number per voxel"):
            read_volume(write_image(tmp_path / "odd.nii.gz", array))
    colour = SimpleITK.GetImageFromArray(np.zeros((2, 3, 4, 3), dtype=np.uint8), isVector=True)
    for suffix in ("mha", "nrrd"):
        SimpleITK.WriteImage(colour, str(tmp_path / f"odd.{suffix}"))
        with pytest.raises(VolumeReadError, match="not one number per voxel"):
            read_volume(tmp_path / f"odd.{suffix}")


def test_detached_data_and_missing_data(tmp_path, scan):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(tmp_path / "scan.mhd"))
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.mhd").array, scan)
    os.unlink(tmp_path / "scan.raw")
    with pytest.raises(VolumeReadError, match=r"scan\.mhd: the file that its header names for the voxels is missing"):
        read_volume(tmp_path / "scan.mhd")


def test_a_scan_of_another_format_is_written_in_the_order_of_its_axes(tmp_path, scan):
    image = SimpleITK.GetImageFromArray(scan)
    image.SetSpacing((0.8, 0.9, 2.5))
    SimpleITK.WriteImage(image, str(tmp_path / "scan.mha"))
    volume = read_volume(tmp_path / "scan.mha")
    write_nifti(volume, tmp_path / "scan.nii.gz", reorder=True)
    written = SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), scan)
    for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(written, name)(), getattr(image, name)(), atol=1e-5)
    turned = Volume(volume.array.transpose(1, 0, 2), volume.affine[:, [1, 0, 2, 3]])
    write_nifti(turned, tmp_path / "turned.nii.gz", reorder=True)
    assert read_volume(tmp_path / "turned.nii.gz").axis_codes == turned.axis_codes


def test_the_files_of_a_volume(tmp_path, scan):
    image = SimpleITK.GetImageFromArray(scan)
    for name in ("scan.mhd", "scan.mha", "detached.nhdr"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
    assert [file.name for file in volume_files(tmp_path / "scan.mhd")] == ["scan.mhd", "scan.raw"]
    assert [file.name for file in volume_files(tmp_path / "detached.nhdr")] == ["detached.nhdr", "detached.raw"]
    assert volume_files(str(tmp_path / "scan.mha")) == [tmp_path / "scan.mha"]
    assert len(volume_files(tmp_path)) == 5
    # A pattern stands for several files, which may be any of the folder.
    header = (tmp_path / "scan.mhd").read_text()
    (tmp_path / "slices.mhd").write_text(header.replace("scan.raw", "slice%03d.raw 1 4 1"))
    assert len(volume_files(tmp_path / "slices.mhd")) == 6


def damaged_files(folder, scan):
    """(name, bytes) of files that cannot be read right."""
    plain = write_image(folder / "plain.nii", scan).read_bytes()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(folder / "plain.mha"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(folder / "plain.nrrd"))
    meta, nrrd = (folder / "plain.mha").read_bytes(), (folder / "plain.nrrd").read_bytes()

    def patched(offset, form, *values):
        data = bytearray(plain)
        struct.pack_into(form, data, offset, *values)
        return bytes(data)

    yield "empty.nii", b""
    yield "short.nii", plain[:100]
    yield "truncated.nii", plain[:-3]
    yield "truncated.nii.gz", gzip.compress(plain)[:-40]
    yield "checksum.nii.gz", gzip.compress(plain)[:-8] + b"\0" * 8
    yield "not_gzip.nii.gz", plain
    yield "gzip.nii", gzip.compress(plain)
    yield "magic.nii", patched(344, "<4s", b"abcd")
    yield "zero_axis.nii", patched(42, "<h", 0)
    yield "negative_axis.nii", patched(42, "<h", -5)
    yield "terabytes.nii", patched(42, "<hhh", 32767, 32767, 32767)
    yield "terabytes.nii.gz", gzip.compress(patched(42, "<hhh", 32767, 32767, 32767))
    yield "type.nii", patched(70, "<h", 999)
    yield "nan_affine.nii", patched(280, "<f", float("nan"))
    yield "singular.nii", patched(280, "<12f", *[1.0, 0, 0, 0] * 3)
    yield "zero_affine.nii", patched(280, "<12f", *[0.0] * 12)
    yield "huge_spacing.nii", patched(280, "<12f", 1e6, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    yield "infinite_slope.nii", patched(112, "<f", float("inf"))
    yield "truncated.mha", meta[:-3]
    for suffix in ("mha", "nrrd"):
        path = folder / f"compressed.{suffix}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(path), useCompression=True)
        yield f"truncated_compressed.{suffix}", path.read_bytes()[:-30]
        yield f"overwritten_compressed.{suffix}", path.read_bytes()[:-100] + b"\x7f" * 100
    yield "not_compressed.mha", meta.replace(b"CompressedData = False", b"CompressedData = True")
    yield "truncated.nrrd", nrrd[:-3]
    yield "terabytes.mha", meta.replace(b"DimSize = 7 6 5", b"DimSize = 70000 60000 50000")
    yield "terabytes.nrrd", nrrd.replace(b"sizes: 7 6 5", b"sizes: 70000 60000 50000")
    yield "text.nrrd", b"NRRD0004\nnothing here\n"
    yield "text.mha", b"not a header"
    yield "text.dcm", b"not a DICOM file"
    yield "text", b"not a DICOM file"
    yield "picture.jpg", b"\xff\xd8\xff\xe0 and so on"


def test_damaged_files_are_refused_by_name(tmp_path, scan, capfd):
    count = 0
    for name, content in damaged_files(tmp_path, scan):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(VolumeReadError) as caught:
            pytest.fail(f"{name} was read: {read_volume(path)}")
        assert str(caught.value).startswith(f"{path}: "), name
        assert "\n" not in str(caught.value)
        count += 1
    assert count == 32
    assert capfd.readouterr() == ("", "")


def test_paths_that_cannot_be_read(tmp_path, scan, monkeypatch):
    for name in ("missing.nii.gz", "missing", "missing.dcm", "nul\0byte"):
        with pytest.raises(VolumeReadError, match=r"missing|nul"):
            read_volume(name)
    with pytest.raises(VolumeReadError, match="holds no files"):
        read_volume(tmp_path)
    with pytest.raises(VolumeReadError, match="series= is for DICOM"):
        read_volume(write_image(tmp_path / "scan.nii", scan), series=0)
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.nii")
    with pytest.raises(VolumeReadError, match=r"^pipe.nii: is neither"):
        read_volume("pipe.nii")
    os.chmod("scan.nii", 0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # the superuser may read every file
        with pytest.raises(VolumeReadError, match=r"^scan.nii: cannot be opened \(Permission denied\)"):
            read_volume("scan.nii")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("SimpleITK", "plain.mha", "modeling_t3d[formats]"), ("pydicom", "slice.dcm", "modeling_t3d[dicom]")],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, scan, monkeypatch, package, name, extra):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(tmp_path / "plain.mha"))
    (tmp_path / "slice.dcm").write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VolumeReadError) as caught:
        read_volume(tmp_path / name)
    assert package in str(caught.value)
    assert f'pip install "{extra}"' in str(caught.value)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_sheared_grids_are_resampled_to_where_the_voxels_are(tmp_path, dtype, order):
    """A ramp in world coordinates keeps its value at every world position; linear interpolation is exact on it."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.5, 0, 0], [0, 0.5, 0.7], [0, -0.1, 2.0]])[:, list(order)]
    affine[:3, 3] = (4, 5, 6)
    shape = tuple(np.array((9, 40, 12))[list(order)])
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)

    def ramp(affine, index):
        return (index @ affine[:3, :3].T + affine[:3, 3]) @ (20.0, 30.0, -10.0) + 5000

    values = ramp(affine, index)
    volume = Volume((np.rint(values) if dtype == "int16" else values).astype(dtype), affine)
    straight = remove_shear(volume)
    assert not straight.is_sheared
    assert straight.array.dtype == dtype
    assert "right angle" in straight.warnings[0]
    inside = straight.array > volume.array.min() + 40  # the border mixes with the fill value
    position = np.argwhere(inside)
    error = np.abs(straight.array[inside] - ramp(straight.affine, position))
    assert np.quantile(error, 0.85) < (1.01 if dtype == "int16" else 0.05)
    assert inside.sum() > 0.6 * volume.array.size
    write_nifti(volume, tmp_path / "sheared.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "sheared.nii").array.shape, straight.array.shape)
    assert remove_shear(straight) is straight


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_sheared_label_maps_hold_the_labels_of_the_file_where_they_are(tmp_path, order):
    affine = np.eye(4)
    affine[:3, :3] = np.array([[2.0, 0, 0], [0, 2.0, -1.2], [0, 0, 3.0]])[:, list(order)]
    shape = tuple(np.array((14, 40, 20))[list(order)])
    labels = np.full(shape, 4, dtype=np.uint8)
    labels[tuple(slice(size // 4, size // 2) for size in shape)] = 10
    path = write_image(tmp_path / "labels.nii.gz", labels, affine)
    found = read_label_map(path)
    assert not found.is_sheared
    assert found.array.dtype == np.int16
    for value in (4, 10):
        assert (found.array == value).sum() == (labels == value).sum()
    assert set(np.unique(found.array)) == {0, 4, 10}, "what the slices do not reach is background"
    # Every labelled voxel lies within half a voxel of one of the file's.
    centres = np.argwhere(found.array == 10) @ found.affine[:3, :3].T + found.affine[:3, 3]
    stored = (centres - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    nearest = np.rint(stored)
    assert np.abs((stored - nearest) @ affine[:3, :3].T).max() < 1.01
    assert len(np.unique(nearest, axis=0)) == (labels == 10).sum()


def test_label_maps_are_integers(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (6, 5, 4))
    for dtype in (np.uint8, np.int16, np.float32, np.float64):
        found = read_label_map(write_image(tmp_path / "labels.nii.gz", labels.astype(dtype)))
        assert found.array.dtype.kind == "i"
        np.testing.assert_array_equal(found.array, labels)
    stored = (255 * (labels > 2)).astype(np.uint8)
    scaled = read_label_map(write_image(tmp_path / "scaled.nii", stored, slope=1 / 255, intercept=0.0))
    np.testing.assert_array_equal(scaled.array, labels > 2)
    for wrong in (0.5, np.nan, np.inf, 1e9):
        path = write_image(tmp_path / "wrong.nii.gz", np.where(labels == 1, wrong, labels).astype(np.float32))
        with pytest.raises(VolumeReadError, match=r"wrong\.nii\.gz: a label map holds whole numbers up to 16,777,216"):
            read_label_map(path)


def test_to_volume_takes_what_holds_a_volume(tmp_path, scan):
    path = write_image(tmp_path / "scan.nii.gz", scan)
    everything = [
        path,
        str(path),
        nibabel.load(path),
        nibabel.Nifti1Image(scan, AFFINE),
        read_volume(path),
    ]
    volumes = [to_volume(one) for one in everything]
    volumes += [to_volume(scan, affine=AFFINE), to_volume(torch.from_numpy(scan), affine=torch.from_numpy(AFFINE))]
    for volume in volumes:
        assert volume.array.dtype == np.int16
        np.testing.assert_array_equal(volume.array, scan)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    scaled = nibabel.load(write_image(path, scan, slope=2.5, intercept=1.0))
    np.testing.assert_allclose(to_volume(scaled).array, scan * 2.5 + 1)
    assert (
        to_volume(torch.zeros(2, 3, 4, dtype=torch.bfloat16), spacing=(1, 1, 1), axes="SAR").array.dtype == np.float32
    )
    assert to_volume(scan > 0, affine=AFFINE).array.dtype == np.int16
    assert to_volume(scan.astype(np.float64), affine=AFFINE).array.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "spacing="),
        ({"spacing": (1, 1, 1)}, "axes="),
        ({"affine": np.eye(4), "spacing": (1, 1, 1), "axes": "SAR"}, "not both"),
        ({"affine": np.eye(3)}, "4, 4"),
        ({"affine": np.full((4, 4), np.nan)}, "NaN"),
        ({"spacing": (1, 1, 0), "axes": "SAR"}, "not believable"),
    ],
)
def test_arrays_need_their_geometry(scan, arguments, match):
    with pytest.raises(VolumeGeometryError, match=match):
        to_volume(scan, **arguments)


def test_what_is_no_volume_is_refused(tmp_path, scan):
    for wrong in (scan[0], scan[None], scan[:0], scan.astype(complex), scan.astype(str), scan.astype(object)):
        with pytest.raises(VolumeGeometryError):
            to_volume(wrong, affine=np.eye(4))
    for wrong in (None, 3, [1, 2], {"image": scan}):
        with pytest.raises(VolumeGeometryError, match="is not a volume"):
            to_volume(wrong)
    path = write_image(tmp_path / "scan.nii", scan)
    for carrying in (path, nibabel.load(path), Volume(scan, AFFINE)):
        with pytest.raises(VolumeGeometryError, match="its own geometry"):
            to_volume(carrying, affine=np.eye(4))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "uint8", "int64", "float64"])
def test_write_nifti_round_trip(tmp_path, scan, suffix, dtype):
    path = tmp_path / f"written{suffix}"
    write_nifti(Volume((scan % 200).astype(dtype), AFFINE), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, scan % 200)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    image = nibabel.load(path)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(image.get_qform(), AFFINE, atol=1e-5)
    assert os.listdir(tmp_path) == [path.name]


def test_write_nifti_refuses_what_it_cannot_do(tmp_path, scan):
    volume = Volume(scan, AFFINE)
    for path in (tmp_path / "scan.mha", tmp_path / "missing" / "scan.nii"):
        with pytest.raises(VolumeError, match="scan"):
            write_nifti(volume, path)
    with pytest.raises(VolumeError, match="up to 32767"):
        write_nifti(Volume(np.zeros((40000, 1, 1), dtype=np.int16), np.eye(4)), tmp_path / "long.nii")
    assert os.listdir(tmp_path) == []


def test_examples_in_the_docstrings():
    assert doctest.testmod(volume_io_t3d).failed == 0
    assert doctest.testmod(volume_arithmetic_t3d).failed == 0
