# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""NRRD and MetaImage: which headers orient a scan, and suffixes in any case."""

import gc
import gzip
import shutil

import numpy as np
import pytest

from modeling_t3d.volume_arithmetic_t3d import rescale
from modeling_t3d.volume_io_t3d import VolumeReadError, read_volume, to_volume

SimpleITK = pytest.importorskip("SimpleITK")
DIRECTIONS = "space directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (10,20,30)\n"
DIRECTIONS_AND_TIME = (
    "space directions: (1,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,0,1)\nspace origin: (10,20,30,0)\n"  # (x, y, z, t)
)


def write_nrrd(path, geometry: str, shape=(2, 3, 4)) -> str:
    """An NRRD file of the numbers from 0 on, its axes the array's from the last to the first."""
    sizes = " ".join(str(size) for size in shape[::-1])
    header = f"NRRD0004\ntype: short\ndimension: {len(shape)}\n{geometry}sizes: {sizes}\nendian: little\n"
    values = np.arange(np.prod(shape), dtype="<i2")
    path.write_bytes(f"{header}encoding: raw\n\n".encode() + values.tobytes())
    return str(path)


@pytest.mark.parametrize(
    ("space", "codes"),
    [
        ("left-posterior-superior", "SPL"),
        ("right-anterior-superior", "SAR"),
        ("left-anterior-superior", "SAL"),
        ("LPS", "SPL"),
        ("RAS", "SAR"),
        ("LAS", "SAL"),
        ("right anterior superior", "SAR"),
    ],
)
def test_anatomical_spaces_orient(tmp_path, space, codes):
    volume = read_volume(write_nrrd(tmp_path / "scan.nrrd", f"space: {space}\n{DIRECTIONS}"))
    assert volume.axis_codes == codes
    assert volume.warnings == ()
    signs = [1 if codes[2] == "R" else -1, 1 if codes[1] == "A" else -1, 1]
    np.testing.assert_array_equal(volume.affine[:3, 3], np.multiply(signs, (10, 20, 30)))
    np.testing.assert_array_equal(volume.affine[:3, 2::-1], np.diag(np.multiply(signs, (1, 2, 3))))
    np.testing.assert_array_equal(volume.array, np.arange(24).reshape(2, 3, 4))
    # The same space with time, where SimpleITK leaves the axes as the file has them.
    with_time = f"{space}T" if len(space) == 3 else f"{space.replace(' ', '-')}-time"
    path = write_nrrd(tmp_path / "four.nrrd", f"space: {with_time}\n{DIRECTIONS_AND_TIME}", (2, 2, 3, 4))
    fourth = read_volume(path, time_index=1)
    np.testing.assert_array_equal(fourth.affine, volume.affine)
    np.testing.assert_array_equal(fourth.array, volume.array + 24)
    assert fourth.warnings == ()


@pytest.mark.parametrize(
    "geometry",
    [
        *(f"space: {space}\n{DIRECTIONS}" for space in ("scanner-xyz", "3D-right-handed", "3D-left-handed")),
        f"space dimension: 3\n{DIRECTIONS}",
        "space: left-posterior-superior\n",
        "spacings: 1 2 3\n",
    ],
)
def test_headers_that_name_no_anatomical_axes_are_noted(tmp_path, geometry):
    volume = read_volume(write_nrrd(tmp_path / "scan.nrrd", geometry))
    assert volume.axis_codes == "SPL"
    assert [warning.partition(":")[0] for warning in volume.warnings] == ["the header gives no orientation"]


def write_list(path, kinds: str, packed: bool = False, kind: str = "short") -> np.ndarray:
    """An NRRD file of two volumes along the one axis that is no domain, and its values (2, z, y, x)."""
    values = np.arange(48).reshape(2, 2, 3, 4).astype("<i2" if kind == "short" else "u1")
    axes = kinds.split()
    place = next(index for index, axis in enumerate(axes) if axis not in ("domain", "space"))
    directions = ["(1,0,0)", "(0,2,0)", "(0,0,3)"]
    directions.insert(place, "none")
    stored = np.moveaxis(values, 0, 3 - place)  # an array's axes run against those of a header
    sizes = " ".join(str(size) for size in stored.shape[::-1])
    header = f"NRRD0004\ntype: {kind}\ndimension: 4\nspace: left-posterior-superior\nsizes: {sizes}\n"
    header += f"space directions: {' '.join(directions)}\nkinds: {kinds}\nspace origin: (10,20,30)\n"
    header += f"endian: little\nencoding: {'gzip' if packed else 'raw'}\n\n"
    path.write_bytes(header.encode() + (gzip.compress(stored.tobytes()) if packed else stored.tobytes()))
    return values


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        "list domain domain domain",
        "domain domain domain list",
        "domain domain list domain",
        "space space space list",
    ],
)
def test_a_list_of_volumes_is_chosen_from_by_time(tmp_path, kinds, packed):
    """The first is the layout of a 3D Slicer sequence."""
    path = tmp_path / "four.nrrd"
    values = write_list(path, kinds, packed)
    for time in range(2):
        volume = read_volume(path, time_index=time)
        np.testing.assert_array_equal(volume.array, values[time])
        np.testing.assert_array_equal(volume.affine[:3, 3], (-10, -20, 30))
        np.testing.assert_array_equal(volume.affine[:3, 2::-1], np.diag((-1, -2, 3)))
        assert volume.warnings == ()
    with pytest.raises(VolumeReadError, match=r"holds 2 volumes \(4-D\); choose one with time_index=0..1"):
        read_volume(path)
    with pytest.raises(VolumeReadError, match=r"time_index=2 is outside 0..1"):
        read_volume(path, time_index=2)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(VolumeReadError, match="truncated"):
        read_volume(path, time_index=0)


