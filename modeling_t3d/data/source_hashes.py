# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Names of prepared volumes: from what the source holds and how it was prepared, never from where it lies."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..volume_io_t3d import volume_files

_BLOCK = 1 << 20
_KEY = re.compile("[0-9a-f]{40}")


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of several with their names: those of a folder (a DICOM series), a header and its data."""
    path = Path(path)
    digest = hashlib.sha256()
    files = volume_files(path)
    for file in files:
        if path.is_dir() or len(files) > 1:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def source_stamp(path: Path) -> str:
    """Hash of names, sizes and modification times: while they stay, the content hash is not computed again."""
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in volume_files(path)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def memo(stamp: str, content: str) -> bytes:
    """What a store keeps of a source: its stamp and the hash of its content, with a checksum."""
    return json.dumps({"stamp": stamp, "content": content, "checksum": _checksum(stamp, content)}).encode()


def remembered_content(text: bytes, stamp: str) -> str | None:
    """The hash of the content that a `memo` holds; `None` where the memo is damaged, or the source another by now."""
    try:
        known = json.loads(text)
    except ValueError:
        return None
    if not isinstance(known, dict) or known.get("stamp") != stamp:
        return None
    content = str(known.get("content"))
    # One wrong digit would name the volume anew, and it would be prepared and stored a second time.
    return content if known.get("checksum") == _checksum(stamp, content) else None


def _checksum(stamp: str, content: str) -> str:
    return hashlib.sha256(f"{stamp}\0{content}".encode()).hexdigest()


def path_hash(path: Path) -> str:
    """Hash of an absolute path, which itself may name a person."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()


def preparation_text(preparation: dict[str, Any]) -> str:
    """The settings that a preparation depends on, in one canonical form."""
    return json.dumps(preparation, sort_keys=True, default=list)


def volume_key(content: str, preparation: dict[str, Any]) -> str:
    """Forty hexadecimal digits from a content hash and the settings of the preparation."""
    return hashlib.sha256(f"{content}\0{preparation_text(preparation)}".encode()).hexdigest()[:40]


def is_key(text: str) -> bool:
    """Whether a text has the form of a volume's key."""
    return _KEY.fullmatch(text) is not None


__all__ = [
    "content_hash",
    "is_key",
    "memo",
    "path_hash",
    "preparation_text",
    "remembered_content",
    "source_stamp",
    "volume_key",
]
