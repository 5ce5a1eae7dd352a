# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Resampling along the axes: where samples lie, and separable interpolation plane by plane.

Planes are interpolated one at a time, slices first where there are fewer of them afterwards, as products with band
matrices in float32 on one thread per run of planes. On one thread and 512x512x300 voxels that took less than half the
time of `F.interpolate` on the whole volume, and less than gathering neighbours (`benchmarks/volumes.py` has the other
libraries); and a file can be resampled while it is still being decompressed. Values are left to `intensity_t3d`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .threads_t3d import run_single_threaded
from .volume_memory_t3d import empty_voxels

BAND = 32  # samples per dense piece of a band matrix: larger ones hold more zeros, smaller ones cost more calls
SMALL = 1 << 21  # voxels; below this, starting threads costs more than it saves


@dataclass(frozen=True)
class AxisSampling:
    """Sample positions along one axis, in voxel indices of the source: `start + step * i` for `i < count`."""

    start: float
    step: float
    count: int

    @property
    def is_identity(self) -> bool:
        """Whether the first `count` source voxels are taken as they are."""
        return self.start == 0.0 and self.step == 1.0


def spacing_sampling(num_voxels: int, spacing: float, target: float) -> AxisSampling:
    """Samples `target` mm apart that cover `num_voxels` voxels of `spacing` mm, centred on them.

    Nothing depends on the origin. The last sample may reach beyond the last voxel's edge by less than half a step.
    """
    step = round(target / spacing, 6)
    if abs(step - 1.0) < 1e-4:
        return AxisSampling(0.0, 1.0, num_voxels)
    count = max(1, math.ceil(num_voxels / step - 1e-3))
    return AxisSampling((num_voxels - 1) / 2 - step * (count - 1) / 2, step, count)


def sampled_affine(affine: np.ndarray, samplings: Sequence[AxisSampling]) -> np.ndarray:
    """Affine (4, 4) of the samples, given the affine of the array in the same axis order."""
    index = np.eye(4)
    index[:3, :3] = np.diag([sampling.step for sampling in samplings])
    index[:3, 3] = [sampling.start for sampling in samplings]
    return np.asarray(affine, dtype=np.float64) @ index


# ---------------------------------------------------------------------------------------------- weights


def _integrated_hat(x: np.ndarray) -> np.ndarray:
    """Integral of the triangle of half-width 1 and area 1, from minus infinity to x."""
    x = np.clip(x, -1.0, 1.0)
    return np.where(x < 0, (x + 1) ** 2 / 2, 1 - (1 - x) ** 2 / 2)


def _axis_weights(num_voxels: int, positions: np.ndarray, step: float, antialias: bool) -> tuple[int, int, np.ndarray]:
    """First voxel, end voxel and weights (positions, voxels) of linear interpolation averaged over a box.

    The box is sqrt(step^2 - 1) voxels wide when downsampling: together with the interpolation's own width that is
    about one output voxel, and at step 1 it vanishes. Linear intensities are reproduced exactly. Beyond the ends
    the outermost voxel is repeated.
    """
    width = math.sqrt(max(step * step - 1.0, 0.0)) if antialias else 0.0
    reach = width / 2 + 1
    taps = np.arange(math.floor(positions[0] - reach), math.ceil(positions[-1] + reach) + 1)
    distance = positions[:, None] - taps[None, :]
    if width > 0:
        weights = (_integrated_hat(distance + width / 2) - _integrated_hat(distance - width / 2)) / width
    else:
        weights = np.clip(1 - np.abs(distance), 0, None)
    inside = np.clip(taps, 0, num_voxels - 1)
    first, end = int(inside[0]), int(inside[-1]) + 1
    folded = np.zeros((len(positions), end - first))
    for column, voxel in enumerate(inside - first):
        folded[:, voxel] += weights[:, column]
    folded /= folded.sum(axis=1, keepdims=True)
    return first, end, folded.astype(np.float32)


class _Block(NamedTuple):
    """Samples [begin, begin + rows) as a dense product with source voxels [first, end)."""

    begin: int
    first: int
    end: int
    weights: torch.Tensor


@lru_cache(maxsize=256)
def _axis_blocks(num_voxels: int, sampling: AxisSampling, antialias: bool) -> tuple[_Block, ...]:
    """A band matrix in dense pieces, which matrix products like."""
    positions = sampling.start + sampling.step * np.arange(sampling.count)
    blocks = []
    for begin in range(0, sampling.count, BAND):
        run = positions[begin : begin + BAND]
        first, end, weights = _axis_weights(num_voxels, run, sampling.step, antialias)
        blocks.append(_Block(begin, first, end, torch.from_numpy(weights)))
    return tuple(blocks)


