# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""DICOM pixel data in every encoding, as single slices and as enhanced multi-frame objects, gives the same volume."""

import itertools

import numpy as np
import pytest
from dicom_writer import SYNTAXES, multi_frame_elements, write_encoded, write_series, write_slice

from modeling_t3d import volume_dicom_t3d
from modeling_t3d.volume_io_t3d import VolumeReadError, list_series, read_volume

pydicom = pytest.importorskip("pydicom")
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SHAPE = (3, 32, 40)  # JPEG 2000 needs 32 pixels


@pytest.fixture(scope="module")
def stored():
    return np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)


@pytest.fixture(scope="module")
def plain(stored, tmp_path_factory):
    """A folder of slices and the same slices, in another order, in one enhanced object."""
    folder = tmp_path_factory.mktemp("plain")
    write_series(folder / "slices", stored)
    order = [2, 0, 1]
    elements = multi_frame_elements(3, [(-10, -20, 30 + 2.0 * index) for index in order], [1] * 3)
    write_slice(folder / "frames.dcm", stored[order], (0, 0, 0), SOPClassUID=ENHANCED_CT, **elements)
    return folder


@pytest.fixture(params=["small", "large"])
def pixels(request, monkeypatch):
    """Whether a file's pixels are read at once, or those of one frame after the other."""
    if request.param == "large":
        monkeypatch.setattr(volume_dicom_t3d, "LARGE_PIXELS", 0)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("kind", ["slices", "frames"])
def test_every_transfer_syntax_gives_one_volume(tmp_path, stored, plain, pixels, syntax, kind):
    try:
        if kind == "frames":
            write_encoded(plain / "frames.dcm", tmp_path / "frames", syntax)  # no extension
        for file in (plain / "slices").iterdir() if kind == "slices" else ():
            write_encoded(file, tmp_path / file.name, syntax)
    except ImportError as error:
        pytest.skip(str(error))
    assert pydicom.dcmread(next(tmp_path.iterdir())).file_meta.TransferSyntaxUID == SYNTAXES[syntax]
    volume, reference = read_volume(tmp_path), read_volume(plain / "slices")
    np.testing.assert_array_equal(volume.array, stored.astype(int) - 1024)
    np.testing.assert_array_equal(volume.affine, reference.affine)
    assert volume.array.dtype == np.int16
    assert volume.warnings == ()


@pytest.mark.parametrize("syntax", ["deflated", "jpeg_lossless", "jpeg_ls", "jpeg_2000", "rle", "big_endian"])
def test_truncated_multi_frame_objects_are_refused(tmp_path, plain, pixels, syntax):
    try:
        write_encoded(plain / "frames.dcm", tmp_path / "whole", syntax)
    except ImportError as error:
        pytest.skip(str(error))
    content = (tmp_path / "whole").read_bytes()
    for share in (0.3, 0.6, 0.9, 0.99):
        (tmp_path / "cut.dcm").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(VolumeReadError, match=r"cut\.dcm"):
            read_volume(tmp_path / "cut.dcm")


def test_what_follows_pixels_that_are_too_few_is_no_pixel(tmp_path, stored, plain, pixels):
    dataset = pydicom.dcmread(plain / "frames.dcm")
    dataset.PixelData = dataset.PixelData[:-80]
    dataset.add_new(0x7FE10010, "LO", "PRIVATE")
    dataset.add_new(0x7FE11000, "OB", b"x" * 400)
    dataset.save_as(tmp_path / "short.dcm")
    with pytest.raises(VolumeReadError, match="the pixel data is truncated: 7600 bytes where 7680 are needed"):
        read_volume(tmp_path / "short.dcm")


