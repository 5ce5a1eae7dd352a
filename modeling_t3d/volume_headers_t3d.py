# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Checks of what a header promises, before anything is allocated, and of the text headers of NRRD and MetaImage.

Damaged text headers can end the whole process of the library that parses them, hence the checks before it does. They
say what is wrong; voxels, spacing and directions are left to the libraries.
"""

import gzip
import math
import operator
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .geometry_t3d import VolumeReadError

# Deflate packs at most 1032 to 1: a header that promises more than this many times the file is damaged or hostile.
MAXIMUM_DEFLATE = 1040
MAXIMUM_ITEM = 8  # bytes per number; as text, a number takes at least one
DEFLATED = ("gzip", "gz")
ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
META_TYPES = {
    *(f"MET_{sign}{kind}" for sign in ("", "U") for kind in ("CHAR", "SHORT", "INT", "LONG", "LONG_LONG")),
    *("MET_FLOAT", "MET_DOUBLE"),
}
# MetaImage fields that hold numbers: how many, given the number of axes.
META_NUMBERS = {
    **dict.fromkeys(
        ("dimsize", "elementspacing", "elementsize", "offset", "position", "origin", "centerofrotation"), 1
    ),
    **dict.fromkeys(("transformmatrix", "rotation", "orientation"), 2),
    **dict.fromkeys(("ndims", "compresseddatasize", "headersize", "elementnumberofchannels"), 0),
}
WHOLE_NUMBERS = ("ndims", "dimsize", "compresseddatasize", "headersize", "elementnumberofchannels")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


def archive_kind(path: str) -> str | None:
    """What kind of archive a file is by its first bytes, such as `"an encrypted zip archive"`; None for any other."""
    with open(path, "rb") as stream:
        start = stream.read(512)
    if start.startswith(ZIP_MARKS):
        # Bit 0 of the flags of the first entry.
        return (
            "an encrypted zip archive"
            if start[:4] == ZIP_MARKS[0] and start[6:7] and start[6] & 1
            else "a zip archive"
        )
    marks = {b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a RAR archive"}
    for mark, kind in marks.items():
        if start.startswith(mark):
            return kind
    return "a tar archive" if start[257:262] == b"ustar" else None


def damaged(source: str, kind: str, error: Exception) -> VolumeReadError:
    """The error for whatever a parser raised; its own text is not repeated, it may quote the header."""
    compressed = isinstance(error, EOFError | zlib.error | gzip.BadGzipFile)
    reason = "its compressed data ends early or is wrong" if compressed else type(error).__name__
    return VolumeReadError(f"{source}: is not a readable {kind} file: truncated, damaged or another format ({reason})")


def check_promise(source: str, shape: Sequence[int], item_size: int, held: int) -> None:
    """Refuse, before anything is allocated, a header that promises more than the file can hold."""
    if min(shape) < 1:
        raise VolumeReadError(
            f"{source}: its header gives a size of {'x'.join(map(str, shape))}; no axis may be empty"
        )
    promised = math.prod(int(size) for size in shape) * item_size
    if promised > held:
        raise VolumeReadError(
            f"{source}: its header promises {'x'.join(map(str, shape))} voxels ({promised:,} bytes), more than the "
            "file holds; it is truncated or damaged"
        )


def checked_choice(value: Any, count: int) -> int | None:
    """The number of one of `count` things, NumPy's as Python's; `None` for what is no such number."""
    try:
        choice = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return choice if 0 <= choice < count else None


def pick_time(source: str, shape: Sequence[int], time_index: int | None) -> int:
    """The time point to take from a shape (x, y, z, t, ...); 0 for one volume."""
    spatial, rest = shape[:3], [size for size in shape[3:] if size != 1]
    if len(spatial) < 3:
        raise VolumeReadError(f"{source}: holds {len(spatial)} axes; a volume needs three")
    if len(rest) > 1 or (rest and rest[0] != shape[3]):
        raise VolumeReadError(f"{source}: has shape {tuple(shape)}, several values per voxel; pass one volume")
    count = rest[0] if rest else 1
    if rest and time_index is None:
        raise VolumeReadError(f"{source}: holds {count} volumes (4-D); choose one with time_index=0..{count - 1}")
    chosen = checked_choice(0 if time_index is None else time_index, count)
    if chosen is None:
        raise VolumeReadError(f"{source}: time_index={time_index!r} is outside 0..{count - 1}")
    return chosen


class TextHeader(NamedTuple):
    """An NRRD or MetaImage header.

    Args:
        fields: by name in lower case without spaces.
        held: the most bytes of voxels that its files can hold.
        packed: file, first byte and number of bytes of voxels that are deflated; None where they are not, or where
            the header names several files.
        is_nrrd: whether it is an NRRD header, by its first bytes; else it is MetaImage.
    """

    fields: dict[str, str]
    held: int
    packed: tuple[str, int, int] | None
    is_nrrd: bool


def _fields(source: str) -> tuple[dict[str, str], int, bool]:
    """The fields of an NRRD or MetaImage header, where the header ends, and whether it is NRRD."""
    with open(source, "rb") as stream:
        head = stream.read(65536)
    is_nrrd = head.startswith(b"NRRD")
    fields: dict[str, str] = {}
    start = 0
    finished = False
    for line in head.split(b"\n"):
        start += len(line) + 1
        text = line.rstrip(b"\r").decode("latin-1")
        if is_nrrd and not text:
            finished = True
            break
        if not text.isprintable():
            text = text.replace("\t", " ")
        if not text.isprintable() or len(text) > 4000:
            raise VolumeReadError(f"{source}: its header holds something else than text; it is damaged")
        name, found, value = text.partition(":" if is_nrrd else "=")
        name = "".join(name.lower().split())
        if found:
            if name in fields and not is_nrrd:
                raise VolumeReadError(f"{source}: its header gives one field twice; it is damaged")
            fields.setdefault(name, value.strip())
        elif not is_nrrd:
            raise VolumeReadError(f"{source}: its header has a line that is no field; it is damaged or no MetaImage")
        if not is_nrrd and name == "elementdatafile":
            finished = True
            break
    if not finished and not (is_nrrd and start >= len(head)):
        raise VolumeReadError(f"{source}: its header has no end; it is damaged or another format")
    return fields, start, is_nrrd


def read_text_header(source: str) -> TextHeader:
    """The header of an NRRD or MetaImage file.

    Args:
        source: path as the user gave it.

    Raises:
        VolumeReadError: the header is not well formed, or the file that it names for the voxels is missing.
    """
    fields, start, is_nrrd = _fields(source)
    data, held = _data_file(source, fields, start)
    if not is_nrrd:
        _check_meta_image(source, fields, held)
    deflated = fields.get("compresseddata", "").lower() == "true" or fields.get("encoding", "").lower() in DEFLATED
    is_text = fields.get("binarydata", "").lower() == "false" or fields.get("encoding", "raw").lower() != "raw"
    if not deflated:
        return TextHeader(fields, held * MAXIMUM_ITEM if is_text else held, None, is_nrrd)
    packed = None
    if data is not None and fields.get("lineskip", "0") == "0":
        size = int(fields.get("compresseddatasize", 0)) or os.path.getsize(data)
        packed = data, start if data == source else 0, size
    return TextHeader(fields, held * MAXIMUM_DEFLATE, packed, is_nrrd)


def detached_files(source: str) -> list[str]:
    """The files beside an NRRD or MetaImage header that hold its voxels: none where it holds them itself, all other
    files of its folder where it names several. A damaged header names none; reading refuses it."""
    try:
        fields, _, _ = _fields(source)
    except VolumeReadError:
        return []
    named = _named_file(source, fields)
    if named is None or os.path.isfile(named):
        return [] if named is None else [named]
    own = os.path.abspath(source)
    return sorted(entry.path for entry in os.scandir(os.path.dirname(own)) if entry.is_file() and entry.path != own)


def _named_file(source: str, fields: dict[str, str]) -> str | None:
    """The path that a header names for its voxels, which may stand for several files; None where it holds them."""
    data = fields.get("elementdatafile") or fields.get("datafile") or "LOCAL"
    return None if data.upper() == "LOCAL" else os.path.join(os.path.dirname(os.path.abspath(source)), data)


def _data_file(source: str, fields: dict[str, str], start: int) -> tuple[str | None, int]:
    """The one file that holds the voxels, None where there are several, and the bytes that are there for them."""
    named = _named_file(source, fields)
    if named is None:
        return source, max(0, os.path.getsize(source) - start)
    if os.path.isfile(named):
        return named, os.path.getsize(named)
    name = os.path.basename(named)
    if not name.upper().startswith("LIST") and "%" not in name:  # lists and patterns of names
        raise VolumeReadError(
            f"{source}: the file that its header names for the voxels is missing; keep the two together, or convert "
            "them to one .mha or .nrrd file"
        )
    return None, sum(os.path.getsize(file) for file in detached_files(source))


def _check_meta_image(source: str, fields: dict[str, str], held: int) -> None:
    axes = int(fields["ndims"]) if fields.get("ndims") in ("2", "3", "4", "5") else 0
    if not axes or not fields.get("elementdatafile") or "dimsize" not in fields:
        raise VolumeReadError(f"{source}: its header lacks NDims (2 to 5), DimSize or ElementDataFile; it is damaged")
    for name, power in META_NUMBERS.items():
        if name not in fields:
            continue
        numbers = fields[name].split()
        whole = name in WHOLE_NUMBERS
        if len(numbers) != axes**power or not all(
            NUMBER.fullmatch(number) and (not whole or re.fullmatch(r"-?\d{1,12}", number)) for number in numbers
        ):
            kind = "whole number" if whole else "number"
            raise VolumeReadError(f"{source}: its header field {name} is not {axes**power} {kind}(s); it is damaged")
    if int(fields.get("compresseddatasize", 0)) > held:
        raise VolumeReadError(f"{source}: its header promises more compressed bytes than there are; it is truncated")
    if fields.get("elementtype", "").removesuffix("_ARRAY") not in META_TYPES:
        raise VolumeReadError(f"{source}: its header gives no known ElementType; it is damaged")
    if not 1 <= int(fields.get("elementnumberofchannels", 1)) <= 64:
        raise VolumeReadError(f"{source}: its header gives an impossible number of channels; it is damaged")


def check_deflated(source: str, packed: tuple[str, int, int], wanted: int) -> None:
    """Inflate the voxels once and count them: ITK allocates what the header says, and may hand it out unfilled.

    Args:
        source: path as the user gave it.
        packed: see `TextHeader`.
        wanted: bytes that the header promises.
    """
    path, start, left = packed
    held = 0
    try:
        inflate = zlib.decompressobj(wbits=47)  # zlib or gzip, as the stream says
        with open(path, "rb") as stream:
            stream.seek(start)
            while held < wanted and left > 0 and (part := stream.read(min(left, 1 << 20))):
                left -= len(part)
                while part and held < wanted:
                    held += len(inflate.decompress(part, 1 << 24))
                    part = inflate.unconsumed_tail
    except (OSError, zlib.error):
        raise VolumeReadError(f"{source}: its compressed data is damaged or missing") from None
    if held < wanted:
        raise VolumeReadError(f"{source}: its compressed data is truncated: {held} bytes where {wanted} are needed")


__all__ = [
    "MAXIMUM_DEFLATE",
    "archive_kind",
    "check_deflated",
    "check_promise",
    "checked_choice",
    "damaged",
    "detached_files",
    "pick_time",
    "read_text_header",
]
