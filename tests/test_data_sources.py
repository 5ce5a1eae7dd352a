# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a row's source is for the image processor: its path, or its voxels with the rescale of the manifest."""

import nibabel
import numpy as np
import pytest
from body_phantom import body_array, upright_affine

from modeling_t3d.data.manifest import ManifestRow
from modeling_t3d.data.sources import open_source, read_row, read_row_acquisition
from modeling_t3d.geometry_t3d import VolumeReadError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import read_volume


def test_a_rescaled_source_is_interpolated_no_more_often_than_others(tmp_path):
    affine = upright_affine((3.0, 1.5, 1.5))
    affine[1, 0] = 0.8  # sheared, as by a tilted gantry
    array = body_array((16, 24, 28))
    for name, stored in (("plain.nii.gz", array), ("offset.nii.gz", array + 1024)):
        image = nibabel.Nifti1Image(stored.transpose(2, 1, 0), affine @ np.eye(4)[[2, 1, 0, 3]])
        nibabel.save(image, tmp_path / name)
    source = open_source(tmp_path / "offset.nii.gz", (1.0, -1024.0))
    assert source.is_sheared
    processor = T3DImageProcessor(spacing=(2, 2, 2))
    expected = processor.prepare(open_source(tmp_path / "plain.nii.gz"))
    prepared = processor.prepare(source)
    np.testing.assert_array_equal(prepared.array, expected.array)
    np.testing.assert_array_equal(prepared.affine, expected.affine)
    assert "rescaled by 1 and -1024, which the manifest names" in prepared.warnings


def test_the_volume_of_a_row_is_right_angled_and_rescaled(tmp_path):
    affine = upright_affine((3.0, 1.5, 1.5))
    affine[1, 0] = 0.8
    array = body_array((16, 24, 28))
    for name, stored in (("plain.nii.gz", array), ("offset.nii.gz", array + 1024)):
        image = nibabel.Nifti1Image(stored.transpose(2, 1, 0), affine @ np.eye(4)[[2, 1, 0, 3]])
        nibabel.save(image, tmp_path / name)
    expected = read_volume(tmp_path / "plain.nii.gz")
    for row in (
        ManifestRow(1, tmp_path / "plain.nii.gz", "", "p", "s"),
        ManifestRow(2, tmp_path / "offset.nii.gz", "", "p", "s", rescale=(1.0, -1024.0)),
    ):
        volume = read_row(row)
        np.testing.assert_array_equal(volume.array, expected.array)
        np.testing.assert_array_equal(volume.affine, expected.affine)


def test_an_array_of_rad_chestct_is_a_volume_and_says_nothing_of_its_acquisition(tmp_path):
    np.savez_compressed(tmp_path / "trn00001.npz", ct=body_array((16, 24, 28)))
    row = ManifestRow(1, tmp_path / "trn00001.npz", "", "p", "s")
    assert read_row(row).axis_codes == "IPL"
    assert read_row_acquisition(row) == {}


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(VolumeReadError, match=r"absent.nii.gz: no such file"):
        open_source(tmp_path / "absent.nii.gz", (1.0, -1024.0))
