# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""From a volume, or a NIfTI file that is still compressed, to a PreparedVolume: orientation, checks, model grid, body.

Planes are cleared of padding, resampled, rounded and averaged over the body's cells while they are in the processor's
cache. Those of a file that holds them in order are surveyed in the same pass, while the rest of it is being
decompressed; should the survey find other padding than the first slab has, the file is read again. A volume in memory
is surveyed in a pass before: several threads resample it, and each must know the padding when it begins.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .geometry_t3d import (
    SHEAR_TOLERANCE,
    Volume,
    VolumeGeometryError,
    VolumeIntensityError,
    axis_directions,
    orientation,
    spacing_from_affine,
)
from .intensity_t3d import (
    AIR,
    GAS_BELOW,
    ValueSurvey,
    check_declared_range,
    check_finite,
    check_hounsfield,
    check_modality,
    survey_values,
    value_range,
)
from .nifti_stream_t3d import NiftiFile
from .prepared_volume_t3d import PreparedVolume
from .resample_affine_t3d import affine_sampling, resample_affine
from .resample_t3d import (
    SMALL,
    AxisSampling,
    PlaneResampler,
    resample_array,
    sampled_affine,
    spacing_sampling,
)
from .threads_t3d import run_single_threaded
from .volume_arithmetic_t3d import shear_note
from .volume_io_t3d import naming
from .volume_transforms_t3d import BodyMask, CellMeans, body_cell, find_body, whole_volume_mask

SLAB = 1 << 21  # bytes decompressed at a time: a few planes that stay in the cache
SLABS_AHEAD = 4  # decompressed slabs that may wait for the resampler
# No table moves a body much further than 2 m, through a bore of less than 1 m; the rest is room for rotated boxes.
# What is larger has a wrong voxel size, and its model grid could take all memory.
MAXIMUM_EXTENT = 3000.0  # mm, along any axis
MAXIMUM_BOX = 4e9  # mm^3


