# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is read from NIfTI files equals what nibabel reads, whole and in slabs, with isal and without."""

import dataclasses
import gzip
import sys

import nibabel
import numpy as np
import pytest

from modeling_t3d import nifti_stream_t3d
from modeling_t3d.geometry_t3d import VolumeReadError
from modeling_t3d.nifti_stream_t3d import open_nifti
from modeling_t3d.volume_io_t3d import read_volume

AFFINE = np.array([[-0.7, 0, 0, 30.0], [0, -0.7, 0, 10.0], [0, 0, 2.5, -100.0], [0, 0, 0, 1]])
TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


@pytest.fixture(params=["isal", "zlib"])
def library(request, monkeypatch):
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)
    return request.param


def write(path, stored, slope=None, intercept=None, endianness="<", kind=nibabel.Nifti1Image, extension=None):
    """A file with exactly these stored numbers and factors."""
    header = kind.header_class(endianness=endianness)
    image = kind(stored, AFFINE, header)
    image.header.set_data_dtype(stored.dtype)
    if extension is not None:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", extension))
    plain = path.with_name("plain.nii")
    nibabel.save(image, plain)
    payload = bytearray(plain.read_bytes())
    plain.unlink()
    if slope is not None:
        offset = 112 if kind is nibabel.Nifti1Image else 176
        code = endianness + ("f4" if kind is nibabel.Nifti1Image else "f8")
        factors = np.array([slope, intercept], dtype=code).tobytes()
        payload[offset : offset + len(factors)] = factors
    path.write_bytes(gzip.compress(bytes(payload), 1) if path.suffix == ".gz" else bytes(payload))
    return path


def numbers(code: str, shape=(7, 6, 5)) -> np.ndarray:
    generator = np.random.default_rng(0)
    if code[0] == "f":
        return generator.normal(0, 1000, shape).astype(code)
    limits = np.iinfo(code)
    # Values up to 2**24 are exact in float32, the type of everything that does not fit int32.
    return generator.integers(max(limits.min, -(2**24)), min(limits.max, 2**24), shape, endpoint=True).astype(code)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("factors", [(None, None), (1.0, -1024.0), (2.0, 3.0), (0.25, -7.5), (0.0, 5.0), (np.nan, 0)])
@pytest.mark.parametrize("code", TYPES)
def test_values_are_nibabels(tmp_path, library, code, factors, endianness, suffix):
    path = write(tmp_path / f"scan.{suffix}", numbers(code), *factors, endianness=endianness)
    image = nibabel.load(path)
    volume = open_nifti(str(path)).read()
    expected = np.asarray(image.dataobj)
    assert volume.array.dtype in (np.int16, np.int32, np.float32)
    np.testing.assert_allclose(volume.array, expected, rtol=1e-6, atol=1e-3 if volume.array.dtype.kind == "f" else 0)
    if expected.dtype.kind in "iu":
        np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(volume.affine, image.affine)
    assert volume.array.flags.writeable


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("extension", [None, b"x" * 1000])
def test_both_versions_and_header_extensions(tmp_path, library, kind, extension):
    stored = numbers("i2")
    path = write(tmp_path / "scan.nii.gz", stored, 1.0, -5.0, kind=kind, extension=extension)
    np.testing.assert_array_equal(open_nifti(str(path)).read().array, stored.astype(int) - 5)


