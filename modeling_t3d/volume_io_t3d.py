# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Files (NIfTI, NRRD, MetaImage, DICOM) and arrays to a Volume, and a Volume to NIfTI; the only reader of disks.

What cannot be read right raises `VolumeReadError` with the path as given; header text is never repeated.
"""

import math
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .geometry_t3d import (
    SHEAR_TOLERANCE,
    Volume,
    VolumeError,
    VolumeGeometryError,
    VolumeReadError,
    affine_from_axes,
    shear,
)
from .nifti_stream_t3d import NiftiFile, check_type, import_nibabel, nifti_geometry, open_nifti
from .volume_arithmetic_t3d import remove_shear, rescale
from .volume_dicom_t3d import describe_acquisition, describe_series, quiet_parsers, read_dicom
from .volume_headers_t3d import archive_kind, damaged, detached_files, pick_time
from .volume_itk_t3d import LPS_TO_RAS, from_simple_itk, read_itk

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima", "")
_LABEL_TOLERANCE = 1e-3  # by which a header's rescale may move a whole number
_LARGEST_LABEL = 1 << 24  # float32, as which what is no integer is read, holds every whole number up to here


def read_volume(
    path: str | os.PathLike, *, series: int | None = None, time_index: int | None = None, resample: bool = True
) -> Volume:
    """Read one volume from disk: `.nii`, `.nii.gz`, `.nrrd`, `.mha`, `.mhd`, a DICOM file or a folder of them.

    Values are those after the header's rescale (HU for CT): int16 or int32 where the file stores whole numbers and the
    rescale keeps them whole, else float32. A sheared grid (gantry tilt) is resampled to right angles, slightly uneven
    slices to even ones; `warnings` says so.

    Args:
        path: file or folder.
        series: which series of a DICOM folder, by its place in `list_series(path)`. By default the only series, or
            the only axial CT series.
        time_index: which volume of a 4-D file.
        resample: `False` refuses a sheared grid and uneven slices.

    Raises:
        VolumeReadError: names the path as given, the reason and, where there is one, the remedy.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "scan.nii.gz")
        >>> write_nifti(to_volume(np.zeros((4, 5, 6), dtype=np.int16), spacing=(2, 1, 1), axes="SAR"), path)
        >>> read_volume(path).spacing
        (2.0, 1.0, 1.0)
    """
    opened = open_volume(path, series=series, time_index=time_index, resample=resample)
    with naming(os.fspath(path)):
        return remove_shear(opened if isinstance(opened, Volume) else opened.read())


def read_label_map(path: str | os.PathLike) -> Volume:
    """Read one label map or mask from disk, in any format of `read_volume`; values are integers (int16 or int32).

    A sheared grid (gantry tilt) is brought to right angles by the nearest voxel: interpolation, as `read_volume` does
    it, would invent labels that the file does not hold. Slightly uneven slices of a DICOM series are interpolated
    even so; `warnings` says it.

    Args:
        path: file or folder.

    Raises:
        VolumeReadError: as `read_volume`; or the values are no whole numbers.
    """
    opened = open_volume(path)
    with naming(os.fspath(path)):
        volume = opened if isinstance(opened, Volume) else opened.read()
        if volume.array.dtype.kind == "f":
            whole = np.rint(volume.array)
            near = np.isclose(volume.array, whole, rtol=0.0, atol=_LABEL_TOLERANCE)
            if not (near & (np.abs(whole) <= _LARGEST_LABEL)).all():
                raise VolumeError(
                    f"a label map holds whole numbers up to {_LARGEST_LABEL:,}, and this file other values; threshold "
                    "probabilities, or name the file of the labels"
                )
            volume = replace(volume, array=whole.astype(np.int32))
        return remove_shear(volume, labels=True)


def open_volume(
    path: str | os.PathLike, *, series: int | None = None, time_index: int | None = None, resample: bool = True
) -> Volume | NiftiFile:
    """As `read_volume`, but a sheared grid stays as it is, and of NIfTI files the header alone is read and checked."""
    source = os.fspath(path)
    if not isinstance(source, str):
        raise VolumeReadError(f"{source!r}: a path is a string or a pathlib.Path")
    is_folder = _check_readable(source)
    if not is_folder and (archive := archive_kind(source)):
        raise VolumeReadError(f"{source}: is {archive}; unpack it and pass the file or folder inside")
    name = os.path.basename(source).lower()
    suffix = ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]
    is_dicom = is_folder or not (suffix in NIFTI_SUFFIXES or suffix in ITK_SUFFIXES)
    if series is not None and not is_dicom:
        raise VolumeReadError(f"{source}: series= is for DICOM; the file holds one image")
    with naming(source), quiet_parsers():
        if suffix in NIFTI_SUFFIXES and not is_dicom:
            file = open_nifti(source, time_index)
            _refuse_shear(file.affine, resample)
            return file
        if is_dicom:
            files = _dicom_files(source, suffix, is_folder)
            volume = read_dicom(source, files, series=series, time_index=time_index, resample=resample)
        else:
            volume = read_itk(source, time_index)
        _refuse_shear(volume.affine, resample)
        return volume


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Turns whatever goes wrong with a file into a `VolumeReadError` that begins with its path."""
    try:
        yield
    except VolumeReadError:
        raise
    except VolumeError as error:
        raise VolumeReadError(f"{source}: {error}") from None
    except MemoryError:
        raise VolumeReadError(f"{source}: the volume does not fit in memory") from None


