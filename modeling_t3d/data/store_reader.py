# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Reads boxes of one stored volume: by a memory map from a disk, by byte ranges from anywhere else."""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from .store_format import HEADER_GUESS, StoreCorruptionError, header_length, read_header, tile_decoder

_RANGE_GAP = 1 << 16  # bytes that are cheaper read than asked for around


class VolumeReader:
    """
    One stored volume, open for reading.

    Args:
        file_system (`fsspec.AbstractFileSystem`), path (`str`): where the object is.
        key, url (`str`): of the volume and of the store, for errors.
        is_verified (`bool`, defaults to `False`): its bytes were compared with their checksums before. What comes over
            a network is compared each time all the same.
    """

    def __init__(
        self, file_system: fsspec.AbstractFileSystem, path: str, key: str, url: str, *, is_verified: bool = False
    ) -> None:
        self.file_system = file_system
        self.path = path
        self.name = f"volume {key} of the store {url}"
        self.map: mmap.mmap | None = None
        if isinstance(file_system, LocalFileSystem):
            with open(path, "rb") as file:
                try:
                    self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except ValueError:  # an empty file
                    raise self._corruption("the header") from None
        start = self._read(HEADER_GUESS)
        length = header_length(start)
        if length is not None and length > len(start):
            start = self._read(length)
        header = None if length is None else read_header(start[:length])
        if header is None or header.facts["key"] != key:
            raise self._corruption("the header")
        self.header = header
        # Lists, because a crop looks dozens of tiles up one by one.
        self._offsets: list[int] = header.index["offset"].tolist()
        self._lengths: list[int] = header.index["length"].tolist()
        # Tiles of the map that were compared with their checksums, or of which nothing is stored.
        self._checked = self._without_checks()
        if is_verified and self.map is not None:
            self._checked = bytearray(b"\1") * len(self._lengths)
        self._voxels: np.ndarray | None = None
        if self.map is not None and header.codec == "none":
            self._voxels = np.frombuffer(self.map, header.dtype, len(self.map) // header.dtype.itemsize)
            self._first_voxels = (header.index["offset"] // header.dtype.itemsize).tolist()
            self._num_voxels = (header.index["length"] // header.dtype.itemsize).tolist()

    def _read(self, stop: int) -> bytes:
        if self.map is not None:
            return self.map[:stop]
        with self._truncation_named("the header", 1):
            return self.file_system.cat_file(self.path, start=0, end=stop)

    @contextmanager
    def _truncation_named(self, what: str, needed: int) -> Iterator[None]:
        """Object storage that has fewer bytes than are asked for may answer with an error of its own."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError:
            if self.file_system.info(self.path)["size"] < needed:
                raise self._corruption(what) from None
            raise

    def _corruption(self, what: str) -> StoreCorruptionError:
        return StoreCorruptionError(
            f"{self.name}: {what} is not what was written; remove the volume from the store and prepare it again"
        )

    def crop(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """A box of the volume; see [`VolumeStore.crop`]."""
        header = self.header
        low = [min(max(0, first), count) for first, count in zip(start, header.shape, strict=True)]
        stop = [first + length for first, length in zip(start, size, strict=True)]
        high = [max(first, min(*ends)) for first, *ends in zip(low, stop, header.shape, strict=True)]
        inside = tuple(slice(first - at, end - at) for first, end, at in zip(low, high, start, strict=True))
        if [end - first for first, end in zip(low, high, strict=True)] == [*size]:
            result = np.empty(tuple(size), dtype=header.dtype)
        else:
            result = np.full(tuple(size), header.facts["outside"], dtype=header.dtype)
        self._fill(result[inside], low, high)
        return result

    def _fill(self, result: np.ndarray, low: Sequence[int], high: Sequence[int]) -> None:
        """Copies the voxels of a box within the volume to `result`."""
        header = self.header
        parts = header.parts(low, high)
        if self._voxels is not None and all(self._checked[part.tile] for part in parts):
            # What a crop of an open volume on a disk does: copying, and as little else as possible.
            voxels, first, lengths = self._voxels, self._first_voxels, self._num_voxels
            for tile, shape, source, target in parts:
                if lengths[tile]:
                    result[target] = voxels[first[tile] : first[tile] + lengths[tile]].reshape(shape)[source]
                else:
                    result[target] = header.index["value"][tile]
            return
        stored = self._tiles([part.tile for part in parts])
        decode = tile_decoder(header.codec)
        for part in parts:
            content = stored[part.tile]
            if content is None:
                result[part.target] = header.index["value"][part.tile]
            else:
                result[part.target] = np.frombuffer(decode(content), header.dtype).reshape(part.shape)[part.source]

    def verify(self) -> None:
        """Compare every byte with what was written, also where that was done before."""
        self._checked = self._without_checks()
        self._tiles(range(len(self._lengths)))

    def _without_checks(self) -> bytearray:
        return bytearray(length == 0 for length in self._lengths)

    def _tiles(self, tiles: Sequence[int]) -> dict[int, Any]:
        """Stored bytes of tiles, compared with their checksums; `None` for one of a single value."""
        offsets, lengths, checked = self._offsets, self._lengths, self._checked
        stored: dict[int, Any] = dict.fromkeys(tiles)
        for first, block, members in self._blocks([tile for tile in tiles if lengths[tile]]):
            for tile in members:
                offset = offsets[tile] - first
                content = stored[tile] = block[offset : offset + lengths[tile]]
                if not checked[tile]:
                    if not self.header.is_whole(tile, content):
                        raise self._corruption(f"tile {tile}")
                    # What comes over a network is new each time.
                    checked[tile] = self.map is not None
        return stored

    def _blocks(self, tiles: Sequence[int]) -> list[tuple[int, memoryview, Sequence[int]]]:
        """Runs of bytes that hold the given tiles: first byte, bytes, tiles."""
        if self.map is not None:
            return [(0, memoryview(self.map), tiles)]
        ranges = self.header.ranges(tiles, _RANGE_GAP)
        starts, stops = [first for first, _, _ in ranges], [end for _, end, _ in ranges]
        with self._truncation_named("its end", max(stops, default=0)):
            blocks = self.file_system.cat_ranges([self.path] * len(ranges), starts, stops, on_error="raise")
        return [(first, memoryview(block), members) for (first, _, members), block in zip(ranges, blocks, strict=True)]


__all__ = ["VolumeReader"]
