# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Reads a manifest (CSV, JSONL or Parquet), the list of volumes and reports that a model is trained on, and refuses
one that would train or score a wrong model. Opening the volumes is left to the data sets.

| column | meaning |
| --- | --- |
| `volume` | path of the volume, absolute or relative to the manifest's folder; required |
| `report`, or `findings` and `impression` | the text |
| `patient_id`, `study_id` | who and which examination; a row without them counts as a patient or study of its own |
| `reconstruction` | which reconstruction of the study, free text |
| `split` | `train` where absent |
| `labels`, or `label:<name>` columns | finding -> 1 (present), 0 (absent), empty (unknown); `labels` is JSON |
| `masks` | path of a mask, or a JSON object name -> path |
| `rescale` | JSON `[slope, intercept]` for a file whose own header lacks its rescale; used after the header's |
| `key` | name of the prepared volume in a store; `examples/prepare_dataset.py` fills it |

Rows are numbered from 1, the header of a CSV not counted. CSV and JSONL are UTF-8. NaN is an empty cell."""

import difflib
import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .manifest_files import COLUMNS, LABEL_PREFIX, LABEL_VALUES, ManifestError, plain_value, read_records

Sections = Literal["both", "findings", "impression"]

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on all usual file systems


@dataclass(frozen=True)
class ManifestRow:
    """
    One volume and what is known about it.

    Args:
        number (`int`): row of the manifest, from 1.
        volume (`Path`): the file or DICOM folder, ready to be opened.
        report (`str`): the text to train on, after the choice of sections; empty if the manifest may lack reports.
        patient_id, study_id (`str`): identities; derived from the volume's path where the manifest names none.
        reconstruction (`str`, *optional*): as in the manifest. These three are in Unicode's composed form (NFC), in
            which the same id is the same text.
        split (`str`): as in the manifest, `"train"` where it names none.
        labels (`dict[str, int | None]`): finding -> 1, 0 or unknown.
        masks (`dict[str, Path]`): name -> mask file; a single path is called `"mask"`.
        rescale (two floats, *optional*): slope and intercept that the volume's header lacks.
        key (`str`, *optional*): name of the prepared volume in a store.
        full_report (`str`): all of the report's text, whatever the choice of sections.
    """

    number: int
    volume: Path
    report: str
    patient_id: str
    study_id: str
    reconstruction: str | None = None
    split: str = "train"
    labels: dict[str, int | None] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    rescale: tuple[float, float] | None = None
    key: str | None = None
    full_report: str = ""


@dataclass(frozen=True)
class Manifest:
    """
    The usable rows of a manifest and a count of what was left out.

    Args:
        path (`Path`): the manifest, as given.
        rows (`list[ManifestRow]`): in the manifest's order.
        dropped_short (`list[int]`): numbers of the rows whose report has too few words to train on.
        min_report_words (`int`): that limit.
        sections (`str`): which sections make the text.
        notes (`list[str]`): columns that are not read, identities that are absent.
    """

    path: Path
    rows: list[ManifestRow]
    dropped_short: list[int]
    min_report_words: int
    sections: Sections
    notes: list[str]

    def split(self, name: str) -> list[ManifestRow]:
        """The rows of one split; an absent one raises with the names of those that exist."""
        rows = [row for row in self.rows if row.split == name]
        if not rows:
            found = ", ".join(f"{split!r} ({count})" for split, count in self.split_sizes().items())
            raise ManifestError(f"{self.path}: no row of split {name!r}; the splits are {found}")
        return rows

    def split_sizes(self) -> dict[str, int]:
        """Rows per split."""
        return dict(Counter(row.split for row in self.rows))

    def label_names(self) -> list[str]:
        """Every finding that some row labels, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.labels))

    def describe(self) -> str:
        """What is in the manifest and what was dropped, one fact per line."""
        lines = [f"{self.path.name}: {len(self.rows)} volumes"]
        for name, count in self.split_sizes().items():
            rows = self.split(name)
            patients = len({row.patient_id for row in rows})
            studies = len({row.study_id for row in rows})
            lines.append(f"split {name!r}: {count} volumes, {studies} studies, {patients} patients")
        if self.min_report_words:
            lines.append(
                f"dropped {len(self.dropped_short)} rows whose report has fewer than {self.min_report_words} words"
                + (f": rows {_some(self.dropped_short)}" if self.dropped_short else "")
            )
        return "\n".join([*lines, *self.notes])


