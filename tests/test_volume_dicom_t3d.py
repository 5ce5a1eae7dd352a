# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""DICOM series: order, spacing, rescale, which series, what is refused, and that no header text leaves the reader."""

import logging
import shutil
import tracemalloc
import warnings

import nibabel
import numpy as np
import pytest
from dicom_writer import SECRETS, multi_frame_elements, write_series, write_slice
from testing_utils import shared_data

from modeling_t3d import volume_dicom_t3d
from modeling_t3d.volume_io_t3d import VolumeReadError, list_series, read_volume
from modeling_t3d.volume_slices_t3d import Slice

pydicom = pytest.importorskip("pydicom")
TILT = np.deg2rad(18.5)
TURNED = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]


@pytest.fixture
def stored():
    return np.random.default_rng(0).integers(0, 3000, (5, 6, 7)).astype(np.uint16)


def refused(path, **options) -> str:
    """The message of the refusal; it is one line, begins with the path and holds no header text."""
    with pytest.raises(VolumeReadError) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert not any(secret in message for secret in SECRETS)
    return message


def test_order_and_spacing_come_from_the_positions(tmp_path, stored):
    write_series(tmp_path, stored)  # file names run downwards, SliceThickness says 9 mm
    volume = read_volume(tmp_path)
    assert volume.spacing == (2.0, 0.8, 0.7)
    assert volume.array.dtype == np.int16
    assert volume.modality == "CT"
    np.testing.assert_array_equal(volume.array, stored.astype(int) - 1024)
    # First pixel of the lowest slice at (-10, -20, 30) in LPS; columns go left, rows go posterior.
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [10, 20, 30, 1])
    np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], [10 - 3 * 0.7, 20 - 2 * 0.8, 32, 1])
    assert volume.axis_codes == "SPL"


def test_positions_that_run_downwards_give_the_same_volume(tmp_path, stored):
    write_series(tmp_path / "up", stored)
    write_series(tmp_path / "down", stored[::-1], step=(0, 0, -2.0), origin=(-10, -20, 38))
    up, down = read_volume(tmp_path / "up"), read_volume(tmp_path / "down")
    np.testing.assert_array_equal(up.array, down.array)
    np.testing.assert_array_equal(up.affine, down.affine)


def test_rescale_is_applied_slice_by_slice(tmp_path, stored):
    for index, slope in enumerate((1, 2, 0.5)):
        write_slice(
            tmp_path / f"{index}", stored[index], (0, 0, 3 * index), RescaleSlope=slope, RescaleIntercept=-index
        )
    volume = read_volume(tmp_path)
    assert volume.array.dtype == np.float32
    for index, slope in enumerate((1, 2, 0.5)):
        np.testing.assert_array_equal(volume.array[index], stored[index] * np.float32(slope) - index)
    signed = (stored.astype(np.int16) - 1000)[:2]
    write_series(tmp_path / "signed", signed.astype(np.int16), RescaleIntercept=0)
    np.testing.assert_array_equal(read_volume(tmp_path / "signed").array, signed)
    write_series(
        tmp_path / "wide", stored[:2] + np.array([0, 60000], dtype=np.uint16)[:, None, None], RescaleIntercept=0
    )
    wide = read_volume(tmp_path / "wide").array
    assert wide.dtype == np.int32
    np.testing.assert_array_equal(wide[1], stored[1].astype(int) + 60000)


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_slices_of_several_types_are_copied_once(monkeypatch, slope):
    """An array wide enough for all slices is not copied for each narrower one; values stay exact."""
    narrow = np.random.default_rng(0).integers(0, 3000, (1, 128, 128)).astype(np.uint16)
    wide = narrow + np.uint16(60000)
    monkeypatch.setattr(volume_dicom_t3d, "_frames", lambda folder, file: iter(narrow if file else wide))
    slices = [
        Slice(file, 0, None, None, None, None, narrow.shape[1:], slope if file == 0 else 1.0, -1024.0, 1.0)
        for file in range(40)
    ]
    tracemalloc.start()
    array = volume_dicom_t3d._stacked_pixels(None, slices)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.dtype == (np.int32 if slope == 1.0 else np.float32)
    np.testing.assert_array_equal(array[0], wide[0] * slope - 1024)
    np.testing.assert_array_equal(array[1:], np.repeat(narrow.astype(int) - 1024, 39, axis=0))
    assert peak < 1.5 * array.nbytes


