# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Local views of a prepared volume: planned, cut all at once or a few at a time, batched, and put together again.

Where views lie is worked out in `tile_plan_t3d`, what a model says about them is blended in `reassembly_t3d`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .geometry_t3d import Box, Grid, Volume, VolumeGeometryError
from .image_settings_t3d import checked_views
from .intensity_t3d import apply_windows
from .prepared_volume_t3d import PreparedVolume, ViewGeometry
from .reassembly_t3d import Reassembled, reassemble
from .tile_plan_t3d import (
    aligned_plan,
    aligned_positions,
    grid_plan,
    independent_plan,
    normalised_positions,
    overlapping_plan,
    point_plan,
)
from .volume_memory_t3d import empty_voxels
from .volume_transforms_t3d import crop

# How many random views, "grid", points (x, y, z) in RAS mm, or boxes that are planned already.
Views = int | Literal["grid"] | Sequence[Sequence[float]] | np.ndarray | Sequence[Box]


class LocalViews(NamedTuple):
    """Local views of one volume: values (views, channels, depth, height, width), positions (views, 6) and boxes."""

    pixel_values: torch.Tensor
    positions: torch.Tensor
    boxes: tuple[Box, ...]


class LocalViewsMixin:
    """What `T3DImageProcessor` does with local views; the settings named here are its fields."""

    local_size: tuple[int, int, int]
    view_sampling: str
    view_overlap: float
    view_jitter: float
    grid_overlap: float
    intensity: str
    windows: Sequence[Sequence[float]]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any

    def plan_views(
        self,
        prepared: PreparedVolume,
        views: Views = "grid",
        generator: np.random.Generator | int | None = None,
        positions: np.ndarray | None = None,
    ) -> tuple[Box, ...]:
        """Where local views lie, in voxels of the prepared volume; no voxel is read. Arguments as in `make_views`."""
        shape, size, body = prepared.array.shape, self.local_size, prepared.body
        views = checked_views(views)
        if isinstance(views, str):
            cells = body.cells if body.dense is None else body.cells | body.dense
            return grid_plan(shape, size, self.grid_overlap, cells, body.cell)
        if not isinstance(views, int):
            if all(isinstance(view, Box) for view in views):
                return tuple(views)
            return point_plan(shape, size, views, prepared.affine, prepared.source or "the volume")
        if not isinstance(generator, np.random.Generator):
            generator = np.random.default_rng(generator)
        if self.view_sampling == "aligned":
            positions = aligned_positions(views, generator) if positions is None else positions
            return aligned_plan(shape, size, positions, body.box, generator, jitter=self.view_jitter)
        if self.view_sampling == "overlapping":
            overlap = self.view_overlap
            return overlapping_plan(shape, size, views, body.box, generator, body, minimum_overlap=overlap)
        return independent_plan(shape, size, views, body.box, generator, body)

    def shared_positions(self, views: Any, seed: int, num_volumes: int = 1) -> np.ndarray | None:
        """Under `view_sampling="aligned"` the normalised centres that a batch's random views share, else `None`."""
        if not isinstance(views, int) or self.view_sampling != "aligned":
            return None
        return aligned_positions(views, np.random.default_rng((seed, num_volumes, 0)))

    def make_views(
        self,
        prepared: PreparedVolume,
        views: Views,
        generator: np.random.Generator | int | None = None,
        positions: np.ndarray | None = None,
    ) -> LocalViews:
        """Local views, all at once.

        Args:
            prepared ([`PreparedVolume`]): what `prepare` returned.
            views (`int`, `"grid"`, points or boxes): that many random ones; tiles over the uncropped volume, those
                that hold nothing but air left out; views around world coordinates (x, y, z) in RAS mm, moved inwards
                where they would leave the volume; or the boxes of `plan_views`.
            generator (`np.random.Generator` or a seed): draws where random views lie.
            positions (`np.ndarray` of shape `(views, 3)`): for `view_sampling="aligned"`, the normalised centres that
                the batch shares (`aligned_positions`); drawn from the generator when not given, which aligns nothing.

        Returns:
            [`LocalViews`]
        """
        return self._cut_views(prepared, self.plan_views(prepared, views, generator, positions))

    def iterate_views(
        self,
        prepared: PreparedVolume,
        views: Views = "grid",
        *,
        batch_size: int = 1,
        generator: np.random.Generator | int | None = None,
        positions: np.ndarray | None = None,
    ) -> Iterator[LocalViews]:
        """The views of `make_views`, in the same order, `batch_size` at a time: two batches are in memory at most.

        Example:

        ```python
        >>> import numpy as np
        >>> from modeling_t3d import T3DImageProcessor

        >>> scan = np.full((40, 40, 60), -1000, dtype=np.int16)
        >>> scan[8:32, 8:32] = 40
        >>> processor = T3DImageProcessor(spacing=(3, 3, 3), local_size=(32, 32, 32))
        >>> prepared = processor.prepare(scan, np.diag([3.0, 3.0, 3.0, 1.0]))
        >>> [len(views.boxes) for views in processor.iterate_views(prepared, "grid", batch_size=6)]
        [6, 2]

        ```
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        boxes = self.plan_views(prepared, views, generator, positions)
        return (
            self._cut_views(prepared, boxes[first : first + batch_size]) for first in range(0, len(boxes), batch_size)
        )

    def _cut_views(self, prepared: PreparedVolume, boxes: tuple[Box, ...]) -> LocalViews:
        num_channels = 1 if prepared.value_range is not None else len(self.windows)
        pixel_values = empty_voxels(len(boxes), num_channels, *self.local_size)
        for channels, box in zip(pixel_values, boxes, strict=True):
            self._channels(crop(prepared.array, box, prepared.outside, channels[-1]), prepared, channels)
        return LocalViews(pixel_values, torch.from_numpy(normalised_positions(boxes, prepared.body.box)), boxes)

    def _channels(
        self, values: torch.Tensor, prepared: PreparedVolume, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(depth, height, width) in the volume's unit -> (channels, depth, height, width) as the model wants it.

        `out` takes the result; its last channel may hold the values.
        """
        windows = self.windows if prepared.value_range is None else (prepared.value_range,)
        channels = empty_voxels(len(windows), *values.shape) if out is None else out
        if self.do_rescale:
            apply_windows(values, windows, clip=self.intensity != "zscore", out=channels)
            if self.rescale_factor != 1.0:
                channels *= self.rescale_factor
        else:
            for channel in channels:
                channel.copy_(values)
        if self.do_normalize:
            mean, deviation = (torch.as_tensor(x, dtype=torch.float32) for x in (self.image_mean, self.image_std))
            channels.sub_(mean.reshape(-1, 1, 1, 1)).div_(deviation.reshape(-1, 1, 1, 1))
        return channels

    def reassemble(
        self,
        outputs: Iterable[Any],
        geometry: PreparedVolume | ViewGeometry,
        mode: Literal["logits", "labels", "features"] = "logits",
        target: str | Grid | Volume | None = "input",
        *,
        boxes: Sequence[Box] | None = None,
        background: float = 0,
    ) -> Reassembled:
        """What a model says about each tile, as one array on the scan's own grid.

        Tiles are blended with Gaussian weights, one at a time: of 117 classes of a 512 x 512 x 600 scan, only the
        logits of the slices that later tiles still change are in memory (about one tile's depth).

        Args:
            outputs (iterable of tensors or arrays): one per tile, in the order of the plan: `(classes, d, h, w)` for
                `mode="logits"`, integers `(d, h, w)` for `"labels"`, `(channels, d, h, w)` for `"features"`; of any
                stride: `d` may be a fraction of the tile's depth. A generator is read one tile at a time.
            geometry ([`PreparedVolume`] or [`ViewGeometry`]): of the volume that the tiles were cut from.
            mode: logits are blended, interpolated and arg-max'd; on labels the tiles vote with the same weights, and
                the nearest is taken where grids differ; features are blended and interpolated.
            target: `"input"`, the axis order, spacing and shape of the file or array as it came; `"processed"`, the
                model grid; `"outputs"`, the model grid in voxels of the outputs' stride; or any `Grid` or `Volume`.
            boxes (`Sequence[Box]`): of the tiles, if they are not those of `views="grid"` (or of the `ViewGeometry`).
            background (`float`): where no tile was (air that the grid leaves out), and beyond the volume.

        Returns:
            [`Reassembled`]: array and affine; `Volume(*reassembled)` for what `write_nifti` takes. Exact where the
            target's voxels are the outputs', else within half a voxel of where they should be.

        Example:

        ```python
        >>> import numpy as np
        >>> from modeling_t3d import T3DImageProcessor, Volume

        >>> scan = np.full((40, 40, 60), -1000, dtype=np.int16)  # (x, y, z) with its affine, as nibabel gives them
        >>> scan[8:32, 8:32] = 40
        >>> processor = T3DImageProcessor(spacing=(2, 2, 2), local_size=(32, 32, 32), grid_overlap=0.5)
        >>> prepared = processor.prepare(scan, np.diag([-3.0, 3.0, 3.0, 1.0]))
        >>> def model(pixel_values):  # two classes: air and tissue
        ...     return torch.cat([-pixel_values - 0.5, pixel_values + 0.5], dim=1)
        >>> tiles = processor.iterate_views(prepared, "grid", batch_size=4)
        >>> logits = (tile for views in tiles for tile in model(views.pixel_values))
        >>> segmentation = Volume(*processor.reassemble(logits, prepared))
        >>> segmentation.shape, bool(((segmentation.array == 1) == (scan > -500)).all())
        ((40, 40, 60), True)

        ```
        """
        if boxes is None:
            boxes = self.plan_views(geometry) if isinstance(geometry, PreparedVolume) else geometry.local_boxes
        shape = geometry.array.shape if isinstance(geometry, PreparedVolume) else geometry.shape
        processed = Grid(shape, geometry.affine)
        if isinstance(target, str):
            grids = {"input": geometry.input_grid, "processed": processed, "outputs": None}
            if target not in grids:
                raise ValueError(f'target must be "input", "processed", "outputs" or a Grid, got {target!r}')
            if target == "input" and geometry.input_grid is None:
                raise VolumeGeometryError(
                    f"{geometry.source or 'the volume'} was prepared by a version that did not keep the input's own "
                    "grid; prepare it again, or pass the scan as target="
                )
            target = grids[target]
        return reassemble(outputs, boxes, processed, target, mode=mode, background=background)

    def stack_views(self, local_views: Sequence[LocalViews]) -> dict[str, torch.Tensor]:
        """One batch from volumes with different numbers of views; what is added is zero and masked out.

        Returns:
            `local_pixel_values` (batch, views, channels, depth, height, width), `local_mask` (batch, views) bool, and
            `local_positions` (batch, views, 6). Those of a single volume share its views' memory.
        """
        most = max(len(views.boxes) for views in local_views)
        mask = torch.zeros(len(local_views), most, dtype=torch.bool)
        for index, views in enumerate(local_views):
            mask[index, : len(views.boxes)] = True
        if len(local_views) == 1:
            pixel_values, positions = local_views[0].pixel_values[None], local_views[0].positions[None]
        else:
            first = local_views[0].pixel_values
            pixel_values = first.new_zeros(len(local_views), most, *first.shape[1:])
            positions = torch.zeros(len(local_views), most, 6)
            for index, views in enumerate(local_views):
                pixel_values[index, : len(views.boxes)] = views.pixel_values
                positions[index, : len(views.boxes)] = views.positions
        return {"local_pixel_values": pixel_values, "local_mask": mask, "local_positions": positions}


__all__ = ["LocalViews", "LocalViewsMixin", "Views"]
