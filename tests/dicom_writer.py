# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Small synthetic DICOM series whose every header field a test can set; their names must never reach a message."""

import warnings
from pathlib import Path

import numpy as np

SECRETS = ("Doe^Secret", "ID-SECRET-7", "19431224", "SecretDescription", "1.2.826.0.1.3680043.8.498.77")


def write_slice(path: Path, stored: np.ndarray, position, **elements) -> None:
    """One CT slice file; `elements` replace header fields by keyword, None removes one."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = SECRETS[4] + ".1"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    fields = {
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientName": SECRETS[0],
        "PatientID": SECRETS[1],
        "PatientBirthDate": SECRETS[2],
        "SeriesDescription": SECRETS[3],
        "SeriesInstanceUID": SECRETS[4] + ".2",
        "SeriesNumber": 2,
        "ImagePositionPatient": [float(value) for value in position],
        "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "PixelSpacing": [0.8, 0.7],
        "SliceThickness": 9.0,
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": stored.tobytes(),
    }
    fields.update(elements)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tests write values that the standard forbids
        for keyword, value in fields.items():
            if value is not None:
                setattr(dataset, keyword, value)
        dataset.save_as(path, enforce_file_format=True)


def write_series(
    folder: Path, array: np.ndarray, *, step=(0.0, 0.0, 2.0), origin=(-10.0, -20.0, 30.0), **elements
) -> None:
    """A (slices, rows, columns) uint16 array as files whose names run against the order of the positions."""
    for index, stored in enumerate(array):
        position = np.asarray(origin) + index * np.asarray(step)
        write_slice(folder / f"{len(array) - index:03d}", stored, position, **elements)


def multi_frame_elements(count: int, positions, slopes) -> dict:
    """Functional groups of an enhanced multi-frame CT: positions and rescale per frame, the rest shared."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def item(**values) -> Sequence:
        dataset = Dataset()
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        return Sequence([dataset])

    shared = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
        PixelMeasuresSequence=item(PixelSpacing=[0.8, 0.7], SliceThickness=9.0),
    )
    frames = [
        item(
            PlanePositionSequence=item(ImagePositionPatient=[float(value) for value in position]),
            PixelValueTransformationSequence=item(RescaleSlope=slope, RescaleIntercept=-1024),
        )[0]
        for position, slope in zip(positions, slopes, strict=True)
    ]
    removed = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
    return {
        "NumberOfFrames": count,
        "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
        **dict.fromkeys(removed),
    }


SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big_endian": "1.2.840.10008.1.2.2",
    "jpeg_lossless": "1.2.840.10008.1.2.4.57",
    "jpeg_lossless_first_order": "1.2.840.10008.1.2.4.70",
    "jpeg_ls": "1.2.840.10008.1.2.4.80",
    "jpeg_2000": "1.2.840.10008.1.2.4.90",
    "rle": "1.2.840.10008.1.2.5",
}


def write_encoded(source: Path, target: Path, syntax: str) -> None:
    """Write an uncompressed file in another transfer syntax of `SYNTAXES`; ImportError without its encoder."""
    import pydicom

    uid = pydicom.uid.UID(SYNTAXES[syntax])
    target.parent.mkdir(parents=True, exist_ok=True)
    dataset = pydicom.dcmread(source)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID  # some encoders ask for it
    if syntax.startswith("jpeg_lossless"):
        _gdcm_jpeg_lossless(source, target, syntax.endswith("order"))
        dataset.PixelData = pydicom.dcmread(target).PixelData
        dataset["PixelData"].is_undefined_length = True
    elif uid.is_encapsulated:
        try:
            dataset.compress(uid, generate_instance_uid=False)
        except RuntimeError as error:  # what pydicom raises where a plugin is missing
            raise ImportError(f"no encoder for {syntax}: {error}") from None
    elif syntax == "big_endian":
        meta = dataset.file_meta
        dataset = pydicom.Dataset(dict(dataset.items()))  # a data set from a file is bound to that file's byte order
        dataset.file_meta = meta
        dataset.PixelData = np.frombuffer(dataset.PixelData, dtype="<u2").astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = uid
    little = syntax != "big_endian"
    implicit = syntax == "implicit"
    dataset.save_as(target, implicit_vr=implicit, little_endian=little, enforce_file_format=True)


def _gdcm_jpeg_lossless(source: Path, target: Path, first_order: bool) -> None:
    """Encode with GDCM; of what it writes, only the pixel data can be used: it makes up functional groups."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14 + int(first_order)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