def test_empty_identifiers_and_headers_without_rescale(tmp_path, stored):
    nothing = {"SeriesInstanceUID": "", "SOPClassUID": "", "PatientName": "", "SliceThickness": None}
    write_series(tmp_path, stored, RescaleSlope=None, RescaleIntercept=None, **nothing)
    np.testing.assert_array_equal(read_volume(tmp_path).array, stored)


def test_multi_frame_objects(tmp_path, stored):
    order = [3, 0, 4, 1, 2]
    positions, slopes = [(0, 0, 2.5 * index) for index in order], [1, 2, 1, 1, 1]
    elements = multi_frame_elements(5, positions, slopes)
    write_slice(tmp_path / "frames.dcm", stored, (0, 0, 0), **elements)
    volume = read_volume(tmp_path / "frames.dcm")
    assert volume.spacing == (2.5, 0.8, 0.7)
    for frame, (place, slope) in enumerate(zip(order, slopes, strict=True)):
        np.testing.assert_array_equal(volume.array[place], stored[frame].astype(int) * slope - 1024)
    elements["NumberOfFrames"] = 6
    write_slice(tmp_path / "promise.dcm", stored, (0, 0, 0), **elements)
    assert "describes 5 frames and promises 6" in refused(tmp_path / "promise.dcm")
    write_slice(tmp_path / "plain.dcm", stored, (0, 0, 0), NumberOfFrames=5)
    assert "without a position for each" in refused(tmp_path / "plain.dcm")


@pytest.mark.parametrize("order", ["time by time", "place by place"])
def test_time_points_of_a_multi_frame_object(tmp_path, order):
    stored = np.random.default_rng(0).integers(0, 3000, (6, 6, 7)).astype(np.uint16)
    frames = [(time, place) for time in range(2) for place in range(3)]
    if order == "place by place":
        frames.sort(key=lambda frame: (frame[1], -frame[0]))
    elements = multi_frame_elements(6, [(0, 0, 2.5 * place) for _, place in frames], [1] * 6)
    for functional, (time, _) in zip(elements["PerFrameFunctionalGroupsSequence"], frames, strict=True):
        functional.FrameContentSequence = pydicom.Sequence([pydicom.Dataset()])
        functional.FrameContentSequence[0].TemporalPositionIndex = time + 1
    path = tmp_path / "four.dcm"
    write_slice(path, stored, (0, 0, 0), **elements)
    assert list_series(path) == ("CT axial 7x6x3x2",)
    for time in range(2):
        volume = read_volume(path, time_index=time)
        assert volume.spacing == (2.5, 0.8, 0.7)
        for place in range(3):
            expected = stored[frames.index((time, place))].astype(int) - 1024
            np.testing.assert_array_equal(volume.array[place], expected)
    assert "holds 2 volumes (4-D); choose one with time_index=0..1" in refused(path)
    assert "time_index=2 is outside 0..1" in refused(path, time_index=2)
    for functional in elements["PerFrameFunctionalGroupsSequence"]:
        del functional.FrameContentSequence
    write_slice(path, stored, (0, 0, 0), **elements)  # nothing tells the frames of one position apart
    assert "two or more slices lie at 0.00 mm" in refused(path)
    assert "different TemporalPositionIndex; this series has none" in refused(path, time_index=0)


def test_frames_that_each_have_a_time_are_one_volume(tmp_path, stored):
    """A table that moves on while it scans: no position is there twice."""
    elements = multi_frame_elements(5, [(0, 0, 2.5 * place) for place in range(5)], [1] * 5)
    for time, functional in enumerate(elements["PerFrameFunctionalGroupsSequence"]):
        functional.FrameContentSequence = pydicom.Sequence([pydicom.Dataset()])
        functional.FrameContentSequence[0].TemporalPositionIndex = time + 1
    write_slice(tmp_path / "frames.dcm", stored, (0, 0, 0), **elements)
    np.testing.assert_array_equal(read_volume(tmp_path / "frames.dcm").array, stored.astype(int) - 1024)