@lru_cache(maxsize=64)
def _axis_taps(num_voxels: int, sampling: AxisSampling, antialias: bool) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The source voxels of each sample with their weights, those of weight 0 left out."""
    return tuple(
        tuple((block.first + int(k), float(row[k])) for k in np.flatnonzero(row))
        for block in _axis_blocks(num_voxels, sampling, antialias)
        for row in block.weights.numpy()
    )


def _is_whole(sampling: AxisSampling, num_voxels: int) -> bool:
    return sampling.is_identity and sampling.count == num_voxels


# ---------------------------------------------------------------------------------------------- planes


class PlaneResampler:
    """Separable trilinear resampling of a volume whose planes arrive one after the other, in either direction.

    Each output plane is a sum of whole source planes and two products with band matrices. Its bits depend on the
    shape and the samplings alone, not on the direction, on what else is computed, or on the number of threads.

    Args:
        shape (three ints, z y x): of the source.
        samplings (three `AxisSampling`, z y x): where to sample, in voxel indices.
        deliver (`Callable`): called with the index and the values (float32, height x width) of each output plane; it
            may change the values, which are overwritten afterwards.
        antialias (`bool`, defaults to `True`): average over the output voxel where an axis is downsampled.
        outputs (`range`, *optional*): which output planes to compute, ascending; all of them if not given.
        descending (`bool`, defaults to `False`): planes are pushed from the last to the first.
    """

    def __init__(
        self,
        shape: Sequence[int],
        samplings: Sequence[AxisSampling],
        deliver: Callable[[int, torch.Tensor], None],
        *,
        antialias: bool = True,
        outputs: range | None = None,
        descending: bool = False,
    ):
        (depth, height, width), (along_z, along_y, along_x) = shape, samplings
        outputs = range(along_z.count) if outputs is None else outputs
        self._taps = _axis_taps(depth, along_z, antialias)
        needed = [index for z in outputs for index, _ in self._taps[z]]
        self.sources = range(min(needed), max(needed) + 1) if needed else range(0)
        self._deliver = deliver
        self._descending = descending
        self._waiting = list(outputs) if descending else list(reversed(outputs))  # the next one is the last
        self._blocks_y = None if _is_whole(along_y, height) else _axis_blocks(height, along_y, antialias)
        self._blocks_x = None if _is_whole(along_x, width) else _axis_blocks(width, along_x, antialias)
        # Whether a held plane could be handed out as it is and still be needed by another output plane.
        handed_out = along_z.count > depth or (self._blocks_y is None and self._blocks_x is None)
        self._shares = handed_out and not _is_whole(along_z, depth)
        # The axis that shrinks most goes first: the others then work on less.
        self._slices_first = along_z.count <= depth
        self._rows_first = along_y.count * width <= along_x.count * height
        kept = (height, width) if self._slices_first else (along_y.count, along_x.count)
        self._free = [torch.empty(kept)]
        self._held: dict[int, torch.Tensor] = {}
        self._source = torch.empty(height, width)
        self._sum = torch.empty(kept)
        half = (along_y.count, width) if self._rows_first else (height, along_x.count)
        self._half = torch.empty(half)
        self._result = torch.empty(along_y.count, along_x.count)

    def push(self, index: int, plane: np.ndarray) -> None:
        """Takes the next source plane (height x width, any real type) and delivers what can be computed now."""
        if not self._waiting:
            return
        buffer = self._free.pop() if self._free else torch.empty_like(self._sum)
        if self._slices_first:
            buffer.numpy()[...] = plane
        else:
            self._source.numpy()[...] = plane
            buffer.copy_(self._in_plane(self._source))
        self._held[index] = buffer
        while self._waiting:
            taps = self._taps[self._waiting[-1]]
            if (index > taps[0][0]) if self._descending else (index < taps[-1][0]):
                break
            self._emit(self._waiting.pop(), taps)
        self._drop()

    def _emit(self, z: int, taps: Sequence[tuple[int, float]]) -> None:
        (first, weight), *others = taps
        values = self._held[first]
        if others or self._shares:
            values = torch.mul(values, weight, out=self._sum)
            for index, weight in others:
                values.add_(self._held[index], alpha=weight)
        self._deliver(z, self._in_plane(values) if self._slices_first else values)

    def _in_plane(self, plane: torch.Tensor) -> torch.Tensor:
        if self._rows_first:
            return self._along_x(self._along_y(plane, self._half), self._result)
        return self._along_y(self._along_x(plane, self._half), self._result)

    def _along_y(self, plane: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self._blocks_y is None:
            return plane
        for begin, first, end, weights in self._blocks_y:
            torch.mm(weights, plane[first:end], out=out[begin : begin + weights.shape[0]])
        return out

    def _along_x(self, plane: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self._blocks_x is None:
            return plane
        for begin, first, end, weights in self._blocks_x:
            torch.mm(plane[:, first:end], weights.T, out=out[:, begin : begin + weights.shape[0]])
        return out

    def _drop(self) -> None:
        """Frees the planes that no later output needs."""
        if not self._waiting:
            self._held.clear()
            return
        taps = self._taps[self._waiting[-1]]
        if self._descending:
            passed = [index for index in self._held if index > taps[-1][0]]
        else:
            passed = [index for index in self._held if index < taps[0][0]]
        self._free += [self._held.pop(index) for index in passed]


class Planes(Protocol):
    """What `resample_array` needs of an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels (depth, height, width)."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one voxel to the next along each axis."""

    @property
    def size(self) -> int:
        """Number of voxels."""

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> np.ndarray:
        """A run of planes, or a box."""