def read_manifest(
    path: str | Path,
    *,
    sections: Sections = "both",
    min_report_words: int = 5,
    require_report: bool = True,
    check_files: bool = True,
) -> Manifest:
    """
    Read and check a manifest; everything wrong with it is raised here, before anything is trained.

    Args:
        path (`str` or `Path`): a `.csv`, `.jsonl` or `.parquet` file.
        sections (`"both"`, `"findings"` or `"impression"`):
            Which sections make the text: findings then impression by default; a `report` column is the text where
            neither section is given, and cannot serve a single section.
        min_report_words (`int`, defaults to 5): rows with a shorter report are dropped, counted and printed.
        require_report (`bool`, defaults to `True`): raise on a row without any text; `False` for evaluation by labels.
        check_files (`bool`, defaults to `True`): raise on a row whose volume or mask does not exist; a volume with a
            key is looked for in a store, not here.

    Example:

    ```python
    >>> import tempfile, pathlib
    >>> from modeling_t3d.data.manifest import read_manifest

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.nii.gz").write_bytes(b"")
    >>> _ = (folder / "manifest.csv").write_text("volume,report\\na.nii.gz,The heart is of normal size.\\n")
    >>> read_manifest(folder / "manifest.csv").rows[0].report
    'The heart is of normal size.'

    ```"""
    path = Path(path)
    if sections not in ("both", "findings", "impression"):
        raise ManifestError(f"sections must be 'both', 'findings' or 'impression', got {sections!r}")
    records, columns = read_records(path)
    notes = _check_columns(path, columns)
    rows = [parse_row(path, number, record, sections) for number, record in records]
    if not rows:
        raise ManifestError(f"{path}: no rows; write one row per volume below the header")
    if check_files:
        _check_files(path, rows, dict(records))
    _check_duplicates(path, rows)
    _check_leakage(path, rows)
    if require_report:
        _raise_for(path, rows, lambda row: not row.report, _missing_report(sections, columns))
    if len({row.split for row in rows}) > 1 and not any(record.get("patient_id") for _, record in records):
        notes.append("no patient_id: whether the splits share patients could not be checked")
    short = [row.number for row in rows if 0 < len(row.report.split()) < min_report_words]
    kept = [row for row in rows if row.number not in set(short)]
    if not kept:
        raise ManifestError(f"{path}: every report has fewer than {min_report_words} words; lower min_report_words")
    return Manifest(path, kept, short, min_report_words, sections, notes)


def _check_columns(path: Path, columns: list[str]) -> list[str]:
    """Refuse misspelt columns and note those that are not read."""
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise ManifestError(f"{path}: column {repeated[0]!r} stands twice; rename or remove one")
    unread = [name for name in columns if name not in COLUMNS and not name.startswith(LABEL_PREFIX)]
    for name in unread:
        label = re.fullmatch(r"\s*labels?\s*:\s*(.+)", name, re.IGNORECASE)
        meant = LABEL_PREFIX + label[1] if label else _meant_column(name.lower())
        if meant and meant not in columns:
            raise ManifestError(f"{path}: unknown column {name!r}; rename it to {meant!r}")
    if columns and "volume" not in columns:
        raise ManifestError(
            f"{path}: no column 'volume'; name the column of volume paths so (found {', '.join(map(repr, columns))})"
        )
    return [f"columns that are not read: {', '.join(unread)}"] if unread else []


def _meant_column(name: str) -> str | None:
    """The column that a misspelt name is near to, word by word: `patient_age` is no misspelt `patient_id`."""
    for column in difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.75):
        if all(difflib.get_close_matches(word, column.split("_"), cutoff=0.75) for word in name.split("_")):
            return column
    return None


def parse_row(path: Path, number: int, record: dict[str, Any], sections: Sections = "both") -> ManifestRow:
    """One typed row of a manifest at `path`; paths become absolute or relative to the working directory."""
    where = f"{path}: row {number}"
    volume = _text(record.get("volume"))
    if not volume:
        raise ManifestError(f"{where} names no volume; fill its 'volume' cell or remove the row")
    study_id = _identity(record.get("study_id"))
    patient_id = _identity(record.get("patient_id"))
    masks = _json_object(where, "masks", record.get("masks"), bare_name="mask")
    return ManifestRow(
        number=number,
        volume=_path(where, "volume", path.parent, volume),
        report=_report(record, sections),
        patient_id=patient_id or study_id or volume,
        study_id=f"{patient_id}/{study_id}" if patient_id and study_id else study_id or volume,
        reconstruction=_identity(record.get("reconstruction")) or None,
        split=_text(record.get("split")) or "train",
        labels=_labels(where, record),
        # An Arrow struct, and a table turned into JSON, give every row every name.
        masks={name: _path(where, "masks", path.parent, _text(mask)) for name, mask in masks.items() if _text(mask)},
        rescale=_rescale(where, record.get("rescale")),
        key=_text(record.get("key")) or None,
        full_report=_report(record, "both"),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _identity(value: Any) -> str:
    return unicodedata.normalize("NFC", _text(value))


def _path(where: str, column: str, folder: Path, text: str) -> Path:
    """The path that a cell names; raises, without repeating it, where it is a text that can name no file."""
    path = folder / text
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        encoded = b"\0"
    names = encoded.split(os.fsencode(os.sep))
    if b"\0" in encoded or b"\n" in encoded or len(encoded) > _LONGEST_PATH or max(map(len, names)) > _LONGEST_NAME:
        raise ManifestError(f"{where}: its {column!r} cell holds a text that is no path; write a file's path there")
    return path


def _report(record: dict[str, Any], sections: Sections) -> str:
    findings, impression = _text(record.get("findings")), _text(record.get("impression"))
    if sections != "both":
        return findings if sections == "findings" else impression
    return " ".join(part for part in (findings, impression) if part) or _text(record.get("report"))


def _json_object(where: str, column: str, value: Any, bare_name: str | None = None) -> dict[str, Any]:
    """A cell that holds a JSON object, or, where `bare_name` is given, one bare value."""
    if isinstance(value, dict):
        return value
    text = _text(value)
    if not text:
        return {}
    if bare_name is not None and not text.startswith("{"):
        return {bare_name: text}
    try:
        parsed = plain_value(json.loads(text))
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ManifestError(f'{where}: {column} is not a JSON object; write for example {{"nodule": 1}}')
    return parsed


def _labels(where: str, record: dict[str, Any]) -> dict[str, int | None]:
    labels = _json_object(where, "labels", record.get("labels"))
    for column, value in record.items():
        if column.startswith(LABEL_PREFIX):
            labels = {**labels, column.removeprefix(LABEL_PREFIX).strip(): value}
    parsed = {}
    for name, value in labels.items():
        key = _text(value).lower()
        if key not in LABEL_VALUES:
            raise ManifestError(f"{where}: label {name!r} is {value!r}; write 1, 0 or nothing (unknown)")
        parsed[name] = LABEL_VALUES[key]
    return parsed


def _rescale(where: str, value: Any) -> tuple[float, float] | None:
    """Slope and intercept of a cell."""
    if value is None or not str(value).strip():
        return None
    try:
        slope, intercept = (float(part) for part in (json.loads(value) if isinstance(value, str) else value))
    except (TypeError, ValueError):
        slope = intercept = math.nan
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope):
        raise ManifestError(f"{where}: rescale is not two numbers; write [slope, intercept], for example [1, -1024]")
    return slope, intercept


