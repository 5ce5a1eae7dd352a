# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""INSPECT: CT pulmonary angiography with the reports' impressions (Stanford AIMI, under a data use agreement).

Layout of the release's folder `full` (tables carry the date of their release; `impression_id` joins them):

    CTPA/PE45239c8.nii.gz
    impressions_20250611.tsv     impression_id, impressions
    splits_20250611.tsv          impression_id, split (train, valid, test)
    study_mapping_20250611.tsv   impression_id, image_id, person_id, ...
    labels_20250611.tsv          impression_id, pe_positive_nlp, 1_month_mortality, ... (optional)

Sources: names and columns as github.com/som-shahlab/INSPECT_public and readers of the 2025 release use them.
A label is true, false or censored; a censored one is unknown. The table of splits holds some rows twice.
"""

from pathlib import Path
from typing import Any

from ..manifest_files import LABEL_VALUES
from .release import LayoutError, Release, find_table, read_table

SOURCE = "https://stanfordaimi.azurewebsites.net (INSPECT)"
_KEY = "impression_id"
_LABEL_VALUES = {**LABEL_VALUES, "censored": None}
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_IDENTITIES = {_KEY, "person_id", "image_id", "split"}


def build_inspect(folder: Path) -> Release:
    """
    Rows of an INSPECT download, whole or in part.

    Args:
        folder (`Path`): the release's `full` folder, or the one that holds it.
    """
    root = folder / "full" if (folder / "full").is_dir() else folder
    tables = {
        name: find_table(root, [f"{name}_*.tsv", f"{name}.tsv", f"{name}_*.csv"], contents, SOURCE)
        for name, contents in {
            "impressions": "the reports",
            "splits": "the splits",
            "study_mapping": "which volume belongs to which report",
        }.items()
    }
    if not (root / "CTPA").is_dir():
        raise LayoutError(f"{root}: the folder CTPA (the volumes) is missing; download it from {SOURCE}")
    impressions = {row[_KEY]: row["impressions"] for row in read_table(tables["impressions"], [_KEY, "impressions"])}
    splits = _splits(tables["splits"])
    release = Release()
    labels = _labels(release, root)
    absent = silent = repeated = 0
    used: set[Path] = set()
    for row in read_table(tables["study_mapping"], [_KEY, "image_id", "person_id"]):
        path = root / "CTPA" / f"{row['image_id'].strip().removesuffix('.nii.gz')}.nii.gz"
        key = row[_KEY]
        if not path.is_file():
            absent += 1
        elif key not in impressions or key not in splits:
            silent += 1
        elif path in used:
            repeated += 1
        else:
            used.add(path)
            record: dict[str, Any] = {
                "volume": path,
                "impression": impressions[key].strip(),
                "patient_id": row["person_id"].strip(),
                "study_id": key,
                "split": splits[key],
                "labels": labels.get(key, {}),
            }
            release.records.append(record)
    release.note(absent, "studies have no volume here and were left out")
    release.note(silent, "volumes have no report or no split and were left out")
    release.note(repeated, "rows of study_mapping name a volume that an earlier row names and were left out")
    unnamed = sum(path not in used for path in (root / "CTPA").glob("*.nii.gz")) - silent
    release.note(unnamed, "volumes are not named in study_mapping and were left out")
    if not release.records:
        raise LayoutError(f"{folder}: no volume of study_mapping is in CTPA; download volumes from {SOURCE}")
    return release


def _splits(table: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in read_table(table, [_KEY, "split"]):
        split = _SPLITS.get(row["split"].strip())
        if split is None:
            raise LayoutError(f"{table}: the split {row['split']!r} is not train, valid or test; download it again")
        if found.setdefault(row[_KEY], split) != split:
            raise LayoutError(f"{table}: impression_id {row[_KEY]} lies in two splits; download it again")
    return found


def _labels(release: Release, root: Path) -> dict[str, dict[str, int | None]]:
    tables = sorted(root.glob("labels_*.tsv"))
    if not tables:
        release.notes.append("no labels: labels_*.tsv is not there")
        return {}
    rows = list(read_table(tables[-1], [_KEY]))
    # Times to an event and ids of visits may stand in the same table: a finding is a column of true, false, censored.
    findings = (
        [
            name
            for name in rows[0]
            if name not in _IDENTITIES and {row[name].strip().lower() for row in rows} <= set(_LABEL_VALUES)
        ]
        if rows
        else []
    )
    return {row[_KEY]: {name: _LABEL_VALUES[row[name].strip().lower()] for name in findings} for row in rows}


__all__ = ["build_inspect"]
