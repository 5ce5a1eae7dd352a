# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What an encoder of local contrast sees: bright and dark spots, told apart from edges and tubes, cell by cell."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from math import prod, sqrt

import torch
from torch import nn

from .encoder_blocks_t3d import T3DEncoderBlock
from .threads_t3d import run_single_threaded

# To the neighbours of a voxel, of which one of each opposite pair: 3 along axes, 6 across faces, 4 across corners.
_LINES = tuple(step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0))
# Voxels of a line [choice, by fits on labels of training phantoms]: lines are longer than the spots they tell apart.
_COARSE_LINE, _BRIGHT_LINE, _DARK_LINE = 3, 5, 7
_HIGHEST = 255
_Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def spots(volumes: torch.Tensor, length: int) -> torch.Tensor:
    r"""
    How much brighter a voxel is than its surroundings in every direction: the volume less its largest opening by a
    line of so many voxels, over the 13 directions of a voxel's neighbours. An edge, a plate or a tube holds a line and
    gives 0, where a difference of Gaussians answers to all of them; what is smaller than the lines remains.

    Args:
        volumes (`torch.Tensor` of shape `(..., depth, height, width)`): of any number type, none below 0; beyond its
            border a volume goes on as it ends.
        length (`int`): of the lines in voxels, odd.

    Returns:
        `torch.Tensor` like `volumes`, at least 0.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.encoder_contrast_t3d import spots

    >>> volume = torch.zeros(9, 9, 9, dtype=torch.uint8)
    >>> volume[:, 2, 2], volume[6, 6, 6] = 100, 80  # a vessel, and a nodule beside it
    >>> spots(volume, 3).nonzero().tolist(), spots(volume, 3).max().item()
    ([[6, 6, 6]], 80)

    ```"""
    margin = length - 1
    padded = _continued(volumes, margin, margin)
    height, width = padded.shape[-2:]
    flat = padded.flatten(-3)
    opened = torch.zeros_like(flat)
    for z, y, x in _LINES:
        step = (z * height + y) * width + x
        # Where a row of the flat volume ends the next begins, but the margin keeps what mixes out of the result.
        eroded = _along(flat, step, length, torch.minimum)
        opening = _along(eroded, step, length, torch.maximum)
        lines = opened.narrow(-1, margin * step, opening.shape[-1])
        torch.maximum(lines, opening, out=lines)
    inside = tuple(slice(margin, margin + side) for side in volumes.shape[-3:])
    return volumes - opened.view(padded.shape)[(..., *inside)]


def _along(flat: torch.Tensor, step: int, length: int, combine: _Combine) -> torch.Tensor:
    """Each entry combined with the `length - 1` that follow it, `step` apart: doubled as far as that goes."""
    reach = 1
    while reach < length:
        further = min(reach, length - reach)
        size = flat.shape[-1] - further * step
        flat = combine(flat.narrow(-1, 0, size), flat.narrow(-1, further * step, size))
        reach += further
    return flat


def _continued(volumes: torch.Tensor, before: int, after: int | Sequence[int]) -> torch.Tensor:
    """Replicated at the borders, which torch's padding does on a GPU for floating point alone."""
    afters = (after,) * 3 if isinstance(after, int) else after
    for axis, end in zip((-1, -2, -3), reversed(afters), strict=True):
        size = volumes.shape[axis]
        first, last = volumes.narrow(axis, 0, 1), volumes.narrow(axis, size - 1, 1)
        volumes = torch.cat([first] * before + [volumes] + [last] * end, dim=axis)
    return volumes


def _pooled(volumes: torch.Tensor, size: int, combine: _Combine) -> torch.Tensor:
    """Blocks of `size`^3 voxels, which fit, each combined into one; on a CPU sooner than torch's pools."""
    for axis in (-3, -2, -1):
        slices = volumes.unflatten(axis, (-1, size)).unbind(axis)
        volumes = slices[0]
        for further in slices[1:]:
            volumes = combine(volumes, further)
    return volumes


def _smoothed(volumes: torch.Tensor) -> torch.Tensor:
    """The binomial filter (1, 2, 1) / 4 along each axis: neighbours added twice, in whole numbers."""
    sums = _continued(volumes, 1, 1).to(torch.int16)
    for axis in (-1, -2, -3):
        for _ in range(2):
            size = sums.shape[axis] - 1
            sums = sums.narrow(axis, 0, size) + sums.narrow(axis, 1, size)
    return sums.bitwise_right_shift_(6).to(volumes.dtype)


