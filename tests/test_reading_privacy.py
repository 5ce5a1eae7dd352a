# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Nothing that a header says about a person leaves the readers: not in results, errors, logs, caches or saved files.

Marks are planted in every attribute that can hold text, a date or an identifier, and looked for in all that comes out.
"""

import dataclasses
import gzip
import io
import logging
import pickle
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from body_phantom import body_array
from dicom_writer import multi_frame_elements, write_slice

from modeling_t3d.data.datasets import PretrainingDataset
from modeling_t3d.data.manifest import ManifestRow
from modeling_t3d.geometry_t3d import VolumeError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_dicom_t3d import quiet_parsers
from modeling_t3d.volume_io_t3d import list_series, read_volume, write_nifti

SimpleITK = pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")
MARKS = ("Qx7Mark", "19431224", "1.2.826.0.1.3680043.8.498.7391", "073Y", "113355")
# By value representation: what is planted in it. Numbers identify nobody; pixels and functional codes stay right.
PLANTED = {
    **dict.fromkeys(("LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE", "CS"), MARKS[0]),
    **{"DA": MARKS[1], "DT": MARKS[1] + MARKS[4], "TM": MARKS[4], "AS": MARKS[3], "UI": MARKS[2]},
    "UR": f"http://{MARKS[0]}",
}
FUNCTIONAL = {"Modality", "ImageType", "SpecificCharacterSet", "FrameType", "SOPClassUID"}
SETTINGS = {"spacing": None, "global_size": (8, 8, 8), "local_size": (8, 8, 8)}


def planted_elements() -> dict[str, str]:
    """Every text, date and identifier that the DICOM dictionary knows outside the description of the pixels."""
    from pydicom.datadict import DicomDictionary

    return {
        keyword: PLANTED[kind]
        for tag, (kind, _, _, _, keyword) in DicomDictionary.items()
        if kind in PLANTED and keyword and keyword not in FUNCTIONAL and tag >> 16 >= 0x0008 and tag >> 16 != 0x0028
    }


def planted_sequences() -> dict:
    """Identifiers one level down, and in private elements."""
    inner = pydicom.Dataset()
    inner.PatientID, inner.IssuerOfPatientID, inner.ReferencedSOPInstanceUID = MARKS[0], MARKS[0], MARKS[2]
    names = ("OtherPatientIDsSequence", "ReferencedStudySequence", "RequestAttributesSequence", "SourceImageSequence")
    return {name: pydicom.Sequence([inner]) for name in names}


def write_dicom(folder: Path, elements: dict) -> list[Path]:
    """Slices and a multi-frame object of a body, marks everywhere."""
    body = (body_array((6, 24, 24)).astype(int) + 1024).astype(np.uint16)
    for index, stored in enumerate(body):
        write_slice(folder / "slices" / f"{index}", stored, (0, 0, 3.0 * index), **elements)
    frames = multi_frame_elements(6, [(0, 0, 3.0 * index) for index in range(6)], [1] * 6)
    for functional in frames["PerFrameFunctionalGroupsSequence"]:
        content = pydicom.Dataset()
        content.FrameAcquisitionDateTime, content.FrameComments = MARKS[1], MARKS[0]
        functional.FrameContentSequence = pydicom.Sequence([content])
    write_slice(folder / "frames.dcm", body, (0, 0, 0), **{**elements, **frames})
    return [folder / "slices", folder / "frames.dcm", folder / "slices" / "0"]


def write_nifti_marks(folder: Path) -> list[Path]:
    image = nibabel.Nifti1Image(body_array((24, 24, 24)), np.diag([3.0, 3.0, 3.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = MARKS[0].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", (MARKS[0] + MARKS[1]).encode()))
    for name in ("scan.nii", "scan.nii.gz"):
        nibabel.save(image, folder / name)
    return [folder / "scan.nii", folder / "scan.nii.gz"]


def write_itk_marks(folder: Path) -> list[Path]:
    image = SimpleITK.GetImageFromArray(body_array((24, 24, 24)))
    image.SetSpacing((3.0, 3.0, 3.0))
    for key in ("PatientName", "StudyDate", "0010|0010", "Comment"):
        image.SetMetaData(key, MARKS[0])
    paths = [folder / f"scan.{suffix}" for suffix in ("nrrd", "mha", "mhd")]
    for path in paths:
        SimpleITK.WriteImage(image, str(path))
    nrrd = paths[0].read_bytes()
    paths[0].write_bytes(nrrd.replace(b"\n", b"\n# " + MARKS[0].encode() + b"\n", 1))
    return paths


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Files of every format with marks, each found in its bytes."""
    folder = tmp_path_factory.mktemp("marked")
    elements = planted_elements()
    assert len(elements) > 1500
    paths = [
        *write_dicom(folder, {**elements, **planted_sequences()}),
        *write_nifti_marks(folder),
        *write_itk_marks(folder),
    ]
    for path in paths:
        content = b"".join(one.read_bytes() for one in (path.iterdir() if path.is_dir() else [path]))
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert MARKS[0].encode() in content, path
    return paths


