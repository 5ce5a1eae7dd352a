# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""CT-RATE: chest CT with English reports (Hugging Face data set `ibrahimhamamci/CT-RATE`, gated).

Layout, as the data set's own folder and the code published with it (github.com/ibrahimethemhamamci/CT-CLIP) use it:

    dataset/train/train_1/train_1_a/train_1_a_1.nii.gz            v1; `train_fixed` instead of `train` in v2
    dataset/valid/valid_1/valid_1_a/valid_1_a_1.nii.gz            v1; `valid_fixed` in v2
    dataset/radiology_text_reports/{train,validation}_reports.csv VolumeName, Findings_EN, Impressions_EN, ...
    dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv  VolumeName and 18 findings (optional)
    dataset/metadata/{train,validation}_metadata.csv              VolumeName, RescaleSlope, RescaleIntercept, ...
    dataset/metadata/no_chest_{train,valid}.txt                   volumes of other regions (optional)

A name is patient (`train_1`), study (`train_1_a`) and reconstruction (`1`). Headers of v1 lack the rescale that the
metadata table gives; headers of v2 are right, and applying the table once more makes them wrong (CT-CLIP, issue 50).
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..manifest_files import LABEL_VALUES, open_text
from .release import LayoutError, Release, find_table, read_table

SOURCE = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
_NAME = re.compile(r"(?P<study>(?P<patient>(?:train|valid)_\d+)_[a-z]+)_(?P<reconstruction>\d+)\.nii\.gz")
_ABSENT_TEXT = "Not given."


class _Split(NamedTuple):
    """How one split is called in the manifest, in folder and label names, and in other names."""

    name: str
    folder: str
    table: str


_SPLITS = (_Split("train", "train", "train"), _Split("validation", "valid", "validation"))


def build_ct_rate(folder: Path, *, version: str | None = None, csv_rescale: bool = False) -> Release:
    """
    Rows of a CT-RATE download, whole or in part.

    Args:
        folder (`Path`): the data set's folder, or its `dataset` folder.
        version (`"v1"` or `"v2"`, *optional*): which volumes to take; those there are, v2 where both are.
        csv_rescale (`bool`, defaults to `False`):
            Have the metadata table's slope and intercept applied to v1 volumes. By default HU come from the headers
            alone, and a volume whose header lacks them is refused when it is prepared.
    """
    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    version = _choose_version(root, version)
    if csv_rescale and version == "v2":
        raise LayoutError(
            f"{folder}: the headers of CT-RATE v2 (train_fixed, valid_fixed) already give HU, and the table's rescale "
            "would be applied a second time; leave csv_rescale out"
        )
    release = Release()
    if version == "v1" and not csv_rescale:
        release.notes.append(
            "these are volumes of v1, whose headers lack the rescale: those that are no HU will be refused; "
            "csv_rescale takes it from the metadata table, and v2 needs none"
        )
    present = [split for split in _SPLITS if (root / _volumes(split, version)).is_dir()]
    for split in present:
        _add_split(release, root, split, version, csv_rescale)
    release.note(len(_SPLITS) - len(present), "splits have no folder of volumes and were left out")
    if not release.records:
        raise LayoutError(f"{folder}: no volume of the report tables is there; download volumes from {SOURCE}")
    return release


def _volumes(split: _Split, version: str) -> str:
    return f"{split.folder}_fixed" if version == "v2" else split.folder


def _choose_version(root: Path, version: str | None) -> str:
    if version not in (None, "v1", "v2"):
        raise LayoutError(f"version must be 'v1' or 'v2', got {version!r}")
    found = [name for name in ("v2", "v1") if any((root / _volumes(split, name)).is_dir() for split in _SPLITS)]
    if not found or (version and version not in found):
        names = ", ".join(
            _volumes(split, name) for name in ([version] if version else ("v2", "v1")) for split in _SPLITS
        )
        raise LayoutError(f"{root}: none of the folders {names} is there; download the volumes from {SOURCE}")
    return version or found[0]


