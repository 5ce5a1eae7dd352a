# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The units that 3D encoders repeat: residual blocks, transformer layers, position codes. No encoder is built here."""

from collections.abc import Callable
from math import prod

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs

from .configuration_t3d import T3DVisionConfig


class T3DEncoderBlock(GradientCheckpointingLayer):
    """
    Base of an encoder's repeated unit: what activation checkpointing recomputes, what `output_hidden_states` records
    and what stays on one device. It takes its hidden states as first positional argument and returns a tensor.
    """


def norm_layer(config: T3DVisionConfig, num_channels: int) -> nn.Module:
    """The configured normalisation."""
    if config.norm == "group":
        return nn.GroupNorm(config.num_norm_groups, num_channels, eps=config.norm_eps)
    if config.norm == "batch":
        return nn.BatchNorm3d(num_channels, eps=config.norm_eps)
    return nn.InstanceNorm3d(num_channels, eps=config.norm_eps, affine=True)


class T3DConv3d(nn.Conv3d):
    """
    `nn.Conv3d` whose weight gradient is right in 16 bits on a CPU as well.

    Where a map is about as small as the kernel, such as the last one of a small view, torch 2.13 gives garbage for
    it, now and then infinite (seen on an AMD CPU with AVX-512; not looked for on CPUs with AMX). The zeros around
    such maps are made beforehand: that takes another way through torch, and the outputs are the same.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        in_16_bits = input.dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
        # Sizes are asked last: compiled or exported, each question about them narrows what a graph is good for.
        if input.device.type == "cpu" and in_16_bits and min(input.shape[2:]) <= max(self.kernel_size):
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice)
            return nn.functional.conv3d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return super()._conv_forward(input, weight, bias)


class T3DZeroPadShortcut(nn.Module):
    """
    Shortcut A of residual networks: every `stride`-th voxel, and zeros for the new channels; no parameters.

    MONAI's form of it detaches the shortcut from the graph; here the gradient flows, as the residual network means it.
    """

    def __init__(self, num_new_channels: int, stride: int):
        super().__init__()
        self.num_new_channels = num_new_channels
        self.stride = stride

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, d, h, w)` to `(batch, channels + num_new_channels, ceil(d / stride), ...)`."""
        hidden_states = hidden_states[:, :, :: self.stride, :: self.stride, :: self.stride]
        return nn.functional.pad(hidden_states, (0, 0, 0, 0, 0, 0, 0, self.num_new_channels))