def volume_files(path: str | os.PathLike) -> list[Path]:
    """All files that a volume is read from, in a fixed order: those of a folder; a file, and the files of voxels that
    lie beside an NRRD or MetaImage header."""
    path = Path(path)
    if path.is_dir():
        return sorted(entry for entry in path.rglob("*") if entry.is_file())
    is_header = path.suffix.lower() in ITK_SUFFIXES
    return [path, *map(Path, detached_files(str(path)))] if is_header else [path]


def list_series(path: str | os.PathLike) -> tuple[str, ...]:
    """The series of a DICOM folder or file, such as `"CT axial 512x512x300"`, in the order that `series=` counts.

    A series with a file that cannot be read right is listed as far as it is known, with the reason: such as
    `"CR, not readable (its RescaleSlope is 0)"`.
    """
    source = os.fspath(path)
    files = _series_files(source)
    if files is None:
        raise VolumeReadError(f"{source}: has no series, as only DICOM has; read_volume takes the file as it is")
    return describe_series(source, files)


def read_acquisition(path: str | os.PathLike) -> dict[str, Any]:
    """What a DICOM file or folder says of its acquisition and cannot identify anyone: `modality`, `body_part`,
    `contrast`, `slice_thickness` (mm), `tube_voltage` (kV), as far as they are known; other formats say nothing."""
    source = os.fspath(path)
    files = _series_files(source)
    return {} if files is None else describe_acquisition(source, files)


def _series_files(source: str) -> list[str] | None:
    """The DICOM files of a path; `None` for a file of a format without series."""
    is_folder = _check_readable(source)
    name = os.path.basename(source).lower()
    suffix = ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]
    if not is_folder and suffix in (*NIFTI_SUFFIXES, *ITK_SUFFIXES):
        return None
    return _dicom_files(source, suffix, is_folder)


def _refuse_shear(affine: np.ndarray, resample: bool) -> None:
    if shear(affine) > SHEAR_TOLERANCE and not resample:
        raise VolumeGeometryError(
            f"the axes are {math.degrees(math.asin(min(1.0, shear(affine)))):.1f} degrees off a right angle "
            "(gantry tilt or a sheared affine); pass resample=True to have it resampled"
        )


def _check_readable(source: str) -> bool:
    """Whether `source` is a folder; raises when it is missing, empty, not to be opened or no plain file."""
    try:
        status = os.stat(source)
        if stat.S_ISDIR(status.st_mode):
            os.listdir(source)
            return True
        if not stat.S_ISREG(status.st_mode):
            raise VolumeReadError(f"{source}: is neither a file nor a folder")
        with open(source, "rb"):
            pass
    except VolumeReadError:
        raise
    except FileNotFoundError:
        raise VolumeReadError(f"{source}: no such file or folder") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid path"
        raise VolumeReadError(f"{source}: cannot be opened ({reason}); check its permissions") from None
    if status.st_size == 0:
        raise VolumeReadError(f"{source}: the file is empty")
    return False


def _dicom_files(source: str, suffix: str, is_folder: bool) -> list[str]:
    if is_folder:

        def stop(error: OSError) -> None:  # a folder left out in silence would be a gap in the scan
            raise VolumeReadError(
                f"{source}: a folder in it cannot be opened ({error.strerror}); check its permissions"
            )

        files = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(source, onerror=stop)
            for name in names
            if not name.startswith(".") and name.upper() != "DICOMDIR"
        )
        files = [file for file in files if os.path.isfile(file)]
        if not files:
            raise VolumeReadError(f"{source}: the folder holds no files")
        return files
    with open(source, "rb") as stream:
        if stream.read(132)[128:] != b"DICM" and suffix not in DICOM_SUFFIXES:
            known = ", ".join((*NIFTI_SUFFIXES, *ITK_SUFFIXES))
            raise VolumeReadError(f"{source}: unknown format; supported are {known}, DICOM files and DICOM folders")
    return [source]


