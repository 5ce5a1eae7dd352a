# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""PreparedVolume, a volume on the model grid that can be cached on disk; the global view's frame and its geometry.

Which views a model wants, and their intensities, are left to `image_processing_t3d`.
"""

import base64
import json
import math
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .geometry_t3d import Box, Grid, VolumeGeometryError, spacing_from_affine
from .intensity_t3d import AIR
from .resample_t3d import SMALL, AxisSampling, resample_array, resample_whole
from .volume_memory_t3d import empty_voxels
from .volume_transforms_t3d import BodyMask


@dataclass(eq=False)
class PreparedVolume:
    """One volume on the model grid: everything that views are cut from. Picklable; `save` and `load` for a cache.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): int16 HU, or float32 in the declared unit.
        affine (`np.ndarray` of shape `(4, 4)`): (z, y, x) voxel index to RAS+ world (x, y, z) in mm.
        body (`BodyMask`): where the body lies.
        value_range (two floats): values that become -1 and 1; `None` for HU, which the processor's windows scale.
        outside (`float`): value of what lies beyond the volume.
        source (`str`): the path as given, if there was one.
        warnings (`tuple[str, ...]`): what was noticed or changed on the way.
        input_grid (`Grid`): shape and affine of the image as it came, in its own axis order; `reassemble` goes back
            to it. `None` for volumes that an early version prepared.
    """

    array: np.ndarray
    affine: np.ndarray
    body: BodyMask
    value_range: tuple[float, float] | None = None
    outside: float = AIR
    source: str | None = None
    warnings: tuple[str, ...] = ()
    input_grid: Grid | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm."""
        return spacing_from_affine(self.affine)

    @property
    def body_box(self) -> Box:
        """Bounding box of the body, in voxels."""
        return self.body.box

    def facts(self) -> dict[str, Any]:
        """Everything but the voxels, as JSON holds it. The source may identify a person: a store leaves it out."""
        grid = self.input_grid
        return {
            "shape": self.array.shape,
            "dtype": str(self.array.dtype),
            "affine": self.affine.tolist(),
            "body": {
                "cells": _pack(self.body.cells),
                "dense": None if self.body.dense is None else _pack(self.body.dense),
                "num_cells": self.body.cells.shape,
                "cell": self.body.cell,
                "start": self.body.box.start,
                "stop": self.body.box.stop,
            },
            "value_range": self.value_range,
            "outside": float(self.outside),
            "source": self.source,
            "warnings": self.warnings,
            "input_grid": None if grid is None else {"shape": grid.shape, "affine": grid.affine.tolist()},
        }

    @classmethod
    def from_facts(cls, array: np.ndarray, facts: dict[str, Any]) -> "PreparedVolume":
        """A prepared volume from its voxels and what `facts` gave."""
        # The dense cells and the input's grid are missing from what early versions wrote.
        body, grid = facts["body"], facts.get("input_grid")
        mask = BodyMask(
            cells=_unpack(body["cells"], body["num_cells"]),
            cell=tuple(body["cell"]),
            box=Box(tuple(body["start"]), tuple(body["stop"])),
            shape=tuple(facts["shape"]),
            dense=None if body.get("dense") is None else _unpack(body["dense"], body["num_cells"]),
        )
        return cls(
            array=array,
            affine=np.asarray(facts["affine"], dtype=np.float64),
            body=mask,
            value_range=None if facts["value_range"] is None else tuple(facts["value_range"]),
            outside=facts["outside"],
            source=facts["source"],
            warnings=tuple(facts["warnings"]),
            input_grid=grid and Grid(tuple(grid["shape"]), np.asarray(grid["affine"], dtype=np.float64)),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes `<path>.npy`, then `<path>.json`, under a temporary name first: a reader never sees half a file."""
        temporary = f"{path}.{uuid.uuid4().hex}.temporary"
        with open(temporary, "wb") as file:
            np.save(file, self.array)
        os.replace(temporary, f"{path}.npy")
        Path(temporary).write_text(json.dumps(self.facts()))
        os.replace(temporary, f"{path}.json")

    @classmethod
    def load(cls, path: str | os.PathLike, mmap: bool = True) -> "PreparedVolume":
        """Reads what `save` wrote; with `mmap` voxels stay on disk until a view asks for them."""
        facts = json.loads(Path(f"{path}.json").read_text())
        array = np.load(f"{path}.npy", mmap_mode="r" if mmap else None)
        if [*array.shape] != facts["shape"] or str(array.dtype) != facts["dtype"]:
            raise VolumeGeometryError(f"{path}.npy does not belong to {path}.json; delete both and prepare again")
        return cls.from_facts(array, facts)


def _pack(cells: np.ndarray) -> str:
    """Booleans as compressed bits in text."""
    return base64.b64encode(zlib.compress(np.packbits(cells).tobytes())).decode()


def _unpack(text: str, shape: Sequence[int]) -> np.ndarray:
    """The booleans of `_pack`."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape)


@dataclass(eq=False)
class ViewGeometry:
    """Where the views of one volume lie in the world.

    Args:
        spacing (three floats, z y x, mm): of the model grid, which local views lie on.
        shape (three ints, z y x): of the model grid.
        body_box (`Box`): of the body, in voxels of the model grid.
        affine (`np.ndarray` of shape `(4, 4)`): of the model grid, (z, y, x) index to RAS+ world (x, y, z) in mm.
        global_affine (`np.ndarray` of shape `(4, 4)`): of `pixel_values`.
        global_scale (three floats, z y x): voxel size of the global view over that of the model grid.
        discarded_mm (three pairs of floats, z y x): left out of the global view at the low and the high end.
        discarded_body_voxels (`int`): voxels of the body (model grid) that the global view leaves out.
        local_boxes, local_affines: of each local view, in voxels of the model grid and to the world.
        source, warnings, input_grid: from the prepared volume.
    """

    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    body_box: Box
    affine: np.ndarray
    global_affine: np.ndarray
    global_scale: tuple[float, float, float]
    discarded_mm: tuple[tuple[float, float], ...]
    discarded_body_voxels: int
    local_boxes: tuple[Box, ...] = ()
    local_affines: tuple[np.ndarray, ...] = ()
    source: str | None = None
    warnings: tuple[str, ...] = ()
    input_grid: Grid | None = None


def global_frame(
    prepared: PreparedVolume,
    fit: str,
    size: Sequence[int],
    spacing: Sequence[float] | None,
    crop_extent: float,
) -> tuple[list[AxisSampling], Box]:
    """Where the global view samples the model grid, and the box of voxels that it may use (beyond it is air).

    Args:
        prepared (`PreparedVolume`): the volume.
        fit (`"body"`, `"crop"` or `"resize"`): as in `T3DImageProcessor`.
        size (three ints, z y x): voxels of the global view.
        spacing (three floats, z y x, or `None`): of the model grid, which gives the proportions of the view's voxels.
        crop_extent (`float`, mm): edge of the cube of `fit="crop"`.
    """
    shape, steps_mm = prepared.array.shape, prepared.spacing
    whole, body = Box((0, 0, 0), shape), prepared.body_box
    if fit == "resize":
        steps, middle, allowed = [n / g for n, g in zip(shape, size, strict=True)], whole.center, whole
    elif fit == "crop":
        steps = [crop_extent / g / s for g, s in zip(size, steps_mm, strict=True)]
        middle, allowed = body.center, whole
    else:
        # One factor for all axes. Without a model grid the view is a cube of mm, as it is with the default settings.
        unit = spacing or [1.0 / g for g in size]
        extents = [b * s for b, s in zip(body.size, steps_mm, strict=True)]
        factor = max(e / (g * u) for e, g, u in zip(extents, size, unit, strict=True))
        steps = [factor * u / s for u, s in zip(unit, steps_mm, strict=True)]
        middle, allowed = body.center, body
    samplings = [
        AxisSampling(center - 0.5 - step * (count - 1) / 2, step, count)
        for center, step, count in zip(middle, steps, size, strict=True)
    ]
    return samplings, allowed


def cut_frame(
    prepared: PreparedVolume,
    samplings: Sequence[AxisSampling],
    allowed: Box,
    num_channels: int,
    scale: Callable[[torch.Tensor, torch.Tensor], Any],
    antialias: bool = True,
) -> torch.Tensor:
    """Samples a volume on a frame; samples centred outside the allowed voxels are the volume's outside value.

    Cropping, resampling and the windows are one pass: beside the result only a few planes are held.

    Args:
        prepared (`PreparedVolume`): the volume.
        samplings (three `AxisSampling`, z y x): of the frame, in voxels of the volume.
        allowed (`Box`): voxels that may be used.
        num_channels (`int`): of the result.
        scale (`Callable`): takes values (depth, height, width) in the volume's unit, and puts what becomes of them,
            voxel by voxel, into its second argument (channels, depth, height, width).
        antialias (`bool`, defaults to `True`): average over the frame's voxels where they are larger.

    Returns:
        `torch.Tensor` of shape `(channels, depth, height, width)`, float32.
    """
    inner, where, start, stop = [], [], [], []
    for axis, sampling in enumerate(samplings):
        positions = sampling.start + sampling.step * np.arange(sampling.count)
        low, high = allowed.start[axis] - 0.5, allowed.stop[axis] - 0.5
        used = np.flatnonzero((positions > low - 1e-6) & (positions < high + 1e-6))
        if used.size == 0:  # thinner than a sample's width and between two centres: the nearer sample holds it
            used = np.abs(positions - (low + high) / 2).argmin(keepdims=True)
        first, last = int(used[0]), int(used[-1])
        where.append(slice(first, last + 1))
        # Only the voxels under the samples and under the width over which they are averaged are read.
        reach = sampling.step / 2 + 2
        start.append(min(max(allowed.start[axis], math.floor(positions[first] - reach)), allowed.stop[axis] - 1))
        stop.append(max(min(allowed.stop[axis], math.ceil(positions[last] + reach) + 1), start[-1] + 1))
        inner.append(AxisSampling(float(positions[first]) - start[axis], sampling.step, len(used)))
    voxels = prepared.array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    frame = empty_voxels(num_channels, *(sampling.count for sampling in samplings))
    if any(sampling.count != part.count for sampling, part in zip(samplings, inner, strict=True)):
        beyond = torch.empty(num_channels, 1, 1, 1)
        scale(torch.full((1, 1, 1), float(prepared.outside)), beyond)
        frame[:] = beyond
    inside = frame[:, where[0], where[1], where[2]]
    if voxels.size < SMALL:
        scale(resample_whole(torch.from_numpy(voxels.astype(np.float32)), inner, antialias), inside)
        return frame

    def deliver(z: int, plane: torch.Tensor) -> None:
        scale(plane[None], inside[:, z : z + 1])

    resample_array(voxels, inner, deliver, antialias)
    return frame


def frame_loss(
    prepared: PreparedVolume, samplings: Sequence[AxisSampling], allowed: Box
) -> tuple[tuple[tuple[float, float], ...], int]:
    """What a frame leaves out: mm at the low and high end of each axis (z, y, x), and voxels of the body."""
    discarded, cells = [], prepared.body.cells
    for axis, sampling in enumerate(samplings):
        first = sampling.start - sampling.step / 2 + 0.5  # edges: voxel k covers [k, k + 1)
        low = max(0.0, first, float(allowed.start[axis]))
        high = min(first + sampling.step * sampling.count, float(allowed.stop[axis]))
        extent, step = prepared.array.shape[axis], prepared.spacing[axis]
        discarded.append((low * step, max(0.0, extent - high) * step))
        edges = np.minimum(np.arange(cells.shape[axis] + 1) * prepared.body.cell[axis], extent)
        middles = (edges[1:] + edges[:-1]) / 2
        inside = (middles >= low - 1e-6) & (middles <= high + 1e-6)
        cells = cells & inside.reshape([-1 if other == axis else 1 for other in range(3)])
    lost_cells = int(prepared.body.cells.sum()) - int(cells.sum())
    return tuple(discarded), lost_cells * math.prod(prepared.body.cell)


__all__ = ["PreparedVolume", "ViewGeometry", "cut_frame", "frame_loss", "global_frame"]