def num_responses(num_channels: int, bright_channels: Sequence[int], dark_channels: Sequence[int]) -> int:
    """Responses of a cell: of three kinds of bright spots, one of dark ones, and the ends of each intensity."""
    return 3 * len(bright_channels) + len(dark_channels) + 2 * num_channels


def _responses(pixel_values: torch.Tensor, bright: Sequence[int], dark: Sequence[int], cell_size: int) -> torch.Tensor:
    levels = pixel_values.clamp(-1, 1).add_(1).mul_(_HIGHEST / 2).add_(0.5).to(torch.uint8)
    levels = _continued(levels, 0, [-side % cell_size for side in levels.shape[-3:]])
    lit, shaded = (levels[..., list(channels), :, :, :] for channels in (bright, dark))
    # The window's lower end is another tissue (fat or air in a window of soft tissue), which is no dark spot.
    shaded = _HIGHEST - torch.where(shaded == 0, (_HIGHEST + 1) // 2, shaded)
    full = [spots(lit, _BRIGHT_LINE), spots(_smoothed(lit), _BRIGHT_LINE), spots(_smoothed(shaded), _DARK_LINE)]
    mean = (_pooled(levels.to(torch.int16), 2, torch.add) >> 3).to(torch.uint8)
    # The largest of 2^3 voxels keeps what a mean would thin out: a stone of one voxel.
    half = [spots(_pooled(lit, 2, torch.maximum), _COARSE_LINE), mean, _HIGHEST - mean]
    parts = [
        _pooled(torch.cat(maps, dim=-4), size, torch.maximum)
        for maps, size in ((full, cell_size), (half, cell_size // 2))
    ]
    return torch.cat(parts, dim=-4)


def _empty_responses(
    pixel_values: torch.Tensor, bright_channels: Sequence[int], dark_channels: Sequence[int], cell_size: int
) -> torch.Tensor:
    batch, channels, *sides = pixel_values.shape
    count = num_responses(channels, bright_channels, dark_channels)
    cells = [-(-side // cell_size) for side in sides]
    return pixel_values.new_empty((batch, count, *cells), dtype=torch.uint8)


@torch.library.custom_op("modeling_t3d::contrast_responses", mutates_args=())
def contrast_responses(
    pixel_values: torch.Tensor, bright_channels: Sequence[int], dark_channels: Sequence[int], cell_size: int
) -> torch.Tensor:
    r"""
    The largest response of each kind in each cell: of the bright channels, spots of the voxels, of the smoothed voxels
    and of the largest of 2^3 voxels; of the dark channels, dark spots of the smoothed voxels; of all channels, the
    highest and the lowest mean of 2^3 voxels. In 8 bits, in which a CPU looks at four times as many voxels at once;
    one operator, so that `torch.compile` need not look inside. No gradient reaches the voxels.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, depth, height, width)`):
            From -1 to 1, the ends of a window; what lies beyond counts as the end.
        bright_channels, dark_channels (`Sequence[int]`): in which to look for such spots.
        cell_size (`int`): edge of a cell in voxels, even; a last cell that is cut goes on as the volume ends.

    Returns:
        `torch.Tensor` of shape `(batch, num_responses, ceil(depth / cell_size), ...)`: `uint8`, of 255 per window.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.encoder_contrast_t3d import contrast_responses

    >>> contrast_responses(torch.zeros(1, 1, 12, 12, 14), [0], [0], 6).shape
    torch.Size([1, 6, 2, 2, 3])

    ```"""
    if pixel_values.device.type != "cpu":
        return _responses(pixel_values, bright_channels, dark_channels, cell_size)
    responses = _empty_responses(pixel_values, bright_channels, dark_channels, cell_size)
    # One volume at a time, whose maps fit a CPU's caches.
    num_runs = min(len(pixel_values), torch.get_num_threads())

    def task(first: int) -> None:
        for index in range(first, len(pixel_values), num_runs):
            responses[index] = _responses(pixel_values[index], bright_channels, dark_channels, cell_size)

    if num_runs > 1:
        run_single_threaded([partial(task, first) for first in range(num_runs)])
    elif num_runs == 1:
        task(0)
    return responses


contrast_responses.register_fake(_empty_responses)


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