def test_enhanced_object_made_by_highdicom(tmp_path, stored, plain):
    """Functional groups as the field's own library writes them."""
    highdicom = pytest.importorskip("highdicom")
    slices = [pydicom.dcmread(file) for file in sorted((plain / "slices").iterdir())]
    for index, dataset in enumerate(slices):
        required = {
            **dict.fromkeys(("PatientSex", "ReferringPhysicianName", "Laterality", "PositionReferenceIndicator"), ""),
            **dict.fromkeys(("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"), "20200101"),
            **dict.fromkeys(("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"), "101010"),
            **{"StudyInstanceUID": "1.2.3", "SOPInstanceUID": f"1.2.3.{index + 1}", "FrameOfReferenceUID": "1.5"},
            **{"StudyID": "1", "AccessionNumber": "7", "InstanceNumber": index + 1, "AcquisitionNumber": 1},
            **{"Manufacturer": "none", "KVP": 120, "PatientPosition": "HFS", "ConvolutionKernel": "B"},
        }
        for keyword, value in required.items():
            setattr(dataset, keyword, value)
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices, series_instance_uid="1.2.9", series_number=3, sop_instance_uid="1.2.10", instance_number=1
    )
    enhanced.save_as(tmp_path / "enhanced.dcm")
    volume = read_volume(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(volume.array, stored.astype(int) - 1024)
    np.testing.assert_array_equal(volume.affine, read_volume(plain / "slices").affine)
    assert list_series(tmp_path / "enhanced.dcm") == ("CT axial 40x32x3",)


def test_localiser_frames_are_left_out(tmp_path, stored):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    elements = multi_frame_elements(3, [(0, 0, 0), (0, 0, 2), (0, 0, 100)], [1] * 3)
    frame_type = Dataset()
    frame_type.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    elements["PerFrameFunctionalGroupsSequence"][2].CTImageFrameTypeSequence = Sequence([frame_type])
    write_slice(tmp_path / "frames.dcm", stored, (0, 0, 0), **elements)
    volume = read_volume(tmp_path / "frames.dcm")
    np.testing.assert_array_equal(volume.array, stored[:2].astype(int) - 1024)
    assert "1 localiser" in volume.warnings[0]


@pytest.mark.parametrize("description", ["Scout", "TOPOGRAM 0.6 T80", "1. Localizer", "Surview_1", "chest scouts"])
def test_localisers_are_known_by_the_description_of_their_series(tmp_path, stored, description):
    write_series(tmp_path, stored)
    write_slice(tmp_path / "first", stored[0], (0, 0, 0), SeriesDescription=description, SeriesInstanceUID="1.7")
    volume = read_volume(tmp_path)
    assert volume.shape == SHAPE
    assert "1 localiser" in volume.warnings[0]
    assert description not in repr(volume.warnings)


def test_series_are_listed(tmp_path, stored):
    write_series(tmp_path / "a", stored)
    write_series(tmp_path / "b", stored[:2], SeriesInstanceUID="1.5", Modality="MR")
    assert list_series(tmp_path) == ("CT axial 40x32x3", "MR axial 40x32x2")
    for index, expected in enumerate(list_series(tmp_path)):
        assert expected.endswith(f"x{read_volume(tmp_path, series=index).shape[0]}")
    assert read_volume(tmp_path, series=1).modality == "MR"


def test_colour_look_up_tables_are_refused(tmp_path, stored):
    write_slice(tmp_path / "palette.dcm", stored[0], (0, 0, 0), PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(VolumeReadError, match="colour"):
        read_volume(tmp_path / "palette.dcm")


def test_series_without_identifiers_are_told_apart_by_number(tmp_path, stored):
    """Anonymised folders have empty identifiers throughout."""
    empty = {"SeriesInstanceUID": "", "SOPInstanceUID": None, "StudyInstanceUID": None}
    for number, height in itertools.product((1, 2), range(3)):
        write_slice(tmp_path / f"{number}{height}", stored[height], (0, 0, height), SeriesNumber=number, **empty)
    with pytest.raises(VolumeReadError, match="holds 2 series"):
        read_volume(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, series=1).array, stored.astype(int) - 1024)
