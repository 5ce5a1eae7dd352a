# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""One's own data: volumes with their reports beside them, no table needed.

Layout, all of it in one folder or in one folder per patient, and in that one per study:

    scan.nii.gz, scan.txt                 .nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder of DICOM files
    scan_mask.nii.gz                      a mask of it (optional)
    patient1/study1/lung.nii.gz, patient1/study1/soft.nii.gz, patient1/study1/report.txt

A volume's report has its name; volumes that have none share the `report.txt` of their folder. Reports are UTF-8;
headings FINDINGS and IMPRESSION split one into sections, and what stands under equal headings is joined. A heading
that says more (CHEST FINDINGS) stays in the text. What stands before IMPRESSION is the findings where no heading says
so; what stands before FINDINGS (history, technique) is left out. The first folder below the given one names the
patient, the folder of a volume the study; volumes right in the given folder are patients of their own.
"""

import re
from pathlib import Path
from typing import Any

from ..manifest_files import open_text
from .release import LayoutError, Release

_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
# DICOM files may end in anything, the last number of an identifier for one; those of these kinds are never opened.
_OTHER_SUFFIXES = {
    *(".txt", ".pdf", ".rtf", ".doc", ".docx", ".htm", ".html", ".xml", ".json", ".jsonl", ".yaml", ".yml"),
    *(".csv", ".tsv", ".xls", ".xlsx", ".parquet"),
    *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff"),
    *(".npy", ".npz", ".h5", ".hdf5", ".mat", ".mgz", ".mnc", ".gz", ".zip"),
}
_HEADING = re.compile(
    # On a line of its own or before a colon; further words need the colon.
    r"^[ \t]*(?i:(?P<bare>findings?|impressions?)[ \t]*(?::|$)"
    r"|(?:[a-z/]+[ \t]+){0,3}?(?P<longer>findings?|impressions?)(?:[ \t]*(?:and|/|&)[ \t]*[a-z]+)?[ \t]*:)"
    # Within a line in capitals alone.
    r"|(?<=[.!?])[ \t]+(?P<inner>FINDINGS?|IMPRESSIONS?)[ \t]*:",
    re.MULTILINE,
)


def build_folder(folder: Path) -> Release:
    """
    Rows of a folder of volumes and reports; a volume without report is kept, without text, and counted.

    Args:
        folder (`Path`): the uppermost one.
    """
    volumes, masks = _find(folder)
    if not volumes:
        raise LayoutError(
            f"{folder}: no volumes; put {', '.join(_SUFFIXES)} files or folders of DICOM files there, each with its "
            "report as a .txt file of the same name beside it"
        )
    release = Release()
    mute = shortened = 0
    used = set()
    for volume in volumes:
        stem = volume.parent / _stem(volume)
        text_file = next((file for file in _report_files(volume, stem) if file.is_file()), None)
        inside = volume.parent.relative_to(folder).parts
        record: dict[str, Any] = {"volume": volume}
        if inside:
            record |= {"patient_id": inside[0], "study_id": "/".join(inside), "reconstruction": _stem(volume)}
        if text_file is None:
            mute += 1
        else:
            used.add(text_file)
            sections, begins_otherwise = _sections(text_file)
            record |= sections
            shortened += begins_otherwise
        if stem in masks:
            record["masks"] = {"mask": masks.pop(stem)}
        release.records.append(record)
    release.note(mute, "volumes have no report; a .txt file of the same name would give one")
    release.note(
        shortened, "volumes have a report with text before its findings, such as a history, that was left out"
    )
    orphans = [file for file in folder.rglob("*.txt") if file not in used and not _within(file, volumes)]
    release.note(len(orphans), "text files belong to no volume and were left out")
    release.note(len(masks), "masks belong to no volume and were left out")
    return release


def _find(folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    """Volumes, sorted, and masks by the path of their volume without its suffix."""
    volumes: list[Path] = []
    masks: dict[Path, Path] = {}
    series: set[Path] = set()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.name.lower().endswith(_SUFFIXES):
            if _stem(file).endswith("_mask"):
                masks[file.parent / _stem(file).removesuffix("_mask")] = file
            else:
                volumes.append(file)
        elif file.parent != folder and file.parent not in series and _is_dicom(file):
            series.add(file.parent)
    return sorted([*volumes, *series]), masks


def _is_dicom(file: Path) -> bool:
    """Whether the name or, where it does not tell, the marker after the preamble says so."""
    if file.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return True
    if file.suffix.lower() in _OTHER_SUFFIXES or file.name.upper() == "DICOMDIR":
        return False
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _stem(volume: Path) -> str:
    name = volume.name
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _report_files(volume: Path, stem: Path) -> list[Path]:
    beside = [stem.with_name(f"{stem.name}.txt"), volume.parent / "report.txt"]
    return [volume / "report.txt", *beside] if volume.is_dir() else beside


def _within(file: Path, volumes: list[Path]) -> bool:
    """Whether a text file lies in a DICOM folder, with which scanners put notes."""
    return any(volume in file.parents for volume in volumes if volume.is_dir())


def _sections(file: Path) -> tuple[dict[str, str], bool]:
    """What a row says of a report, and whether that leaves out how the report begins."""
    with open_text(file, LayoutError) as stream:
        text = stream.read().strip()
    headings = list(_HEADING.finditer(text))
    if not headings:
        return {"report": text}, False
    sections: dict[str, list[str]] = {"finding": [], "impression": []}
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    for heading, end in zip(headings, ends, strict=True):
        name = heading["bare"] or heading["longer"] or heading["inner"]
        start = heading.start() if heading["longer"] else heading.end()
        sections[name.lower().rstrip("s")].append(text[start:end].strip())
    beginning = text[: headings[0].start()].strip()
    findings, impression = ("\n".join(filter(None, bodies)) for bodies in sections.values())
    found = {"findings": findings or beginning, "impression": impression}
    return {name: body for name, body in found.items() if body} or {"report": text}, bool(findings and beginning)


__all__ = ["build_folder"]
