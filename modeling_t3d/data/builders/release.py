# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the builders of all layouts share: the error, tables of a release, and splits where a release has none."""

import csv
import hashlib
import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..manifest_files import open_text

# A report with its history passes the 131,072 characters that the csv module allows.
_LONGEST_CELL = 1 << 24


class LayoutError(ValueError):
    """A folder that is not laid out as the release is; the message names the file or column and the remedy."""


@dataclass
class Release:
    """
    What a builder found in the folder of a release.

    Args:
        records (`list[dict]`): rows for [`~modeling_t3d.data.manifest_files.write_records`].
        notes (`list[str]`): what was left out and why, one fact each; nothing is left out without one.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, count: int, text: str) -> None:
        """Keep `"<count> <text>"`, if there is anything to say."""
        if count:
            self.notes.append(f"{count} {text}")


def find_table(folder: Path, patterns: Sequence[str], contents: str, source: str) -> Path:
    """
    The table that a release keeps under one of several names.

    Args:
        folder (`Path`): of the release, as given by the user.
        patterns (sequence of `str`): paths below it, with wildcards; of several matches the last name counts.
        contents (`str`): what it holds, for the message.
        source (`str`): where the release is had from.
    """
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found[-1]
    raise LayoutError(f"{folder}: {patterns[0]} ({contents}) is missing; download it from {source}")


def read_table(path: Path, columns: Sequence[str], *, delimiter: str | None = None) -> Iterator[dict[str, str]]:
    """
    Rows of a CSV or TSV file of a release, which is UTF-8; blank lines are passed over.

    Args:
        path (`Path`): the file; a `.tsv` is split at tabs.
        columns (sequence of `str`): that it must have.
        delimiter (`str`, *optional*): where the suffix does not say it.
    """
    header, rows = read_wide_table(path, columns, delimiter=delimiter)
    for row in rows:
        yield dict(zip(header, row, strict=True))


def read_wide_table(
    path: Path, columns: Sequence[str], *, delimiter: str | None = None
) -> tuple[list[str], Iterator[list[str]]]:
    """Header and rows of a table as lists, for tables of thousands of columns; see `read_table`."""
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = delimiter or ("\t" if path.suffix == ".tsv" else ",")
    lines = _lines(path, delimiter)
    header = [name.strip() for name in next(lines, [])]
    for name in columns:
        if name not in header:
            found = ", ".join(header[:12]) + (", ..." if len(header) > 12 else "")
            raise LayoutError(
                f"{path}: no column {name!r} (found {found or 'an empty file'}); this is another version of the "
                "release, or another file: download the one that the builder's documentation names"
            )

    def rows() -> Iterator[list[str]]:
        for number, row in enumerate(lines, start=1):
            if len(row) != len(header):
                raise LayoutError(
                    f"{path}: row {number} has {len(row)} cells instead of {len(header)}; download it again"
                )
            yield row

    return header, rows()


def _lines(path: Path, delimiter: str) -> Iterator[list[str]]:
    """The header and rows as they stand, without blank lines; the file is closed with the iterator."""
    try:
        with open_text(path, LayoutError, newline="") as file:
            yield from filter(None, csv.reader(file, delimiter=delimiter))
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read ({error.strerror}); download it again") from None
    except csv.Error as error:
        raise LayoutError(f"{path}: is no table ({error}); download it again") from None


def assign_splits(records: list[dict[str, Any]], shares: Mapping[str, float], seed: int = 0) -> None:
    """
    Give every row that has no split one, by a hash of its patient: a patient never lies in two splits, and further
    downloads change no earlier choice.

    Args:
        records (`list[dict]`): changed in place.
        shares (mapping `str` -> `float`): of the splits; they add up to 1.
        seed (`int`, defaults to 0): other seeds give other splits.

    Example:

    ```python
    >>> from modeling_t3d.data.builders.release import assign_splits

    >>> rows = [{"volume": f"{number}.nii.gz", "patient_id": str(number)} for number in range(1000)]
    >>> assign_splits(rows, {"train": 0.8, "test": 0.2})
    >>> 770 < sum(row["split"] == "train" for row in rows) < 830
    True

    ```"""
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        given = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise LayoutError(f"the shares of the splits must add up to 1, got {given}")
    for record in records:
        if record.get("split"):
            continue
        person = record.get("patient_id") or record.get("study_id") or record["volume"]
        # One patient has one form of an id (see ManifestRow), and so one split, whatever system wrote it.
        text = unicodedata.normalize("NFC", f"{seed}\0{person}")
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        ends = itertools.accumulate(shares.values())
        last = list(shares)[-1]  # the sum of the shares may end a rounding error below 1
        record["split"] = next((name for name, end in zip(shares, ends, strict=True) if place < end), last)


__all__ = ["LayoutError", "Release", "assign_splits", "find_table", "read_table", "read_wide_table"]