def resample_array(
    array: np.ndarray | Planes,
    samplings: Sequence[AxisSampling],
    deliver: Callable[[int, torch.Tensor], None],
    antialias: bool = True,
) -> None:
    """Resamples an array that is in memory, runs of planes side by side.

    Args:
        array (`np.ndarray` of shape `(depth, height, width)`): any real type and any memory order; only a few planes
            are copied at a time.
        samplings (three `AxisSampling`, z y x): where to sample, in voxel indices.
        deliver (`Callable`): called with index and values of each output plane, as in [`PlaneResampler`]; from several
            threads at once, for different planes.
        antialias (`bool`, defaults to `True`): average over the output voxel where an axis is downsampled.
    """
    count = samplings[0].count
    # Where planes do not lie together in memory, several are gathered at once.
    together = 1 if array.strides[0] != 0 and abs(array.strides[0]) == max(map(abs, array.strides)) else 16

    def task(outputs: range) -> None:
        resampler = PlaneResampler(array.shape, samplings, deliver, antialias=antialias, outputs=outputs)

        def push(first: int) -> None:  # a function, so that one slab is gone before the next is gathered
            last = min(first + together, resampler.sources.stop)
            slab = np.ascontiguousarray(array[first:last]) if together > 1 else array[first:last]
            for index, plane in enumerate(slab, start=first):
                resampler.push(index, plane)

        with torch.autocast("cpu", enabled=False):  # its products would run in bfloat16: 4 HU at 1000 HU
            for first in resampler.sources[::together]:
                push(first)

    if array.size < SMALL:
        task(range(count))
        return
    num_runs = min(count, torch.get_num_threads())
    edges = np.linspace(0, count, num_runs + 1).round().astype(int).tolist()
    run_single_threaded([partial(task, range(a, b)) for a, b in itertools.pairwise(edges)])


def resample(volume: torch.Tensor, samplings: Sequence[AxisSampling], antialias: bool = True) -> torch.Tensor:
    """Separable trilinear resampling, averaged over the output voxel where an axis is downsampled.

    Args:
        volume (`torch.Tensor` of shape `(depth, height, width)`): any real type, on any device.
        samplings (three `AxisSampling`, z y x): where to sample, in voxel indices.
        antialias (`bool`, defaults to `True`): without it, plain trilinear interpolation.

    Returns:
        `torch.Tensor`: float32, of the samplings' counts, on the volume's device.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.resample_t3d import resample, spacing_sampling

    >>> samplings = [spacing_sampling(size, 1.0, 2.0) for size in (8, 8, 6)]
    >>> resample(torch.zeros(8, 8, 6), samplings).shape
    torch.Size([4, 4, 3])

    ```
    """
    if volume.device.type != "cpu":
        return resample_whole(volume, samplings, antialias)
    result = empty_voxels(*(sampling.count for sampling in samplings))
    resample_array(volume.detach().numpy(), samplings, lambda z, plane: result[z].copy_(plane), antialias)
    return result


def resample_whole(volume: torch.Tensor, samplings: Sequence[AxisSampling], antialias: bool) -> torch.Tensor:
    """The same products on whole volumes, few and large: for GPUs, and for volumes so small that calls cost most."""
    order = sorted(range(3), key=lambda axis: samplings[axis].count / volume.shape[axis])
    with torch.autocast(volume.device.type, enabled=False):
        volume = volume.to(torch.float32)
        for axis in order:
            if _is_whole(samplings[axis], volume.shape[axis]):
                continue
            pieces = []
            for _, first, end, weights in _axis_blocks(volume.shape[axis], samplings[axis], antialias):
                source = volume.narrow(axis, first, end - first)
                weights = weights.to(volume.device)
                if axis == 0:
                    pieces.append((weights @ source.reshape(end - first, -1)).view(-1, *volume.shape[1:]))
                elif axis == 1:
                    pieces.append(torch.matmul(weights, source))
                else:
                    pieces.append(torch.matmul(source, weights.T))
            volume = torch.cat(pieces, dim=axis)
    return volume


__all__ = [
    "AxisSampling",
    "PlaneResampler",
    "Planes",
    "resample",
    "resample_array",
    "resample_whole",
    "sampled_affine",
    "spacing_sampling",
]
