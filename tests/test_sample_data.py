# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Every folder of the sample data is read to the shapes, spacings and values that its README states."""

import csv

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from testing_utils import SHARED_DATA, shared_data

from modeling_t3d.geometry_t3d import VolumeError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import VolumeReadError, list_series, open_volume, read_volume

pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")
TILT = np.deg2rad(18.5)
TOTAL = "totalsegmentator_abdomen"
TINY = "dcmqi_ct_seg/tiny_23x38x3"

# path, shape and spacing and axis codes in the array's own order, lowest and highest value (HU where it is CT)
SCANS = [
    (f"{TOTAL}/ct.nii.gz", (122, 101, 112), (3, 3, 3), "RAS", (-1207, 3382)),
    (f"{TOTAL}/labels_117.nii.gz", (122, 101, 112), (3, 3, 3), "RAS", (0, None)),
    (f"{TOTAL}/labels_spine.nii.gz", (122, 101, 112), (3, 3, 3), "RAS", (0, 33)),
    (f"{TOTAL}/ct_small.nii.gz", (122, 101, 30), (3, 3, 3), "RAS", (None, None)),
    (f"{TOTAL}/ct_small_labels_117.nii.gz", (122, 101, 30), (3, 3, 3), "RAS", (0, None)),
    ("totalsegmentator_dicom_j2k/series", (20, 512, 512), (2.0, 0.9766, 0.9766), "SPL", (-1024, 1839)),
    ("totalsegmentator_dicom_j2k/labels_117.nii.gz", (512, 512, 20), (0.9766, 0.9766, 2.0), "LAS", (0, None)),
    ("lidc_idri_0314_chest/ct_4mm.nii.gz", (512, 512, 69), (0.78125, 0.78125, 4), "LPS", (-1000, 1927)),
    ("metaimage/lidc_idri_0003_slab.mha", (11, 512, 512), (2.5, 0.8203, 0.8203), "SPL", (-2048, 1978)),
    ("dcmqi_ct_seg/ct-3slice", (3, 512, 512), (1, 0.8105, 0.8105), "SPL", (-3024, 1381)),
    ("dcmqi_ct_seg/liver_seg.nrrd", (3, 512, 512), (1, 0.8105, 0.8105), "SPL", (0, 1)),
    ("dcmqi_ct_seg/heart_seg.nrrd", (3, 512, 512), (1, 0.8105, 0.8105), "SPL", (0, None)),
    ("dcmqi_ct_seg/spine_seg.nrrd", (3, 512, 512), (1, 0.8105, 0.8105), "SPL", (0, None)),
    ("dcmqi_ct_seg/liver_spine_gapped_seg.nrrd", (3, 512, 512), (1, 0.8105, 0.8105), "SPL", (0, 5)),
    (f"{TINY}/image", (3, 38, 23), (2.5, 0.7, 0.7), "SPL", (0, 1)),
    (f"{TINY}/multiframe/mf.dcm", (3, 38, 23), (2.5, 0.7, 0.7), "SPL", (0, 1)),
    (f"{TINY}/label.nrrd", (3, 38, 23), (2.5, 0.7, 0.7), "SPL", (0, 1)),
    *(
        (f"transfer_syntaxes/{name}.dcm", (1, 512, 512), (None, 0.6758, 0.6758), "SPL", (-3024, 1378))
        for name in ("implicit_le", "explicit_le", "jpeg2000_lossless", "jpegls_lossless", "jpeg_lossless_sv1", "rle")
    ),
]


@pytest.mark.parametrize(("name", "shape", "spacing", "codes", "values"), SCANS, ids=[scan[0] for scan in SCANS])
def test_scans_and_labels(name, shape, spacing, codes, values):
    volume = read_volume(shared_data(name))
    assert (volume.shape, volume.axis_codes) == (shape, codes)
    for measured, stated in zip(volume.spacing, spacing, strict=True):
        assert stated is None or measured == pytest.approx(stated, abs=5e-5)
    for measured, stated in zip((volume.array.min(), volume.array.max()), values, strict=True):
        assert stated is None or measured == stated
    assert volume.array.dtype == np.int16
    canonical = volume.to_canonical()
    assert canonical.axis_codes == "SAR"