def inflated(content: bytes) -> bytes:
    """The content and, where it is compressed as a whole, what is inside."""
    try:
        return content + zlib.decompress(content, wbits=47)
    except zlib.error:
        return content


def assert_unmarked(what: str, content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else inflated(content)
    for mark in MARKS:
        for form in (mark.encode(), mark.encode("utf-16-le"), mark.lower().encode()):
            assert form not in data, f"{what} holds {mark}"


def saved_files(folder: Path):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_results_and_saved_files_hold_nothing_of_the_header(marked, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    processor = T3DImageProcessor(**SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, path in enumerate(marked):
            volume = read_volume(path)
            assert volume.source == str(path)
            fields = {field.name: getattr(volume, field.name) for field in dataclasses.fields(volume)}
            assert_unmarked(str(path), repr({name: value for name, value in fields.items() if name != "array"}))
            assert_unmarked(str(path), pickle.dumps(volume))
            if len(volume.array) == 1:
                continue
            prepared = processor.prepare(path)
            prepared.save(tmp_path / f"prepared{number}")
            write_nifti(volume, tmp_path / f"copy{number}.nii.gz")
            output = processor(path, views=2, seed=0, return_geometry=True)
            assert_unmarked(str(path), repr(output["geometry"]))
            assert_unmarked(str(path), pickle.dumps((prepared, output)))
            row = ManifestRow(1, path, "The heart is of normal size.", "patient", "study")
            PretrainingDataset([row], processor, tmp_path / f"cache{number}")[0]
        for path in marked[:3]:
            assert_unmarked(str(path), repr(list_series(path)))
        processor.save_pretrained(tmp_path / "processor")
    files = saved_files(tmp_path)
    assert len(files) > 4 * (len(marked) - 1)
    for file in files:
        assert_unmarked(str(file), file.relative_to(tmp_path).as_posix())
        assert_unmarked(str(file), file.read_bytes())
    shown = [record.getMessage() for record in caplog.records] + [str(one.message) for one in caught]
    assert_unmarked("logs, warnings and output", "\n".join([*shown, *capfd.readouterr()]))


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """Cut off, or with marks moved to where numbers are due."""
    data = bytearray(content)
    action = int(generator.integers(3))
    if action == 0:
        return bytes(data[: int(generator.integers(10, len(data)))])
    place = int(generator.integers(len(data) - 16))
    mark = MARKS[int(generator.integers(len(MARKS)))].encode()
    if action == 1:
        data[place : place + len(mark)] = mark
    else:
        data[place:place] = mark
    return bytes(data)


def test_errors_and_logs_hold_nothing_of_the_header(marked, tmp_path, caplog, capfd):
    """Damage of many kinds, each error's text, its causes and what it would print."""
    import traceback

    caplog.set_level(logging.DEBUG)
    generator = np.random.default_rng(3)
    processor = T3DImageProcessor(**SETTINGS)
    shown, num_refused = [], 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in range(100):
            seed = [path for path in marked if path.is_file()][case % (len(marked) - 1)]
            path = tmp_path / seed.name
            path.write_bytes(damaged(seed.read_bytes(), generator))
            if seed.suffix == ".mhd":
                (tmp_path / "scan.raw").write_bytes((seed.parent / "scan.raw").read_bytes())
            try:
                read_volume(path)
                processor(path)
            except VolumeError as error:
                num_refused += 1
                stream = io.StringIO()
                traceback.print_exception(error, file=stream)
                shown += [str(error), repr(error), stream.getvalue()]
    assert num_refused > 25
    shown += [record.getMessage() for record in caplog.records] + [str(one.message) for one in caught]
    assert_unmarked("errors and logs", "\n".join([*shown, *capfd.readouterr()]))


def test_the_reader_that_ends_last_ends_the_silence(caplog):
    """Two readers in two threads, of which the first to begin ends while the other one still reads."""
    second_reads, first_ended = threading.Event(), threading.Event()
    logger = logging.getLogger("pydicom")

    def read() -> bool:
        with quiet_parsers():
            second_reads.set()
            ended = first_ended.wait(60)
            warnings.warn(MARKS[0], stacklevel=1)
            logger.error(MARKS[0])
            return ended

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(1) as threads:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with quiet_parsers():
            second = threads.submit(read)
            assert second_reads.wait(60)
        first_ended.set()
        assert second.result()
        assert not caught
        assert not caplog.records
        assert warnings.filters == before
        assert not logger.disabled
        warnings.warn("of another", stacklevel=1)
        assert len(caught) == 1
