# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Outputs of tiles (logits, label maps, features) back to one array on the model grid or on the scan's own grid.

Streaming: tiles come one at a time, only the slices that later tiles still change are held, and what is finished
goes straight to the result. Where tiles lie is left to `tile_plan_t3d`.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .geometry_t3d import Box, Grid, scale_affine

MODES = ("logits", "labels", "features")
# Standard deviation of the Gaussian that weights a tile, as a share of its length; nnU-Net's and MONAI's default.
SIGMA = 0.125
CHANNELS = 32  # of a tile that are moved together
# Positions this near to a cell's centre (in cells) are at it: affines carry rounding errors of about 1e-10.
SNAP = 1e-6


class Reassembled(NamedTuple):
    """What tiles became: `Volume(*reassembled)` where it has three axes.

    Args:
        array (`np.ndarray`): (axes of the target grid) labels, or (channels, axes of the target grid) features.
        affine (`np.ndarray` of shape `(4, 4)`): the target grid's voxel indices to RAS+ world (x, y, z) in mm.
    """

    array: np.ndarray
    affine: np.ndarray


class _AxisSpan(NamedTuple):
    """Cells of the canvas that one tile covers along one axis, and their places in the tile, in its own cells."""

    first: int
    stop: int
    places: np.ndarray

    def weights(self, count: int) -> np.ndarray:
        """The Gaussian around the middle of the tile's `count` cells."""
        return np.exp(-0.5 * ((self.places - (count - 1) / 2) / (SIGMA * count)) ** 2)


class _Canvas:
    """The model grid in cells of the outputs' stride, cut at the first voxel's outer edge."""

    def __init__(self, grid: Grid, boxes: Sequence[Box], counts: Sequence[int]):
        self.counts = counts
        self.pitch = [size / count for size, count in zip(boxes[0].size, counts, strict=True)]
        # Cells whose centre lies in the volume; what is left of it belongs to the last of them.
        z, y, x = (
            max(1, math.ceil(size / step - 0.5 - SNAP)) for size, step in zip(grid.shape, self.pitch, strict=True)
        )
        self.shape = (z, y, x)
        self.affine = scale_affine(grid.affine, self.pitch)
        self.faces = [size / step - 0.5 for size, step in zip(grid.shape, self.pitch, strict=True)]  # of the volume
        self.spans = [[self._span(axis, box.start[axis]) for axis in range(3)] for box in boxes]
        firsts = [spans[0].first for spans in self.spans]
        # Before each tile, the first slice that it or a later one still changes: all below are finished.
        self.fronts = list(itertools.accumulate(reversed(firsts), min))[::-1]
        # One slice more is held: between it and the next one lie voxels of the target.
        ends = (spans[0].stop for spans in self.spans)
        self.depth = max(2, *(end - front + 1 for end, front in zip(ends, self.fronts, strict=True)))

    def _span(self, axis: int, start: int) -> _AxisSpan:
        offset, count = start / self.pitch[axis], self.counts[axis]
        first = min(max(0, math.ceil(offset - 0.5 - SNAP)), self.shape[axis])
        stop = min(max(first, math.ceil(offset + count - 0.5 - SNAP)), self.shape[axis])
        places = np.arange(first, stop) - offset
        near = np.rint(places)
        return _AxisSpan(first, stop, np.where(np.abs(places - near) < SNAP, near, places).clip(0, count - 1))