def test_every_file_of_the_sample_data_is_covered():
    """A file that is added there fails this test until it is read somewhere in this file."""
    shared_data("README.md")
    tested = {name for name, *_ in SCANS} | {"orientations", "nifti_variants", "broken", "missing_slice_dicom"}
    tested |= {"gantry_tilt_phantom", f"{TOTAL}/ct_small_masks", f"{TINY}/label.seg", f"{TOTAL}/label_names_117.csv"}
    tested |= {"dcmqi_ct_seg/liver.dcm", "dcmqi_ct_seg/partial_overlaps.dcm"}
    for file in SHARED_DATA.rglob("*"):
        name = file.relative_to(SHARED_DATA).as_posix()
        if file.is_file() and "/" in name and not name.startswith(("LICENSES/", "reports/")):
            assert any(name == one or name.startswith(f"{one}/") for one in tested), name


def organ_names() -> dict[str, int]:
    with open(shared_data(f"{TOTAL}/label_names_117.csv"), newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    return {row[1]: int(row[0]) for row in rows}


def test_abdomen_agrees_with_its_labels():
    organs = organ_names()
    scan = read_volume(shared_data(f"{TOTAL}/ct.nii.gz"))
    labels = read_volume(shared_data(f"{TOTAL}/labels_117.nii.gz"))
    assert len(np.unique(labels.array)) == 62  # 61 classes and the background
    assert scan.array[labels.array == organs["liver"]].mean() == pytest.approx(44, abs=1)
    assert scan.array[labels.array == organs["spleen"]].mean() == pytest.approx(33, abs=1)
    spine = read_volume(shared_data(f"{TOTAL}/labels_spine.nii.gz"))
    assert np.unique(spine.array).tolist() == [0, *range(26, 34)]


def test_small_abdomen_agrees_with_the_whole_and_with_its_masks():
    organs = organ_names()
    whole = read_volume(shared_data(f"{TOTAL}/ct.nii.gz"))
    small = read_volume(shared_data(f"{TOTAL}/ct_small.nii.gz"))
    np.testing.assert_array_equal(small.array, whole.array[..., 82:112])
    np.testing.assert_allclose(small.affine, whole.affine)  # on purpose: the affine of the whole volume
    masks = {path.name.removesuffix(".nii.gz"): path for path in shared_data(f"{TOTAL}/ct_small_masks").iterdir()}
    assert len(masks) == 10
    masks = {name: read_volume(path).array for name, path in masks.items()}
    for name, mask in masks.items():
        assert mask.shape == small.shape
        assert mask.max() == (0 if name in ("brain", "prostate") else 1), name
    liver = masks["liver"] > 0
    assert small.array[liver].mean() == pytest.approx(45, abs=1)
    labelled = read_volume(shared_data(f"{TOTAL}/ct_small_labels_117.nii.gz")).array == organs["liver"]
    assert 2 * (liver & labelled).sum() / (liver.sum() + labelled.sum()) == pytest.approx(0.98, abs=0.005)


def test_compressed_series_agrees_with_its_labels():
    """20 JPEG 2000 slices without extension and with empty identifiers, against labels that are flipped."""
    scan = read_volume(shared_data("totalsegmentator_dicom_j2k/series")).to_canonical()
    labels = read_volume(shared_data("totalsegmentator_dicom_j2k/labels_117.nii.gz")).to_canonical()
    np.testing.assert_allclose(scan.affine, labels.affine, atol=1e-3)
    organs = organ_names()
    assert len(np.unique(labels.array)) == 32
    assert scan.array[labels.array == organs["liver"]].mean() == pytest.approx(89, abs=1)
    assert scan.array[labels.array == organs["aorta"]].mean() == pytest.approx(177, abs=1)


def test_segmentations_lie_on_their_series():
    series = read_volume(shared_data("dcmqi_ct_seg/ct-3slice")).to_canonical()
    for name in ("liver", "heart", "spine", "liver_spine_gapped"):
        labels = read_volume(shared_data(f"dcmqi_ct_seg/{name}_seg.nrrd")).to_canonical()
        np.testing.assert_allclose(labels.affine, series.affine, atol=1e-3)
    assert np.unique(labels.array).tolist() == [0, 1, 5]
    for name in ("liver.dcm", "partial_overlaps.dcm", "tiny_23x38x3/label.seg"):
        with pytest.raises(VolumeReadError, match="no image with a position"):  # label maps, no scans
            read_volume(shared_data(f"dcmqi_ct_seg/{name}"))


def test_multi_frame_object_agrees_with_its_slices():
    slices, frames = read_volume(shared_data(f"{TINY}/image")), read_volume(shared_data(f"{TINY}/multiframe/mf.dcm"))
    np.testing.assert_array_equal(slices.array, frames.array)
    np.testing.assert_allclose(slices.affine, frames.affine)
    label = read_volume(shared_data(f"{TINY}/label.nrrd")).to_canonical()
    np.testing.assert_allclose(label.affine, slices.to_canonical().affine, atol=1e-4)
    assert list_series(shared_data(TINY)) == ("CT axial 23x38x3",) * 2
    with pytest.raises(VolumeReadError, match="holds 2 series"):
        read_volume(shared_data(TINY))


def test_tilted_phantom(tmp_path):
    for path in shared_data("gantry_tilt_phantom").glob("I2*"):
        (tmp_path / path.name).symlink_to(path)
    volume = read_volume(tmp_path)
    assert volume.shape[0::2] == (5, 512)
    assert volume.spacing == pytest.approx((2.5 * np.cos(TILT), 0.4824, 0.4824), abs=1e-3)
    assert (volume.array.min(), volume.array.max()) == (-1024, 777)
    assert "18.5 degrees" in volume.warnings[-1]
    with pytest.raises(VolumeReadError, match=r"18\.5 degrees off a right angle .*resample=True"):
        read_volume(tmp_path, resample=False)


@pytest.mark.parametrize("deoblique", [False, True])
def test_tilted_phantom_is_interpolated_once(tmp_path, deoblique):
    """From the slices as stored to the model grid, against SciPy in float64: a second pass or rounding would show."""
    for path in shared_data("gantry_tilt_phantom").glob("I2*"):
        (tmp_path / path.name).symlink_to(path)
    stored = open_volume(tmp_path)
    assert stored.is_sheared
    processor = T3DImageProcessor(spacing=(1.5, 3, 3), antialias=False, deoblique=deoblique, check_intensity=False)
    prepared = processor.prepare(tmp_path)
    to_source = np.linalg.inv(stored.affine) @ prepared.affine
    index = np.moveaxis(np.indices(prepared.array.shape), 0, -1) @ to_source[:3, :3].T + to_source[:3, 3]
    inside = ((index > 0) & (index < np.array(stored.shape) - 1)).all(-1)
    assert inside.sum() > 10_000
    expected = map_coordinates(stored.array.astype(np.float64), index[inside].T, order=1)
    assert np.abs(prepared.array[inside] - expected).max() < 0.55
    assert "18.5 degrees" in prepared.warnings[-1]


def test_sheared_phantom():
    path = shared_data("gantry_tilt_phantom/shear_uint8_slope.nii.gz")
    volume = read_volume(path)
    assert not volume.is_sheared
    assert volume.shape[0::2] == (306, 54)
    assert volume.spacing == pytest.approx((0.482, 0.482, 2.371 * np.cos(TILT)), abs=2e-3)
    assert (volume.array.min(), round(float(volume.array.max()))) == (-1024, 789)
    assert "18.5 degrees" in volume.warnings[0]


def test_series_with_a_missing_slice_gives_the_positions():
    with pytest.raises(VolumeReadError) as caught:
        read_volume(shared_data("missing_slice_dicom"))
    assert "a slice is missing: the step from 28.11 to 38.11 mm is 10.00 mm where 5.00 mm is usual" in str(
        caught.value
    )
    assert "positions: 18.11, 23.11, 28.11, 38.11 mm" in str(caught.value)


def test_transfer_syntaxes_are_one_image():
    files = sorted(shared_data("transfer_syntaxes").iterdir())
    assert len(files) == 6
    arrays = [read_volume(file).array for file in files]
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])
    with pytest.raises(VolumeReadError, match=r"two or more slices lie at 4\.70 mm"):
        read_volume(shared_data("transfer_syntaxes"))