def _shortcut(config: T3DVisionConfig, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """What brings a block's input to the shape of its output; `None` where they agree."""
    if stride == 1 and in_channels == out_channels:
        return None
    if config.shortcut_type == "A":
        if out_channels < in_channels:
            raise ValueError(
                f'shortcut_type="A" cannot reduce {in_channels} channels to {out_channels}; '
                'let hidden_sizes ascend from embedding_size or choose shortcut_type="B"'
            )
        return T3DZeroPadShortcut(out_channels - in_channels, stride)
    convolution = T3DConv3d(in_channels, out_channels, 1, stride=stride, bias=config.downsample_bias)
    return nn.Sequential(convolution, norm_layer(config, out_channels))


# In the blocks, ReLU and the residual sum work in place: they overwrite the output of a normalisation, which keeps its
# input (not its output) for the backward pass. A block's own input is never written to.
class T3DResNetBasicBlock(T3DEncoderBlock):
    """Two 3^3 convolutions and a shortcut; the stride sits in the first."""

    def __init__(self, config: T3DVisionConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = T3DConv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(config, out_channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = T3DConv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = norm_layer(config, out_channels)
        self.downsample = _shortcut(config, in_channels, out_channels, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, in_channels, d, h, w)` to `(batch, out_channels, ceil(d / stride), ...)`."""
        residual = hidden_states if self.downsample is None else self.downsample(hidden_states)
        hidden_states = self.act(self.bn1(self.conv1(hidden_states)))
        hidden_states = self.bn2(self.conv2(hidden_states))
        hidden_states += residual
        return self.act(hidden_states)


class T3DResNetBottleneckBlock(T3DEncoderBlock):
    """Convolutions of 1^3, 3^3 (which strides) and 1^3 on a quarter of the channels, and a shortcut."""

    expansion = 4

    def __init__(self, config: T3DVisionConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        inner_channels = out_channels // self.expansion
        self.conv1 = T3DConv3d(in_channels, inner_channels, 1, bias=False)
        self.bn1 = norm_layer(config, inner_channels)
        self.conv2 = T3DConv3d(inner_channels, inner_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm_layer(config, inner_channels)
        self.conv3 = T3DConv3d(inner_channels, out_channels, 1, bias=False)
        self.bn3 = norm_layer(config, out_channels)
        self.act = nn.ReLU(inplace=True)
        self.downsample = _shortcut(config, in_channels, out_channels, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, in_channels, d, h, w)` to `(batch, out_channels, ceil(d / stride), ...)`."""
        residual = hidden_states if self.downsample is None else self.downsample(hidden_states)
        hidden_states = self.act(self.bn1(self.conv1(hidden_states)))
        hidden_states = self.act(self.bn2(self.conv2(hidden_states)))
        hidden_states = self.bn3(self.conv3(hidden_states))
        hidden_states += residual
        return self.act(hidden_states)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Plain attention, which also returns its map.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): projected tokens.
        attention_mask (`torch.Tensor`, *optional*): added to the scores.

    Returns:
        The mixed values, `(batch, tokens, heads, head_dim)`, and the map, `(batch, heads, tokens, tokens)`.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class T3DViTAttention(nn.Module):
    """Multi-head self-attention with separate projections, computed by the configured `attn_implementation`."""

    def __init__(self, config: T3DVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, tokens, hidden_size)` to the same shape, and the attention map where the implementation has one."""
        shape = hidden_states.shape[:-1]
        # (batch, tokens, hidden_size) -> (batch, heads, tokens, head_dim)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.out_proj(output.reshape(*shape, -1)), weights


class T3DViTMLP(nn.Module):
    """The feed-forward part of a transformer layer."""

    def __init__(self, config: T3DVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden_size)` to the same shape."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class T3DViTLayer(T3DEncoderBlock):
    """A pre-norm transformer layer."""

    def __init__(self, config: T3DVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = T3DViTAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = T3DViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """`(batch, tokens, hidden_size)` to the same shape."""
        hidden_states = hidden_states + self.dropout(self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0])
        return hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))


def sincos_positions(grid: tuple[int, int, int], hidden_size: int, device: torch.device | None = None) -> torch.Tensor:
    """
    Fixed position codes for a grid of any size: sines and cosines of each axis's token index, a third of the channels
    per axis, zeros in the channels that six does not divide.

    Returns:
        `torch.Tensor` of shape `(1, tokens, hidden_size)`, float32.
    """
    num_frequencies = hidden_size // 6
    exponents = torch.arange(num_frequencies, device=device, dtype=torch.float32) / num_frequencies
    frequencies = 10000.0**-exponents
    codes = []
    for axis, size in enumerate(grid):
        angles = torch.arange(size, device=device, dtype=torch.float32)[:, None] * frequencies
        shape = [1, 1, 1, 2 * num_frequencies]
        shape[axis] = size
        codes.append(torch.cat([angles.sin(), angles.cos()], dim=-1).view(shape).expand(*grid, -1))
    table = torch.cat(codes, dim=-1).reshape(1, prod(grid), 6 * num_frequencies)
    return nn.functional.pad(table, (0, hidden_size - 6 * num_frequencies))


__all__ = [
    "T3DConv3d",
    "T3DEncoderBlock",
    "T3DResNetBasicBlock",
    "T3DResNetBottleneckBlock",
    "T3DViTAttention",
    "T3DViTLayer",
    "T3DViTMLP",
    "T3DZeroPadShortcut",
    "eager_attention_forward",
    "norm_layer",
    "sincos_positions",
]