@pytest.mark.parametrize(("kinds", "kind"), [("RGB-color", "uchar"), ("2-vector", "short"), ("vector", "short")])
def test_other_numbers_of_a_voxel_are_no_volumes_to_choose_from(tmp_path, kinds, kind):
    path = tmp_path / "colour.nrrd"
    write_list(path, f"{kinds} domain domain domain", kind=kind)
    if kinds == "RGB-color":
        content = path.read_bytes()
        path.write_bytes(content.replace(b"sizes: 2 4 3 2", b"sizes: 3 4 2 2"))
    for options in ({}, {"time_index": 0}):
        with pytest.raises(VolumeReadError, match=r"holds vector of .*, not one number per voxel; convert it first"):
            read_volume(path, **options)


def test_a_list_of_planes_is_no_volume(tmp_path):
    path = tmp_path / "planes.nrrd"
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 5\nkinds: domain domain list\nencoding: raw\n"
    path.write_bytes(f"{header}endian: little\n\n".encode() + bytes(120))
    with pytest.raises(VolumeReadError, match="not one number per voxel"):
        read_volume(path, time_index=0)


@pytest.mark.parametrize(
    "kinds", ["domain domain domain time", "time domain domain domain", "domain domain domain ???"]
)
def test_a_layout_that_simple_itk_does_not_read_is_named(tmp_path, kinds):
    path = tmp_path / "four.nrrd"
    write_list(path, kinds)
    with pytest.raises(VolumeReadError, match="a 4-D axis layout that SimpleITK does not read; save it as"):
        read_volume(path, time_index=0)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("encoding: raw", "encoding: bzip2", "packed with bzip2, which SimpleITK does not read; save it with"),
        ("encoding: raw", "encoding: zstd", "an encoding that SimpleITK does not read; save it with"),
        ("(1,0,0)", "(nan,0,0)", "its space directions are NaN, infinite or no vectors; mend the header"),
        ("(0,0,3)", "(0,0,-inf)", "its space directions are NaN, infinite or no vectors; mend the header"),
    ],
)
def test_what_simple_itk_does_not_read_is_named(tmp_path, old, new, reason):
    path = tmp_path / "scan.nrrd"
    write_nrrd(path, f"space: LPS\n{DIRECTIONS}")
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(VolumeReadError, match=reason) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["scan.MHA", "scan.Mha", "scan.MHD", "scan.mHd", "scan.NRRD", "scan.NHDR", "scan.Nhdr"]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_suffixes_may_be_in_any_case(tmp_path, name, compressed):
    image = SimpleITK.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    image.SetSpacing((1, 2, 3))
    lower = tmp_path / name.lower()
    SimpleITK.WriteImage(image, str(lower), useCompression=compressed)
    shutil.copy(lower, tmp_path / name)
    volume, expected = read_volume(tmp_path / name), read_volume(lower)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)


@pytest.mark.parametrize("code", ["u1", "i2", "u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("largest", [100, 40_000, 3_000_000_000])
@pytest.mark.parametrize("name", ["scan.mha", "scan.nrrd"])
def test_voxels_outlive_their_image_in_the_type_that_holds_them(tmp_path, name, code, largest):
    stored = np.random.default_rng(0).integers(0, 100, (20, 64, 64)).astype(code)
    stored[3, 4, 5] = largest if stored.dtype.kind == "f" else min(largest, np.iinfo(code).max)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(stored), str(tmp_path / name))
    array = read_volume(tmp_path / name).array
    gc.collect()
    others = [np.full(stored.shape, 7, dtype=code) for _ in range(5)]  # would take the memory if it were free
    expected = rescale(stored, 1.0, 0.0)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)
    array += 1
    np.testing.assert_array_equal(array, expected + 1)
    assert all((other == 7).all() for other in others)


def test_an_image_in_memory_keeps_its_voxels():
    image = SimpleITK.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    to_volume(image).array[...] = 0
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).ravel(), np.arange(24))
