# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""DICOM slices and multi-frame objects to one Volume: which series, in which order, at which spacing, in which values.

Headers and pixels are parsed by pydicom and its codec plugins. Messages carry sizes and positions, never header text.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .geometry_t3d import Volume, VolumeReadError
from .volume_arithmetic_t3d import rescale

# Objects that belong to a study and are no scan: segmentations, plans, doses, reports, presentation states, ...
NOT_SCANS = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "RTIMAGE", "SR", "PR", "KO", "REG", "DOC", "FID", "AU"}
# The only modality codes that messages repeat; anything else there could be free text.
NAMED_MODALITIES = {"CT", "MR", "PT", "NM"}
# Slices are one orientation while their direction cosines agree to this (0.06 degrees).
DIRECTION_TOLERANCE = 1e-3
# No codec packs an image tighter than this many times; a header that promises more is damaged or hostile.
MAXIMUM_COMPRESSION = 20_000
HEADER_KEYWORDS = [
    *("SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber", "Rows", "Columns"),
    *("NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "ImagePositionPatient", "ImageOrientationPatient"),
    *("PixelSpacing", "SliceThickness", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


@contextlib.contextmanager
def quiet_parsers() -> Iterator[None]:
    """Silence what parsers warn and log: they repeat header values, which may identify a person."""
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


class _Refused(Exception):
    """Why a header or a series cannot be used, in words that quote no header text."""


@dataclass(frozen=True)
class _Slice:
    """One frame: where its pixels are and where it lies (LPS world, mm); None where the header does not say."""

    file: int
    frame: int
    position: Any
    row_direction: Any
    column_direction: Any
    pixel_spacing: Any
    size: tuple[int, int]
    slope: float
    intercept: float
    thickness: float

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.row_direction, self.column_direction)


@dataclass
class _Series:
    modality: str
    slices: list[_Slice]

    @property
    def plane(self) -> str:
        return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(self.slices[0].normal)))]

    def describe(self) -> str:
        rows, columns = self.slices[0].size
        return f"{self.modality} {self.plane} {columns}x{rows}x{len(self.slices)}"


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The finite numbers of one element, None where it is absent or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, str | int | float) else value
    try:
        numbers = tuple(float(entry) for entry in values)
    except (TypeError, ValueError):
        raise _Refused(f"its {keyword} is not numeric") from None
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise _Refused(f"its {keyword} is not {count} finite number{'s' if count > 1 else ''}")
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


def _slice(file: int, frame: int, size: tuple[int, int], plane: Sequence[Any]) -> _Slice:
    """Read one frame's geometry; `plane` holds where position, orientation, measures and rescale are written."""
    position_from, orientation_from, measures_from, rescale_from = plane
    position = _numbers(position_from, "ImagePositionPatient", 3)
    cosines = _numbers(orientation_from, "ImageOrientationPatient", 6)
    row = column = None
    if cosines is not None:
        row, column = np.array(cosines[:3]), np.array(cosines[3:])
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(row @ column)) > 0.01:
            raise _Refused("its ImageOrientationPatient is not two perpendicular unit vectors")
        row, column = row / lengths[0], column / lengths[1]
    slope = _number(rescale_from, "RescaleSlope", 1.0)
    if slope == 0:
        raise _Refused("its RescaleSlope is 0")
    return _Slice(
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
    )


def _image_type(dataset: Any) -> set[str]:
    value = dataset.get("ImageType")
    return {str(part).upper() for part in ([value] if isinstance(value, str) else value or [])}


def _slices(dataset: Any, file: int, file_size: int) -> tuple[list[_Slice], int]:
    """Every frame of one object and how many localiser frames were left out; nothing when it is no scan."""
    rows, columns = _number(dataset, "Rows", 0.0), _number(dataset, "Columns", 0.0)
    if str(dataset.get("Modality")) in NOT_SCANS or not rows or not columns:
        return [], 0
    if _number(dataset, "SamplesPerPixel", 1.0) != 1:
        raise _Refused("it holds colour pixels, not one value per voxel")
    if dataset.get("ModalityLUTSequence"):
        raise _Refused("its values are given by a look-up table; convert it to rescaled values first")
    size, num_frames = (int(rows), int(columns)), int(_number(dataset, "NumberOfFrames", 1.0))
    if num_frames < 1 or size[0] * size[1] * num_frames > MAXIMUM_COMPRESSION * file_size:
        raise _Refused(f"its header promises {columns:g}x{rows:g}x{num_frames} pixels, more than the file can hold")
    localiser = {"LOCALIZER", "LOCALISER", "SCOUT", "TOPOGRAM"}
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        if _image_type(dataset) & localiser:
            return [], 1
        if num_frames > 1:
            raise _Refused("it holds several frames without a position for each")
        return [_slice(file, 0, size, [dataset] * 4)], 0
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    frames = dataset["PerFrameFunctionalGroupsSequence"].value
    if len(frames) != num_frames:
        raise _Refused(f"it describes {len(frames)} frames and promises {num_frames}")
    macros = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    slices = []
    for index, functional in enumerate(frames):
        groups = (functional, shared[0])
        frame_type = _group(groups, "CTImageFrameTypeSequence").get("FrameType") or dataset.get("ImageType")
        if _image_type({"ImageType": frame_type}) & localiser:
            continue
        plane = [_group(groups, macro) for macro in (*macros, "PixelValueTransformationSequence")]
        slices.append(_slice(file, index, size, plane))
    return slices, num_frames - len(slices)