@dataclass(frozen=True)
class Preparation:
    """The settings that a prepared volume depends on; fields as in `T3DImageProcessor`.

    Args:
        spacing (three floats, z y x, mm, or `None`): of the model grid; `None` keeps each scan's own.
        intensity (`str`): what the values are.
        check_intensity (`bool`): refuse values that cannot be HU.
        deoblique (`bool`): resample rotated scans to the world axes.
        antialias (`bool`): average over the new voxel when downsampling.
    """

    spacing: tuple[float, float, float] | None
    intensity: str
    check_intensity: bool
    deoblique: bool
    antialias: bool

    def __call__(self, image: Volume | NiftiFile, name: str) -> PreparedVolume:
        """Prepares a volume, or a file that is opened; `name` is what messages call it."""
        try:
            if isinstance(image, NiftiFile):
                canonical = _stand_in(image).to_canonical(contiguous=False, sheared=True)
                if _streams(image) and not self._turns(canonical):
                    return self._stream(image, canonical, name)
                with naming(image.source):
                    image = image.read()
            return self._resample(image.to_canonical(contiguous=False, sheared=True), name)
        except VolumeGeometryError as error:
            raise VolumeGeometryError(f"{name}: {error}") from None
        except MemoryError:
            raise VolumeGeometryError(
                f"{name}: the volume does not fit in memory on the model grid; use a coarser spacing"
            ) from None

    def _turns(self, volume: Volume) -> bool:
        """Whether the axes of the model grid are others than those of a volume in canonical order."""
        return volume.is_sheared or (self.deoblique and _is_tilted(volume.affine))

    # ------------------------------------------------------------------------------------------ two ways

    def _resample(self, volume: Volume, name: str) -> PreparedVolume:
        """A volume in memory: surveyed first, then resampled by as many threads as torch has."""
        if self.intensity == "hu" and self.check_intensity:
            check_modality(volume.modality, name)
        survey = survey_values(volume.array)
        limits, padding = self._check(survey, name)
        array = volume.array if padding is None else _PaddedPlanes(volume.array, padding)
        if self._turns(volume):
            turned = affine_sampling(volume.shape, volume.affine, self.spacing, upright=self.deoblique)
            grid = _ModelGrid(self.intensity, volume, turned.shape, turned.affine)
            outside = self._outside(survey, limits)
            resample_affine(array, turned, outside, grid.deliver, self.antialias)
            if volume.is_sheared:
                volume = replace(volume, warnings=(*volume.warnings, shear_note(volume.affine)))
        else:
            samplings = self._samplings(volume)
            grid = _ModelGrid.along(self.intensity, volume, samplings)
            resample_array(array, samplings, grid.deliver, self.antialias)
        return self._finish(grid, survey, limits, volume, name)

    def _stream(self, file: NiftiFile, canonical: Volume, name: str) -> PreparedVolume:
        """A compressed file: one thread inflates, another surveys and resamples what is there already."""
        survey, guess = ValueSurvey(canonical.shape), _PaddingGuess(self.intensity == "hu")
        samplings = self._samplings(canonical)
        grid = _ModelGrid.along(self.intensity, canonical, samplings)

        def run(survey: ValueSurvey | None, guess: _PaddingGuess) -> None:
            _run_stream(file, canonical, samplings, self.antialias, grid, survey, guess)

        run(survey, guess)
        limits, padding = self._check(survey, name)
        if padding != guess.highest:  # what the first slab held was not what the whole volume says
            run(None, _PaddingGuess(False, padding))
        return self._finish(grid, survey, limits, canonical, name)

    # ------------------------------------------------------------------------------------------ both

    def _samplings(self, volume: Volume) -> list[AxisSampling]:
        spacing = self.spacing or volume.spacing
        return [spacing_sampling(*axis) for axis in zip(volume.shape, volume.spacing, spacing, strict=True)]

    def _outside(self, survey: ValueSurvey, limits: tuple[float, float] | None) -> float:
        """The value of what lies beyond the scan."""
        if limits is None:
            return AIR
        return survey.minimum if self.intensity == "zscore" else limits[0]

    def _check(self, survey: ValueSurvey, name: str) -> tuple[tuple[float, float] | None, float | None]:
        """The values that become -1 and 1 (`None` for HU), and the highest padding value, if there is padding."""
        check_finite(survey, name)
        if self.intensity != "hu":
            check_declared_range(survey, self.intensity, name)
            return value_range(survey, self.intensity, name), None
        padding = check_hounsfield(survey, name) if self.check_intensity else survey.padding()
        # Each padding value is the minimum of what the ones before it left over.
        return None, padding[-1] if padding else None

    def _finish(
        self,
        grid: "_ModelGrid",
        survey: ValueSurvey,
        limits: tuple[float, float] | None,
        volume: Volume,
        name: str,
    ) -> PreparedVolume:
        array, affine, outside = grid.array, grid.affine, self._outside(survey, limits)
        body = self._body(array.shape, spacing_from_affine(affine), limits, survey, grid.means.result())
        if body is None:
            raise VolumeIntensityError(f"{name}: no body found, nothing exceeds {GAS_BELOW:.0f} HU over 6 mm")
        grid_of_input = volume.input_grid
        return PreparedVolume(array, affine, body, limits, outside, volume.source, volume.warnings, grid_of_input)

    def _body(
        self,
        shape: Sequence[int],
        spacing: Sequence[float],
        limits: tuple[float, float] | None,
        survey: ValueSurvey,
        means: np.ndarray,
    ) -> BodyMask | None:
        """The body; of anything but HU, the whole volume where nothing stands out."""
        if limits is None:
            return find_body(shape, spacing, GAS_BELOW, means)
        threshold = limits[0] + 0.1 * (limits[1] - limits[0])
        if self.intensity == "zscore":
            threshold = 0.9 * survey.minimum + 0.1 * limits[1]
        return find_body(shape, spacing, threshold, means) or whole_volume_mask(shape)


# ---------------------------------------------------------------------------------------------- the model grid


def _is_tilted(affine: np.ndarray) -> bool:
    # Columns in (x, y, z) order: those of an upright grid are the unit matrix.
    return bool(np.abs(axis_directions(affine)[:, ::-1] - np.eye(3)).max() > SHEAR_TOLERANCE)


