# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Generated text for volumes that have no report: what a source of captions is, and captions into a manifest.

The three sources stand in `caption_slices`, `caption_masks` and `caption_metadata`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .manifest import ManifestRow, parse_row
from .manifest_files import ManifestError, check_suffix, read_records, write_records
from .source_hashes import source_stamp

_TEXT_COLUMNS = ("report", "findings", "impression")


class CaptionError(ValueError):
    """A row that a source cannot caption, or captions that do not belong together; the message names the remedy."""


class CaptionSource(Protocol):
    """
    Where the text of a volume comes from when nobody wrote a report. A new source needs these two and nothing else.

    Example:

    ```python
    >>> from modeling_t3d.data.captions import CaptionSource

    >>> class Fixed:
    ...     def settings(self):
    ...         return {"source": "fixed"}
    ...
    ...     def __call__(self, row, record):
    ...         return "A scan of the thorax without further findings."
    >>> source: CaptionSource = Fixed()

    ```"""

    def settings(self) -> dict[str, Any]:
        """What decides the captions, as JSON holds it; an interrupted run continues with the same settings alone."""

    def __call__(self, row: ManifestRow, record: Mapping[str, Any]) -> str:
        """The caption of a row, in whole sentences; `record` holds all of its cells as they are. May raise
        [`CaptionError`]."""


@dataclass(frozen=True)
class CaptionReport:
    """
    What became of a manifest's rows.

    Args:
        path (`Path`): the manifest with captions.
        num_written (`int`): rows that were captioned, of which `num_resumed` by an earlier, interrupted call.
        num_kept (`int`): rows that had text and kept it.
        num_resumed (`int`): see there.
    """

    path: Path
    num_written: int
    num_kept: int
    num_resumed: int


def write_captions(
    manifest: str | Path, output: str | Path, source: CaptionSource, *, overwrite: bool = False
) -> CaptionReport:
    """
    Write a manifest whose rows all have text: their own, or a caption in the column `report`.

    Captions are kept beside the output, one line each, as they are made; an interrupted call is finished by calling it
    again. The output appears under its name only when it is complete.

    Args:
        manifest (`str` or `Path`): to read.
        output (`str` or `Path`): to write, another file than `manifest`; its suffix chooses the format.
        source ([`CaptionSource`]): row -> caption.
        overwrite (`bool`, defaults to `False`): caption rows that have text, too, in place of it.

    Raises:
        CaptionError: a row cannot be captioned; captions so far are kept.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from modeling_t3d.data.caption_metadata import MetadataCaptioner
    >>> from modeling_t3d.data.captions import write_captions
    >>> from modeling_t3d.data.manifest import read_manifest
    >>> from modeling_t3d.volume_io_t3d import to_volume, write_nifti

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> scan = to_volume(np.zeros((40, 30, 30), dtype=np.int16), spacing=(2.5, 1, 1), axes="SAR")
    >>> write_nifti(scan, folder / "a.nii.gz")
    >>> _ = (folder / "scans.csv").write_text("volume\\na.nii.gz\\n")
    >>> report = write_captions(folder / "scans.csv", folder / "captions.csv", MetadataCaptioner(modality="CT"))
    >>> read_manifest(report.path).rows[0].report
    'Computed tomography. 40 slices 2.5 mm apart, 1 mm in plane, 100 mm from bottom to top.'

    ```"""
    manifest, output = Path(manifest), Path(output)
    check_suffix(output)  # before hours of captioning
    if manifest.resolve() == output.resolve():
        raise CaptionError(f"{output}: is the manifest that is read; choose another output")
    records, _ = read_records(manifest)
    if not records:
        raise ManifestError(f"{manifest}: no rows; write one row per volume below the header")
    rows = [parse_row(manifest, number, record) for number, record in records]
    journal = _Journal(output.with_name(f"{output.name}.captions.jsonl"), source.settings())
    written, num_written, num_resumed = [], 0, 0
    for row, (_, record) in zip(tqdm(rows, desc="captions", unit="volume", disable=None), records, strict=True):
        # Cells are as they were read; paths stay true wherever the output lies.
        changed = {**record, "volume": row.volume, "masks": row.masks}
        if overwrite or not row.full_report:
            key = _key(row, record)
            caption = journal.captions.get(key)
            num_resumed += caption is not None
            if caption is None:
                caption = " ".join(source(row, record).split())
                if not caption:
                    raise CaptionError(f"{manifest}: row {row.number}: the source wrote nothing; remove the row")
                journal.add(key, caption)
            changed |= {**dict.fromkeys(_TEXT_COLUMNS[1:]), "report": caption}
            num_written += 1
        written.append(changed)
    write_records(written, output)
    return CaptionReport(output, num_written, len(rows) - num_written, num_resumed)


def _key(row: ManifestRow, record: Mapping[str, Any]) -> str:
    """Known again by its cells, the text aside, and its files; a hash, because cells may identify a person."""
    cells = {name: str(value) for name, value in record.items() if name not in _TEXT_COLUMNS}
    stamps = [source_stamp(path) for path in (row.volume, *row.masks.values()) if path.exists()]
    return hashlib.sha256(json.dumps([row.number, cells, stamps], sort_keys=True).encode()).hexdigest()[:32]


class _Journal:
    """The captions so far, on disk: a line of settings, then one line per caption."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.captions: dict[str, str] = {}
        first = json.dumps(settings, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
        if whole and json.loads(whole[0]) != json.loads(first):
            raise CaptionError(
                f"{path}: holds captions made with other settings ({whole[0].strip()}); choose another output, or "
                "delete this file to start anew"
            )
        for line in whole[1:]:
            entry = json.loads(line)
            self.captions[entry["row"]] = entry["caption"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not whole:
            path.write_text(first + "\n", encoding="utf-8")
        elif len(whole) < len(lines):
            with path.open("r+b") as file:
                file.truncate(sum(len(line.encode()) for line in whole))

    def add(self, key: str, caption: str) -> None:
        """Keep one more, on disk before the next is begun."""
        self.captions[key] = caption
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": key, "caption": caption}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


__all__ = ["CaptionError", "CaptionReport", "CaptionSource", "write_captions"]