def test_localisers_and_other_objects_are_left_out(tmp_path, stored):
    write_series(tmp_path, stored)
    write_slice(
        tmp_path / "scout",
        stored[0],
        (0, 0, 0),
        ImageOrientationPatient=TURNED,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    write_slice(tmp_path / "plan", stored[0], (0, 0, 0), Modality="RTDOSE", SeriesInstanceUID="1.9")
    write_slice(tmp_path / "capture", stored[0], (0, 0, 0), ImagePositionPatient=None, SeriesInstanceUID="1.8")
    (tmp_path / "notes.txt").write_text("not DICOM")
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array, stored.astype(int) - 1024)
    assert "1 localiser" in volume.warnings[0]
    assert "3 file(s)" in volume.warnings[1]
    assert "localisers only" in refused(tmp_path / "scout")
    assert "no image with a position" in refused(tmp_path / "plan")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scan.nii.gz").write_bytes(bytes(400))
    assert "holds no DICOM files; pass a folder with a series, or the file itself" in refused(tmp_path / "other")


def test_a_segmentation_is_named(tmp_path, stored):
    path = tmp_path / "seg"
    write_slice(path, stored[0], (0, 0, 0), Modality="SEG", SeriesInstanceUID="1.9")
    for given in (path, tmp_path):
        assert "but a segmentation (DICOM SEG); pass the scan that it belongs to" in refused(given)
    write_series(tmp_path, stored)
    assert read_volume(tmp_path).warnings == ("1 file(s) that are no DICOM scan left out",)


NOT_VOLUMES = [
    {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "Modality": "OT", "ImagePositionPatient": None},
    {"PhotometricInterpretation": "PALETTE COLOR", "Modality": "OT"},
    {"NumberOfFrames": 5, "Modality": "US"},
]


@pytest.mark.parametrize("elements", NOT_VOLUMES)
def test_images_that_are_no_volume_do_not_block_their_study(tmp_path, stored, elements):
    write_series(tmp_path, stored)
    path = tmp_path / "000"  # read before the scan
    pixels = stored if "NumberOfFrames" in elements else stored[0]
    write_slice(path, pixels, (0, 0, 0), SeriesInstanceUID="1.9", **elements)
    for options in ({}, {"series": 0}):
        volume = read_volume(tmp_path, **options)
        np.testing.assert_array_equal(volume.array, stored.astype(int) - 1024)
        assert volume.warnings == ("1 file(s) that are no DICOM scan left out",)
    assert list_series(tmp_path) == ("CT axial 7x6x5",)
    expected = "without a position for each" if "NumberOfFrames" in elements else "colour pixels"
    assert expected in refused(path)  # nothing else is there
    shutil.copy(path, tmp_path / "again")
    assert "2 file(s)" in read_volume(tmp_path).warnings[0]
    path.unlink()
    (tmp_path / "again").unlink()
    write_slice(path, pixels, (0, 0, 0), **elements)  # in the scan's own series, where it may stand for a slice
    assert expected in refused(tmp_path)


LOOK_UP_TABLE = "its values are given by a look-up table; convert it to rescaled values first"
BAD_SERIES = [
    ({"ImageOrientationPatient": None}, "CT unoriented 7x6x1", "1 of 1 slices have no ImageOrientationPatient"),
    ({"Modality": "CR", "ModalityLUTSequence": []}, f"CR, not readable ({LOOK_UP_TABLE})", LOOK_UP_TABLE),
    ({"RescaleSlope": 0}, "CT, not readable (its RescaleSlope is 0)", "its RescaleSlope is 0"),
]