def _add_split(release: Release, root: Path, split: _Split, version: str, csv_rescale: bool) -> None:
    reports = find_table(root, [f"radiology_text_reports/{split.table}_reports.csv"], "the reports", SOURCE)
    labels = _labels(release, root, split)
    rescales = _rescales(root, split) if csv_rescale else {}
    elsewhere = _other_regions(root, split)
    volumes = root / _volumes(split, version)
    absent = excluded = repeated = 0
    named: set[str] = set()
    for row in read_table(reports, ["VolumeName", "Findings_EN", "Impressions_EN"]):
        name = row["VolumeName"].strip()
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise LayoutError(
                f"{reports}: VolumeName {name!r} is not of the form train_1_a_1.nii.gz; download it again"
            )
        path = volumes / parts["patient"] / parts["study"] / name
        if name in named:
            repeated += 1
        elif name in elsewhere:
            excluded += 1
        elif not path.is_file():
            absent += 1
        elif csv_rescale and name not in rescales:
            raise LayoutError(f"{root / 'metadata'}: no rescale of {name}; download the metadata table again")
        else:
            record: dict[str, Any] = {
                "volume": path,
                "findings": _text(row["Findings_EN"]),
                "impression": _text(row["Impressions_EN"]),
                "patient_id": parts["patient"],
                "study_id": parts["study"],
                "reconstruction": parts["reconstruction"],
                "split": split.name,
                "labels": labels.get(name, {}),
            }
            release.records.append(record | ({"rescale": rescales[name]} if csv_rescale else {}))
        named.add(name)
    release.note(absent, f"reports of the split {split.name} have no volume here and were left out")
    release.note(excluded, f"volumes of the split {split.name} show no chest and were left out")
    release.note(
        repeated, f"reports of the split {split.name} name a volume that an earlier row names and were left out"
    )
    unnamed = sum(path.name not in named for path in volumes.glob("*/*/*.nii.gz"))
    release.note(unnamed, f"volumes of the split {split.name} have no report and were left out")


def _labels(release: Release, root: Path, split: _Split) -> dict[str, dict[str, int | None]]:
    """Findings of every volume: 1, 0, or `None` where the cell is empty or NaN."""
    path = root / "multi_abnormality_labels" / f"{split.folder}_predicted_labels.csv"
    if not path.is_file():
        release.notes.append(f"the split {split.name} has no labels: {path.name} is not there")
        return {}
    found = {}
    for number, row in enumerate(read_table(path, ["VolumeName"]), start=1):
        name = row.pop("VolumeName").strip()
        cells = {finding: value.strip().lower() for finding, value in row.items()}
        if wrong := [finding for finding, cell in cells.items() if cell not in LABEL_VALUES]:
            raise LayoutError(f"{path}: row {number}: {wrong[0]!r} is not 1, 0 or empty; download it again")
        found[name] = {finding: LABEL_VALUES[cell] for finding, cell in cells.items()}
    return found


def _rescales(root: Path, split: _Split) -> dict[str, list[float]]:
    path = find_table(root, [f"metadata/{split.table}_metadata.csv"], "slopes and intercepts", SOURCE)
    columns = ["RescaleSlope", "RescaleIntercept"]
    found = {}
    for number, row in enumerate(read_table(path, ["VolumeName", *columns]), start=1):
        try:
            rescale = [float(row[column].strip() or "nan") for column in columns]
        except ValueError:
            raise LayoutError(
                f"{path}: row {number}: {' or '.join(columns)} is no number; download it again"
            ) from None
        if not any(map(math.isnan, rescale)):
            found[row["VolumeName"].strip()] = rescale
    return found


def _other_regions(root: Path, split: _Split) -> set[str]:
    path = root / "metadata" / f"no_chest_{split.folder}.txt"
    if not path.is_file():
        return set()
    with open_text(path, LayoutError) as file:
        return {line.strip().rsplit("/", 1)[-1] for line in file if line.strip()}


def _text(text: str) -> str:
    return "" if text.strip() == _ABSENT_TEXT else text.strip()


__all__ = ["build_ct_rate"]
