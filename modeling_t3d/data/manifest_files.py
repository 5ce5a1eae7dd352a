# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The rows of a manifest from and to disk: CSV, JSONL and Parquet. What they mean is left to `manifest`."""

import csv
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

COLUMNS = (
    "volume",
    "report",
    "findings",
    "impression",
    "patient_id",
    "study_id",
    "reconstruction",
    "split",
    "labels",
    "masks",
    "rescale",
    "key",
)
LABEL_PREFIX = "label:"
# What a label's cell says, in lower case; `None` is unknown.
LABEL_VALUES = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "": None, "none": None, "nan": None}
SUFFIXES = (".csv", ".jsonl", ".parquet")
_NESTED = ("labels", "masks", "rescale")  # written as JSON in every format: one way to read them back
_SEPARATORS = {";": "semicolons", "\t": "tabs"}  # that spreadsheets write instead of commas
_LONGEST_CELL = 1 << 24  # characters; a report with its history passes the 131,072 that the csv module allows


class ManifestError(ValueError):
    """A manifest that cannot be used as it is; the message names the row and what to change."""


def read_records(path: str | Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """
    The rows as they stand in a file, numbered from 1, and all column names.

    Args:
        path (`str` or `Path`): a `.csv`, `.jsonl` or `.parquet` file.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest; give the path of a .csv, .jsonl or .parquet file")
    if path.suffix not in readers:
        raise ManifestError(f"{path}: a manifest is a .csv, .jsonl or .parquet file")
    records, columns = readers[path.suffix](path)
    return [(number, plain_value(record)) for number, record in records], columns


def plain_value(value: Any) -> Any:
    """
    A value as every format gives it: NaN, a number or a text, is `None`, and a whole number is an `int`, because
    pandas writes the ids of a column that has gaps as 12.0 and NaN. The values of a `dict` become so too.

    Example:

    ```python
    >>> from modeling_t3d.data.manifest_files import plain_value

    >>> plain_value({"patient_id": 12.0, "study_id": float("nan"), "split": "train"})
    {'patient_id': 12, 'study_id': None, 'split': 'train'}

    ```"""
    if isinstance(value, dict):
        return {name: plain_value(entry) for name, entry in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if str(value).strip() in ("nan", "NaN") else value


@contextmanager
def open_text(path: Path, error: type[ValueError], newline: str | None = None) -> Iterator[TextIO]:
    """
    A text file in UTF-8, opened for reading, with or without a byte order mark.

    Args:
        path (`Path`): the file.
        error (type of `ValueError`): raised where the text turns out to be in another encoding; it names the file.
        newline (`str`, *optional*): as `open` takes it.
    """
    try:
        with path.open(newline=newline, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise error(f"{path}: is not UTF-8; save it as UTF-8") from None


def _read_csv(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    csv.field_size_limit(_LONGEST_CELL)
    with open_text(path, ManifestError, newline="") as file:
        if separator := _other_separator(file.readline()):
            raise ManifestError(f"{path}: its columns are separated by {separator}; separate them by commas")
        file.seek(0)
        reader = csv.DictReader(file, strict=True)
        try:
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            records = list(enumerate(reader, start=1))
        except csv.Error as error:
            raise ManifestError(f"{path}: line {reader.line_num}: {error}; quote texts that hold quotes") from None
    for number, record in records:
        if None in record or None in record.values():
            raise ManifestError(
                f"{path}: row {number} has other than {len(columns)} cells; quote texts that hold commas"
            )
    return records, columns


def _other_separator(header: str) -> str | None:
    """What stands between the column names of a header, if it is not the comma."""
    for mark, name in _SEPARATORS.items():
        if mark in header and "volume" in [cell.strip().strip('"') for cell in header.split(mark)]:
            return name
    return None


def _read_jsonl(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    records = []
    with open_text(path, ManifestError) as file:
        for number, line in enumerate((line for line in file if line.strip()), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"{path}: row {number} is not JSON ({error.msg}); one object per line") from None
            if not isinstance(record, dict):
                raise ManifestError(f"{path}: row {number} is not a JSON object; write {{'volume': ..., ...}}")
            records.append((number, record))
    return records, list(dict.fromkeys(name for _, record in records for name in record))


def _import_parquet(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ManifestError(
            f'{path}: Parquet needs pyarrow; install it with pip install "modeling_t3d[parquet]"'
        ) from None
    return pyarrow, pyarrow.parquet


def _read_parquet(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    pyarrow, parquet = _import_parquet(path)
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{path}: is not readable Parquet ({type(error).__name__}); write it anew") from None
    records = []
    for number, record in enumerate(table.to_pylist(), start=1):
        for name, value in record.items():
            if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):  # an Arrow map
                record[name] = dict(value)
        records.append((number, record))
    return records, table.column_names


def check_suffix(path: Path) -> None:
    """Raise where a name is of no format that manifests have."""
    if path.suffix not in SUFFIXES:
        raise ManifestError(f"{path}: a manifest is a .csv, .jsonl or .parquet file; name it so")


def write_records(records: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """
    Write rows as a manifest; the file appears under its name only when it is complete.

    Columns stand in the order of `COLUMNS`, further ones after them; `labels`, `masks` and `rescale` are written as
    JSON, and a `Path` below the manifest's folder relative to it; a `str` is written as it is.

    Args:
        records (sequence of `dict`): one per row; `labels` and `masks` are dictionaries.
        path (`str` or `Path`): its suffix chooses the format: `.csv`, `.jsonl` or `.parquet`.

    Example:

    ```python
    >>> import tempfile, pathlib
    >>> from modeling_t3d.data.manifest_files import write_records

    >>> path = pathlib.Path(tempfile.mkdtemp()) / "manifest.csv"
    >>> _ = write_records([{"volume": path.parent / "a.nii.gz", "labels": {"nodule": 1}}], path)
    >>> path.read_text().splitlines()
    ['volume,labels', 'a.nii.gz,"{""nodule"": 1}"']

    ```"""
    path = Path(path)
    check_suffix(path)
    if not records:
        raise ManifestError(f"{path}: no rows to write")
    found = {name for record in records for name in record}
    columns = [name for name in COLUMNS if name in found] + sorted(found - set(COLUMNS))
    rows = [_plain(record, columns, path.parent) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.temporary")
    try:
        _write(rows, columns, temporary, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write(rows: list[dict[str, str | None]], columns: list[str], temporary: Path, path: Path) -> None:
    if path.suffix == ".parquet":
        pyarrow, parquet = _import_parquet(path)
        schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)
        return
    with temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        else:
            for row in rows:
                filled = {name: value for name, value in row.items() if value is not None}
                file.write(json.dumps(filled, ensure_ascii=False) + "\n")


def _plain(record: dict[str, Any], columns: list[str], folder: Path) -> dict[str, str | None]:
    """A record whose values are texts, or `None` where there is nothing to say."""
    plain: dict[str, str | None] = {}
    for name in columns:
        value = plain_value(record.get(name))
        if name == "masks" and isinstance(value, dict):
            value = {mask: _place(file, folder) for mask, file in value.items()}
        if name in _NESTED and isinstance(value, dict | list | tuple):
            value = json.dumps(value, ensure_ascii=False) if value else None
        if name == "volume":
            value = _place(value, folder)
        plain[name] = None if value is None or value == "" else str(value)
    return plain


def _place(path: Any, folder: Path) -> Any:
    return relative_to(path, folder) if isinstance(path, Path) else path


def relative_to(path: str | Path, folder: Path) -> str:
    """A path below `folder` relative to it, any other one absolute: both stay true when the caller moves elsewhere."""
    absolute = Path(os.path.abspath(path))
    inside = Path(os.path.abspath(folder))
    return absolute.relative_to(inside).as_posix() if absolute.is_relative_to(inside) else str(absolute)


__all__ = [
    "COLUMNS",
    "LABEL_PREFIX",
    "LABEL_VALUES",
    "ManifestError",
    "check_suffix",
    "open_text",
    "plain_value",
    "read_records",
    "relative_to",
    "write_records",
]