@pytest.mark.parametrize(("elements", "listed", "reason"), BAD_SERIES)
def test_a_series_that_cannot_be_read_does_not_block_its_study(tmp_path, stored, elements, listed, reason):
    if "ModalityLUTSequence" in elements:
        elements = {**elements, "ModalityLUTSequence": pydicom.Sequence([pydicom.Dataset()])}
    write_series(tmp_path, stored)
    path = tmp_path / "000"  # read before the scan
    write_slice(path, stored[0], (-10, -20, 40), SeriesInstanceUID="1.9", **elements)
    assert list_series(tmp_path) == (listed, "CT axial 7x6x5")
    unread = ", 1 of them not readable" if "not readable" in listed else ""
    for options in ({}, {"series": 1}):
        volume = read_volume(tmp_path, **options)
        np.testing.assert_array_equal(volume.array, stored.astype(int) - 1024)
        assert volume.warnings == (f"1 other series left out{unread}",)
    assert reason in refused(tmp_path, series=0)
    assert reason in refused(path)  # nothing else is there
    write_slice(
        path, stored[0], (-10, -20, 40), **elements
    )  # in the scan's own series, where it may stand for a slice
    reason = reason.replace("1 of 1", "1 of 6")
    assert reason in refused(tmp_path)
    assert reason in refused(tmp_path, series=0)


def test_a_refused_slice_does_not_decide_between_two_scans(tmp_path, stored):
    """Both are axial CT: the sound one is not taken in silence for the one that was meant."""
    write_series(tmp_path / "a", stored)
    write_series(tmp_path / "b", stored[:3], SeriesInstanceUID="1.5")
    write_slice(tmp_path / "b" / "000", stored[3], (-10, -20, 36), SeriesInstanceUID="1.5", RescaleSlope=0)
    listing = "series=0: CT axial 7x6x5; series=1: CT axial 7x6x3, not readable (its RescaleSlope is 0)"
    assert f"holds 2 series; choose one with series= ({listing})" in refused(tmp_path)
    assert read_volume(tmp_path, series=0).shape == (5, 6, 7)
    assert "(file 6 of 9 in name order): its RescaleSlope is 0" in refused(tmp_path, series=1)


def test_a_damaged_header_may_belong_to_any_series(tmp_path, stored):
    """Its series' identifier may be damaged as well: the scan could lack a slice in silence."""
    write_series(tmp_path, stored)
    path = tmp_path / "000"
    write_slice(path, stored[0], (-10, -20, 40), SeriesInstanceUID="1.9", PixelSpacing=["1234567890", "1"])
    path.write_bytes(path.read_bytes().replace(b"1234567890", b"1234?67890"))
    for options in ({}, {"series": 0}):
        assert "(file 1 of 6 in name order): its PixelSpacing is not numeric" in refused(tmp_path, **options)


def test_several_series_are_listed_without_names(tmp_path, stored):
    write_series(tmp_path / "a", stored)
    write_series(tmp_path / "b", stored[:3], SeriesInstanceUID="1.5", SeriesNumber=7)
    write_series(tmp_path / "c", stored, step=(2.0, 0, 0), SeriesInstanceUID="1.6", ImageOrientationPatient=TURNED)
    message = refused(tmp_path)
    assert "holds 3 series" in message
    assert "series=0: CT axial 7x6x5; series=1: CT axial 7x6x3; series=2: CT sagittal 7x6x5" in message
    assert read_volume(tmp_path, series=1).shape == (3, 6, 7)
    assert read_volume(tmp_path, series=2).axis_codes == "RIP"
    for wrong in (3, -1, "1", True):
        assert "is not one of its 3 series" in refused(tmp_path, series=wrong)
    shutil.rmtree(tmp_path / "b")
    volume = read_volume(tmp_path)  # the only axial CT
    assert volume.axis_codes == "SPL"
    assert "1 other series left out" in volume.warnings


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0, 5, 10, 20, 25], ("a slice is missing", "10.00 to 20.00 mm is 10.00 mm where 5.00 mm")),
        ([0, 5, 5, 10, 15], ("two or more slices lie at 5.00 mm",)),
        ([0, 5, 10, 12, 17], ("slice spacing varies", "2.00 mm where 5.00 mm")),
        ([0, 0, 1, 1, 2], ("two or more slices lie at 0.00 mm",)),
    ],
)
def test_uneven_positions_are_shown(tmp_path, stored, heights, expected):
    for index, height in enumerate(heights):
        write_slice(tmp_path / f"{index}", stored[index], (0, 0, height))
    message = refused(tmp_path)
    for part in (*expected, "positions: "):
        assert part in message


