# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""One prepared volume as one object: a checked header with an index, then tiles, each with its own checksum.

Where objects lie, and how they get there, is left to `store`.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from ..geometry_t3d import VolumeError
from ..prepared_volume_t3d import PreparedVolume

# Voxels (z, y, x), 512 KiB of int16. Of the shapes measured, large ones with long rows copy fastest: this one 1.6
# times as fast as (32, 64, 64), of which a random crop of 128^3 touches a quarter fewer bytes.
TILE = (32, 64, 128)
CODECS = ("none", "zstd")
HEADER_GUESS = 1 << 16  # bytes of a remote object that are asked for first; the header of most volumes fits
_MAGIC = b"T3DVOL1\n"
_PREFIX = struct.Struct("<8sIIQ")  # magic, bytes of the JSON, bytes of the index, checksum of both
_ALIGNMENT = 4096  # tiles of full size begin on pages
_INDEX = np.dtype([("offset", "<u8"), ("checksum", "<u8"), ("length", "<u4"), ("value", "<f4")])


class StoreError(VolumeError):
    """A store, or an entry of it, that does not exist or belongs to other settings."""


class StoreCorruptionError(StoreError):
    """Bytes that are not those that were written; the message names the volume's key and the remedy."""


class TilePart(NamedTuple):
    """What one tile gives to a crop: its number, its shape, where to cut it and where that goes."""

    tile: int
    shape: tuple[int, int, int]
    source: tuple[slice, slice, slice]
    target: tuple[slice, slice, slice]


