# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A folder of prepared volumes, found by what the source file holds and how it was prepared, never by its path."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..prepared_volume_t3d import PreparedVolume

logger = logging.getLogger(__name__)

_FORMAT = 1
_BLOCK = 1 << 20


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names (a DICOM series)."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and modification times: while they stay, the content hash is not computed again."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.temporary")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class PreparedVolumeCache:
    """
    Prepared volumes on disk; safe to share between processes and runs.

    An entry is valid once its `<key>.check` file, written last, names the hashes of the others; each process compares
    them when it first opens an entry, and an entry that is damaged or not ours is prepared again with a warning.

    Args:
        folder (`str` or `Path`): where entries lie; made when the first is written.
        preparation (`dict`): the settings that the preparation depends on.
    """

    def __init__(self, folder: str | Path, preparation: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.preparation = json.dumps({"format": _FORMAT, **preparation}, sort_keys=True, default=list)
        self._verified: set[str] = set()

    def key(self, source: Path) -> str:
        """Name of the entry for a source: hash of its content and of the preparation."""
        memo = self.folder / "sources" / f"{hashlib.sha256(str(source.resolve()).encode()).hexdigest()}.json"
        stamp = _stamp(source)
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if not isinstance(known, dict) or known.get("stamp") != stamp:
            known = {"stamp": stamp, "content": content_hash(source)}
            memo.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(memo, json.dumps(known))
        return hashlib.sha256(f"{known['content']}\0{self.preparation}".encode()).hexdigest()[:40]

    def load(self, source: Path, prepare: Callable[[Path], PreparedVolume]) -> PreparedVolume:
        """
        The prepared volume of a source, from the cache or prepared now.

        Args:
            source (`Path`): file or DICOM folder.
            prepare (callable): makes a [`PreparedVolume`] of it.
        """
        key = self.key(source)
        stem = self.folder / key
        if self._is_valid(key, source):
            prepared = PreparedVolume.load(stem)
        else:
            prepared = prepare(source)
            self.folder.mkdir(parents=True, exist_ok=True)
            prepared.save(stem)
            hashes = {suffix: content_hash(f"{stem}{suffix}") for suffix in (".npy", ".json")}
            _write_atomically(Path(f"{stem}.check"), json.dumps({"key": key, **hashes}))
            self._verified.add(key)
        # The same content may have been prepared under another name.
        prepared.source = str(source)
        return prepared

    def _is_valid(self, key: str, source: Path) -> bool:
        if key in self._verified:
            return True
        stem = self.folder / key
        try:
            check = json.loads(Path(f"{stem}.check").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except ValueError:
            check = {}
        valid = check.get("key") == key and all(
            Path(f"{stem}{suffix}").is_file() and content_hash(f"{stem}{suffix}") == check.get(suffix)
            for suffix in (".npy", ".json")
        )
        if valid:
            self._verified.add(key)
        else:
            logger.warning("%s: the cached copy %s is damaged or not ours; it is prepared again", source, stem)
        return valid


__all__ = ["PreparedVolumeCache", "content_hash"]