def test_positions_rounded_by_the_header_are_accepted(tmp_path, stored):
    for index, height in enumerate([0.0, 0.63, 1.25, 1.88, 2.5]):
        write_slice(tmp_path / f"{index}", stored[index], (0, 0, height))
    assert read_volume(tmp_path).spacing[0] == 0.625


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"ImageOrientationPatient": TURNED}, "mixed orientations (axial + sagittal)"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, np.cos(0.1), np.sin(0.1)]}, "mixed orientations (axial, turned"),
        ({"PixelSpacing": [0.8, 0.8]}, "another size or pixel spacing"),
        ({"ImagePositionPatient": [40, -20, 40]}, "do not lie on one line"),
        ({"ImagePositionPatient": None}, "1 of 6 slices have no ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "no ImageOrientationPatient"),
        ({"PixelSpacing": None}, "1 of 6 slices have no PixelSpacing"),
        ({"PixelSpacing": ["0.8", "nan"]}, "PixelSpacing is not 2 finite numbers"),
        ({"PixelSpacing": ["0.8", "0"]}, "not believable"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "perpendicular"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"Rows": 0}, "its header gives 7x0 pixels; no axis may be empty"),
        ({"Columns": 0}, "its header gives 0x6 pixels; no axis may be empty"),
        ({"NumberOfFrames": 2_000_000_000}, "more than the file can hold"),
        ({"PixelData": b"\0" * 20}, "truncated"),
        ({"PixelData": None}, "truncated"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, stored, elements, expected):
    write_series(tmp_path, stored[:, :6, :])
    if "PixelSpacing" in elements and elements["PixelSpacing"] and elements["PixelSpacing"][1] == "0":
        write_series(tmp_path, stored, **elements)
    else:
        position = elements.pop("ImagePositionPatient", [-10, -20, 40])
        write_slice(tmp_path / "odd", stored[0], (0, 0, 0), ImagePositionPatient=position, **elements)
    assert expected in refused(tmp_path)


def test_one_slice_has_the_depth_of_its_thickness(tmp_path, stored):
    write_slice(tmp_path / "one.dcm", stored[0], (0, 0, 0))
    volume = read_volume(tmp_path / "one.dcm")
    assert volume.spacing == (9.0, 0.8, 0.7)
    assert "one slice" in volume.warnings[0]
    write_slice(tmp_path / "thin.dcm", stored[0], (0, 0, 0), SliceThickness=None)
    assert "extent is unknown" in refused(tmp_path / "thin.dcm")
    assert "time_index= is for 4-D" in refused(tmp_path / "one.dcm", time_index=0)