def _some(numbers: list[int], limit: int = 10) -> str:
    listed = ", ".join(map(str, numbers[:limit]))
    return listed if len(numbers) <= limit else f"{listed} and {len(numbers) - limit} more"


def _raise_for(path: Path, rows: Iterable[ManifestRow], wrong: Callable[[ManifestRow], bool], message: str) -> None:
    numbers = [row.number for row in rows if wrong(row)]
    if numbers:
        raise ManifestError(f"{path}: row{'s' if len(numbers) > 1 else ''} {_some(numbers)}: {message}")


def _missing_report(sections: Sections, columns: list[str]) -> str:
    if sections != "both" and sections not in columns:
        return f"no column {sections!r}, which sections={sections!r} reads; add it or use sections='both'"
    columns_read = "findings, impression or report" if sections == "both" else sections
    return f"no text in {columns_read}; add it or remove the row, or have examples/generate_captions.py write it"


def _check_files(path: Path, rows: list[ManifestRow], records: dict[int, dict[str, Any]]) -> None:
    missing = [row for row in rows if row.key is None and not row.volume.exists()]
    if missing:
        others = f" (so are rows {_some([row.number for row in missing[1:]])})" if missing[1:] else ""
        raise ManifestError(
            f"{path}: row {missing[0].number}: the volume {_text(records[missing[0].number]['volume'])!r} is missing"
            f"{others}; paths are absolute or relative to the manifest's folder"
        )
    for row in rows:
        for name, mask in row.masks.items():
            if not mask.exists():
                raise ManifestError(
                    f"{path}: row {row.number}: the mask {name!r} is missing; mend its path or remove it"
                )


def _check_duplicates(path: Path, rows: list[ManifestRow]) -> None:
    first: dict[str, int] = {}
    for row in rows:
        earlier = first.setdefault(str(row.volume.resolve()), row.number)
        if earlier != row.number:
            raise ManifestError(f"{path}: rows {earlier} and {row.number} name the same volume; remove one")


def _check_leakage(path: Path, rows: list[ManifestRow]) -> None:
    """One patient in two splits makes every score of the second split too good."""
    first: dict[str, ManifestRow] = {}
    for row in rows:
        earlier = first.setdefault(row.patient_id, row)
        if earlier.split != row.split:
            raise ManifestError(
                f"{path}: rows {earlier.number} ({earlier.split!r}) and {row.number} ({row.split!r}) are one "
                "patient's; put all volumes of a patient into one split"
            )
    for row, other in nameless_leaks(rows):
        raise ManifestError(
            f"{path}: rows {row.number} ({row.split!r}) and {other.number} ({other.split!r}) name one study, and one "
            "of them no patient; fill its 'patient_id' cell, or put the study into one split"
        )


def nameless_leaks(rows: Iterable[ManifestRow]) -> Iterator[tuple[ManifestRow, ManifestRow]]:
    """Pairs of rows of different splits that name one study, of which the first names no patient."""
    by_study: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        by_study[row.study_id.removeprefix(f"{row.patient_id}/")].append(row)
    for group in by_study.values():
        for row in group:
            if row.patient_id == row.study_id:
                yield from ((row, other) for other in group if other.split != row.split)


__all__ = ["COLUMNS", "Manifest", "ManifestError", "ManifestRow", "nameless_leaks", "parse_row", "read_manifest"]
