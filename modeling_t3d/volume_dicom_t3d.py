# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""DICOM slices and multi-frame objects to one Volume: which series, which frames of it, and in which values.

Headers and pixels are parsed by pydicom and its codec plugins; order and spacing are left to `volume_slices_t3d`.
Messages carry sizes and positions, never header text.
"""

import contextlib
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .geometry_t3d import Volume, VolumeReadError
from .volume_arithmetic_t3d import rescale, widened
from .volume_codestreams_t3d import DeflateGuard, check_codestream
from .volume_headers_t3d import archive_kind, checked_choice, pick_time
from .volume_slices_t3d import Refused, Slice, even_out, stack_slices

# Objects that belong to a study and are no scan: segmentations, plans, doses, reports, presentation states, ...
NOT_SCANS = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "RTIMAGE", "SR", "PR", "KO", "REG", "DOC", "FID", "AU"}
# The only modality codes that are repeated; anything else there could be free text.
NAMED_MODALITIES = {"CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OCT", "OPT", "OT"}
# What marks an image as a localiser, in its type or as a word of its series' description.
LOCALISER = re.compile(r"(?<![A-Z])(LOCALI[SZ]ER|SCOUT|TOPOGRAM|SCANOGRAM|SURVIEW)S?(?![A-Z])")
# No codec packs an image tighter than this many times; a header that promises more is damaged or hostile.
MAXIMUM_COMPRESSION = 20_000
# Pixels of one slice, four times those of the largest detectors: a codec allocates them before it looks at the data.
MAXIMUM_SLICE = 1 << 26
LARGE_PIXELS = 1 << 22  # bytes; more are left in the file until a frame of them is wanted
HEADER_KEYWORDS = [
    *("SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Rows"),
    *("Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope"),
    *("RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
# What decoding needs; the rest of the header has been read before.
# Body parts as the standard codes them, in words; anything else there could be free text.
BODY_PARTS = {
    "ABDOMEN": "abdomen", "ABDOMENPELVIS": "abdomen and pelvis", "ABDPELV": "abdomen and pelvis", "BRAIN": "brain",
    "CHEST": "chest", "CHESTABDOMEN": "chest and abdomen", "CHESTABDPELVIS": "chest, abdomen and pelvis",
    "CSPINE": "cervical spine", "HEAD": "head", "HEADNECK": "head and neck", "HEART": "heart", "HIP": "hip",
    "KIDNEY": "kidneys", "KNEE": "knee", "LIVER": "liver", "LSPINE": "lumbar spine", "LUNG": "lungs", "NECK": "neck",
    "NECKCHEST": "neck and chest", "PELVIS": "pelvis", "SHOULDER": "shoulder", "SPINE": "spine", "THORAX": "chest",
    "TSPINE": "thoracic spine", "WHOLEBODY": "whole body",
}  # fmt: skip
ACQUISITION_KEYWORDS = ["Modality", "BodyPartExamined", "ContrastBolusAgent", "SliceThickness", "KVP"]
PIXEL_KEYWORDS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData"),
    *("DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel", "nibabel.global")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


class _SharedSilence:
    """One silence from the first reader that enters to the last that leaves.

    Filters and loggers are the whole process's: readers in several threads that each saved and restored them would
    end the silence of one another, and leave behind what they found half-way.
    """

    def __init__(self) -> None:
        self._lock, self._undo = threading.Lock(), contextlib.ExitStack()
        self._num_readers = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_readers == 0:
                self._undo.enter_context(_silence())
            self._num_readers += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._num_readers -= 1
            if self._num_readers == 0:
                self._undo.close()


_SHARED_SILENCE = _SharedSilence()


def quiet_parsers() -> contextlib.AbstractContextManager[None]:
    """Silence what parsers warn and log: they repeat header values, which may identify a person."""
    return _SHARED_SILENCE


class _NotAVolume(Refused):
    """Why an image has no voxels in space, such as a dose screen: the other series of its study do without it."""


class _Damaged(Refused):
    """What no writer leaves in a header: its series' identifier may be damaged as well, and whose it is, unknown."""


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The finite numbers of one element, None where it is absent or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, str | int | float) else value
    try:
        numbers = tuple(float(entry) for entry in values)
    except (TypeError, ValueError):
        raise _Damaged(f"its {keyword} is not numeric") from None
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise Refused(f"its {keyword} is not {count} finite number{'s' if count > 1 else ''}")
    return numbers


