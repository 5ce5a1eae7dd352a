# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Volumes that other libraries hold in memory keep their voxels and their place in the world."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from body_phantom import body_array

from modeling_t3d.geometry_t3d import VolumeError, VolumeGeometryError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import to_volume

AFFINE = np.array([[-0.8, 0, 0, 30.0], [0, -0.7, 0, 20.0], [0, 0, 2.0, -400.0], [0, 0, 0, 1]])  # (x, y, z), LPS


@pytest.fixture(scope="module")
def scan():
    return np.random.default_rng(0).integers(-1024, 2000, (5, 6, 7)).astype(np.int16)


def meta_tensor(scan, affine=AFFINE, **meta):
    data = pytest.importorskip("monai.data")
    return data.MetaTensor(torch.from_numpy(scan), affine=torch.from_numpy(affine), meta=meta)


def torchio_image(scan, affine=AFFINE, path=None):
    torchio = pytest.importorskip("torchio")
    return torchio.ScalarImage(path) if path else torchio.ScalarImage(tensor=scan[None], affine=affine)


def itk_image(scan, affine=AFFINE):
    simple_itk = pytest.importorskip("SimpleITK")
    image = simple_itk.GetImageFromArray(np.ascontiguousarray(scan.T))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


@pytest.mark.parametrize(
    "make",
    [
        meta_tensor,
        lambda scan: meta_tensor(scan[None]),
        lambda scan: meta_tensor(scan, np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE, space="LPS"),
        torchio_image,
        itk_image,
        lambda scan: nibabel.Nifti1Image(scan, AFFINE),
    ],
    ids=["meta tensor", "meta tensor with channel", "meta tensor in LPS", "TorchIO", "SimpleITK", "nibabel"],
)
def test_images_of_other_libraries(scan, make):
    volume = to_volume(make(scan)).to_canonical()
    reference = to_volume(scan, affine=AFFINE).to_canonical()
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, reference.array)
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)
    assert volume.warnings == ()


def test_meta_tensor_as_monai_loads_it(tmp_path, scan):
    transforms = pytest.importorskip("monai.transforms")
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(scan, AFFINE), path)
    reference = to_volume(path).to_canonical()
    loaded = transforms.LoadImage(image_only=True, ensure_channel_first=True)(str(path))
    turned = transforms.Orientation(axcodes="PIR")(loaded)
    lazily = torchio_image(None, path=path)
    for image in (loaded, turned, lazily):
        volume = to_volume(image).to_canonical()
        np.testing.assert_array_equal(volume.array, reference.array)
        np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)


def test_meta_tensor_without_an_affine_says_so(scan):
    data = pytest.importorskip("monai.data")
    volume = to_volume(data.MetaTensor(torch.from_numpy(scan)))
    assert "unit matrix" in volume.warnings[0]
    given = to_volume(data.MetaTensor(torch.from_numpy(scan)), affine=AFFINE)
    np.testing.assert_array_equal(given.affine, AFFINE)
    assert given.warnings == ()


@pytest.mark.parametrize("make", [meta_tensor, torchio_image], ids=["MONAI", "TorchIO"])
def test_several_channels_are_refused(scan, make):
    if make is torchio_image:
        image = pytest.importorskip("torchio").ScalarImage(tensor=np.stack([scan, scan]), affine=AFFINE)
    else:
        image = meta_tensor(np.stack([scan, scan]))
    with pytest.raises(VolumeGeometryError, match="one volume with one channel"):
        to_volume(image)


def test_other_kinds_of_image_are_refused(scan):
    simple_itk = pytest.importorskip("SimpleITK")
    colour = simple_itk.GetImageFromArray(np.zeros((2, 3, 4, 3), dtype=np.uint8), isVector=True)
    for image in (colour, simple_itk.JoinSeries([itk_image(scan)] * 2), simple_itk.Cast(itk_image(scan), 11)[:, :, 0]):
        with pytest.raises(VolumeError, match="pass 3 axes, one number per voxel"):
            to_volume(image)
    for image in (itk_image(scan), torchio_image(scan)):
        with pytest.raises(VolumeGeometryError, match="its own geometry"):
            to_volume(image, affine=AFFINE)
    for image in (simple_itk.ImageFileReader(), nibabel.Nifti1Header()):
        with pytest.raises(VolumeGeometryError, match="is not a volume"):
            to_volume(image)


@pytest.mark.parametrize("layout", ["vector", "series"])
def test_one_of_several_volumes_of_simple_itk(scan, layout):
    simple_itk = pytest.importorskip("SimpleITK")
    turned = AFFINE[:, [1, 0, 2, 3]]
    images = [itk_image(scan + number, turned) for number in range(3)]
    image = simple_itk.Compose(images) if layout == "vector" else simple_itk.JoinSeries(images)
    for number, one in enumerate(images):
        volume, expected = to_volume(image, time_index=np.int64(number)), to_volume(one)
        np.testing.assert_array_equal(volume.array, expected.array)
        np.testing.assert_allclose(volume.affine, expected.affine)
    with pytest.raises(VolumeError, match="choose one of several volumes with time_index="):
        to_volume(image)
    with pytest.raises(VolumeError, match=r"SimpleITK image: time_index=3 is outside 0..2"):
        to_volume(image, time_index=3)
    colour = simple_itk.GetImageFromArray(np.zeros((2, 3, 4, 3), dtype=np.uint8), isVector=True)
    with pytest.raises(VolumeError, match="pass 3 axes, one number per voxel"):
        to_volume(colour, time_index=0)


def test_a_lazy_image_that_cannot_be_loaded_is_a_typed_error(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"no image")
    with pytest.raises(VolumeError, match="TorchIO image: cannot be loaded"):
        to_volume(torchio_image(None, path=path))


def test_sheared_images_are_refused_on_request(scan):
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.5
    for image in (meta_tensor(scan, sheared), nibabel.Nifti1Image(scan, sheared)):
        assert not to_volume(image).is_sheared
        with pytest.raises(VolumeGeometryError, match=r"14\.0 degrees off a right angle"):
            to_volume(image, resample=False)
    with pytest.raises(VolumeGeometryError, match=r"14\.0 degrees off a right angle"):
        to_volume(scan, affine=sheared, resample=False)


def test_the_processor_takes_them_all():
    array = body_array((24, 24, 24))
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    processor = T3DImageProcessor(spacing=(3, 3, 3), global_size=(8, 8, 8), local_size=(8, 8, 8))
    reference = processor(array, affine=affine)["pixel_values"]
    images = [make(array, affine) for make in (meta_tensor, torchio_image, itk_image)]
    for image in [*images, nibabel.Nifti1Image(array, affine)]:
        assert torch.equal(processor(image)["pixel_values"], reference)
    assert processor(images)["pixel_values"].shape[0] == 3


def test_an_image_of_afni_keeps_the_scale_of_its_values():
    """nibabel holds it like NIfTI, but the factor elsewhere."""
    image = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "scaled+tlrc.HEAD")
    np.testing.assert_allclose(to_volume(image).array, np.asarray(image.dataobj).squeeze(), rtol=1e-6)