def _from_nibabel(nibabel: Any, image: Any, source: str, time_index: int | None) -> Volume:
    """A Volume from a nibabel image; `source` names it in messages."""
    time = pick_time(source, image.shape, time_index)
    slope, intercept = 1.0, 0.0
    try:
        proxy = image.dataobj
        if type(proxy) is nibabel.arrayproxy.ArrayProxy:  # AFNI's scales each volume by itself
            stored, slope, intercept = proxy.get_unscaled(), float(proxy.slope), float(proxy.inter)
        else:
            stored = np.asanyarray(proxy)
    except Exception as error:  # a damaged file can make the parser raise anything
        raise damaged(source, "NIfTI", error) from None
    check_type(source, stored.dtype)
    affine, notes = nifti_geometry(source, image)
    stored = stored.reshape((*stored.shape[:3], -1))[..., time]
    return Volume(rescale(stored, slope, intercept), affine, source=source, warnings=notes)


def to_volume(
    image: Any,
    *,
    affine: np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    series: int | None = None,
    time_index: int | None = None,
    resample: bool = True,
) -> Volume:
    """A right-angled Volume from whatever holds one.

    Args:
        image: 3-D numpy array or tensor; MONAI `MetaTensor` or TorchIO image, both with or without a channel axis of
            one; nibabel image; SimpleITK image; Volume; or path for `read_volume`.
        affine: (4, 4), indices of the array in its own axis order to RAS+ world mm. Arrays and tensors only.
        spacing: voxel size in mm per array axis, for an array without affine; needs `axes`.
        axes: the direction in which each array axis grows, e.g. `"SAR"` for (z, y, x); see `affine_from_axes`.
        series, time_index: which image of a path, as in `read_volume`; `time_index` also of a nibabel or
            SimpleITK image that holds several.
        resample: `False` refuses a sheared grid, and uneven slices of a path.

    Example:
        >>> to_volume(np.zeros((40, 64, 64), dtype=np.int16), spacing=(2.0, 0.7, 0.7), axes="SPL").axis_codes
        'SPL'
    """
    volume = wrap_volume(
        image, affine=affine, spacing=spacing, axes=axes, series=series, time_index=time_index, resample=resample
    )
    with naming(os.fspath(image)) if isinstance(image, str | os.PathLike) else nullcontext():
        return remove_shear(volume)


def wrap_volume(
    image: Any,
    *,
    affine: np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    series: int | None = None,
    time_index: int | None = None,
    resample: bool = True,
) -> Volume:
    """As `to_volume`, but a sheared grid stays as it is."""
    is_path = isinstance(image, str | os.PathLike)
    has_times = is_path or type(image).__module__.partition(".")[0] in ("nibabel", "SimpleITK")
    for name, value, taken in (("series", series, is_path), ("time_index", time_index, has_times)):
        if value is not None and not taken:
            raise VolumeGeometryError(f"{name}= is for files; this {type(image).__name__} holds one volume")
    if isinstance(image, np.ndarray | torch.Tensor) and (
        getattr(image, "affine", None) is None or affine is not None or spacing is not None
    ):
        volume = _from_array(image, affine, spacing, axes)
        _refuse_shear(volume.affine, resample)
        return volume
    if affine is not None or spacing is not None or axes is not None:
        raise VolumeGeometryError(
            "affine, spacing and axes describe a bare array; this input carries its own geometry"
        )
    if is_path:
        opened = open_volume(image, series=series, time_index=time_index, resample=resample)
        with naming(os.fspath(image)):
            return opened if isinstance(opened, Volume) else opened.read()
    with quiet_parsers():
        volume = _from_object(image, time_index)
    _refuse_shear(volume.affine, resample)
    return volume