def _check_extent(volume: Volume, shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Refuses a volume (in canonical order) larger than any body, where its model grid has more voxels than itself."""
    extent = [count * step for count, step in zip(shape, spacing, strict=True)]
    is_larger = max(extent) > MAXIMUM_EXTENT or math.prod(extent) > MAXIMUM_BOX
    if is_larger and math.prod(shape) > volume.array.size:
        own, voxel, grid, step = (
            " x ".join(f"{value:.6g}" for value in values)
            for values in (np.multiply(volume.shape, volume.spacing), volume.spacing, shape, spacing)
        )
        raise VolumeGeometryError(
            f"it extends over {own} mm (z y x, voxels of {voxel} mm), more than any body, and would take {grid} "
            f"voxels on the model grid of {step} mm; mend the voxel size in the header, or pass the right affine or "
            "spacing"
        )


class _ModelGrid:
    """Where the planes of one volume go: int16 HU or float32 on the model grid, and the means of the body's cells."""

    def __init__(self, intensity: str, volume: Volume, shape: Sequence[int], affine: np.ndarray):
        _check_extent(volume, shape, spacing_from_affine(affine))
        self.affine = affine
        self.array = np.empty(shape, dtype=np.int16 if intensity == "hu" else np.float32)
        self._values = torch.from_numpy(self.array)
        self.means = CellMeans(shape, body_cell(shape, spacing_from_affine(affine)))

    @classmethod
    def along(cls, intensity: str, volume: Volume, samplings: Sequence[AxisSampling]) -> "_ModelGrid":
        """The grid that has the volume's own axes."""
        shape = [sampling.count for sampling in samplings]
        return cls(intensity, volume, shape, sampled_affine(volume.affine, samplings))

    def deliver(self, z: int, plane: torch.Tensor) -> None:
        """Takes plane `z`, whose values are changed."""
        self.means.add(z, plane)
        if self._values.dtype == torch.int16:
            plane.round_().clamp_(-32768, 32767)
        self._values[z].copy_(plane)


class _PaddedPlanes:
    """A volume whose padding becomes air as its planes are taken; stands in for the array of `resample_array`."""

    def __init__(self, array: np.ndarray, padding: float):
        self._array, self._padding = array, padding
        self.shape, self.strides, self.size = array.shape, array.strides, array.size

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        return _without_padding(self._array[index], self._padding)


def _without_padding(values: np.ndarray, padding: float | None) -> np.ndarray:
    if padding is None or values.min() > padding:
        return values
    return np.where(values <= padding, np.asarray(AIR, dtype=values.dtype), values)


# ---------------------------------------------------------------------------------------------- streaming


class _PaddingGuess:
    """The highest padding value: what is given, or what the first slab of a file says."""

    def __init__(self, ask_first_slab: bool, highest: float | None = None):
        self.highest = highest
        self._open = ask_first_slab

    def clear(self, slab: np.ndarray) -> np.ndarray:
        """The slab with its padding turned to air."""
        if self._open:
            padding = survey_values(slab).padding()
            self.highest, self._open = (padding[-1] if padding else None), False
        return _without_padding(slab, self.highest)


def _stand_in(file: NiftiFile) -> Volume:
    """A Volume with the file's geometry and not one voxel of memory."""
    nothing = np.broadcast_to(np.zeros(1, dtype=np.int16), file.shape)
    return Volume(nothing, file.affine, source=file.source, warnings=file.warnings)


def _streams(file: NiftiFile) -> bool:
    """Whether the planes of a file, in their order, are those of the canonical volume (or its last to first)."""
    return orientation(file.affine)[0][2] == 2


def _run_stream(
    file: NiftiFile,
    canonical: Volume,
    samplings: Sequence[AxisSampling],
    antialias: bool,
    grid: _ModelGrid,
    survey: ValueSurvey | None,
    padding: _PaddingGuess,
) -> None:
    """Reads a file through; its planes go to the survey (if there is one) and, resampled, to the grid."""
    worlds, signs = orientation(file.affine)
    order = [worlds.index(world) for world in (2, 1, 0)]
    flipped = tuple(new for new, axis in enumerate(order) if signs[axis] < 0)
    depth = canonical.shape[0]
    descending = 0 in flipped
    resampler = PlaneResampler(canonical.shape, samplings, grid.deliver, antialias=antialias, descending=descending)

    def take(slabs: Iterator[np.ndarray]) -> None:
        index = depth - 1 if descending else 0
        with torch.autocast("cpu", enabled=False):
            for stored in slabs:
                slab = np.flip(stored.transpose(order), flipped)
                planes = range(index, index - len(slab), -1) if descending else range(index, index + len(slab))
                if survey is not None:
                    survey.count(stored)
                slab = slab[::-1] if descending else slab
                cleared = padding.clear(slab)
                for z, plane, clear_plane in zip(planes, slab, cleared, strict=True):
                    if survey is not None:
                        survey.sample_plane(z, plane)
                    resampler.push(z, clear_plane)
                index = planes.stop

    plane_bytes = file.dtype.itemsize * file.shape[0] * file.shape[1]
    slabs = file.slabs(max(1, SLAB // plane_bytes))
    with naming(file.source):
        if canonical.array.size < SMALL:
            take(slabs)
        else:
            _side_by_side(slabs, take)


def _side_by_side(slabs: Iterator[np.ndarray], take: Callable[[Iterator[np.ndarray]], None]) -> None:
    """Runs an iterator in one thread and what takes its items in another, a few items apart."""
    ahead: queue.Queue[np.ndarray | BaseException | None] = queue.Queue(SLABS_AHEAD)
    stopped = threading.Event()

    def put(item: np.ndarray | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ahead.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for slab in slabs:
                if stopped.is_set():
                    return
                put(slab)
            put(None)
        except BaseException as error:
            put(error)

    def received() -> Iterator[np.ndarray]:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def consume() -> None:
        try:
            take(received())
        finally:
            stopped.set()

    run_single_threaded([consume, produce])


__all__ = ["Preparation"]