@pytest.mark.parametrize("turned", [False, True])
def test_tilted_gantry_is_resampled_to_where_the_voxels_are(tmp_path, turned):
    """Slices tilted about x while the table moves along z: a ramp keeps its values in world coordinates."""
    column = np.array([0, np.cos(TILT), -np.sin(TILT)])
    rows, columns = np.meshgrid(np.arange(30), np.arange(7), indexing="ij")
    step = np.array([0, 0, -2.5 if turned else 2.5])

    def ramp(lps):
        return 3000 + lps @ np.array([30.0, 40.0, -50.0])

    for index in range(6):
        pixels = index * step + columns[..., None] * [0.7, 0, 0] + rows[..., None] * 0.8 * column
        elements = {"ImageOrientationPatient": [1.0, 0, 0, *column.tolist()], "RescaleIntercept": 0}
        write_slice(tmp_path / f"{index}", np.rint(ramp(pixels)).astype(np.uint16), index * step, **elements)
    volume = read_volume(tmp_path)
    assert not volume.is_sheared
    assert "18.5 degrees" in volume.warnings[-1]
    assert volume.spacing[0] == pytest.approx(2.5 * np.cos(TILT), abs=1e-4)
    assert volume.shape[0] == 6
    index = np.argwhere(np.ones(volume.shape, dtype=bool))
    lps = (index @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * (-1, -1, 1)
    error = np.abs(volume.array.ravel() - ramp(lps))
    assert np.mean(error < 1.5) > 0.8  # the rest is the fill beside the tilted slices
    assert volume.to_canonical().axis_codes == "SAR"


def test_no_header_text_is_logged_warned_or_raised(tmp_path, stored, caplog, capfd):
    number = "1234567890"  # written where a number is due, then overwritten with a name of the same length
    assert len(number) == len(SECRETS[0])
    fields = {
        "weight.dcm": {"PatientWeight": number},
        "frames.dcm": {"NumberOfFrames": number},
        "position.dcm": {"ImagePositionPatient": [number, "1", "2"]},
        "orientation.dcm": {"ImageOrientationPatient": [number, "0", "0", "0", "1", "0"]},
        "spacing.dcm": {"PixelSpacing": [number, "1"]},
        "slope.dcm": {"RescaleSlope": number},
        "thickness.dcm": {"SliceThickness": number},
        "series.dcm": {"SeriesNumber": number, "SeriesInstanceUID": ""},
        "modality.dcm": {"Modality": number},
    }
    for name, elements in fields.items():
        write_slice(tmp_path / name, stored[0], (0, 0, 0), **elements)
        content = (tmp_path / name).read_bytes()
        assert number.encode() in content
        (tmp_path / name).write_bytes(content.replace(number.encode(), SECRETS[0].encode()))
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    capfd.readouterr()
    shown = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in fields:
            if name in ("weight.dcm", "modality.dcm", "series.dcm"):
                volume = read_volume(tmp_path / name)
                shown += [repr(volume.warnings), repr(volume.modality)]
            else:
                shown.append(refused(tmp_path / name))
        content = (tmp_path / "weight.dcm").read_bytes()
        for cut in range(140, len(content), 37):
            (tmp_path / "cut.dcm").write_bytes(content[:cut])
            shown.append(refused(tmp_path / "cut.dcm"))
    shown += [record.getMessage() for record in caplog.records] + [str(one.message) for one in caught]
    shown += list(capfd.readouterr())
    assert not [text for text in shown if any(secret in text for secret in SECRETS)]


def test_files_are_named_by_number_not_by_name(tmp_path, stored):
    write_series(tmp_path, stored)
    content = (tmp_path / "003").read_bytes()
    (tmp_path / "003").unlink()
    (tmp_path / "Doe^Secret").write_bytes(content[:-10])
    assert f"{tmp_path} (file 5 of 5 in name order): the pixel data is truncated" in refused(tmp_path)


@pytest.mark.parametrize("name", ["jpeg2000_lossless", "jpegls_lossless", "jpeg_lossless_sv1", "rle", "explicit_le"])
def test_truncated_pixel_data_is_refused(tmp_path, name):
    content = shared_data(f"transfer_syntaxes/{name}.dcm").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.dcm").write_bytes(content[: int(len(content) * share)])
        assert "truncated" in refused(tmp_path / "cut.dcm")


def test_agrees_with_simple_itk(tmp_path, stored):
    """An oblique series against another reader's geometry."""
    simple_itk = pytest.importorskip("SimpleITK")
    row, column = np.array([np.cos(0.3), np.sin(0.3), 0]), np.array([-np.sin(0.3), np.cos(0.3), 0])
    write_series(tmp_path, stored, ImageOrientationPatient=[*row.tolist(), *column.tolist()])
    names = simple_itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = simple_itk.ReadImage(names)
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array, simple_itk.GetArrayFromImage(image))
    for index in ((0, 0, 0), (4, 5, 6), (2, 1, 3)):
        lps = image.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
        np.testing.assert_allclose(volume.affine @ [*index, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-4)
    assert volume.axis_codes == "".join(nibabel.aff2axcodes(volume.affine))
