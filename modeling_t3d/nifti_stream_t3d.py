# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""NIfTI files opened without reading their voxels: whole into one array, or slab by slab while decompressing.

nibabel parses the header and reads whatever is unusual. Compressed bytes go through `isal` where it is installed
(the extra "fast"), else through the standard library, straight into the array that is handed out.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from .geometry_t3d import Grid, Volume, VolumeReadError, check_affine
from .volume_arithmetic_t3d import rescale, widened
from .volume_headers_t3d import MAXIMUM_DEFLATE, check_promise, damaged, pick_time

logger = logging.get_logger(__name__)

PIECE = 1 << 20  # bytes inflated per call: larger than the reader's own buffer, so that it is passed by


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """One volume of a `.nii` or `.nii.gz` file: its geometry is known and checked, its voxels are still on disk.

    Args:
        source: path as the user gave it.
        shape: voxels per axis (x, y, z of the file).
        affine: (4, 4) float64, voxel indices to RAS+ world (x, y, z) in mm.
        dtype: of the stored numbers, byte order included.
        slope, intercept: stored numbers to values.
        offset: bytes (after decompression) before the first voxel.
        warnings: what was noticed in the header.
        image: nibabel's image, for files that only nibabel reads; `None` for all others.
        time: place of the volume in a 4-D file.
    """

    source: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    dtype: np.dtype
    slope: float
    intercept: float
    offset: int
    warnings: tuple[str, ...] = ()
    image: Any = None
    time: int = 0

    @property
    def input_grid(self) -> Grid:
        """The file's own grid."""
        return Grid(self.shape, self.affine)

    def read(self) -> Volume:
        """The whole volume; values as `read_volume` describes them."""
        if self.image is not None or self._holds_values:
            (values,) = self.slabs(self.shape[2])
        else:
            values = self._gathered()
        return Volume(values, self.affine, source=self.source, warnings=self.warnings)

    def slabs(self, num_planes: int) -> Iterator[np.ndarray]:
        """Values (x, y, up to `num_planes` of z) in the order of the file, each in an array of its own.

        The file is read to its end, where the checksum is: only a loop that finishes has read sound voxels.

        Raises:
            VolumeReadError: the file is truncated or damaged.
        """
        if self.image is not None:
            values = _read_with_nibabel(self)
            for first in range(0, self.shape[2], num_planes):
                yield values[:, :, first : first + num_planes]
            return
        stream = self._open()
        with stream:
            self._skip(stream, self.offset)
            for first in range(0, self.shape[2], num_planes):
                stored = np.empty(
                    (*self.shape[:2], min(num_planes, self.shape[2] - first)), dtype=self.dtype, order="F"
                )
                self._fill(stream, stored)
                yield self._values(stored)
            if self.source[-3:].lower() == ".gz":
                self._skip(stream, None)

    @property
    def _holds_values(self) -> bool:
        """Whether the stored numbers are the values."""
        return self.dtype == np.int16 and self.slope == 1.0 and self.intercept == 0.0

    def _gathered(self) -> np.ndarray:
        """The whole volume (x, y, z), rescaled slab by slab: its stored numbers are never all in memory beside it."""
        values, first = np.empty(0), 0
        for slab in self.slabs(max(1, PIECE // (self.dtype.itemsize * self.shape[0] * self.shape[1]))):
            if first == 0:
                values = np.empty(self.shape, dtype=slab.dtype, order="F")
            values, last = widened(values, slab), first + slab.shape[2]
            values[:, :, first:last] = slab
            first = last
        return values

    def _open(self) -> Any:
        if self.source[-3:].lower() != ".gz":
            return open(self.source, "rb", buffering=0)
        try:
            from isal import igzip
        except ImportError:
            return gzip.open(self.source)
        return igzip.open(self.source)

    def _fill(self, stream: Any, stored: np.ndarray) -> None:
        view = stored.reshape(-1, order="F").view(np.uint8).data
        filled = 0
        while filled < len(view):
            filled += self._read_into(stream, view[filled : filled + PIECE]) or self._end_early()

    def _skip(self, stream: Any, count: int | None) -> None:
        """Reads on by `count` bytes, or to the end."""
        scratch = memoryview(bytearray(PIECE if count is None else min(count, PIECE)))
        while count is None or count > 0:
            length = self._read_into(stream, scratch if count is None else scratch[: min(count, PIECE)])
            if length == 0 and count is None:
                return
            count = None if count is None else count - (length or self._end_early())

    def _read_into(self, stream: Any, view: memoryview) -> int:
        try:
            return stream.readinto(view)
        except Exception as error:  # isal and gzip raise errors of several kinds for damaged data
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise damaged(self.source, "NIfTI", error) from None
            raise damaged(self.source, "NIfTI", zlib.error()) from None

    def _end_early(self) -> int:
        raise damaged(self.source, "NIfTI", EOFError())

    def _values(self, stored: np.ndarray) -> np.ndarray:
        if self._holds_values:
            return stored  # its own array already
        return rescale(stored, self.slope, self.intercept)


def open_nifti(source: str, time_index: int | None = None) -> NiftiFile:
    """Reads and checks the header of a NIfTI file.

    Args:
        source: path of a `.nii` or `.nii.gz` file.
        time_index: which volume of a 4-D file.

    Raises:
        VolumeReadError: not a NIfTI volume, or its header promises what the file cannot hold.
    """
    nibabel = import_nibabel(source)
    try:
        image = _load(nibabel, source)
        shape, dtype = image.shape, image.get_data_dtype()
        proxy = image.dataobj
        offset = int(proxy.offset)
        with image.file_map["image"].get_prepare_fileobj("rb") as stream:  # the loaded header has lost these two
            stored = image.header_class.from_fileobj(stream, check=False)
            factors = float(stored["scl_slope"]), float(stored["scl_inter"])
    except Exception as error:  # a damaged file can make the parser raise anything
        raise damaged(source, "NIfTI", error) from None
    if not isinstance(image, nibabel.Nifti1Image | nibabel.Nifti2Image):
        raise VolumeReadError(f"{source}: is not a NIfTI volume")
    check_type(source, dtype)
    if any(math.isinf(factor) for factor in factors):
        raise VolumeReadError(f"{source}: its header gives an infinite rescale (scl_slope or scl_inter)")
    size = os.path.getsize(source)
    held = size * MAXIMUM_DEFLATE if source[-3:].lower() == ".gz" else size - offset
    check_promise(source, shape, dtype.itemsize, held)
    time = pick_time(source, shape, time_index)
    affine, notes = nifti_geometry(source, image)
    spatial = (int(shape[0]), int(shape[1]), int(shape[2]))
    usual = type(proxy) is nibabel.arrayproxy.ArrayProxy and dtype.itemsize <= 8 and offset >= 0
    return NiftiFile(
        source=source,
        shape=spatial,
        affine=affine,
        dtype=dtype,
        slope=float(proxy.slope),
        intercept=float(proxy.inter),
        offset=offset + time * math.prod(spatial) * dtype.itemsize,
        warnings=notes,
        image=None if usual else image,
        time=time,
    )


def _load(nibabel: Any, source: str) -> Any:
    """nibabel's image of a path, whose suffix may be in any case."""
    if source.endswith((".nii", ".nii.gz")):
        return nibabel.load(source, keep_file_open=False)
    # From a suffix in mixed case nibabel makes the name of another file, one in lower case: it is given the file.
    is_second = nibabel.Nifti2Image.path_maybe_image(source)[0]
    kind = nibabel.Nifti2Image if is_second else nibabel.Nifti1Image
    return kind.from_file_map({"image": nibabel.FileHolder(filename=source)}, keep_file_open=False)


def nifti_geometry(source: str, image: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Affine in mm of a nibabel image, and what is to be noted about it; `source` names it in messages."""
    try:
        affine, header = image.affine, image.header
        if affine is None:
            raise VolumeReadError(f"{source}: has no affine; the orientation is unknown")
        notes: list[str] = []
        if hasattr(header, "get_xyzt_units"):  # NIfTI; nibabel's other formats are in mm
            if header["sform_code"] <= 0 and header["qform_code"] <= 0:
                note = "the header gives no orientation (sform and qform codes are 0): nibabel's default is used"
                notes.append(note)
                # Once, and without the name: a data set may hold thousands of such files.
                logger.warning_once(
                    f"a NIfTI file is read of which {note}; sides and spacing may be wrong. `warnings` of a volume "
                    "names what was noticed of it; read the voxels yourself and pass affine= where it is known"
                )
            scale = {"meter": 1e3, "micron": 1e-3}.get(_spatial_unit(header))
            if scale is not None:
                affine = np.diag([scale, scale, scale, 1.0]) @ affine
                notes.append("the header gives lengths in another unit: converted to mm")
    except VolumeReadError:
        raise
    except Exception as error:  # as above
        raise damaged(source, "NIfTI", error) from None
    return check_affine(affine), tuple(notes)


def _spatial_unit(header: Any) -> str:
    try:
        return header.get_xyzt_units()[0]
    except KeyError:  # a code that the standard does not define
        return "unknown"


def _read_with_nibabel(file: NiftiFile) -> np.ndarray:
    """Values (x, y, z) of a file with numbers that are not read here."""
    try:
        stored = np.asanyarray(file.image.dataobj.get_unscaled())
    except Exception as error:
        raise damaged(file.source, "NIfTI", error) from None
    stored = stored.reshape((*stored.shape[:3], -1))[..., file.time]
    return rescale(stored, file.slope, file.intercept)


def import_nibabel(source: str) -> Any:
    """nibabel, or an error that names what needs it."""
    try:
        import nibabel
    except ImportError:
        raise VolumeReadError(f"{source}: reading NIfTI needs nibabel; install it with pip install nibabel") from None
    return nibabel


def check_type(source: str, dtype: np.dtype) -> None:
    """Raises for stored numbers that are not one real number per voxel."""
    if dtype.kind not in "iufb":
        kind = "complex" if dtype.kind == "c" else "colour or composite"
        raise VolumeReadError(f"{source}: holds {kind} values, not one number per voxel; convert it first")


__all__ = ["NiftiFile", "check_type", "import_nibabel", "nifti_geometry", "open_nifti"]