def _from_object(image: Any, time_index: int | None) -> Volume:
    """A Volume from an object of another library, told by where its type is defined: none of them is imported."""
    if isinstance(image, Volume):
        return image
    package = type(image).__module__.partition(".")[0]
    if isinstance(image, torch.Tensor):  # MONAI's, the one tensor with an affine
        volume = _from_array(_without_channel(image.detach().as_subclass(torch.Tensor)), image.affine, None, None)
        if image.meta.get("space") == "LPS":
            volume = replace(volume, affine=LPS_TO_RAS @ volume.affine)
        if np.array_equal(volume.affine, np.eye(4)):
            note = "the affine is the unit matrix, which a MetaTensor has where none was given: 1 mm voxels, RAS"
            volume = replace(volume, warnings=(note,))
        return volume
    if package == "SimpleITK" and type(image).__name__ == "Image":
        return from_simple_itk(image, time_index)
    if package == "torchio" and type(image).__name__ in ("Image", "ScalarImage", "LabelMap"):
        try:
            data, affine = image.data, image.affine  # a lazy image is read here
        except Exception as error:  # any of the readers behind it
            raise VolumeReadError(f"TorchIO image: cannot be loaded ({type(error).__name__})") from None
        return _from_array(_without_channel(data), affine, None, None)
    if package == "nibabel":
        nibabel = import_nibabel("nibabel image")
        if isinstance(image, nibabel.spatialimages.SpatialImage):
            return _from_nibabel(nibabel, image, "nibabel image", time_index)
    raise VolumeGeometryError(
        f"a {type(image).__name__} is not a volume; pass a path, a numpy array or tensor with affine=, a "
        "MetaTensor, a nibabel, SimpleITK or TorchIO image, or a Volume"
    )


def _without_channel(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        return tensor[0]
    if tensor.ndim != 3:
        raise VolumeGeometryError(f"the image has shape {tuple(tensor.shape)}; pass one volume with one channel")
    return tensor


def _from_array(image: Any, affine: Any, spacing: Sequence[float] | None, axes: str | None) -> Volume:
    if affine is not None and (spacing is not None or axes is not None):
        raise VolumeGeometryError("pass affine= or spacing= with axes=, not both")
    if spacing is not None and axes is not None:
        affine = affine_from_axes(spacing, axes)
    if affine is None:
        raise VolumeGeometryError(
            "an array needs its geometry: pass affine= (4x4, array indices to RAS+ mm), or spacing= and axes=, e.g. "
            'spacing=(2.0, 0.7, 0.7), axes="SAR" for (z, y, x)'
        )
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(affine, torch.Tensor):
        affine = affine.detach().cpu().double().numpy()
    if image.ndim != 3:
        raise VolumeGeometryError(f"the array has shape {image.shape}; pass one volume with three axes")
    if image.dtype.kind not in "iufb":
        raise VolumeGeometryError(f"the array holds {image.dtype} values; pass one real number per voxel")
    if image.size and image.dtype not in (np.int16, np.float32):
        image = rescale(image, 1.0, 0.0)
    return Volume(image, affine)


def write_nifti(volume: Volume, path: str | os.PathLike, *, reorder: bool = False) -> None:
    """Write a Volume as `.nii` or `.nii.gz` (sform and qform set, no rescale), whole or not at all.

    Args:
        volume: written in its array's own order of axes.
        path: of the file.
        reorder: write an array in the order (z, y, x), as DICOM, NRRD and MetaImage files are read, in the order
            (x, y, z), in which other tools have these scans; any other order stays.
    """
    source = os.fspath(path)
    suffix = next((suffix for suffix in (".nii.gz", ".nii") if source.endswith(suffix)), None)
    if suffix is None:
        raise VolumeError(f"{source}: a NIfTI file ends in .nii or .nii.gz")
    nibabel = import_nibabel(source)
    array = volume.array
    if max(array.shape) > np.iinfo(np.int16).max:
        raise VolumeError(f"{source}: an axis of {max(array.shape)} voxels cannot be written; NIfTI holds up to 32767")
    if array.dtype not in (np.uint8, np.int16, np.int32, np.float32):
        array = rescale(array, 1.0, 0.0)
    temporary = None
    try:
        affine = volume.affine
        is_reversed = all(code in ends for code, ends in zip(volume.axis_codes, ("SI", "AP", "LR"), strict=True))
        if is_reversed and reorder:
            array, affine = array.transpose(), affine[:, [2, 1, 0, 3]]
        image = nibabel.Nifti1Image(array, affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
        handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=".", dir=os.path.dirname(source) or ".")
        os.close(handle)
        nibabel.save(image, temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, source)
    except (OSError, nibabel.spatialimages.HeaderDataError) as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise VolumeError(f"{source}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


__all__ = [
    "VolumeReadError",
    "list_series",
    "naming",
    "open_volume",
    "read_acquisition",
    "read_label_map",
    "read_volume",
    "remove_shear",
    "to_volume",
    "volume_files",
    "wrap_volume",
    "write_nifti",
]