@dataclass(eq=False)
class VolumeHeader:
    """
    What is known of a stored volume without its voxels; nothing in it identifies a person or names a file.

    Args:
        shape (three ints, z y x), dtype (`np.dtype`): int16 HU, or float32 in the declared unit.
        codec (`"none"` or `"zstd"`), tile (three ints, z y x): how the voxels are stored.
        facts (`dict`): of [`PreparedVolume`]: affine, body, warnings; and the volume's key.
        index (`np.ndarray`): offset, checksum, length and, of a tile with one value throughout, that value.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    codec: str
    tile: tuple[int, int, int]
    facts: dict[str, Any] = field(repr=False)
    index: np.ndarray = field(repr=False)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Tiles per axis (z, y, x)."""
        return _grid(self.shape, self.tile)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tiles in the store."""
        return int(self.index["length"].sum())

    def volume(self, array: Any) -> PreparedVolume:
        """The prepared volume with these facts and the given voxels."""
        return PreparedVolume.from_facts(array, self.facts)

    def parts(self, start: Sequence[int], stop: Sequence[int]) -> list[TilePart]:
        """The tiles of a box that lies within the volume, in the order in which they are stored."""
        pieces = [_axis_parts(*axis) for axis in zip(start, stop, self.tile, self.shape, strict=True)]
        parts = []
        for z, depth, source_z, target_z in pieces[0]:
            for y, height, source_y, target_y in pieces[1]:
                row = (z * self.grid[1] + y) * self.grid[2]
                for x, width, source_x, target_x in pieces[2]:
                    parts.append(
                        TilePart(
                            row + x,
                            (depth, height, width),
                            (source_z, source_y, source_x),
                            (target_z, target_y, target_x),
                        )
                    )
        return parts

    def is_whole(self, tile: int, stored: Any) -> bool:
        """Whether the stored bytes of a tile are those that were written."""
        return xxhash.xxh3_64_intdigest(stored) == int(self.index["checksum"][tile])

    def ranges(self, tiles: Sequence[int], gap: int) -> list[tuple[int, int, list[int]]]:
        """Byte ranges that hold the given tiles (first byte, end, tiles); neighbours within `gap` bytes become one."""
        ranges: list[tuple[int, int, list[int]]] = []
        for tile in tiles:
            offset, length = int(self.index["offset"][tile]), int(self.index["length"][tile])
            if ranges and 0 <= offset - ranges[-1][1] <= gap:
                ranges[-1] = (ranges[-1][0], offset + length, [*ranges[-1][2], tile])
            else:
                ranges.append((offset, offset + length, [tile]))
        return ranges


def _grid(shape: Sequence[int], tile: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = (math.ceil(count / size) for count, size in zip(shape, tile, strict=True))
    return z, y, x


def _axis_parts(start: int, stop: int, size: int, count: int) -> list[tuple[int, int, slice, slice]]:
    """Along one axis: number and length of each tile, what of it lies in [start, stop), and where that goes."""
    parts = []
    for tile in range(start // size, -(-stop // size)):
        first = tile * size
        low, high = max(start, first), min(stop, first + size)
        parts.append(
            (tile, min(size, count - first), slice(low - first, high - first), slice(low - start, high - start))
        )
    return parts


# ---------------------------------------------------------------------------------------------- codecs


def _blosc() -> Any:
    try:
        from numcodecs import Blosc
    except ImportError:
        raise ImportError("codec='zstd' needs numcodecs: pip install 'modeling_t3d[store]'") from None
    return Blosc


def tile_encoder(codec: str, item_size: int) -> Callable[[np.ndarray], bytes]:
    """From a contiguous tile to what is stored of it."""
    if codec == "none":
        return lambda tile: tile.tobytes()
    blosc = _blosc()
    compressor = blosc(cname="zstd", clevel=5, shuffle=blosc.BITSHUFFLE, blocksize=0)
    return lambda tile: compressor.encode(tile.view(f"u{item_size}"))


def tile_decoder(codec: str) -> Callable[[Any], Any]:
    """From what is stored of a tile to its bytes."""
    return (lambda stored: stored) if codec == "none" else _blosc()().decode


# ---------------------------------------------------------------------------------------------- writing


def write_volume(file: BinaryIO, key: str, prepared: PreparedVolume, codec: str, tile: Sequence[int]) -> None:
    """
    Write one prepared volume; its `source` is left out.

    Args:
        file (binary file): empty and seekable: the header is written last, before everything else.
        key (`str`): of the volume; tells it from others if objects are mixed up.
        prepared ([`PreparedVolume`]): the volume.
        codec (`"none"` or `"zstd"`): of the tiles.
        tile (three ints, z y x): their size in voxels; tiles at the far ends are cut.
    """
    array = prepared.array
    index = np.zeros(math.prod(_grid(array.shape, tile)), dtype=_INDEX)
    # The source is left out: a file's name may hold a patient's.
    described = {**prepared.facts(), "source": None, "dtype": array.dtype.newbyteorder("<").str}
    facts = json.dumps({**described, "key": key, "codec": codec, "tile": tuple(tile)}).encode()
    end = -(-(_PREFIX.size + len(facts) + index.nbytes) // _ALIGNMENT) * _ALIGNMENT
    encode = tile_encoder(codec, array.dtype.itemsize)
    for number, block in enumerate(_tiles(array, tile)):
        value = block.flat[0]
        if (block == value).all():
            index[number] = (end, 0, 0, value)
            continue
        stored = encode(np.ascontiguousarray(block))
        file.seek(end)
        file.write(stored)
        index[number] = (end, xxhash.xxh3_64_intdigest(stored), len(stored), 0)
        end += -(-len(stored) // array.dtype.itemsize) * array.dtype.itemsize
    head = facts + index.tobytes()
    file.seek(0)
    file.write(_PREFIX.pack(_MAGIC, len(facts), index.nbytes, xxhash.xxh3_64_intdigest(head)) + head)


def _tiles(array: np.ndarray, tile: Sequence[int]) -> Iterator[np.ndarray]:
    depth, height, width = tile
    for z in range(0, array.shape[0], depth):
        for y in range(0, array.shape[1], height):
            for x in range(0, array.shape[2], width):
                yield np.asarray(array[z : z + depth, y : y + height, x : x + width])


# ---------------------------------------------------------------------------------------------- reading


def header_length(start: bytes) -> int | None:
    """Bytes of an object's header, from its first `HEADER_GUESS` bytes; `None` if they are no header."""
    if len(start) < _PREFIX.size:
        return None
    magic, facts, index, _ = _PREFIX.unpack(start[: _PREFIX.size])
    return _PREFIX.size + facts + index if magic == _MAGIC else None


def read_header(head: bytes) -> VolumeHeader | None:
    """The header from its bytes; `None` if they are not what was written."""
    _, facts_length, index_length, checksum = _PREFIX.unpack(head[: _PREFIX.size])
    if len(head) != _PREFIX.size + facts_length + index_length:
        return None
    if xxhash.xxh3_64_intdigest(head[_PREFIX.size :]) != checksum:
        return None
    facts = json.loads(head[_PREFIX.size : _PREFIX.size + facts_length])
    return VolumeHeader(
        shape=tuple(facts["shape"]),
        dtype=np.dtype(facts["dtype"]),
        codec=facts["codec"],
        tile=tuple(facts["tile"]),
        facts=facts,
        index=np.frombuffer(head, dtype=_INDEX, offset=_PREFIX.size + facts_length),
    )


__all__ = [
    "CODECS",
    "HEADER_GUESS",
    "TILE",
    "StoreCorruptionError",
    "StoreError",
    "TilePart",
    "VolumeHeader",
    "header_length",
    "read_header",
    "tile_decoder",
    "tile_encoder",
    "write_volume",
]
