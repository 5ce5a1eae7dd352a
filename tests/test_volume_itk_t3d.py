# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""NRRD and MetaImage: which headers orient a scan, and suffixes in any case."""

import shutil

import numpy as np
import pytest

from modeling_t3d.volume_io_t3d import read_volume

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