def _number(dataset: Any, keyword: str, default: float) -> float:
    numbers = _numbers(dataset, keyword, 1)
    return default if numbers is None else numbers[0]


def _group(groups: Sequence[Any], keyword: str) -> Any:
    """The macro `keyword` of a frame: its own, else the shared one, else an empty data set."""
    for functional in groups:
        if functional.get(keyword):
            return functional[keyword].value[0]
    return {}


def _read_slice(file: int, frame: int, size: tuple[int, int], plane: Sequence[Any], time: float = 0.0) -> Slice:
    """Read one frame's geometry; `plane` holds where position, orientation, measures and rescale are written."""
    position_from, orientation_from, measures_from, rescale_from = plane
    position = _numbers(position_from, "ImagePositionPatient", 3)
    cosines = _numbers(orientation_from, "ImageOrientationPatient", 6)
    row = column = None
    if cosines is not None:
        row, column = np.array(cosines[:3]), np.array(cosines[3:])
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(row @ column)) > 0.01:
            raise Refused("its ImageOrientationPatient is not two perpendicular unit vectors")
        row, column = row / lengths[0], column / lengths[1]
    slope = _number(rescale_from, "RescaleSlope", 1.0)
    if slope == 0:
        raise Refused("its RescaleSlope is 0")
    return Slice(
        file,
        frame,
        None if position is None else np.array(position),
        row,
        column,
        _numbers(measures_from, "PixelSpacing", 2),
        size,
        slope,
        _number(rescale_from, "RescaleIntercept", 0.0),
        _number(measures_from, "SliceThickness", 0.0),
        time,
    )


def _is_localiser(image_type: Any, description: Any) -> bool:
    parts = [image_type] if isinstance(image_type, str) else image_type or []
    return any(LOCALISER.search(str(part).upper()) for part in (*parts, description or ""))


def _slices(dataset: Any, file: int, file_size: int) -> tuple[list[Slice], int]:
    """Every frame of one object and how many localiser frames were left out; nothing when it is no scan."""
    rows, columns = _number(dataset, "Rows", math.nan), _number(dataset, "Columns", math.nan)
    if str(dataset.get("Modality")) in NOT_SCANS or math.isnan(rows) or math.isnan(columns):
        return [], 0
    if min(rows, columns) < 1:
        raise Refused(f"its header gives {columns:g}x{rows:g} pixels; no axis may be empty")
    if _number(dataset, "SamplesPerPixel", 1.0) != 1 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise _NotAVolume("it holds colour pixels, not one value per voxel")
    if dataset.get("ModalityLUTSequence"):
        raise Refused("its values are given by a look-up table; convert it to rescaled values first")
    size, num_frames = (int(rows), int(columns)), int(_number(dataset, "NumberOfFrames", 1.0))
    pixels = size[0] * size[1]
    if num_frames < 1 or pixels > MAXIMUM_SLICE or pixels * num_frames > MAXIMUM_COMPRESSION * file_size:
        raise Refused(f"its header promises {columns:g}x{rows:g}x{num_frames} pixels, more than the file can hold")
    description = dataset.get("SeriesDescription")
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        if _is_localiser(dataset.get("ImageType"), description):
            return [], 1
        if num_frames > 1:
            raise _NotAVolume("it holds several frames without a position for each")
        return [_read_slice(file, 0, size, [dataset] * 4)], 0
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    frames = dataset["PerFrameFunctionalGroupsSequence"].value
    if len(frames) != num_frames:
        raise Refused(f"it describes {len(frames)} frames and promises {num_frames}")
    macros = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    slices = []
    for index, functional in enumerate(frames):
        groups = (functional, shared[0])
        frame_type = _group(groups, "CTImageFrameTypeSequence").get("FrameType") or dataset.get("ImageType")
        if _is_localiser(frame_type, description):
            continue
        plane = [_group(groups, macro) for macro in (*macros, "PixelValueTransformationSequence")]
        time = _number(_group(groups, "FrameContentSequence"), "TemporalPositionIndex", 0.0)
        slices.append(_read_slice(file, index, size, plane, time))
    return slices, num_frames - len(slices)


