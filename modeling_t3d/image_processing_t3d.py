# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""T3DImageProcessor: from volumes (files, arrays, nibabel images) to global views, local views and their positions.

`prepare` does what is the same in every epoch (orientation, intensity check, resampling, body mask) and may be cached;
`global_view` and `make_views` cut the tensors. Calling the processor does all of it.
"""

import os
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import Unpack
from transformers.utils import logging

from .geometry_t3d import Box, Volume, VolumeGeometryError, VolumeReadError, crop_affine
from .image_settings_t3d import (
    CALL_ARGUMENTS,
    LOADER_ARGUMENTS,
    T3DImageProcessorKwargs,
    describe,
    has_axes,
    per_image,
    refuse_unknown,
    standardise,
)
from .local_views_t3d import LocalViews, LocalViewsMixin, Views
from .nifti_stream_t3d import NiftiFile
from .preparation_t3d import Preparation
from .prepared_volume_t3d import PreparedVolume, ViewGeometry, cut_frame, frame_loss, global_frame
from .resample_t3d import AxisSampling, sampled_affine
from .volume_io_t3d import open_volume, wrap_volume

logger = logging.get_logger(__name__)

PREPARATION_VERSION = 2  # part of `preparation_key`: grows whenever `prepare` gives other voxels


class T3DImageProcessor(LocalViewsMixin, BaseImageProcessor):
    r"""
    Turns 3-D scans into a global view (the body, reduced) and local views (crops at full resolution).

    Sizes and spacings are in tensor order (z, y, x): indices grow towards superior, anterior and right.

    Args:
        spacing (three floats, mm, defaults to `(1.5, 0.75, 0.75)`): model grid; `None` keeps each scan's own grid.
        global_size (three ints, defaults to `(128, 256, 256)`): voxels of the global view.
        local_size (three ints, defaults to `(64, 128, 128)`): voxels of a local view.
        global_fit (`"body"`, `"crop"` or `"resize"`): the body's box scaled by one factor and padded with air; a cube
            of `global_crop_extent` mm around the body's centre; the whole volume stretched.
        global_crop_extent (`float`, mm, defaults to 384): edge of the cube of `global_fit="crop"`.
        intensity (`"hu"`, `"unit"`, `"uint8"`, `"zscore"` or `"percentile"`): what the voxel values are.
        check_intensity (`bool`, defaults to `True`): refuse volumes whose values cannot be HU.
        windows (pairs of HU, defaults to `((-1000, 1000),)`): one channel each, scaled to [-1, 1] and clipped.
        num_local_views (`int`, defaults to 4): local views per volume in training.
        view_sampling (`"independent"`, `"overlapping"` or `"aligned"`): where random views lie.
        view_overlap (`float`, defaults to 0.25): least share of its volume that a view has in common with each other
            view of its pair under `"overlapping"`.
        view_jitter (`float`, defaults to 0.05): largest move per axis under `"aligned"`, body box = [-1, 1].
        grid_overlap (`float`, defaults to 0): least share of a tile's length in common with the next tile.
        antialias (`bool`, defaults to `True`): average over the new voxel when downsampling; `False` is the plain
            trilinear interpolation of most other pipelines.
        deoblique (`bool`, defaults to `False`): resample rotated scans to the world axes; else they keep their own.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: `do_rescale=False` leaves values unscaled;
            the factor (1) multiplies the scaled values; the mean and deviation are then taken per channel.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.image_processing_t3d import T3DImageProcessor

    >>> scan = np.full((40, 40, 20), -1000, dtype=np.int16)  # (x, y, z), as nibabel gives it
    >>> scan[8:32, 8:32] = 40
    >>> processor = T3DImageProcessor(spacing=(3, 3, 3), global_size=(16, 16, 16), local_size=(8, 8, 8))
    >>> inputs = processor(scan, affine=np.diag([3.0, 3.0, 3.0, 1.0]), views=2, seed=0)
    >>> inputs["pixel_values"].shape, inputs["local_pixel_values"].shape
    (torch.Size([1, 1, 16, 16, 16]), torch.Size([1, 2, 1, 8, 8, 8]))

    ```
    """

    valid_kwargs = T3DImageProcessorKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values", "local_pixel_values", "local_mask", "local_positions"]
    default_to_square = None
    spacing: tuple[float, float, float] | None = (1.5, 0.75, 0.75)
    global_size = (128, 256, 256)
    local_size = (64, 128, 128)
    global_fit = "body"
    global_crop_extent = 384.0
    intensity = "hu"
    check_intensity = True
    windows = ((-1000.0, 1000.0),)
    num_local_views = 4
    view_sampling = "independent"
    view_overlap = 0.25
    view_jitter = 0.05
    grid_overlap = 0.0
    antialias = True
    deoblique = False
    do_rescale = True
    rescale_factor = 1.0
    do_normalize = False

    def __init__(self, **kwargs: Unpack[T3DImageProcessorKwargs]):
        loader = {key: kwargs.pop(key) for key in LOADER_ARGUMENTS if key in kwargs}
        fields = [key for key in self.valid_kwargs.__annotations__ if key not in CALL_ARGUMENTS]
        refuse_unknown(kwargs, fields, "field")
        super().__init__(**loader)
        self._set_attributes(**kwargs)
        for name in ("spacing", "do_rescale", "do_normalize"):
            if name in kwargs and kwargs[name] is None:  # None is a value of these fields, not their absence
                setattr(self, name, None)

    # ------------------------------------------------------------------------------------------ settings

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        return standardise(kwargs)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        """Nothing is left to check: `_standardize_kwargs` did it."""

    @property
    def num_channels(self) -> int:
        """Channels of the views: one per window for HU, one for every other intensity."""
        return len(self.windows) if self.intensity == "hu" else 1

    def preparation_key(self) -> dict[str, Any]:
        """The settings that `prepare` depends on, for the key of a cache of prepared volumes."""
        return self._key("spacing", "intensity", "check_intensity", "deoblique")

    def _key(self, *settings: str) -> dict[str, Any]:
        facts = {"version": PREPARATION_VERSION, **{key: getattr(self, key) for key in settings}}
        # Named only where it is off: it came later, and volumes that were prepared before had it.
        return facts if self.antialias else {**facts, "antialias": False}

    def describe(self) -> str:
        """The whole volume contract in plain words."""
        return describe(self)

    # ------------------------------------------------------------------------------------------ prepare

    def prepare(
        self,
        image: Any,
        affine: np.ndarray | None = None,
        volume_spacing: Sequence[float] | None = None,
        volume_axes: str | None = None,
        name: str = "the volume",
        series: int | None = None,
        time_index: int | None = None,
    ) -> PreparedVolume:
        """Everything that does not change between epochs: orientation, intensity check, model grid, body.

        Args:
            image: path, numpy array, tensor, nibabel image or `Volume`; a `PreparedVolume` is returned as it is.
            affine (`np.ndarray` of shape `(4, 4)`): for an array, its own index order to RAS+ world (x, y, z) in mm.
            volume_spacing, volume_axes: for an array without affine: mm per axis, and the direction in which each
                axis grows, such as `"SAR"` for (z, y, x).
            name (`str`): what messages call a volume that came without a path.
            series (`int`): which series of a DICOM folder, by its place in `list_series(path)`.
            time_index (`int`): which volume of a 4-D file, nibabel or SimpleITK image.

        Returns:
            [`PreparedVolume`]
        """
        if isinstance(image, PreparedVolume):
            return image
        opened = _open_volume(image, affine, volume_spacing, volume_axes, name, series, time_index)
        settings = Preparation(self.spacing, self.intensity, self.check_intensity, self.deoblique, self.antialias)
        return settings(opened, opened.source or name)

    # ------------------------------------------------------------------------------------------ views

    def _global_frame(self, prepared: PreparedVolume) -> tuple[list[AxisSampling], Box]:
        return global_frame(prepared, self.global_fit, self.global_size, self.spacing, self.global_crop_extent)

    def global_key(self) -> dict[str, Any]:
        """The settings that `global_values` depends on beside those of the preparation, for where it is kept."""
        return self._key("global_size", "global_fit", "global_crop_extent")

    def global_values(self, prepared: PreparedVolume) -> torch.Tensor:
        """The global view before windows: (depth, height, width), float32, in the volume's unit."""
        return self._cut_global(prepared, 1, lambda values, out: out[0].copy_(values))[0]

    def _cut_global(
        self, prepared: PreparedVolume, num_channels: int, scale: Callable[[torch.Tensor, torch.Tensor], Any]
    ) -> torch.Tensor:
        samplings, allowed = self._global_frame(prepared)
        if self.global_fit == "crop":
            _, lost = frame_loss(prepared, samplings, allowed)
            if lost:
                logger.warning_once(
                    f"{prepared.source or 'a volume'}: global_fit='crop' leaves {lost} voxels of the body out of the "
                    "global view; use global_fit='body' or a larger global_crop_extent to keep them"
                )
        return cut_frame(prepared, samplings, allowed, num_channels, scale, self.antialias)

    def global_view(self, prepared: PreparedVolume, values: torch.Tensor | None = None) -> torch.Tensor:
        """The global view (channels, depth, height, width) of a prepared volume, float32; `values` are those kept."""
        if values is None:
            num_channels = len(self.windows) if prepared.value_range is None else 1
            return self._cut_global(
                prepared, num_channels, lambda values, out: self._channels(values, prepared, out=out)
            )
        return self._channels(values, prepared)

    def geometry(self, prepared: PreparedVolume, boxes: Sequence[Box] = ()) -> ViewGeometry:
        """Where the global view, and local views in `boxes`, lie; what the global view leaves out."""
        samplings, allowed = self._global_frame(prepared)
        discarded, lost = frame_loss(prepared, samplings, allowed)
        return ViewGeometry(
            spacing=prepared.spacing,
            shape=tuple(prepared.array.shape),
            body_box=prepared.body_box,
            affine=prepared.affine,
            global_affine=sampled_affine(prepared.affine, samplings),
            global_scale=(samplings[0].step, samplings[1].step, samplings[2].step),
            discarded_mm=discarded,
            discarded_body_voxels=lost,
            local_boxes=tuple(boxes),
            local_affines=tuple(crop_affine(prepared.affine, box.start) for box in boxes),
            source=prepared.source,
            warnings=prepared.warnings,
            input_grid=prepared.input_grid,
        )

    # ------------------------------------------------------------------------------------------ call

    def preprocess(self, images: Any, *args: Any, **kwargs: Unpack[T3DImageProcessorKwargs]) -> BatchFeature:
        """Turns one volume, or a list of them, into tensors.

        Args:
            images: path, numpy array, tensor, nibabel image, `Volume`, [`PreparedVolume`], or a list of these.
            affine (`np.ndarray` of shape `(4, 4)`, or one per image, `None` for a file): array indices to RAS+ world
                (x, y, z) in mm.
            volume_spacing, volume_axes: in place of `affine`, mm per array axis and where each axis grows (`"SAR"`).
            series (`int`, or one per image): which series of a DICOM folder, by its place in `list_series(path)`; by
                default the only one, or the only axial CT.
            time_index (`int`, or one per image): which volume of a 4-D file, nibabel or SimpleITK image.
            views (`None`, `int`, `"grid"` or points): no local views, that many random ones, tiles that cover all but
                pure air, or views around world coordinates (x, y, z) in RAS mm (one list of points per image, or one
                for all).
            seed (`int`): of the random views; without it they follow `torch.manual_seed`.
            return_geometry (`bool`): adds `"geometry"`, one [`ViewGeometry`] per volume.
            return_tensors (`"pt"` or `"np"`): kind of arrays; `"pt"` if not given.
            kwargs: fields of the processor, for this call only.

        Returns:
            `BatchFeature`: `pixel_values` (batch, channels, depth, height, width); with `views` also
            `local_pixel_values` (batch, views, channels, depth, height, width), `local_mask` (batch, views) bool and
            `local_positions` (batch, views, 6): centre (z, y, x) in [-1, 1] of the body box, extent as a fraction.
        """
        refuse_unknown(kwargs, list(self.valid_kwargs.__annotations__), "argument")
        try:
            return super().preprocess(images, *args, **kwargs)
        except StrictDataclassFieldValidationError as error:
            reason = str(error.__cause__).partition(" Errors: ")[0]
            raise TypeError(f"T3DImageProcessor: {reason}") from None

    def fetch_images(self, images: Any) -> Any:
        """Leaves images as they are: `prepare` opens paths, and a volume is not a PIL image."""
        return images

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        call = {key: kwargs.pop(key, None) for key in CALL_ARGUMENTS}
        processor = copy(self)
        for key, value in kwargs.items():
            setattr(processor, key, value)
        return processor._process(_flatten(images), **call)

    def _process(
        self,
        images: list[Any],
        affine: Any,
        volume_spacing: Any,
        volume_axes: Any,
        series: Any,
        time_index: Any,
        views: Views | None,
        seed: int | None,
        return_geometry: bool | None,
        return_tensors: str | None,
    ) -> BatchFeature:
        affines = per_image(affine, len(images), "affine", has_axes(2))
        spacings = per_image(volume_spacing, len(images), "volume_spacing", has_axes(1))
        places = per_image(
            views, len(images), "views", lambda value: isinstance(value, int | str) or has_axes(1)(value[0])
        )
        axes = per_image(volume_axes, len(images), "volume_axes", lambda value: isinstance(value, str))
        ordinals = per_image(series, len(images), "series", has_axes(0))
        times = per_image(time_index, len(images), "time_index", has_axes(0))
        if not images:
            raise ValueError("no images were given; pass at least one volume")
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        shared = self.shared_positions(views, seed, len(images))
        pixel_values, local_views, geometry = [], [], []
        for index, image in enumerate(images):
            prepared = self.prepare(
                *(image, affines[index], spacings[index], axes[index]),
                name=f"volume {index}",
                series=ordinals[index],
                time_index=times[index],
            )
            pixel_values.append(self.global_view(prepared))
            if views is not None:
                generator = np.random.default_rng((seed, index))
                local_views.append(self.make_views(prepared, places[index], generator, shared))
            geometry.append(self.geometry(prepared, local_views[-1].boxes if views is not None else ()))
        data: dict[str, Any] = {
            "pixel_values": torch.stack(pixel_values) if len(pixel_values) > 1 else pixel_values[0][None]
        }
        if views is not None:
            data.update(self.stack_views(local_views))
        if getattr(self, "device", None) is not None:
            data = {key: value.to(self.device) for key, value in data.items()}
        if return_tensors is not None and str(getattr(return_tensors, "value", return_tensors)) == "np":
            data = {key: value.numpy() for key, value in data.items()}
        if return_geometry:
            data["geometry"] = geometry
        return BatchFeature(data=data)


def _open_volume(
    image: Any,
    affine: np.ndarray | None,
    spacing: Sequence[float] | None,
    axes: str | None,
    name: str,
    series: int | None,
    time_index: int | None,
) -> Volume | NiftiFile:
    """Opens or wraps one image; an error about an array says which one of the call it was."""
    is_bare = isinstance(image, np.ndarray | torch.Tensor) and getattr(image, "affine", None) is None
    if is_bare and affine is None and (spacing is None or axes is None):
        raise VolumeGeometryError(
            f"{name}: an array needs its geometry; pass affine= (4x4, array indices to RAS+ world mm), or "
            'volume_spacing= and volume_axes=, e.g. volume_spacing=(2.0, 0.7, 0.7), volume_axes="SAR" for (z, y, x)'
        )
    if isinstance(image, str | os.PathLike) and affine is None and spacing is None and axes is None:
        return open_volume(image, series=series, time_index=time_index)
    try:
        return wrap_volume(image, affine=affine, spacing=spacing, axes=axes, series=series, time_index=time_index)
    except VolumeReadError:
        raise
    except VolumeGeometryError as error:
        raise VolumeGeometryError(f"{name}: {error}") from None


def _flatten(images: Any) -> list[Any]:
    """Lists of images, nested ([sample][image]) or not, as one list; empty inner lists vanish."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in _flatten(entry)]


__all__ = ["LocalViews", "PreparedVolume", "T3DImageProcessor", "T3DImageProcessorKwargs", "ViewGeometry"]