def test_orientations_are_one_volume():
    paths = sorted(shared_data("orientations").glob("*.nii.gz"))
    assert len(paths) == 8
    volumes = [read_volume(path) for path in paths]
    assert [volume.axis_codes for volume in volumes] == [path.name[:3] for path in paths]
    first = volumes[0].to_canonical()
    assert first.shape == (67, 79, 64)
    assert first.spacing == pytest.approx((2.38, 2.38, 2.38), abs=0.02)
    for volume in volumes[1:]:
        canonical = volume.to_canonical()
        np.testing.assert_array_equal(canonical.array, first.array)
        np.testing.assert_allclose(canonical.affine, first.affine, atol=1e-3)


@pytest.mark.parametrize("intensity", ["percentile", "zscore"])
def test_head_scan_under_the_settings_for_magnetic_resonance(intensity):
    """The window is the scan's own: most of the head lies within it, whatever the scanner's gain was."""
    processor = T3DImageProcessor(
        spacing=(5, 5, 5), global_size=(32, 32, 32), local_size=(16, 16, 16), intensity=intensity
    )
    path = shared_data("orientations/LPS.nii.gz")
    volume = read_volume(path)
    values = processor(path)["pixel_values"]
    louder = processor(volume.array * np.float32(40), affine=volume.affine)["pixel_values"]
    np.testing.assert_allclose(values, louder, atol=1e-3)
    assert values.std() > 0.3
    if intensity == "percentile":
        assert (float(values.min()), float(values.max())) >= (-1.0, 0.5)
        assert values.max() <= 1.0
    else:
        head = values[values > values.min() + 0.3]
        assert abs(float(head.mean())) < 0.5
        assert 0.5 < float(head.std()) < 1.5
    with pytest.raises(VolumeError, match="not HU"):
        T3DImageProcessor(spacing=(5, 5, 5), global_size=(8, 8, 8), local_size=(8, 8, 8))(path)