@dataclass
class _Series:
    """The slices of one series that can be read; `refused` is the first file that cannot, and why."""

    modality: str
    first_file: int
    slices: list[Slice] = field(default_factory=list)
    refused: tuple[int, str] | None = None

    @property
    def time_points(self) -> list[list[Slice]]:
        """The slices of each time point, where several lie at one position and the header tells their times."""
        times = sorted({entry.time for entry in self.slices})
        positions = {tuple(entry.position.round(3)) for entry in self.slices if entry.position is not None}
        if len(times) < 2 or len(positions) == len(self.slices):
            return [self.slices]
        return [[entry for entry in self.slices if entry.time == time] for time in times]

    @property
    def plane(self) -> str | None:
        """The plane of the first slice whose orientation is known."""
        return next((entry.plane for entry in self.slices if entry.row_direction is not None), None)

    def describe(self) -> str:
        text = self.modality
        if self.slices:
            rows, columns = self.slices[0].size
            points = self.time_points
            times = f"x{len(points)}" if len(points) > 1 else ""
            text += f" {self.plane or 'unoriented'} {columns}x{rows}x{len(points[0])}{times}"
        return text if self.refused is None else f"{text}, not readable ({self.refused[1]})"


class _Folder:
    """The DICOM files of one path, named in messages by that path and a number: file names may hold identifiers."""

    def __init__(self, source: str, files: Sequence[str]):
        self.source, self.files = source, files

    def error(self, reason: str, file: int | None = None) -> VolumeReadError:
        """The error that names the path as given, and which of its files."""
        which = ""
        if file is not None and len(self.files) > 1:
            which = f" (file {file + 1} of {len(self.files)} in name order)"
        return VolumeReadError(f"{self.source}{which}: {reason}")

    def read(self, file: int, **options: Any) -> Any:
        """One file as pydicom's data set; None where it does not carry the DICOM marker."""
        pydicom = _import_pydicom(self.source)
        try:
            with open(self.files[file], "rb") as stream:
                start = stream.read(132)
            if start[128:] != b"DICM":
                if b"\x08\x00\x05\x00" in start:  # the character set, which a data set without preamble begins with
                    raise self.error("is a DICOM data set without the file preamble; convert it to a DICOM file", file)
                return None
            with DeflateGuard(self.files[file]) as guarded:
                return pydicom.dcmread(guarded, **options)
        except VolumeReadError:
            raise
        except Refused as refused:
            raise self.error(str(refused), file) from None
        except OSError as error:
            raise self.error(f"cannot be opened ({type(error).__name__}: {error.strerror})", file) from None
        except Exception as error:  # a damaged file can make the parser raise anything
            raise self.error(f"its DICOM header is damaged ({type(error).__name__})", file) from None


def _import_pydicom(source: str) -> Any:
    try:
        import pydicom
    except ImportError:
        raise VolumeReadError(
            f'{source}: reading DICOM needs pydicom; install it with pip install "modeling_t3d[dicom]"'
        ) from None
    return pydicom


def _collect(folder: _Folder) -> tuple[list[_Series], list[str]]:
    """All series with places in space or with files that are refused, in order of their first file, and notes on what
    was left out.

    A refusal is held back with its series: a study is not to be lost for one series that nobody asked for.
    """
    grouped: dict[tuple, _Series] = {}
    refusals: dict[Any, _Series] = {}
    not_volumes: dict[Any, tuple[int, str]] = {}
    localisers, others, foreign, segmentations = 0, 0, 0, 0
    for index, file in enumerate(folder.files):
        dataset = folder.read(index, stop_before_pixels=True, specific_tags=HEADER_KEYWORDS)
        if dataset is None:
            if folder.files == [folder.source]:
                raise folder.error("is not a DICOM file (no DICM marker after the preamble)")
            foreign += 1
            continue
        try:
            modality = str(dataset.get("Modality"))
            named = modality if modality in NAMED_MODALITIES else "other"
            # Without a UID, the series number is all that tells series apart; multi-frame objects stand alone.
            number = str(dataset.get("SeriesNumber") or "")
            key = str(dataset.get("SeriesInstanceUID") or "") or ("", number)
            slices, left_out = _slices(dataset, index, os.path.getsize(file))
        except _NotAVolume as refused:
            not_volumes.setdefault(key, (index, str(refused)))
            others += 1
            continue
        except _Damaged as refused:
            raise folder.error(str(refused), index) from None
        except Refused as refused:
            refusals.setdefault(key, _Series(named, index, refused=(index, str(refused))))
            continue
        except Exception as error:  # elements are parsed on access, so damage may show only here
            raise folder.error(f"its DICOM header is damaged ({type(error).__name__})", index) from None
        localisers += left_out
        others += not slices and not left_out
        segmentations += modality == "SEG"
        if slices:
            alone = index if len(slices) > 1 else None
            grouped.setdefault((key, alone), _Series(named, index)).slices.extend(slices)
    others += foreign
    placed = {key: one for key, one in grouped.items() if any(entry.position is not None for entry in one.slices)}
    others += sum(len(one.slices) for key, one in grouped.items() if key not in placed)
    for (key, _), one in placed.items():
        # Within a series a refused file stands where a slice is due: leaving it out would leave a gap.
        one.refused = refusals[key].refused if key in refusals else not_volumes.get(key)
    placed_keys = {key for key, _ in placed}
    found = [*placed.values(), *(one for key, one in refusals.items() if key not in placed_keys)]
    if not found and not_volumes:
        index, reason = next(iter(not_volumes.values()))
        raise folder.error(reason, index)
    if not found:
        archives = {kind for file in folder.files if (kind := archive_kind(file))}
        kinds = "localisers only" if localisers else "no image with a position in space"
        if archives:
            raise folder.error(f"holds {kinds}, but {' and '.join(sorted(archives))}; unpack it first")
        if foreign == len(folder.files):
            raise folder.error(
                "holds no DICOM files; pass a folder with a series, or the file itself of another format"
            )
        if segmentations:
            raise folder.error(
                f"holds {kinds}, but a segmentation (DICOM SEG); pass the scan that it belongs to, or convert it to "
                "NIfTI or NRRD to read it as a label map"
            )
        raise folder.error(f"holds {kinds}; pass a folder or file with an image series")
    notes = [f"{localisers} localiser image(s) left out"] if localisers else []
    notes += [f"{others} file(s) that are no DICOM scan left out"] if others else []
    return sorted(found, key=lambda one: one.first_file), notes


