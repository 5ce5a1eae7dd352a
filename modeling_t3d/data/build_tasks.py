# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What one worker does with one row of a manifest: fetch the volume if it is far, prepare it, add it to the store.

Who works on what, and what happens when a worker dies, is left to `build`.
"""

import errno
import hashlib
import json
import posixpath
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..geometry_t3d import VolumeError
from .source_hashes import content_hash, memo, remembered_content, volume_key
from .sources import open_source
from .store import VolumeStore
from .store_files import connect, publish

_BUNDLE = 16 << 20  # bytes of sources that go to a worker together; preparing them takes about a second
# The store's disk is full or gone: no volume is to blame, and the build must stop.
_STORE_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE}


@dataclass(frozen=True)
class PreparationTask:
    """
    One volume to prepare.

    Args:
        number (`int`): row of the manifest.
        source (`str`): path, or address that fsspec knows.
        rescale (two floats, *optional*): as in [`ManifestRow`].
        size (`int`): bytes of the source: larger ones are begun earlier.
    """

    number: int
    source: str
    rescale: tuple[float, float] | None
    size: int


@dataclass(frozen=True)
class PreparationOutcome:
    """
    What became of a task.

    Args:
        task (`PreparationTask`): the task.
        state (`str`): `"added"`; `"present"` when the store had the volume; `"unreadable"`.
        key (`str`, *optional*): of the stored volume.
        reason (`str`): why it could not be read; empty otherwise.
        warnings (`tuple[str, ...]`): of the preparation, if it was done now.
        seconds (`float`): spent on it.
    """

    task: PreparationTask
    state: Literal["added", "present", "unreadable"]
    key: str | None = None
    reason: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def run_task(task: PreparationTask, store: VolumeStore, image_processor: Any) -> PreparationOutcome:
    """
    Prepare one volume and add it to the store; running a task again, or on two machines at once, changes nothing.

    What is wrong with the volume comes back as an outcome; what is wrong with the store raises.

    Args:
        task ([`PreparationTask`]): the volume.
        store ([`VolumeStore`]): where it goes.
        image_processor (`T3DImageProcessor`): prepares it.
    """
    begun = time.monotonic()
    try:
        remote = RemoteSource(task.source, store) if is_remote(task.source) else None
        content = remote.known_key() if remote else store.key_of(task.source)
        if content and (key := rescaled_key(content, task.rescale)) in store:
            return PreparationOutcome(task, "present", key, seconds=time.monotonic() - begun)
        with remote.fetched() if remote else nullcontext(Path(task.source)) as path:
            if remote and content is None:
                key = rescaled_key(remote.remember(path), task.rescale)
                if key in store:  # under another address, or what was remembered of it was damaged
                    return PreparationOutcome(task, "present", key, seconds=time.monotonic() - begun)
            prepared = image_processor.prepare(open_source(path, task.rescale))
    except (VolumeError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in _STORE_TROUBLE:
            raise
        return PreparationOutcome(
            task, "unreadable", reason=_reason(task.source, error), seconds=time.monotonic() - begun
        )
    store.add(key, prepared)
    return PreparationOutcome(task, "added", key, "", prepared.warnings, time.monotonic() - begun)


def run_tasks(tasks: list[PreparationTask], store: VolumeStore, image_processor: Any) -> list[PreparationOutcome]:
    """Several small tasks, one after the other: sending one to a worker costs more than a tiny volume takes."""
    return [run_task(task, store, image_processor) for task in tasks]


def bundled(tasks: list[PreparationTask], most: int) -> Iterator[list[PreparationTask]]:
    """
    The same tasks in the same order, neighbours together while their sources are small.

    Args:
        tasks (`list[PreparationTask]`): the largest first.
        most (`int`): tasks that may go together, so that every worker gets its share.
    """
    bundle: list[PreparationTask] = []
    for task in tasks:
        if bundle and (len(bundle) >= most or sum(one.size for one in bundle) + task.size > _BUNDLE):
            yield bundle
            bundle = []
        bundle.append(task)
    if bundle:
        yield bundle


def _reason(source: str, error: Exception) -> str:
    if isinstance(error, VolumeError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{source}: does not fit into the worker's memory; give the workers more, or have fewer of them"
    if isinstance(error, FileNotFoundError):
        return f"{source}: no such file or folder; download it again or remove its row"
    return f"{source}: cannot be read ({type(error).__name__}: {getattr(error, 'strerror', None) or error})"


def rescaled_key(key: str, rescale: tuple[float, float] | None) -> str:
    """The key of a volume whose rescale stands in the manifest: the same file with another one is another volume."""
    if rescale is None:
        return key
    return hashlib.sha256(f"{key}\0{rescale[0]!r}\0{rescale[1]!r}".encode()).hexdigest()[:40]


def is_remote(source: str) -> bool:
    """Whether a source is an address for fsspec and not a path of this machine."""
    return "://" in source


class RemoteSource:
    """
    A volume in object storage: fetched to this machine's own temporary folder, and only when it must be prepared.

    As with local files, the hash of its content is kept in the store until the object changes, so that a second run
    fetches nothing.

    Args:
        url (`str`): of a file or of the folder of a DICOM series.
        store ([`VolumeStore`]): remembers the hash; its storage options hold for addresses that begin as its own.
    """

    def __init__(self, url: str, store: VolumeStore) -> None:
        self.url = url
        self.store = store
        is_alike = url.partition("://")[0] == store.url.partition("://")[0]
        self.file_system, self.path = connect(url, store.storage_options if is_alike else {})
        self._memory, root = connect(store.url, store.storage_options)
        self._memo = posixpath.join(root, "sources", f"{hashlib.sha256(url.encode()).hexdigest()}.json")

    def size(self) -> int:
        """Bytes; raises `FileNotFoundError` where there is nothing."""
        return sum(self.file_system.du(self.path, total=False).values())

    def _stamp(self) -> str:
        files = sorted(self.file_system.find(self.path))
        if not files:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", self.url)
        facts = [self.file_system.ukey(file) for file in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def known_key(self) -> str | None:
        """The key, if an earlier run has read the object as it is now."""
        self._seen = self._stamp()
        try:
            content = remembered_content(self._memory.cat_file(self._memo), self._seen)
        except FileNotFoundError:
            return None
        return None if content is None else volume_key(content, self.store.preparation)

    def remember(self, path: Path) -> str:
        """The key of what was fetched; kept in the store for the next run."""
        content = content_hash(path)
        text = memo(self._seen, content)
        publish(self._memory, self._memo, lambda file: file.write(text))
        return volume_key(content, self.store.preparation)

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        """A copy on this machine, removed afterwards; errors name the address."""
        with tempfile.TemporaryDirectory(prefix="modeling_t3d-") as folder:
            path = Path(folder) / posixpath.basename(self.path.rstrip("/"))
            self.file_system.get(self.path, str(path), recursive=self.file_system.isdir(self.path))
            try:
                yield path
            except VolumeError as error:
                raise type(error)(str(error).replace(str(path), self.url)) from None


__all__ = [
    "PreparationOutcome",
    "PreparationTask",
    "RemoteSource",
    "bundled",
    "is_remote",
    "rescaled_key",
    "run_task",
    "run_tasks",
]
