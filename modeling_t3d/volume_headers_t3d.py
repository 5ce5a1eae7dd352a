# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Checks of what a header promises, before anything is allocated, and of the text headers of NRRD and MetaImage.

Damaged text headers can end the whole process of the library that parses them, hence the checks before it does. They
say what is wrong; voxels, spacing and directions are left to the libraries.
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Sequence

from .geometry_t3d import VolumeReadError

# Deflate packs at most 1032 to 1: a header that promises more than this many times the file is damaged or hostile.
MAXIMUM_DEFLATE = 1040
ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
META_SIZES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8}
META_TYPES = {  # bytes per number
    **{f"MET_{sign}{kind}": size for sign in ("", "U") for kind, size in META_SIZES.items()},
    **{"MET_FLOAT": 4, "MET_DOUBLE": 8},
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


def pick_time(source: str, shape: Sequence[int], time_index: int | None) -> int:
    """The time point to take from a shape (x, y, z, t, ...); 0 for one volume."""
    spatial, rest = shape[:3], [size for size in shape[3:] if size != 1]
    if len(spatial) < 3:
        raise VolumeReadError(f"{source}: holds {len(spatial)} axes; a volume needs three")
    if len(rest) > 1 or (rest and rest[0] != shape[3]):
        raise VolumeReadError(f"{source}: has shape {tuple(shape)}, several values per voxel; pass one volume")
    count = rest[0] if rest else 1
    if rest and time_index is None:
        raise VolumeReadError(
            f"{source}: holds {count} volumes (4-D); choose one with time_index=0..{count - 1} of read_volume"
        )
    if time_index is not None and (
        isinstance(time_index, bool) or not isinstance(time_index, int) or not 0 <= time_index < count
    ):
        raise VolumeReadError(f"{source}: time_index={time_index!r} is outside 0..{count - 1}")
    return time_index or 0


def read_text_header(source: str) -> tuple[dict[str, str], int]:
    """The fields of an NRRD or MetaImage header and the most bytes of voxels that its files can hold.

    Args:
        source: path as the user gave it.

    Returns:
        Fields by name in lower case without spaces, and the number of bytes (after decompression at best).

    Raises:
        VolumeReadError: the header is not well formed.
    """
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
    held, raw = _held(source, fields, start)
    if not is_nrrd:
        _check_meta_image(source, fields, held)
        if not raw:
            _check_deflated(source, fields, start)
    return fields, held if raw else held * MAXIMUM_DEFLATE


def _held(source: str, fields: dict[str, str], start: int) -> tuple[int, bool]:
    """Bytes of the file, or of the files that its header names, and whether they hold voxels uncompressed."""
    data = fields.get("elementdatafile") or fields.get("datafile") or "LOCAL"
    held = max(0, os.path.getsize(source) - start)
    if data.upper() != "LOCAL":
        folder = os.path.dirname(os.path.abspath(source))
        named = os.path.join(folder, data)
        files = [named] if os.path.isfile(named) else [entry.path for entry in os.scandir(folder) if entry.is_file()]
        held = sum(os.path.getsize(file) for file in files)
    raw = fields.get("compresseddata", "false").lower() != "true" and fields.get("encoding", "raw").lower() == "raw"
    return held, raw


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
    if _element_type(fields) not in META_TYPES:
        raise VolumeReadError(f"{source}: its header gives no known ElementType; it is damaged")
    if not 1 <= int(fields.get("elementnumberofchannels", 1)) <= 64:
        raise VolumeReadError(f"{source}: its header gives an impossible number of channels; it is damaged")


def _check_deflated(source: str, fields: dict[str, str], start: int) -> None:
    """Inflate the voxels once and count them: ITK hands out uninitialised memory where that fails."""
    path = source
    if fields["elementdatafile"].upper() != "LOCAL":
        path, start = os.path.join(os.path.dirname(source), fields["elementdatafile"]), 0
    wanted = math.prod(int(size) for size in fields["dimsize"].split()) * META_TYPES[_element_type(fields)]
    wanted *= int(fields.get("elementnumberofchannels", 1))
    limit = int(fields.get("compresseddatasize", 0)) or None
    held = 0
    try:
        inflate = zlib.decompressobj(wbits=47)  # zlib or gzip, as the stream says
        with open(path, "rb") as stream:
            stream.seek(start)
            left = limit if limit is not None else os.path.getsize(path)
            while held < wanted and left > 0 and (part := stream.read(min(left, 1 << 20))):
                left -= len(part)
                while part and held < wanted:
                    held += len(inflate.decompress(part, 1 << 24))
                    part = inflate.unconsumed_tail
    except (OSError, zlib.error):
        raise VolumeReadError(f"{source}: its compressed data is damaged or missing") from None
    if held < wanted:
        raise VolumeReadError(f"{source}: its compressed data is truncated: {held} bytes where {wanted} are needed")


def _element_type(fields: dict[str, str]) -> str:
    return fields.get("elementtype", "").removesuffix("_ARRAY")


__all__ = ["MAXIMUM_DEFLATE", "archive_kind", "check_promise", "damaged", "pick_time", "read_text_header"]