def _choose(folder: _Folder, found: list[_Series], series: int | None) -> _Series:
    """The series asked for, the only one, or the only one known to be an axial CT; raises what refuses its files."""
    listing = "; ".join(f"series={ordinal}: {one.describe()}" for ordinal, one in enumerate(found))
    if series is not None:
        chosen = checked_choice(series, len(found))
        if chosen is None:
            raise folder.error(f"series={series!r} is not one of its {len(found)} series ({listing})")
        candidates = [found[chosen]]
    elif len(found) == 1:
        candidates = found
    else:
        candidates = [one for one in found if one.modality == "CT" and one.plane == "axial"]
    if len(candidates) != 1:
        raise folder.error(f"holds {len(found)} series; choose one with series= ({listing})")
    if candidates[0].refused is not None:
        file, reason = candidates[0].refused
        raise folder.error(reason, file)
    return candidates[0]


def describe_series(source: str, files: Sequence[str]) -> tuple[str, ...]:
    """What series the DICOM files hold, in the order that `read_dicom(series=...)` counts: modality, plane, size."""
    with quiet_parsers():
        folder = _Folder(source, files)
        found, _ = _collect(folder)
        return tuple(one.describe() for one in found)


def describe_acquisition(source: str, files: Sequence[str]) -> dict[str, Any]:
    """How the first scan among the files was acquired: numbers and words of fixed lists, never what a person typed."""
    with quiet_parsers():
        folder = _Folder(source, files)
        for file in range(len(files)):
            dataset = folder.read(file, stop_before_pixels=True, specific_tags=ACQUISITION_KEYWORDS)
            modality = "" if dataset is None else str(dataset.get("Modality", ""))
            if dataset is None or modality in NOT_SCANS:
                continue
            body_part = str(dataset.get("BodyPartExamined", "")).upper().replace(" ", "").replace("_", "")
            facts: dict[str, Any] = {
                "modality": modality if modality in NAMED_MODALITIES else None,
                "body_part": BODY_PARTS.get(body_part),
                "contrast": bool(dataset.get("ContrastBolusAgent")) or None,
            }
            for name, keyword in (("slice_thickness", "SliceThickness"), ("tube_voltage", "KVP")):
                with contextlib.suppress(Refused):
                    facts[name] = (_numbers(dataset, keyword, 1) or [None])[0]
            return {name: value for name, value in facts.items() if value is not None}
    return {}