class _Slab:
    """Some slices of the canvas, the first of them number `first`: blended values and the sum of their weights.

    Channels come last, (slices, height, width, channels): to look up all of a cell is one contiguous read. Of labels,
    `values` and `weight` are the first that a cell was given and its votes; `others` are those that came after it, as
    many as tiles disagree anywhere.
    """

    def __init__(self, canvas: _Canvas, values: Tensor, mode: str):
        self.first, self.mode = 0, mode
        shape = (canvas.depth, *canvas.shape[1:])
        self.values = values.new_zeros((*shape, *values.shape[:-3]))
        self.weight = torch.zeros(shape, device=values.device)
        self.others: list[tuple[Tensor, Tensor]] = []

    def blend(self, values: Tensor, spans: Sequence[_AxisSpan]) -> None:
        """Adds one tile (..., d, h, w)."""
        counts = values.shape[-3:]
        for axis, span in enumerate(spans):
            values = _sample_axis(values, axis - 3, span.places, nearest=self.mode == "labels")
        z, y, x = (
            torch.as_tensor(span.weights(count), dtype=torch.float32, device=values.device)
            for span, count in zip(spans, counts, strict=True)
        )
        weight = z[:, None, None] * y[:, None] * x
        rows = slice(spans[0].first - self.first, spans[0].stop - self.first)
        where = (rows, *(slice(span.first, span.stop) for span in spans[1:]))
        if self.mode == "labels":
            self._vote(values, weight, where)
            return
        self.weight[where] += weight
        # A running mean, which stays exactly what it is where tiles agree, as a sum divided by its weight does not.
        share = (weight / self.weight[where]).to(values.dtype)
        # Transposed some channels at a time, which torch does much faster than it reads channels that lie far apart.
        for channels in range(0, len(values), CHANNELS):
            part = values[channels : channels + CHANNELS]
            moved = part.reshape(len(part), -1).t().contiguous().view(*share.shape, len(part))
            self.values[(*where, slice(channels, channels + len(part)))].lerp_(moved, share[..., None])

    def _vote(self, labels: Tensor, weight: Tensor, where: tuple[slice, ...]) -> None:
        """Adds a tile's weights to the votes of its labels."""
        open_cells = torch.ones_like(labels, dtype=torch.bool)
        for number in itertools.count():
            if number > len(self.others):
                self.others.append((torch.zeros_like(self.values), torch.zeros_like(self.weight)))
            candidates, votes = self.others[number - 1] if number else (self.values, self.weight)
            # A cell's candidates have no gaps: none is free before one that this label may have.
            takes = open_cells & ((candidates[where] == labels) | (votes[where] == 0))
            candidates[where] = torch.where(takes, labels, candidates[where])
            votes[where] += weight * takes
            open_cells &= ~takes
            if not open_cells.any():
                return

    def elected(self) -> Tensor:
        """The label of each cell that has most votes, the earlier one of equals."""
        labels, most = self.values, self.weight
        for candidates, votes in self.others:
            wins = votes > most
            labels, most = torch.where(wins, candidates, labels), torch.where(wins, votes, most)
        return labels

    def advance(self, first: int) -> None:
        """Drops the slices below `first`; the new ones at the other end are covered by nothing."""
        step = first - self.first
        depth = len(self.weight)
        for values, weight in ((self.values, self.weight), *self.others):
            for row in range(depth - step):  # upwards, so that no row is overwritten before it has moved
                values[row] = values[row + step]
                weight[row] = weight[row + step]
            weight[max(0, depth - step) :] = 0
        self.first = first


def _sample_axis(values: Tensor, axis: int, places: np.ndarray, nearest: bool) -> Tensor:
    """Values at places along one axis, in its cells: the nearest one or linear interpolation."""
    low = np.rint(places) if nearest else np.floor(places)
    share = places - low
    index = torch.as_tensor(low, dtype=torch.int64, device=values.device)
    if nearest or not share.any():
        if len(low) and np.array_equal(low, low[0] + np.arange(len(low))):
            return values.narrow(axis, int(low[0]), len(low))
        return values.index_select(axis, index)
    above = values.index_select(axis, (index + 1).clamp(max=values.shape[axis] - 1))
    weights = torch.as_tensor(share, dtype=values.dtype, device=values.device)
    return values.index_select(axis, index).lerp_(above, weights.reshape(-1, *[1] * (-1 - axis)))


