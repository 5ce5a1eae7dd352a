# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Text-informed restoration (TIR) of T3D v1: corruption of views, the decoder that restores them, and its loss.

Which views are restored from which encoder is left to the model. Corruption and loss are pure functions of tensors.
"""

from collections.abc import Sequence
from math import gcd, log2, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .communication_t3d import all_reduce_sum, global_mean
from .configuration_t3d import T3DConfig
from .counter_noise_t3d import hash_integers, normal_noise
from .encoder_blocks_t3d import T3DConv3d

# Streams of one seed: which blocks are zeroed must not follow from the noise.
_BLOCK_STREAM = 0x5851F42D


def view_seeds(seeds: torch.Tensor, num_views: int) -> torch.Tensor:
    """One seed per view, `(batch, views)` of 32 bits, from one seed per pair, `(batch,)`, of any integers."""
    halves = hash_integers(hash_integers(seeds & 0xFFFFFFFF) ^ ((seeds >> 32) & 0xFFFFFFFF))
    return hash_integers(halves[:, None] + torch.arange(num_views, device=seeds.device))


def corrupt_views(
    views: torch.Tensor, seeds: torch.Tensor, *, block_size: int, ratio: float, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Zero random blocks of each view and add Gaussian noise. What becomes of a view depends on its seed alone, on every
    device and in every batch, so that a second pass or another number of processes sees the same.

    ```python
    for view, seed in zip(views, seeds):
        blocks = cut view into cubes of block_size voxels, those at its far ends smaller
        view[round(ratio * len(blocks)) random blocks] = 0
        view += noise * standard_normal
    ```

    Args:
        views (`torch.Tensor` of shape `(views, channels, depth, height, width)`): scaled views.
        seeds (`torch.LongTensor` of shape `(views,)`): 32 bits, from `view_seeds`.
        block_size (`int`): edge of a block, in voxels.
        ratio (`float`): share of the blocks that are zeroed, at least one and never all.
        noise (`float`): standard deviation, in the unit of the views.

    Returns:
        The corrupted views, and where blocks were zeroed, `torch.BoolTensor` of shape
        `(views, 1, depth, height, width)`.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.restoration_t3d import corrupt_views

    >>> views, seeds = torch.ones(2, 1, 8, 8, 8), torch.tensor([3, 4])
    >>> corrupted, zeroed = corrupt_views(views, seeds, block_size=4, ratio=0.5, noise=0.0)
    >>> zeroed.float().mean().item(), corrupted[zeroed].abs().max().item()
    (0.5, 0.0)

    ```"""
    size = views.shape[2:]
    grid = [-(-side // block_size) for side in size]
    num_blocks = prod(grid)
    if num_blocks < 2:
        raise ValueError(
            f"tir_block_size={block_size} makes a local view of {tuple(size)} voxels (z, y, x) a single block; choose "
            "a smaller tir_block_size or a larger local_size"
        )
    num_zeroed = min(max(1, round(ratio * num_blocks)), num_blocks - 1)
    places = torch.arange(num_blocks, device=views.device)
    scores = hash_integers(places ^ hash_integers(seeds ^ _BLOCK_STREAM)[:, None])
    chosen = scores.argsort(dim=1, stable=True)[:, :num_zeroed]
    zeroed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True).unflatten(1, grid)
    for axis, side in enumerate(size, start=1):
        zeroed = zeroed.repeat_interleave(block_size, dim=axis).narrow(axis, 0, side)
    zeroed = zeroed[:, None]
    corrupted = views.masked_fill(zeroed, 0.0)
    if noise:
        # One view after another: the integers behind the noise take four times the space of the view.
        drawn = [normal_noise(seed, views[0].numel(), views.device).view_as(views[0]) for seed in seeds]
        corrupted = corrupted + noise * torch.stack(drawn).to(corrupted) if drawn else corrupted
    return corrupted, zeroed


def restoration_errors(
    restored: torch.Tensor, views: torch.Tensor, zeroed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Squared errors of each view, summed in float32 or finer: over all its voxels, and over those of zeroed blocks.

    Args:
        restored, views (`torch.Tensor` of shape `(views, channels, depth, height, width)`): what came out, what was.
        zeroed (`torch.BoolTensor` of shape `(views, 1, depth, height, width)`): from `corrupt_views`.

    Returns:
        The sums and how many voxels are in each, both of shape `(views, 2)`.
    """
    with torch.autocast(views.device.type, enabled=False):
        dtype = torch.promote_types(restored.dtype, torch.float32)
        squares = (restored.to(dtype) - views.to(dtype)).square()
        sums = torch.stack([squares.sum(dim=(1, 2, 3, 4)), (squares * zeroed).sum(dim=(1, 2, 3, 4))], dim=1)
    num_zeroed = zeroed.sum(dim=(1, 2, 3, 4)) * views.shape[1]
    return sums, torch.stack([torch.full_like(num_zeroed, views[0].numel() if len(views) else 0), num_zeroed], dim=1)


def restoration_loss(
    errors: torch.Tensor,
    num_voxels: torch.Tensor,
    local_mask: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Mean squared error over the voxels of all ranks' valid views.

    ```python
    loss = sum(errors[i, s, 0] for i, s in valid_views) / sum(num_voxels[i, s, 0] for i, s in valid_views)
    ```

    Args:
        errors, num_voxels (`torch.Tensor` of shape `(batch, views, 2)`): from `restoration_errors`.
        local_mask (`torch.BoolTensor` of shape `(batch, views)`): views that exist.

    Returns:
        The loss (see `global_mean` for its gradient) and, without a gradient, the same over zeroed blocks alone.
    """
    totals = torch.where(local_mask[..., None], errors, 0.0).sum(dim=(0, 1))
    counts = torch.where(local_mask[..., None], num_voxels, 0).sum(dim=(0, 1))
    zeroed = all_reduce_sum(torch.stack([totals[1].detach(), counts[1].to(totals)]), group)
    return global_mean(totals[0], counts[0], group), zeroed[0] / zeroed[1].clamp(min=1)


class T3DRestorationStage(GradientCheckpointingLayer):
    """Doubles the axes that still need it, cuts them to the view, then convolution 3^3, group norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, scale: tuple[int, int, int], num_groups: int):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=tuple(map(float, scale)), mode="nearest")
        self.convolution = T3DConv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(gcd(num_groups, out_channels), out_channels)

    def forward(self, hidden_states: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """`(views, in_channels, d, h, w)` to `(views, out_channels, *size)`, at most `scale` times as large."""
        depth, height, width = size
        hidden_states = self.upsample(hidden_states)[:, :, :depth, :height, :width]
        return nn.functional.relu(self.norm(self.convolution(hidden_states)))


class T3DRestoration(nn.Module):
    """
    Restores views from the token maps of corrupted ones, which ask the report: `F' + CrossAttn(F', report)`, then as
    many doublings per axis as the encoder's stride on that axis has.

    Args:
        config ([`T3DConfig`]): `projection_dim`, `num_tir_heads`, `tir_decoder_channels`, `tir_norm_groups`.
        stride (three `int`, z y x): voxels per token of the encoder, each a power of 2.

    `chunk_size` views are decoded at once and, where that is not all of them, again in the backward pass, so that
    memory holds the maps of one chunk at full resolution; `None` decodes all at once. The gradients are the same.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d import T3DConfig
    >>> from modeling_t3d.restoration_t3d import T3DRestoration

    >>> restoration = T3DRestoration(T3DConfig.from_preset("tiny"), stride=(4, 8, 8))
    >>> maps, report = torch.zeros(2, 3, 128, 2, 2, 2), torch.zeros(2, 7, 64)
    >>> tuple(restoration(maps, report, None, size=(8, 16, 16)).shape)
    (6, 1, 8, 16, 16)

    ```"""

    def __init__(self, config: T3DConfig, stride: tuple[int, int, int]):
        super().__init__()
        if any(step < 1 or step & (step - 1) for step in stride):
            raise ValueError(
                f"restoration doubles its maps, but the encoder's stride (z, y, x) is {tuple(stride)}; choose "
                "stem_stride or patch_size so that each is a power of 2, or set lambda_tir=0"
            )
        size = config.projection_dim
        doublings = [int(log2(step)) for step in stride]
        channels = config.tir_decoder_channels
        if channels is None:
            channels = [max(16, size >> (stage + 1)) for stage in range(max(doublings))]
        elif len(channels) != max(doublings):
            raise ValueError(
                f"tir_decoder_channels names {len(channels)} stages, but the encoder's stride (z, y, x) of "
                f"{tuple(stride)} takes {max(doublings)} doublings; name one number per doubling"
            )
        self.chunk_size: int | None = None
        self.doublings = doublings
        self.head_dim = size // config.num_tir_heads
        vision: Any = config.vision_config
        self.input_projection = nn.Linear(vision.hidden_size, size)
        self.query_projection = nn.Linear(size, size)
        self.key_projection = nn.Linear(size, size)
        self.value_projection = nn.Linear(size, size)
        self.output_projection = nn.Linear(size, size)
        widths = [size, *channels]
        # An encoder that strides less on one axis does so in its stem, at the finest scale: the last stages leave that
        # axis alone.
        self.stages = nn.ModuleList(
            T3DRestorationStage(widths[stage], widths[stage + 1], _scale(doublings, stage), config.tir_norm_groups)
            for stage in range(len(channels))
        )
        self.output_convolution = nn.Conv3d(widths[-1], vision.num_channels, 1)

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, size)` to `(batch, heads, tokens, head_dim)`."""
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def inform(
        self, tokens: torch.Tensor, report_tokens: torch.Tensor, report_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`F' + CrossAttn(F', report)`: tokens `(batch, tokens, size)` of all of a pair's views, to the same shape."""
        query = self.split_heads(self.query_projection(tokens))
        key, value = (
            self.split_heads(projection(report_tokens)) for projection in (self.key_projection, self.value_projection)
        )
        mask = None if report_mask is None else report_mask.bool()[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return tokens + self.output_projection(mixed.transpose(1, 2).flatten(2))

    def forward(
        self,
        token_maps: torch.Tensor,
        report_tokens: torch.Tensor,
        report_mask: torch.Tensor | None,
        size: tuple[int, int, int],
    ) -> torch.Tensor:
        """
        Args:
            token_maps (`torch.Tensor` of shape `(batch, views, hidden_size, d, h, w)`): of corrupted views.
            report_tokens (`torch.Tensor` of shape `(batch, report_tokens, projection_dim)`): projected.
            report_mask (`torch.Tensor` of shape `(batch, report_tokens)`, *optional*): 0 for padding.
            size (three `int`, z y x): of the views; each doubling is cut at the far ends to what they need [choice],
                so that nothing beyond a view is computed or enters the statistics of a norm.

        Returns:
            `torch.Tensor` of shape `(batch * views, num_channels, depth, height, width)`.
        """
        batch, num_views, _, *grid = token_maps.shape
        tokens = self.input_projection(token_maps.flatten(3).transpose(2, 3)).flatten(1, 2)
        tokens = self.inform(tokens, report_tokens, report_mask)
        # (batch, views * tokens, size) -> (batch * views, size, d, h, w)
        hidden_states = tokens.view(batch * num_views, prod(grid), -1).transpose(1, 2).unflatten(2, grid)
        chunks = hidden_states.split(self.chunk_size or max(1, len(hidden_states)))
        # The backward pass begins with what came last, whose graph is kept; the others are decoded again.
        restored = [checkpoint(self.decode, chunk, size, use_reentrant=False) for chunk in chunks[:-1]]
        return torch.cat([*restored, self.decode(chunks[-1], size)]) if restored else self.decode(hidden_states, size)

    def decode(self, hidden_states: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
        """Informed token maps `(views, projection_dim, d, h, w)` to views of this size."""
        for index, stage in enumerate(self.stages):
            steps = [2 ** max(0, doublings - index - 1) for doublings in self.doublings]
            needed = [-(-extent // step) for extent, step in zip(size, steps, strict=True)]
            hidden_states = stage(hidden_states, needed)
        return self.output_convolution(hidden_states)


def _scale(doublings: list[int], stage: int) -> tuple[int, int, int]:
    depth, height, width = (2 if stage < count else 1 for count in doublings)
    return depth, height, width


__all__ = [
    "T3DRestoration",
    "T3DRestorationStage",
    "corrupt_views",
    "restoration_errors",
    "restoration_loss",
    "view_seeds",
]