def _frames(folder: _Folder, file: int) -> Iterator[np.ndarray]:
    """Stored pixel values of each frame of one file, (rows, columns), decoded one after the other."""
    dataset = folder.read(file, specific_tags=PIXEL_KEYWORDS, defer_size=LARGE_PIXELS)
    try:
        from pydicom.encaps import generate_frames
        from pydicom.pixels import get_decoder, iter_pixels
        from pydicom.uid import RLELossless

        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not syntax.is_deflated and not get_decoder(syntax).is_available:
            raise Refused(
                'no installed codec decodes its compression; install them with pip install "modeling_t3d[dicom]"'
            )
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames = int(dataset.get("NumberOfFrames") or 1)
        source: Any = dataset
        if not syntax.is_compressed or syntax.is_deflated:
            needed = rows * columns * frames * int(dataset.BitsAllocated) // 8
            pixels = dataset.get_item("PixelData", keep_deferred=True) if "PixelData" in dataset else None
            if pixels is not None and pixels.value is None and not syntax.is_deflated:
                source = folder.files[file]
                held = min(pixels.length, os.path.getsize(source) - pixels.value_tell)
            else:
                held = len(dataset.get("PixelData") or dataset.get("FloatPixelData") or b"")
            if held < needed:
                raise Refused(f"the pixel data is truncated: {held} bytes where {needed} are needed")
        elif syntax != RLELossless:
            offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
            extended = offsets if all(offsets) else None
            for codestream in generate_frames(dataset.PixelData, number_of_frames=frames, extended_offsets=extended):
                check_codestream(codestream, rows, columns)
        # Of the RLE decoders, the one in Rust ends damaged data with a panic, which no `except Exception` sees.
        plugin = "pydicom" if syntax == RLELossless else ""
        for _, frame in zip(range(frames), iter_pixels(source, decoding_plugin=plugin), strict=True):
            yield frame
    except Refused as refused:
        raise folder.error(str(refused), file) from None
    except Exception as error:  # codecs raise many types on damaged data, and their text may quote the header
        reason = f"its pixel data is damaged, truncated or of an unknown encoding ({type(error).__name__})"
        raise folder.error(reason, file) from None


def _stacked_pixels(folder: _Folder, slices: Sequence[Slice]) -> np.ndarray:
    """The values of each slice after its own rescale, (slices, rows, columns)."""
    array = np.empty(0)
    places = {(entry.file, entry.frame): index for index, entry in enumerate(slices)}
    for file in dict.fromkeys(entry.file for entry in slices):
        for frame, stored in enumerate(_frames(folder, file)):
            if (index := places.get((file, frame))) is None:
                continue
            entry = slices[index]
            values = rescale(stored, entry.slope, entry.intercept)
            if values.shape != entry.size:
                raise folder.error("its pixels have another size than its header says", file)
            if array.size == 0:
                array = np.empty((len(slices), *values.shape), dtype=values.dtype)
            array = widened(array, values)
            array[index] = values
    return array


def read_dicom(
    source: str,
    files: Sequence[str],
    *,
    series: int | None = None,
    time_index: int | None = None,
    resample: bool = True,
) -> Volume:
    """One series as a Volume, array order (slice, row, column); a tilted gantry leaves the affine sheared.

    Args:
        source: the path as the user gave it, for messages.
        files: the DICOM files below it, in the order of their names; others are left out and counted.
        series: which series, by its place in the list that the error shows when there are several.
        time_index: which time point of a multi-frame object whose frames have a TemporalPositionIndex.
        resample: whether slices whose steps are slightly uneven may be interpolated to even ones.
    """
    folder = _Folder(source, files)
    with quiet_parsers():
        found, notes = _collect(folder)
        chosen = _choose(folder, found, series)
        if len(found) > 1:
            refused = sum(one.refused is not None for one in found)
            which = f", {refused} of them not readable" if refused else ""
            notes.append(f"{len(found) - 1} other series left out{which}")
        points = chosen.time_points
        if time_index is not None and len(points) == 1:
            raise folder.error(
                "time_index= is for 4-D files, of DICOM for multi-frame objects whose frames at one position have "
                "different TemporalPositionIndex; this series has none"
            )
        time = pick_time(source, (*chosen.slices[0].size, len(points[0]), len(points)), time_index)
        try:
            stack = stack_slices(points[time], resample=resample)
        except Refused as refused:
            raise folder.error(str(refused)) from None
        array = _stacked_pixels(folder, stack.slices)
    if stack.places is not None:
        array = even_out(array, stack.places)
    modality = chosen.modality if chosen.modality in NAMED_MODALITIES else None
    return Volume(array, stack.affine, modality=modality, source=source, warnings=(*notes, *stack.notes))


__all__ = ["BODY_PARTS", "describe_acquisition", "describe_series", "quiet_parsers", "read_dicom"]