class _Place(NamedTuple):
    """Where target voxels lie along one axis of the slab: cell below, share of the way to the next, nearest cell."""

    low: Tensor
    share: Tensor
    nearest: Tensor

    def at(self, voxels: Tensor | None, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`low` and `share` of some voxels (N,), counted row by row, or of all, of the plane they are broadcast to."""
        parts = self.low, self.share.float()
        if voxels is None:
            low, share = (part.expand(*shape).flatten() for part in parts)
            return low, share
        row, column = voxels // shape[1], voxels % shape[1]
        low, share = (
            part[row if part.shape[0] > 1 else 0, column if part.shape[1] > 1 else 0].expand(len(voxels))
            for part in parts
        )
        return low, share


class _Target:
    """The grid of the result, filled slab by slab from the canvas."""

    def __init__(self, target: Any, canvas: _Canvas, slab: _Slab, background: float):
        self.canvas, self.slab = canvas, slab
        self.finished = self.written = 0  # canvas slices that stay as they are; those below which all is written
        matrix = (np.linalg.inv(canvas.affine) @ np.asarray(target.affine, dtype=np.float64))[:3]
        # Planes run along the axis that is nearest to the canvas's slices, so that few of them cross a slab's border.
        planes = int(np.abs(matrix[0, :3]).argmax())
        rows, columns = sorted((axis for axis in range(3) if axis != planes), key=lambda axis: -abs(matrix[1, axis]))
        order = (planes, rows, columns)
        self.size = [target.shape[axis] for axis in order]
        matrix = matrix[:, [*order, 3]]
        whole = np.rint(matrix)
        self.matrix = np.where(np.abs(matrix - whole) * [*self.size, 1] < SNAP, whole, matrix)
        # Axes on which voxels lie between cells; on the others each lies at the centre of one.
        self.between = [axis for axis in range(3) if (self.matrix[axis] != np.rint(self.matrix[axis])).any()]
        channels: tuple[int, ...] = tuple(slab.values.shape[3:])
        kind = slab.values.dtype
        if slab.mode == "logits":
            channels, kind = (), torch.uint8 if slab.values.shape[-1] <= 256 else torch.int32
        if not kind.is_floating_point and not torch.iinfo(kind).min <= background <= torch.iinfo(kind).max:
            kind = torch.int32  # -1 for what is to be ignored, say
        elif kind == torch.bfloat16:  # numpy has no such type
            kind = torch.float32
        self.background = torch.tensor(background, dtype=kind, device=slab.values.device)
        self.array = np.full((*channels, *target.shape), background, dtype=self.background.cpu().numpy().dtype)
        self.planes = self.array.transpose(*range(len(channels)), *(axis + len(channels) for axis in order))
        corners = np.array(list(itertools.product((0, self.size[1] - 1), (0, self.size[2] - 1))))
        heights = self.matrix[0, 0] * np.arange(self.size[0])[:, None] + corners @ self.matrix[0, 1:3]
        heights = (heights + self.matrix[0, 3]).clip(0, canvas.shape[0] - 1)
        self.lowest, self.highest = np.floor(heights.min(axis=1)), np.floor(heights.max(axis=1) + SNAP)

    def finish(self, stop: int) -> None:
        """Writes all voxels that lie between canvas slices below `stop`, which no tile will change any more."""
        num_slices = self.canvas.shape[0]
        while self.finished < stop:
            self.finished = min(stop, self.slab.first + len(self.slab.weight))
            last = self.finished == num_slices
            end = num_slices if last else self.finished - 1  # voxels above the last slice wait for the next one
            self._write(self.written, end)
            self.written = end
            if not last:
                self.slab.advance(end)

    def _write(self, begin: int, end: int) -> None:
        """Fills the voxels whose cell below is one of the canvas slices `begin` to `end - 1`."""
        chosen = np.flatnonzero((self.lowest < end) & (self.highest >= begin)) if begin < end else ()
        if not len(chosen):
            return
        rows = self.finished - self.slab.first
        labels = self._labels(rows) if self.slab.mode == "logits" else None
        elected = self.slab.elected() if self.slab.mode == "labels" else None
        for plane in chosen:
            (z, y, x), inside = zip(*(self._place(axis, int(plane)) for axis in range(3)), strict=True)
            here = (z.low >= begin) & (z.low < end)
            # Voxels of the plane that belong to another slab are looked up somewhere in this one and not written.
            low, nearest = ((part - self.slab.first).clamp_(0, rows - 1) for part in (z.low, z.nearest))
            at = (_Place(low, z.share, nearest), y, x)
            values = self._plane(at, inside[0] & inside[1] & inside[2], labels, elected)
            if here.all():
                self.planes[..., plane, :, :] = values.cpu().numpy()
            else:
                where = here.expand(*self.size[1:]).cpu().numpy()
                self.planes[..., plane, :, :][..., where] = values.cpu().numpy()[..., where]

    def _place(self, axis: int, plane: int) -> tuple[_Place, Tensor]:
        """Places of a plane's voxels on one canvas axis, broadcastable to (rows, columns); if the volume is there."""
        along_planes, along_rows, along_columns, offset = self.matrix[axis]
        position = np.array([[along_planes * plane + offset]])
        if along_rows:
            position = position + along_rows * np.arange(self.size[1])[:, None]
        if along_columns:
            position = position + along_columns * np.arange(self.size[2])
        # A hundredth of a voxel of tolerance: grids that cover a volume do so up to rounding.
        inside = (position > -0.51) & (position < self.canvas.faces[axis] + 0.01)
        whole = np.rint(position)
        position = np.where(np.abs(position - whole) < SNAP, whole, position).clip(0, self.canvas.shape[axis] - 1)
        low = np.floor(position)
        parts = (low.astype(np.int64), position - low, np.floor(position + 0.5).astype(np.int64))
        device = self.slab.values.device
        return _Place(*(torch.from_numpy(part).to(device) for part in parts)), torch.from_numpy(inside).to(device)

    def _plane(
        self,
        places: Sequence[_Place],
        inside: Tensor,
        labels: tuple[Tensor, Tensor] | None,
        elected: Tensor | None,
    ) -> Tensor:
        """The result on one plane of the target, (..., rows, columns)."""
        shape = self.size[1:]
        z, y, x = places
        nearest = (z.nearest, y.nearest, x.nearest)
        known = (inside & (self.slab.weight[nearest] > 0)).expand(*shape)
        if elected is not None:
            return torch.where(known, elected[nearest].to(self.background.dtype), self.background)
        if labels is None:
            everywhere = [place.at(None, shape) for place in places]
            values = _interpolate(self.slab, everywhere, self.between).unflatten(0, shape).permute(2, 0, 1)
            return torch.where(known, values.to(self.background.dtype), self.background)
        highest, agree = (part[z.low, y.low, x.low].expand(*shape) for part in labels)
        result = highest.to(self.background.dtype).contiguous()
        mixed = (known & ~agree).flatten().nonzero().flatten()
        for voxels in mixed.split(1 << 16):
            logits = _interpolate(self.slab, [place.at(voxels, shape) for place in places], self.between)
            result.view(-1)[voxels] = logits.max(dim=1).indices.to(result.dtype)
        return torch.where(known, result, self.background)

    def _labels(self, rows: int) -> tuple[Tensor, Tensor]:
        """Arg-max of each cell, -1 where no tile was, and whether the cells around the voxels above it have the same.

        An interpolated logit lies between those of the cells around it: where these have one arg-max, so has every
        voxel between them, and only the others are worth interpolating all classes for.
        """
        # `max` takes the first of equal values, as `argmax` does, in half its time.
        labels = torch.stack([logits.max(dim=-1).indices.to(torch.int32) for logits in self.slab.values[:rows]])
        labels[self.slab.weight[:rows] == 0] = -1
        lowest = highest = labels
        for axis in self.between:
            last = labels.shape[axis] - 1
            above = torch.arange(1, last + 2, device=labels.device).clamp_(max=last)
            lowest = torch.minimum(lowest, lowest.index_select(axis, above))
            highest = torch.maximum(highest, highest.index_select(axis, above))
        return labels, lowest == highest


def _interpolate(slab: _Slab, places: Sequence[tuple[Tensor, Tensor]], between: Sequence[int]) -> Tensor:
    """Linear interpolation (voxels, channels) between those cells of the slab that a tile covered."""
    # Corner by corner, axis by axis: the index of a cell in the slab, and its weight.
    corners: list[tuple[Tensor, Tensor]] = []
    strides = (slab.weight.shape[1] * slab.weight.shape[2], slab.weight.shape[2], 1)
    for axis, ((low, share), stride, count) in enumerate(zip(places, strides, slab.weight.shape, strict=True)):
        sides = [(low * stride, 1.0 - share), ((low + 1).clamp_(max=count - 1) * stride, share)]
        sides = sides if axis in between else [(low * stride, torch.ones_like(share))]
        corners = [(a + b, v * w) for a, v in corners for b, w in sides] if corners else [(a, v) for a, v in sides]
    indices = torch.stack([index for index, _ in corners], dim=1)
    shares = torch.stack([weight for _, weight in corners], dim=1)
    covered = slab.weight.view(-1)[indices] > 0
    if not covered.all():
        shares = shares * covered
        shares = shares / shares.sum(dim=1, keepdim=True).clamp_(min=SNAP)
    table = slab.values.view(-1, slab.values.shape[-1])
    return nn.functional.embedding_bag(indices, table, per_sample_weights=shares.to(table.dtype), mode="sum")


def _checked(outputs: Iterable[Any], num_tiles: int, mode: str) -> Iterator[Tensor]:
    """The tiles' outputs as tensors, one at a time; errors say which tile is wrong."""
    number, shape, num_axes = 0, None, 3 if mode == "labels" else 4
    for output in outputs:
        if number == num_tiles:
            raise ValueError(f"outputs go on after the {num_tiles} tiles; give one per tile, not one per batch")
        if isinstance(output, np.ndarray):  # torch takes neither mirrored arrays nor another byte order
            output = np.ascontiguousarray(output, dtype=output.dtype.newbyteorder("="))
        values = torch.as_tensor(output).detach()
        if values.ndim != num_axes or shape not in (None, values.shape):
            wanted = "(d, h, w)" if mode == "labels" else "(channels, d, h, w)"
            raise ValueError(
                f"the output of tile {number} has shape {tuple(values.shape)}; mode={mode!r} takes {wanted} per tile, "
                "the same for all"
            )
        if values.is_floating_point() == (mode == "labels"):
            kind = "integers" if mode == "labels" else "floating-point values"
            raise ValueError(f"the output of tile {number} is {values.dtype}: mode={mode!r} takes {kind}")
        if values.is_floating_point() and not all(bound.isfinite() for bound in values.aminmax()):
            raise ValueError(
                f"the output of tile {number} holds NaN or infinite values, which would spread to its neighbours; "
                "write -1e4 for a class that is left out, and see that the model's precision does not overflow"
            )
        shape = values.shape
        if values.dtype == torch.bool:
            values = values.to(torch.uint8)
        yield values
        del output, values  # not held while the next one is computed
        number += 1
    if number < num_tiles:
        raise ValueError(f"outputs end after {number} of {num_tiles} tiles")


def reassemble(
    outputs: Iterable[Any],
    boxes: Sequence[Box],
    grid: Grid,
    target: Any = None,
    *,
    mode: str = "logits",
    background: float = 0,
) -> Reassembled:
    """Blends the outputs of tiles and brings them to a grid; `T3DImageProcessor.reassemble` fills in the geometry.

    Args:
        outputs: per tile, in the order of `boxes`, a tensor or array: (classes, d, h, w) logits, (d, h, w) integer
            labels or (channels, d, h, w) features, finite, at any stride. An iterator is read one tile at a time.
        boxes: the tiles, in voxels of `grid`, all of one size; sorted by their first slice they need least memory.
        grid (`Grid`): the model grid.
        target (`Grid` or `Volume`): where the result lies; by default the model grid at the outputs' stride.
        mode: what the outputs are. `"logits"` are blended, interpolated and arg-max'd; for `"labels"` the tiles
            vote, each with the weight that logits would have, and the nearest one is taken where grids differ;
            `"features"` are blended and interpolated.
        background: label or feature where no tile was, and beyond the volume.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.geometry_t3d import Grid
    >>> from modeling_t3d.reassembly_t3d import reassemble
    >>> from modeling_t3d.tile_plan_t3d import grid_plan

    >>> boxes = grid_plan((6, 4, 4), (4, 4, 4))
    >>> tiles = (np.full((4, 4, 4), number) for number in range(len(boxes)))
    >>> reassemble(tiles, boxes, Grid((6, 4, 4), np.eye(4)), mode="labels").array[:, 0, 0].tolist()
    [0, 0, 0, 1, 1, 1]

    ```
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not boxes:
        raise ValueError("there are no tiles to put together: boxes is empty")
    if len({box.size for box in boxes}) > 1:
        raise ValueError("the tiles differ in size; put those of one size together")
    tiles = _checked(outputs, len(boxes), mode)
    values: Any = next(tiles)
    canvas = _Canvas(grid, boxes, values.shape[-3:])
    slab = _Slab(canvas, values, mode)
    place = Grid(canvas.shape, canvas.affine) if target is None else target
    result = _Target(place, canvas, slab, background)
    plan = zip(canvas.spans, canvas.fronts, strict=True)
    while values is not None:
        spans, front = next(plan)
        result.finish(front)
        slab.blend(values, spans)
        values = None  # not held while the next one is computed
        values = next(tiles, None)
    result.finish(canvas.shape[0])
    return Reassembled(result.array, np.array(place.affine, dtype=np.float64))


__all__ = ["MODES", "Reassembled", "reassemble"]
