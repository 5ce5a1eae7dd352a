# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A store of prepared volumes, on a disk or in object storage: found by content, written whole or not at all, and read
by the tile. The bytes of one volume are `store_format`'s."""

import hashlib
import json
import logging
import os
import posixpath
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..prepared_volume_t3d import PreparedVolume
from .source_hashes import (
    content_hash,
    is_key,
    memo,
    path_hash,
    preparation_text,
    remembered_content,
    source_stamp,
    volume_key,
)
from .store_files import connect, publish
from .store_format import (
    CODECS,
    TILE,
    StoreCorruptionError,
    StoreError,
    VolumeHeader,
    write_volume,
)
from .store_reader import VolumeReader

logger = logging.getLogger(__name__)

_FORMAT = 1
_MAX_OPEN = 128  # volumes whose headers, and on a disk maps, a process keeps


class VolumeStore:
    """
    Prepared volumes behind one address: one object per volume, named by what its source holds and how it was prepared.

    Reading is the same everywhere, and each tile is compared with its checksum when a process first reads it. On a
    disk volumes are memory-mapped; elsewhere a crop asks for the byte ranges of its tiles. Safe to share between
    processes, machines and runs; it may be sent to other processes.

    Args:
        url (`str` or `Path`): of a store that exists: a folder or anything fsspec knows, such as `"s3://bucket/store"`.
        storage_options (`dict`, *optional*): what fsspec needs beside the address, such as an endpoint.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.data.store import VolumeStore
    >>> from modeling_t3d.image_processing_t3d import T3DImageProcessor

    >>> scan = np.full((20, 40, 40), -1000, dtype=np.int16)
    >>> scan[:, 8:32, 8:32] = 40
    >>> processor = T3DImageProcessor(spacing=(3, 3, 3))
    >>> prepared = processor.prepare(scan, volume_spacing=(3, 3, 3), volume_axes="SAR")
    >>> store = VolumeStore.create("memory://example", processor)
    >>> store.add("0" * 40, prepared)
    >>> store.crop("0" * 40, (0, 4, 4), (4, 8, 8)).shape
    (4, 8, 8)

    ```"""

    def __init__(self, url: str | Path, *, storage_options: dict[str, Any] | None = None) -> None:
        self.url = str(url)
        self.storage_options = dict(storage_options or {})
        self._connect()
        try:
            settings = json.loads(self._file_system.cat_file(self._path("store.json")))
        except FileNotFoundError:
            raise StoreError(
                f"{self.url}: no volume store; make one with VolumeStore.create or prepare_dataset.py"
            ) from None
        except ValueError:
            settings = None
        if not isinstance(settings, dict) or not settings.keys() >= {"format", "preparation", "codec", "tile"}:
            raise StoreError(f"{self.url}: its store.json is damaged; write it anew, or prepare the volumes again")
        if settings["format"] != _FORMAT:
            raise StoreError(
                f"{self.url}: store format {settings['format']}, this version reads {_FORMAT}; prepare anew"
            )
        self.preparation: dict[str, Any] = settings["preparation"]
        self.codec: str = settings["codec"]
        self.tile: tuple[int, int, int] = tuple(settings["tile"])

    @classmethod
    def create(
        cls,
        url: str | Path,
        image_processor: Any,
        *,
        codec: str | None = None,
        tile: tuple[int, int, int] | None = None,
        exist_ok: bool = True,
        storage_options: dict[str, Any] | None = None,
    ) -> "VolumeStore":
        """
        Make a store for what an image processor prepares, or open it where it exists.

        Args:
            url, storage_options: as for opening.
            image_processor (`T3DImageProcessor`): whose preparation the volumes share.
            codec (`"none"` or `"zstd"`, *optional*):
                `"none"`, which a new store gets by default, reads fastest; `"zstd"` takes less than half the space
                for CT and needs the extra `store`.
            tile (three ints, z y x, *optional*): voxels that are read, checked and compressed together.
            exist_ok (`bool`, defaults to `True`): open a store that is already there, if its settings are the same.
        """
        if codec not in (None, *CODECS):
            raise StoreError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
        settings = {
            "format": _FORMAT,
            "preparation": json.loads(preparation_text(image_processor.preparation_key())),
            "codec": codec or CODECS[0],
            "tile": tile or TILE,
        }
        file_system, root = connect(str(url), storage_options or {})
        path = posixpath.join(root, "store.json")
        if not file_system.exists(path):
            file_system.makedirs(root, exist_ok=True)
            publish(file_system, path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
        elif not exist_ok:
            raise StoreError(f"{url}: there is a store already; open it with VolumeStore, or choose another address")
        store = cls(url, storage_options=storage_options)
        store.require(image_processor)
        if codec not in (None, store.codec) or (tile is not None and tuple(tile) != store.tile):
            raise StoreError(
                f"{url}: the store has codec {store.codec!r} and tiles of {store.tile} voxels; leave them to it or "
                "choose another address"
            )
        return store

    def _connect(self) -> None:
        self._connection, self._root = connect(self.url, self.storage_options)
        self._readers: OrderedDict[str, VolumeReader] = OrderedDict()
        # Compared as a whole once; tiles that a reader opened later reads are compared again.
        self._verified: set[str] = set()
        self._process = os.getpid()

    @property
    def _file_system(self) -> Any:
        if self._process != os.getpid():  # connections do not survive a fork
            self._connect()
        return self._connection

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def __repr__(self) -> str:
        return f"VolumeStore({self.url!r}, codec={self.codec!r})"

    def require(self, image_processor: Any) -> None:
        """Raise unless the store's volumes are what this image processor prepares."""
        wanted = json.loads(preparation_text(image_processor.preparation_key()))
        for name in sorted({*wanted, *self.preparation}):
            if wanted.get(name) != self.preparation.get(name):
                raise StoreError(
                    f"{self.url}: its volumes were prepared with {name}={self.preparation.get(name)!r}, the image "
                    f"processor has {wanted.get(name)!r}; choose the store of this preparation or make another"
                )

    # ------------------------------------------------------------------------------------------ names

    def _path(self, *parts: str) -> str:
        return posixpath.join(self._root, *parts)

    def _volume_path(self, key: str) -> str:
        return self._path("volumes", key[:2], f"{key}.t3d")

    def key_of(self, source: str | Path) -> str:
        """
        Key of a source: hash of its content and of the preparation.

        The hash of the content is kept in the store under the hash of the path, until sizes or times of the files
        change: a second run reads no volume to find its key. What is damaged there is computed anew.
        """
        source = Path(source)
        path, stamp = self._path("sources", f"{path_hash(source)}.json"), source_stamp(source)
        try:
            content = remembered_content(self._file_system.cat_file(path), stamp)
        except FileNotFoundError:
            content = None
        if content is None:
            content = content_hash(source)
            text = memo(stamp, content)
            publish(self._file_system, path, lambda file: file.write(text))
        return volume_key(content, self.preparation)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (
            key in self._readers or bool(self._file_system.exists(self._volume_path(key)))
        )

    def keys(self) -> Iterator[str]:
        """Keys of all volumes, sorted."""
        self._file_system.invalidate_cache()
        try:
            paths = self._file_system.find(self._path("volumes"))
        except FileNotFoundError:
            paths = []
        names = (posixpath.basename(path) for path in paths)
        return iter(sorted(name.removesuffix(".t3d") for name in names if name.endswith(".t3d")))

    def __len__(self) -> int:
        return sum(1 for _ in self.keys())

    # ------------------------------------------------------------------------------------------ writing

    def add(self, key: str, prepared: PreparedVolume) -> None:
        """
        Store a prepared volume under its key. It appears whole or not at all; one that is there already is kept.

        Args:
            key (`str`): what `key_of` gave for the source.
            prepared ([`PreparedVolume`]): the volume; where it came from is not stored.
        """
        if not is_key(key):
            raise StoreError(f"a key has 40 hexadecimal digits, got {key!r}; take it from key_of")
        if key not in self:
            path = self._volume_path(key)
            publish(self._file_system, path, lambda file: write_volume(file, key, prepared, self.codec, self.tile))

    def remove(self, key: str) -> None:
        """Remove a volume, for instance a damaged one, so that it can be prepared again."""
        self._readers.pop(key, None)
        self._verified.discard(key)
        with suppress(FileNotFoundError):
            self._file_system.rm_file(self._volume_path(key))

    def load(self, key: str, prepare: Callable[[], PreparedVolume]) -> PreparedVolume:
        """
        The prepared volume of a key: the stored one, all of it intact, or prepared and stored now.

        Args:
            key (`str`): what `key_of` gave for the source.
            prepare (callable): makes the [`PreparedVolume`].
        """
        if key not in self._verified and key in self:
            try:
                self.verify(key)
            except StoreCorruptionError as error:
                logger.warning("%s; it is prepared again now", str(error).partition(";")[0])
                self.remove(key)
        if key not in self:
            self.add(key, prepare())
        return self.open(key)

    def keep(self, key: str, kind: dict[str, Any], make: Callable[[], PreparedVolume]) -> PreparedVolume:
        """
        What is small and made of a volume again and again, such as its global view: read, or made and stored now.

        Args:
            key (`str`): of the volume.
            kind (`dict`): the settings that it depends on.
            make (callable): makes it, in the form of a [`PreparedVolume`].
        """
        folder = hashlib.sha256(preparation_text(kind).encode()).hexdigest()[:12]
        path = self._path("views", folder, key[:2], f"{key}.t3d")
        try:
            reader = VolumeReader(self._file_system, path, key, self.url)
            return reader.header.volume(reader.crop((0, 0, 0), reader.header.shape))
        except FileNotFoundError:
            logger.debug("volume %s has no view %s yet", key, folder)
        except StoreCorruptionError as error:
            logger.warning("%s; its view is made again now", str(error).partition(";")[0])
        made = make()
        publish(self._file_system, path, lambda file: write_volume(file, key, made, self.codec, self.tile))
        return made

    # ------------------------------------------------------------------------------------------ reading

    def describe(self, key: str) -> VolumeHeader:
        """The header of a volume: shape, affine, body, warnings; no voxels are read."""
        return self._reader(key).header

    def open(self, key: str) -> PreparedVolume:
        """A prepared volume whose voxels stay in the store until a view asks for them."""
        return self.describe(key).volume(StoredArray(self, key))

    def read(self, key: str) -> PreparedVolume:
        """A prepared volume with all its voxels in memory."""
        header = self.describe(key)
        return header.volume(self.crop(key, (0, 0, 0), header.shape))

    def crop(self, key: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """
        Copy a box out of a volume; only its tiles are read.

        Args:
            key (`str`): of the volume.
            start (three ints, z y x): first voxel; may be negative.
            size (three ints, z y x): voxels; what lies beyond the volume is its outside value.

        Returns:
            `np.ndarray` of the given size, in the volume's dtype.
        """
        return self._reader(key).crop(start, size)

    def verify(self, key: str) -> None:
        """Compare every byte of a volume with what was written; raises [`StoreCorruptionError`]."""
        self._verified.discard(key)
        self._reader(key).verify()
        self._verified.add(key)

    def _reader(self, key: str) -> VolumeReader:
        file_system = self._file_system
        reader = self._readers.get(key)
        if reader is None:
            try:
                path = self._volume_path(key)
                reader = VolumeReader(file_system, path, key, self.url, is_verified=key in self._verified)
            except FileNotFoundError:
                raise StoreError(f"{self.url}: no volume {key}; prepare its source and add it") from None
            self._readers[key] = reader
            if len(self._readers) > _MAX_OPEN:
                self._readers.popitem(last=False)
        else:
            self._readers.move_to_end(key)
        return reader


class StoredArray:
    """
    The voxels of a stored volume, read when they are asked for; slices give `np.ndarray`s.

    Args:
        store ([`VolumeStore`]): where the volume is.
        key (`str`): of the volume.
    """

    ndim = 3

    def __init__(self, store: VolumeStore, key: str) -> None:
        header = store.describe(key)
        self.store = store
        self.key = key
        self.shape = header.shape
        self.dtype = header.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, item: Any) -> np.ndarray:
        if isinstance(item, tuple) and len(item) == 3 and all(_is_plain(part) for part in item):
            bounds = [part.indices(count)[:2] for part, count in zip(item, self.shape, strict=True)]
            size = [max(0, stop - start) for start, stop in bounds]
            return self.store.crop(self.key, [start for start, _ in bounds], size)
        return np.asarray(self)[item]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.store.crop(self.key, (0, 0, 0), self.shape).astype(dtype or self.dtype, copy=False)


def _is_plain(item: Any) -> bool:
    return isinstance(item, slice) and item.step in (None, 1)


__all__ = ["StoreCorruptionError", "StoreError", "StoredArray", "VolumeHeader", "VolumeStore"]