def _shown(positions: Sequence[float], around: int) -> str:
    """Up to eight positions in mm around an index."""
    first = max(0, min(around - 3, len(positions) - 8))
    part = [f"{value:.2f}" for value in positions[first : first + 8]]
    return ("... " if first else "") + ", ".join(part) + (" ..." if first + 8 < len(positions) else "") + " mm"


def _sorted_geometry(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray, list[str]]:
    """Slices in order of position, their affine (slice, row, column indices to RAS+ mm) and notes."""
    for name in ("position", "row_direction", "pixel_spacing"):
        missing = sum(getattr(entry, name) is None for entry in slices)
        if missing:
            keyword = {"position": "ImagePositionPatient", "row_direction": "ImageOrientationPatient"}
            raise _Refused(f"{missing} of {len(slices)} slices have no {keyword.get(name, 'PixelSpacing')}")
    first = slices[0]
    normal = first.normal
    heights = [float(entry.position @ normal) for entry in slices]
    for entry, height in zip(slices, heights, strict=True):
        cosines = np.concatenate([entry.row_direction - first.row_direction, entry.normal - normal])
        if np.abs(cosines).max() > DIRECTION_TOLERANCE:
            planes = sorted({_Series("", [one]).plane for one in slices})
            turned = " + ".join(planes) if len(planes) > 1 else f"{planes[0]}, turned at {height:.2f} mm"
            raise _Refused(f"its slices have mixed orientations ({turned}); keep one orientation per series")
        if entry.size != first.size or not np.allclose(entry.pixel_spacing, first.pixel_spacing, rtol=1e-3):
            raise _Refused(f"the slice at {height:.2f} mm has another size or pixel spacing than the first one")
    order = sorted(range(len(slices)), key=heights.__getitem__)
    slices, heights = [slices[index] for index in order], [heights[index] for index in order]
    notes: list[str] = []
    if len(slices) == 1:
        if first.thickness <= 0:
            raise _Refused("it holds one slice without a thickness, so its extent is unknown; pass the whole series")
        step = normal * first.thickness
        notes.append("one slice: there is no step between positions, its depth is the thickness of the slice")
    else:
        step = _uniform_step(np.stack([entry.position for entry in slices]), heights)
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = first.column_direction * first.pixel_spacing[0]
    affine[:3, 2] = first.row_direction * first.pixel_spacing[1]
    affine[:3, 3] = slices[0].position
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, notes  # LPS to RAS


