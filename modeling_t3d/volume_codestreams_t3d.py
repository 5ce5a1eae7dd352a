# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is compressed in DICOM files, checked before a codec sees it: headers of JPEG, JPEG-LS and JPEG 2000 frames,
damaged ones of which can end the process, and the size of deflated data sets, which pydicom inflates whole.

No pixel is decoded here. A frame passes when what it says of itself is well formed and agrees with the DICOM header,
so that no codec allocates what a damaged frame claims.
"""

import io
import struct
import zlib
from collections.abc import Iterator

from .volume_slices_t3d import Refused

JPEG_2000_START = b"\xff\x4f\xff\x51"
# Frame markers of the coding processes that DICOM uses: baseline, extended, progressive, lossless. JPEG-LS needs no
# Huffman tables.
HUFFMAN_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3}
JPEG_LS_FRAME = 0xF7
LOSSLESS_FRAME = 0xC3
START_OF_SCAN = 0xDA
WITHOUT_LENGTH = {0x01, 0xD8, *range(0xD0, 0xD8)}
# A deflated data set may hold this many bytes whatever its file's size, beyond them this many times that size, and
# never more than the last: noise alone keeps scans from deflating 30 times.
INFLATED_ANYWAY = 64 << 20
INFLATED_TIMES = 30
INFLATED_MOST = 4 << 30
PIECE = 1 << 20  # bytes inflated at a time


class DeflateGuard(io.BufferedReader):
    """A DICOM file for pydicom, which asks for all the rest of a file only where that is a deflated data set.

    What would inflate to more than a scan can hold raises `Refused`; one piece at a time is inflated to find out.

    Args:
        path: of the file.
    """

    def __init__(self, path: str):
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file; see above."""
        content = super().read(size)
        if size is None or size < 0:
            check_inflated(content)
        return content


def check_inflated(content: bytes) -> None:
    """Raise `Refused` for a raw deflate stream that grows beyond what a scan can hold; damage is left to pydicom."""
    limit = min(max(INFLATED_ANYWAY, INFLATED_TIMES * len(content)), INFLATED_MOST)
    inflate, held = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        for first in range(0, len(content), PIECE):
            part = content[first : first + PIECE]
            while part:
                held += len(inflate.decompress(part, PIECE))
                part = inflate.unconsumed_tail
                if held > limit:
                    raise Refused(f"its deflated data grows beyond {limit} bytes, more than a scan of its size holds")
    except zlib.error:
        return


def check_codestream(frame: bytes, rows: int, columns: int) -> None:
    """Raise `Refused` unless a compressed frame says that it holds `rows` x `columns` numbers, and says it rightly."""
    start = frame.find(JPEG_2000_START, 0, 4096)
    try:
        if frame.startswith(b"\xff\xd8"):
            _check_jpeg(frame, rows, columns)
        elif start >= 0:
            _check_jpeg_2000(frame[start:], rows, columns)
        else:
            raise Refused("a compressed frame does not begin as its encoding does")
    except (struct.error, IndexError):
        raise Refused("a compressed frame ends within its header; the pixel data is truncated") from None


def _segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment up to the scan."""
    place = 2
    while True:
        if frame[place] != 0xFF:
            raise Refused("a compressed frame has a damaged header")
        while frame[place] == 0xFF:  # any number of fill bytes
            place += 1
        marker = frame[place]
        place += 1
        if marker in WITHOUT_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", frame, place)
        if length < 2 or place + length > len(frame):
            raise Refused("a compressed frame has a damaged header, or its pixel data is truncated")
        yield marker, frame[place + 2 : place + length]
        if marker == START_OF_SCAN:
            return
        place += length


def _check_jpeg(frame: bytes, rows: int, columns: int) -> None:
    tables: set[int] = set()
    kind, precision, component = None, 0, -1
    for marker, content in _segments(frame):
        if marker == 0xC4:
            tables |= _huffman_tables(content)
        elif marker in HUFFMAN_FRAMES or marker == JPEG_LS_FRAME:
            if kind is not None:
                raise Refused("a compressed frame describes itself twice")
            kind = marker
            precision, height, width, count = struct.unpack_from(">BHHB", content)
            component, sampling, quantisation = content[6:9]
            if (height, width, count) != (rows, columns, 1) or len(content) != 9:
                raise Refused(
                    f"a compressed frame holds {width}x{height}x{count} numbers, another size than its header"
                )
            if not 2 <= precision <= 16 or sampling not in (0x11, 0x22, 0x12, 0x21) or quantisation > 3:
                raise Refused("a compressed frame has a damaged header")
        elif marker == START_OF_SCAN:
            if kind is None or len(content) != 6 or content[0] != 1 or content[1] != component:
                raise Refused("a compressed frame has a damaged header")
            # A lossless number takes at least one bit, a block of 8x8 of the other kinds at least two.
            if kind in HUFFMAN_FRAMES and rows * columns > len(frame) * (8 if kind == LOSSLESS_FRAME else 256):
                raise Refused("a compressed frame is too short for its size; the pixel data is truncated")
            direct, alternating = content[2] >> 4, content[2] & 15
            needed = {direct} if kind == LOSSLESS_FRAME else {direct, 16 | alternating}
            if kind in HUFFMAN_FRAMES and not needed <= tables:
                raise Refused("a compressed frame lacks its Huffman tables")
            if kind == LOSSLESS_FRAME and not (1 <= content[3] <= 7 and (content[5] & 15) < precision):
                raise Refused("a compressed frame names no known predictor")
        elif marker in range(0xC5, 0xD0) and marker != 0xCC:
            raise Refused("a compressed frame is of a kind that DICOM does not use")


def _huffman_tables(content: bytes) -> set[int]:
    """Class (bit 4) and number of each table of a segment."""
    found = set()
    while content:
        count = sum(content[1:17])
        if content[0] & 0xEC or count > 256 or len(content) < 17 + count:
            raise Refused("a compressed frame has damaged Huffman tables")
        found.add(content[0])
        content = content[17 + count :]
    return found


def _check_jpeg_2000(frame: bytes, rows: int, columns: int) -> None:
    length, _, right, bottom, left, top, *tile, count = struct.unpack_from(">HH8IH", frame, 4)
    if (right - left, bottom - top, count) != (columns, rows, 1) or length != 41:
        size = f"{right - left}x{bottom - top}x{count}"
        raise Refused(f"a compressed frame holds {size} numbers, another size than its header")
    precision, across, down = struct.unpack_from(">3B", frame, 42)
    tile_width, tile_height, tile_left, tile_top = tile
    if (precision & 127) > 31 or (across, down) != (1, 1) or min(tile_width, tile_height) < 1:
        raise Refused("a compressed frame has a damaged header")
    tiles = -((tile_left - right) // tile_width) * -((tile_top - bottom) // tile_height)
    if tile_left > left or tile_top > top or not 1 <= tiles <= 65535:
        raise Refused("a compressed frame has a damaged header")


__all__ = ["DeflateGuard", "check_codestream", "check_inflated"]
