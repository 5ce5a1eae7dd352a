# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""BIMCV-R: chest CT with Spanish reports and their English translation (Hugging Face data set `cyd0806/BIMCV-R`).

Layout, as the archives unpack and as the code published with it (github.com/ydchen0806/MedFinder) reads them:

    CT1/ct/sub-S03047_ses-E07985_run-1_bp-chest_ct.nii.gz     CT1, CT2, ...
    meta/curated_ct_report_path_En.csv                        path, Report_en; often Report, Labels

The last part of `path` is a volume's name, or it is the folder `sub-.../ses-.../mod-rx` of an examination, whose
volumes all have this report. A name is patient (`sub-`), study (`ses-`) and reconstruction (the rest). There are no
splits.
"""

import ast
import re
from pathlib import Path, PurePosixPath
from typing import Any

from .release import LayoutError, Release, find_table, read_table

SOURCE = "https://huggingface.co/datasets/cyd0806/BIMCV-R"
_NAME = re.compile(r"(?P<patient>sub-[^_]+)_(?P<study>ses-[^_]+)_(?P<reconstruction>.+)\.nii(?:\.gz)?")


def build_bimcv_r(folder: Path, *, language: str = "en") -> Release:
    """
    Rows of a BIMCV-R download, whole or in part.

    Args:
        folder (`Path`): holds `CT1`, `CT2`, ... and `meta`.
        language (`"en"` or `"es"`, defaults to `"en"`): the translated or the original report.
    """
    if language not in ("en", "es"):
        raise LayoutError(f"language must be 'en' or 'es', got {language!r}")
    column = {"en": "Report_en", "es": "Report"}[language]
    names = ["meta/curated_ct_report_path_En.csv", "**/curated_ct_report_path_En.csv"]
    table = find_table(folder, names, "paths and reports", SOURCE)
    volumes = _volumes(folder)
    examinations: dict[tuple[str, str], list[str]] = {}
    for name, (_, parts) in volumes.items():
        examinations.setdefault((parts["patient"], parts["study"]), []).append(name)
    release = Release()
    rows = list(read_table(table, ["path", column]))
    vocabulary = sorted({label for row in rows for label in _labels(row, table)})
    absent = repeated = 0
    used: set[str] = set()
    for row in rows:
        path = PurePosixPath(row["path"].strip())
        if path.name in volumes:
            names = [path.name]
        else:
            names = examinations.get((_part(path, "sub-"), _part(path, "ses-")), [])
        absent += not names
        repeated += sum(name in used for name in names)
        present = set(_labels(row, table))
        for name in names:
            if name not in used:
                file, parts = volumes[name]
                record: dict[str, Any] = {"volume": file, "report": row[column].strip(), **parts}
                record["patient_id"], record["study_id"] = record.pop("patient"), record.pop("study")
                record["labels"] = {label: int(label in present) for label in vocabulary}
                release.records.append(record)
        used.update(names)
    release.note(absent, "reports have no volume here and were left out")
    release.note(repeated, "reports name a volume that an earlier row names and were left out")
    release.note(len(volumes) - len(used), "volumes have no report and were left out")
    if not release.records:
        raise LayoutError(f"{folder}: no volume of {table.name} is there; unpack the archives CT*.zip of {SOURCE}")
    return release


def _volumes(folder: Path) -> dict[str, tuple[Path, dict[str, str]]]:
    found = {}
    for file in sorted(folder.rglob("*.nii.gz")):
        parts = _NAME.fullmatch(file.name)
        if parts is None:
            raise LayoutError(
                f"{file}: is not named sub-<id>_ses-<id>_<...>.nii.gz; keep only the release's volumes here"
            )
        found[file.name] = (file, parts.groupdict())
    return found


def _part(path: PurePosixPath, prefix: str) -> str:
    return next((part for part in path.parts if part.startswith(prefix)), "")


def _labels(row: dict[str, str], table: Path) -> list[str]:
    """Findings of the column `Labels`, a list as Python writes it."""
    text = row.get("Labels", "").strip()
    if not text:
        return []
    try:
        labels = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        labels = None
    if not isinstance(labels, list):
        raise LayoutError(f"{table}: a cell of the column Labels is not a list ['...', ...]; download it again")
    return [str(label).strip() for label in labels if str(label).strip()]


__all__ = ["build_bimcv_r"]