@pytest.mark.parametrize(
    ("name", "shape", "count"), [("example4d.nii.gz", (128, 96, 24), 2), ("example_nifti2.nii.gz", (32, 20, 12), 2)]
)
def test_four_dimensional_files_ask_which_volume(name, shape, count):
    path = shared_data(f"nifti_variants/{name}")
    with pytest.raises(VolumeReadError, match=rf"holds {count} volumes .* time_index=0\.\.{count - 1}"):
        read_volume(path)
    volumes = [read_volume(path, time_index=index) for index in range(count)]
    assert [volume.shape for volume in volumes] == [shape] * count
    assert not np.array_equal(volumes[0].array, volumes[1].array)
    if name == "example4d.nii.gz":
        assert volumes[0].axis_codes == "LAS"


BROKEN = {
    "CT_small.dcm": "most frequent air value",  # a right slice, read as such, whose air is none in HU
    "MR_truncated.dcm": "truncated",
    "badVR.dcm": "no image with a position",
    "ct_small_truncated.nii.gz": "truncated",
    "meta_missing_tsyntax.dcm": "no image with a position",
    "no_meta.dcm": "without the file preamble",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_raise(name):
    path = shared_data(f"broken/{name}")
    with pytest.raises(VolumeError, match=BROKEN[name]) as caught:
        T3DImageProcessor(spacing=None, global_size=(8, 8, 8), local_size=(8, 8, 8))(path)
    assert str(caught.value).startswith(f"{path}: ")
    if name != "CT_small.dcm":
        with pytest.raises(VolumeReadError):
            read_volume(path)


def test_broken_folder_is_listed_completely():
    with pytest.raises(VolumeReadError, match=r"\(file \d of 6 in name order\)"):
        read_volume(shared_data("broken"))
    assert set(BROKEN) == {path.name for path in shared_data("broken").iterdir()}
    volume = read_volume(shared_data("broken/CT_small.dcm"))
    assert (volume.shape, volume.array.min(), volume.array.max()) == ((1, 128, 128), -896, 1167)