@pytest.mark.parametrize("num_planes", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("code", ["i2", "f4"])
def test_slabs_are_the_volume_in_pieces(tmp_path, library, code, num_planes):
    path = write(tmp_path / "scan.nii.gz", numbers(code), 1.0, -1024.0)
    slabs = list(open_nifti(str(path)).slabs(num_planes))
    assert max(slab.shape[2] for slab in slabs) == min(num_planes, 5)
    np.testing.assert_array_equal(np.concatenate(slabs, axis=2), read_volume(path).array)


@pytest.mark.parametrize("largest", [2**15 - 1, 2**15, 2**31])
@pytest.mark.parametrize("plane", [0, 2, 4])
def test_one_type_holds_slabs_of_several(tmp_path, monkeypatch, largest, plane):
    """The type is that of the whole volume, wherever the values lie that decide it."""
    stored = numbers("u1").astype(np.uint32)
    stored[3, 4, plane] = largest
    path = str(write(tmp_path / "scan.nii", stored))
    whole = open_nifti(path).read().array
    monkeypatch.setattr(nifti_stream_t3d, "PIECE", 1)
    array = open_nifti(path).read().array
    assert array.dtype == whole.dtype == {2**15 - 1: np.int16, 2**15: np.int32, 2**31: np.float32}[largest]
    assert array.flags.f_contiguous
    np.testing.assert_array_equal(array, whole)
    np.testing.assert_array_equal(array, stored)


def test_one_volume_of_several(tmp_path, library):
    stored = numbers("i2", (7, 6, 5, 3))
    for suffix in ("nii", "nii.gz"):
        path = write(tmp_path / f"scan.{suffix}", stored)
        for time in range(3):
            file = open_nifti(str(path), time)
            np.testing.assert_array_equal(file.read().array, stored[..., time])
            np.testing.assert_array_equal(np.concatenate(list(file.slabs(2)), 2), stored[..., time])


def test_gzip_in_several_members(tmp_path, library):
    stored = numbers("i2", (40, 40, 5))
    plain = write(tmp_path / "scan.nii", stored).read_bytes()
    path = tmp_path / "members.nii.gz"
    path.write_bytes(gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]))
    np.testing.assert_array_equal(open_nifti(str(path)).read().array, stored)


def test_what_is_left_to_nibabel_is_the_same(tmp_path):
    path = write(tmp_path / "scan.nii.gz", numbers("f4", (7, 6, 5, 2)), 2.0, 1.0)
    file = open_nifti(str(path), 1)
    assert file.image is None
    left = dataclasses.replace(file, image=nibabel.load(path))
    np.testing.assert_array_equal(np.concatenate(list(left.slabs(2)), 2), file.read().array)


def damage(kind: str, plain: bytes) -> bytes:
    packed = gzip.compress(plain)
    if kind == "cut":
        return packed[: len(packed) // 2]
    if kind == "last byte":
        return packed[:-1]
    if kind == "checksum":
        return packed[:-8] + b"\0\0\0\0" + packed[-4:]
    if kind == "garbage inside":
        middle = len(packed) // 2
        return packed[:middle] + bytes(255 - byte for byte in packed[middle : middle + 40]) + packed[middle + 40 :]
    if kind == "too few voxels":
        return gzip.compress(plain[:-100])
    return packed + b"garbage"


@pytest.mark.parametrize("kind", ["cut", "last byte", "checksum", "garbage inside", "too few voxels", "garbage after"])
def test_damaged_files_are_an_error_with_the_path(tmp_path, library, kind):
    plain = write(tmp_path / "scan.nii", numbers("i2", (64, 64, 20))).read_bytes()
    path = tmp_path / "damaged.nii.gz"
    path.write_bytes(damage(kind, plain))
    with pytest.raises(VolumeReadError, match=r"damaged.nii.gz: .*(truncated|damaged)") as error:
        read_volume(path)
    assert "\n" not in str(error.value)
    with pytest.raises(VolumeReadError):
        for _ in open_nifti(str(path)).slabs(3):
            pass


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path, monkeypatch):
    payload = bytearray(write(tmp_path / "scan.nii", numbers("i2")).read_bytes())
    payload[42:48] = np.array([32767, 32767, 32767], dtype="<i2").tobytes()
    path = tmp_path / "large.nii.gz"
    path.write_bytes(gzip.compress(bytes(payload)))

    def refuse(*arguments, **keywords):
        raise AssertionError("voxels were allocated")

    monkeypatch.setattr(nifti_stream_t3d.np, "empty", refuse)
    with pytest.raises(VolumeReadError, match=r"large.nii.gz: its header promises 32767x32767x32767"):
        open_nifti(str(path))


@pytest.mark.parametrize("name", ["scan.NII", "scan.Nii", "scan.NII.GZ", "scan.Nii.gz", "scan.nii.Gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_suffixes_may_be_in_any_case(tmp_path, name, kind):
    stored = numbers("i2")
    path = write(tmp_path / name.lower(), stored, kind=kind)
    path.rename(tmp_path / name)
    write(path, stored[:2] + 1)  # another file, whose name differs in case alone
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.array, stored)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    (tmp_path / name).write_bytes(b"not a header")
    with pytest.raises(VolumeReadError, match="not a readable NIfTI file"):
        read_volume(tmp_path / name)
