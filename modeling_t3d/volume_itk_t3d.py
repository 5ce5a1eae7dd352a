# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""NRRD and MetaImage files, and SimpleITK images in memory, to a Volume; SimpleITK reads the voxels.

It hands out arrays in (z, y, x) order with LPS geometry; both are turned into a Volume's here.
"""

import math
from typing import Any

import numpy as np

from .geometry_t3d import Volume, VolumeError, VolumeReadError
from .volume_arithmetic_t3d import rescale
from .volume_headers_t3d import check_deflated, check_promise, damaged, pick_time, read_text_header

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# The spaces of NRRD whose axes are anatomical, by the names that SimpleITK gives them, and what turns (x, y, z) of the
# geometry that it hands out to LPS: those without time it turns itself.
NRRD_TO_LPS = {
    **dict.fromkeys(("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"), (1, 1, 1)),
    "left-posterior-superior-time": (1, 1, 1),
    "right-anterior-superior-time": (-1, -1, 1),
    "left-anterior-superior-time": (1, -1, 1),
}
# What SimpleITK's messages hold where an NRRD file is of a kind that it does not read; they themselves may quote the
# header, and are not repeated.
UNREAD_NRRD = {
    "number of domain axes in the NRRD file (4)": "has a 4-D axis layout that SimpleITK does not read; save it as "
    "NRRD with a fourth axis of kind list, or as NIfTI or MetaImage",
    "nrrdEncodingBzip2": "its voxels are packed with bzip2, which SimpleITK does not read; save it with encoding gzip "
    "or raw",
    "Parse_encoding": "its voxels have an encoding that SimpleITK does not read; save it with encoding gzip or raw",
    "Parse_space_directions": "its space directions are NaN, infinite or no vectors; mend the header",
}


def read_itk(source: str, time_index: int | None) -> Volume:
    """One volume of an NRRD or MetaImage file, array order (z, y, x); an oblique or sheared grid stays as it is.

    Args:
        source: path as the user gave it.
        time_index: which volume of a 4-D file; of NRRD, an axis of kind list is one of volumes, wherever it stands.
    """
    try:
        import SimpleITK
    except ImportError:
        raise VolumeReadError(
            f'{source}: reading it needs SimpleITK; install it with pip install "modeling_t3d[formats]"'
        ) from None
    header = read_text_header(source)
    shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(source)
        # Left to itself, SimpleITK tells MetaImage by its suffix, which must be in lower case.
        reader.SetImageIO("NrrdImageIO" if header.is_nrrd else "MetaImageIO")
        reader.ReadImageInformation()
        shape, dimension = reader.GetSize(), reader.GetDimension()
        kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
        components = reader.GetNumberOfComponents()
        is_list = header.is_nrrd and dimension > 2 and _meta_data(reader, "NRRD_kinds[pixel]") == "list"
        if "complex" in kind or (components != 1 and not is_list):
            raise VolumeReadError(f"{source}: holds {kind}, not one number per voxel; convert it first")
        shape = (*shape, components) if components > 1 else shape
        bits = next((bits for bits in (8, 16, 32, 64) if str(bits) in kind), 8)
        check_promise(source, shape, bits // 8, header.held)
        if header.packed is not None:
            check_deflated(source, header.packed, math.prod(shape) * bits // 8)
        time = pick_time(source, shape, time_index)
        if dimension > 3:
            reader.SetExtractSize([*shape[:3], *[0] * (dimension - 3)])
            reader.SetExtractIndex([0, 0, 0, time, *[0] * (dimension - 4)])
        # The image that is cut out of a 4-D file has lost the file's directions: the reader still has them.
        image = reader.Execute()
        if components > 1:
            image = SimpleITK.VectorIndexSelectionCast(image, time)
        volume = _to_volume(rescale(np.asarray(_Voxels(SimpleITK, image)), 1.0, 0.0, overwrite=True), reader)
        space = _meta_data(reader, "NRRD_space") if header.is_nrrd else ""
    except VolumeError:
        raise
    except Exception as error:  # the reader raises RuntimeError with text of its own for everything
        reason = next((reason for mark, reason in UNREAD_NRRD.items() if mark in str(error)), None)
        if reason is not None:
            raise VolumeReadError(f"{source}: {reason}") from None
        raise damaged(source, "NRRD or MetaImage", error) from None
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)
    if header.is_nrrd:
        oriented = space in NRRD_TO_LPS and "spacedirections" in header.fields
    else:
        oriented = not header.fields.keys().isdisjoint({"transformmatrix", "orientation", "rotation"})
    notes = () if oriented else ("the header gives no orientation: the axes are taken as left, posterior, superior",)
    # After the turn from LPS to RAS of `_to_volume`: both only change signs of world axes, in any order.
    affine = np.diag([*NRRD_TO_LPS.get(space, (1, 1, 1)), 1]) @ volume.affine
    return Volume(volume.array, affine, source=source, warnings=notes)


def _meta_data(reader: Any, key: str) -> str:
    return reader.GetMetaData(key) if reader.HasMetaDataKey(key) else ""


def from_simple_itk(image: Any, time_index: int | None = None) -> Volume:
    """A `SimpleITK.Image` of three axes and one number per voxel as a Volume, array order (z, y, x).

    Args:
        image: of three axes, or of several volumes: along a fourth axis, or as the numbers of each voxel.
        time_index: which of several volumes.
    """
    import SimpleITK

    kind, dimension = SimpleITK.GetPixelIDValueAsString(image.GetPixelID()), image.GetDimension()
    components = image.GetNumberOfComponentsPerPixel()
    shape = (*image.GetSize(), components) if components > 1 else image.GetSize()
    is_colour = components in (3, 4) and "8-bit unsigned" in kind
    if dimension < 3 or "complex" in kind or is_colour or (len(shape) > 3 and time_index is None):
        raise VolumeError(
            f"SimpleITK image: {dimension} axes of {kind}; pass 3 axes, one number per voxel, or choose one of "
            "several volumes with time_index="
        )
    time = pick_time("SimpleITK image", shape, time_index)
    chosen = image
    if components > 1:
        chosen = SimpleITK.VectorIndexSelectionCast(image, time)
    elif dimension > 3:
        rest = dimension - 3
        chosen = SimpleITK.Extract(image, [*shape[:3], *[0] * rest], [0, 0, 0, time, *[0] * (rest - 1)])
    return _to_volume(rescale(SimpleITK.GetArrayViewFromImage(chosen), 1.0, 0.0), image)


class _Voxels:
    """The voxels of an image that nobody else holds, as an array in the image's own memory.

    SimpleITK's view does not keep its image alive, and it is read-only; an array made of this object holds the object.
    """

    def __init__(self, simple_itk: Any, image: Any):
        view = simple_itk.GetArrayViewFromImage(image)
        self._image = image
        self.__array_interface__ = {**view.__array_interface__, "data": (view.ctypes.data, False)}


def _to_volume(array: np.ndarray, geometry: Any) -> Volume:
    """The voxels with the geometry that `geometry`, an image or a reader of SimpleITK, gives."""
    spacing, origin, direction = geometry.GetSpacing(), geometry.GetOrigin(), geometry.GetDirection()
    dimension = len(spacing)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (dimension, dimension))[:3, :3] * spacing[:3]
    affine[:3, 3] = origin[:3]
    affine = LPS_TO_RAS @ affine
    affine[:, :3] = affine[:, 2::-1]  # the array's order is (z, y, x) of the file
    return Volume(array, affine)


__all__ = ["LPS_TO_RAS", "from_simple_itk", "read_itk"]
