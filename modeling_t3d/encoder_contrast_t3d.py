# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Fixed filters that respond to small bright or dark spots, and what becomes of the responses, cell by cell."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod, sqrt

import torch
from torch import nn
from transformers import initialization as init

from .encoder_blocks_t3d import T3DEncoderBlock

# Of the half-resolution voxels that the filters see: as wide as the cells' margin allows at little cost.
_FILTER_SIZE = 5
_SMOOTHING = 0.8


def contrast_filters(scales: Sequence[Sequence[float]]) -> torch.Tensor:
    r"""
    Differences of Gaussians of both signs, and one Gaussian.

    Args:
        scales (`Sequence` of pairs): standard deviations of the inner and the outer Gaussian, in voxels; 0 is the
            voxel itself.

    Returns:
        `torch.Tensor` of shape `(2 * len(scales) + 1, 1, 5, 5, 5)`; the absolute values of each filter sum to 1.

    Example:

    ```python
    >>> from modeling_t3d.encoder_contrast_t3d import contrast_filters

    >>> filters = contrast_filters([(0.0, 1.0)])
    >>> tuple(filters.shape), [round(total, 4) + 0.0 for total in filters.sum(dim=(1, 2, 3, 4)).tolist()]
    ((3, 1, 5, 5, 5), [0.0, 0.0, 1.0])

    ```"""
    filters = []
    for inner, outer in scales:
        difference = _gaussian(inner) - _gaussian(outer)
        difference /= difference.abs().sum()
        filters += [difference, -difference]
    return torch.stack([*filters, _gaussian(_SMOOTHING)])[:, None].to(torch.get_default_dtype())


def _gaussian(deviation: float) -> torch.Tensor:
    offsets = torch.arange(_FILTER_SIZE, dtype=torch.float64) - _FILTER_SIZE // 2
    axis = (-(offsets**2) / (2 * deviation**2)).exp() if deviation else (offsets == 0).to(offsets.dtype)
    axis /= axis.sum()
    return axis[:, None, None] * axis[:, None] * axis


class T3DContrastFilters(nn.Module):
    """
    Fixed filters on volumes of half the resolution: each channel's maximum and mean over 2^3 voxels, each through
    every filter of [`contrast_filters`]. The maximum keeps what a mean would thin out: a stone of one voxel.

    The weights are a buffer: nothing here learns, and no gradient is kept for it.
    """

    def __init__(self, num_channels: int, scales: Sequence[Sequence[float]]):
        super().__init__()
        self.scales = [tuple(pair) for pair in scales]
        self.num_inputs = 2 * num_channels
        self.num_outputs = self.num_inputs * (2 * len(self.scales) + 1)
        self.register_buffer("weight", self._dense_filters())

    def _dense_filters(self) -> torch.Tensor:
        # Zeros for the other channels: on a CPU faster than groups, and than channels folded into the batch.
        own_channel = torch.eye(self.num_inputs)[:, None, :, None, None, None]
        return (own_channel * contrast_filters(self.scales)).flatten(0, 1)

    def initialize_parameters(self) -> None:
        """Fill the buffer of a model that was made without memory."""
        init.copy_(self.weight, self._dense_filters())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, d, h, w)` to `(batch, num_outputs, ceil(d / 2), ceil(h / 2), ceil(w / 2))`."""
        if odd := [axis for axis in (4, 3, 2) if pixel_values.shape[axis] % 2]:
            # The last plane once more, which changes neither a maximum nor a mean of it.
            pad = [number for axis in (4, 3, 2) for number in (0, int(axis in odd))]
            pixel_values = nn.functional.pad(pixel_values, pad, mode="replicate")
        # Stacked in the last axis, which is the channels-last layout: on a CPU the convolution takes half the time.
        halved = torch.stack([*_halved(pixel_values, torch.maximum), *_halved(pixel_values, _mean)], dim=-1)
        return nn.functional.conv3d(halved.movedim(-1, 1), self.weight, padding=_FILTER_SIZE // 2)


def _halved(
    volume: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Pairs of voxels combined axis by axis, per channel: pooling over 2^3, sooner on a CPU than torch's pools."""
    for axis in (2, 3, 4):
        pairs = volume.unflatten(axis, (-1, 2))
        volume = combine(pairs.select(axis + 1, 0), pairs.select(axis + 1, 1))
    return volume.unbind(1)


def _mean(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.lerp(one, other, 0.5)


def binned(responses: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
    r"""
    How far responses have come within each bin: a linear layer over it can ask for "more than this".

    Args:
        responses (`torch.Tensor` of shape `(batch, channels, ...)`).
        edges (`Sequence[float]`): ascending.

    Returns:
        `torch.Tensor` of shape `(batch, channels * (len(edges) - 1), ...)`, all bins of the lowest edge first.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.encoder_contrast_t3d import binned

    >>> binned(torch.tensor([[0.5], [1.5], [9.0]]), [0.0, 1.0, 3.0])
    tensor([[0.5000, 0.0000],
            [1.0000, 0.2500],
            [1.0000, 1.0000]])

    ```"""
    return torch.cat([((responses - low) / (high - low)).clamp(0, 1) for low, high in pairwise(edges)], dim=1)


class T3DPlaceProjection(T3DEncoderBlock):
    """
    A linear layer for all cells, and beside it, on the grid that is known, one for each cell: what a spot means
    depends on where it lies. A map on another grid (a local view's) has no known place: the shared layer alone acts.
    """

    def __init__(self, in_channels: int, out_channels: int, grid_size: Sequence[int]):
        super().__init__()
        self.grid_size = tuple(grid_size)
        self.shared = nn.Linear(in_channels, out_channels)
        self.place_weight = nn.Parameter(torch.zeros(prod(self.grid_size), in_channels, out_channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, in_channels, d, h, w)` to `(batch, out_channels, d, h, w)`."""
        grid = hidden_states.shape[2:]
        cells = hidden_states.flatten(2)
        tokens = self.shared(cells.transpose(1, 2))
        if tuple(grid) == self.grid_size:
            # By the root of their number: the mean over all cells then starts neither tiny nor large.
            scale = sqrt(len(self.place_weight))
            tokens = tokens + scale * torch.bmm(cells.permute(2, 0, 1), self.place_weight).transpose(0, 1)
        return tokens.transpose(1, 2).unflatten(2, grid)