def _uniform_step(positions: np.ndarray, heights: Sequence[float]) -> np.ndarray:
    """The vector from slice to slice, or a refusal that shows the positions where they are not evenly spaced."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    # Headers round positions: 5 % of the step or 0.05 mm is let through, a missing slice never is.
    tolerance = min(max(0.05 * usual, 0.05), 0.3 * usual)
    if steps.min() < 1e-3:
        around = int(np.argmin(steps))
        raise _Refused(
            f"two or more slices lie at {heights[around]:.2f} mm (positions: {_shown(heights, around)}): several "
            "phases or copies in one series; keep one slice per position"
        )
    around = int(np.argmax(np.abs(steps - usual)))
    if abs(steps[around] - usual) > tolerance:
        missing = steps[around] > 1.5 * usual
        raise _Refused(
            f"{'a slice is missing' if missing else 'the slice spacing varies'}: the step from {heights[around]:.2f} "
            f"to {heights[around + 1]:.2f} mm is {steps[around]:.2f} mm where {usual:.2f} mm is usual (positions: "
            f"{_shown(heights, around)}); complete the series or resample it to even slices"
        )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    drift = np.abs(positions - positions[0] - np.arange(len(positions))[:, None] * step).max(axis=1)
    if drift.max() > max(0.25 * usual, 0.1):
        around = int(np.argmax(drift))
        raise _Refused(
            f"its slices do not lie on one line: the one at {heights[around]:.2f} mm is {drift[around]:.2f} "
            f"mm beside it (positions: {_shown(heights, around)})"
        )
    return step


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
            return pydicom.dcmread(self.files[file], **options)
        except VolumeReadError:
            raise
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
    """All series with places in space, in order of their first file, and notes on what was left out."""
    grouped: dict[tuple, _Series] = {}
    localisers, others = 0, 0
    for index, file in enumerate(folder.files):
        dataset = folder.read(index, stop_before_pixels=True, specific_tags=HEADER_KEYWORDS)
        if dataset is None:
            if len(folder.files) == 1:
                raise folder.error("is not a DICOM file (no DICM marker after the preamble)")
            others += 1
            continue
        try:
            slices, left_out = _slices(dataset, index, os.path.getsize(file))
            modality = str(dataset.get("Modality"))
            # Without a UID, the series number is all that tells series apart; multi-frame objects stand alone.
            key = str(dataset.get("SeriesInstanceUID") or ""), str(dataset.get("SeriesNumber") or "")
        except _Refused as refused:
            raise folder.error(str(refused), index) from None
        except Exception as error:  # elements are parsed on access, so damage may show only here
            raise folder.error(f"its DICOM header is damaged ({type(error).__name__})", index) from None
        localisers += left_out
        others += not slices and not left_out
        if slices:
            alone = index if len(slices) > 1 else None
            named = modality if modality in NAMED_MODALITIES else "other"
            series = grouped.setdefault((key[0] or key, alone), _Series(named, []))
            series.slices.extend(slices)
    found = list(grouped.values())
    placed = [one for one in found if any(entry.position is not None for entry in one.slices)]
    others += sum(len(one.slices) for one in found) - sum(len(one.slices) for one in placed)
    if not placed:
        kinds = "localisers only" if localisers else "no image with a position in space"
        raise folder.error(f"holds {kinds}; pass a folder or file with an image series")
    notes = [f"{localisers} localiser image(s) left out"] if localisers else []
    return placed, notes + ([f"{others} file(s) that are no DICOM scan left out"] if others else [])


def _choose(folder: _Folder, found: list[_Series], series: int | None) -> _Series:
    """The series asked for, the only one, or the only axial CT."""
    for one in found:
        if any(entry.row_direction is None for entry in one.slices):
            raise folder.error("its slices have no ImageOrientationPatient; the orientation is unknown")
    listing = "; ".join(f"series={ordinal}: {one.describe()}" for ordinal, one in enumerate(found))
    if series is not None:
        if isinstance(series, bool) or not isinstance(series, int) or not 0 <= series < len(found):
            raise folder.error(f"series={series!r} is not one of its {len(found)} series ({listing})")
        return found[series]
    axial = [one for one in found if one.modality == "CT" and one.plane == "axial"]
    if len(found) == 1:
        return found[0]
    if len(axial) != 1:
        raise folder.error(f"holds {len(found)} series; choose one with series= ({listing})")
    return axial[0]


def _pixels(folder: _Folder, file: int) -> np.ndarray:
    """Stored pixel values of one file, (frames, rows, columns)."""
    dataset = folder.read(file)
    try:
        from pydicom.pixels import get_decoder

        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not syntax.is_deflated and not get_decoder(syntax).is_available:
            raise _Refused(
                'no installed codec decodes its compression; install them with pip install "modeling_t3d[dicom]"'
            )
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames = int(dataset.get("NumberOfFrames") or 1)
        if not syntax.is_compressed or syntax.is_deflated:
            needed = rows * columns * frames * int(dataset.BitsAllocated) // 8
            held = len(dataset.get("PixelData") or dataset.get("FloatPixelData") or b"")
            if held < needed:
                raise _Refused(f"the pixel data is truncated: {held} bytes where {needed} are needed")
        return dataset.pixel_array.reshape(frames, rows, columns)
    except _Refused as refused:
        raise folder.error(str(refused), file) from None
    except Exception as error:  # codecs raise many types on damaged data, and their text may quote the header
        reason = f"its pixel data is damaged, truncated or of an unknown encoding ({type(error).__name__})"
        raise folder.error(reason, file) from None


def read_dicom(source: str, files: Sequence[str], *, series: int | None = None) -> Volume:
    """One series as a Volume, array order (slice, row, column); a tilted gantry leaves the affine sheared.

    Args:
        source: the path as the user gave it, for messages.
        files: the DICOM files below it, in the order of their names; others are left out and counted.
        series: which series, by its place in the list that the error shows when there are several.
    """
    folder = _Folder(source, files)
    with quiet_parsers():
        found, notes = _collect(folder)
        chosen = _choose(folder, found, series)
        if len(found) > 1:
            notes.append(f"{len(found) - 1} other series left out")
        try:
            slices, affine, more = _sorted_geometry(chosen.slices)
        except _Refused as refused:
            raise folder.error(str(refused)) from None
        array = np.empty(0)
        cache: tuple[int, np.ndarray] = (-1, np.empty(0))
        for index, entry in enumerate(slices):
            if cache[0] != entry.file:
                cache = entry.file, _pixels(folder, entry.file)
            values = rescale(cache[1][entry.frame], entry.slope, entry.intercept)
            if values.shape != entry.size:
                raise folder.error("its pixels have another size than its header says", entry.file)
            if index == 0:
                array = np.empty((len(slices), *values.shape), dtype=values.dtype)
            elif values.dtype != array.dtype:
                array = array.astype("float32" if "f" in (values.dtype.kind, array.dtype.kind) else "int32")
            array[index] = values
    modality = chosen.modality if chosen.modality in NAMED_MODALITIES else None
    return Volume(array, affine, modality=modality, source=source, warnings=(*notes, *more))


__all__ = ["quiet_parsers", "read_dicom"]
