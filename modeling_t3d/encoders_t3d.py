# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""3D vision encoders behind one contract: a pyramid of feature maps and the last token map. Heads know only that."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs

from .configuration_t3d import T3DVisionConfig
from .encoder_blocks_t3d import (
    T3DConv3d,
    T3DEncoderBlock,
    T3DResNetBasicBlock,
    T3DResNetBottleneckBlock,
    T3DViTAttention,
    T3DViTLayer,
    eager_attention_forward,
    norm_layer,
    sincos_positions,
)
from .encoder_contrast_t3d import T3DPlaceProjection, binned, contrast_responses, num_responses

# Before torch 2.10 they did update them again. There, blocks beside batch norms keep their activations when compiled.
_COMPILED_GRAPHS_COUNT_TWICE = torch.__version__ < "2.10"


@dataclass
class T3DEncoderOutput(ModelOutput):
    r"""
    What every encoder puts out.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, hidden_size, depth, height, width)`):
            The token map: one token per cell of the encoder's coarsest grid.
        feature_maps (`tuple[torch.FloatTensor, ...]`, each of shape `(batch, channels, depth, height, width)`):
            The pyramid, finest map first; its last entry is `last_hidden_state`. Channels and strides of each map are
            the encoder's `feature_channels` and `feature_strides`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    feature_maps: tuple[torch.FloatTensor, ...] | None = None


class T3DEncoder(nn.Module):
    r"""
    The contract of a 3D encoder. A new one derives from this class, sets the attributes below, implements `forward`
    and `get_input_embeddings`, builds on [`T3DEncoderBlock`] and is entered in `ENCODERS`.

    Attributes:
        feature_channels (`list[int]`): channels of each feature map, finest first.
        feature_strides (`list[tuple[int, int, int]]`): voxels per cell of each feature map, per axis (z, y, x).
        hidden_size (`int`): channels of the token map.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.configuration_t3d import T3DVisionConfig
    >>> from modeling_t3d.encoders_t3d import build_encoder

    >>> config = T3DVisionConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    >>> encoder = build_encoder(config)
    >>> output = encoder(torch.zeros(2, 1, 16, 32, 32))
    >>> encoder.feature_strides
    [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
    >>> [tuple(feature_map.shape[2:]) for feature_map in output.feature_maps]
    [(16, 32, 32), (8, 16, 16), (4, 8, 8)]

    ```"""

    feature_channels: list[int]
    feature_strides: list[tuple[int, int, int]]
    hidden_size: int

    def __init__(self, config: T3DVisionConfig):
        super().__init__()
        self.config = config
        self.hidden_size = int(config.hidden_size)

    # The contract: each encoder in `ENCODERS` implements these two; this base is never built itself.
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> T3DEncoderOutput:
        """Encode views of shape `(batch, num_channels, depth, height, width)`."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The first layer that sees voxels; its weight's dtype is the dtype that the encoder computes in."""
        raise NotImplementedError

    def initialize_parameters(self) -> None:
        """Fill parameters and buffers that stand bare in this encoder, by `transformers.initialization` only."""

    def prepare_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Check the views' rank and channels, and cast them to the dtype of the weights."""
        if pixel_values.ndim != 5 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} do not fit: the encoder takes (batch, "
                f"{self.config.num_channels}, depth, height, width); fold views into the batch, and let the "
                "processor's windows match num_channels"
            )
        return pixel_values.to(self.get_input_embeddings().weight.dtype)


class T3DResNet(T3DEncoder):
    """
    3D residual network with the parameter names of MONAI's `ResNet`, and its outputs where the configuration is one
    that MONAI has. Beyond it: the norm reaches every block and shortcut, and every stage's map is put out.

    The pyramid holds the stem's map (before pooling), then each stage's.
    """

    def __init__(self, config: T3DVisionConfig):
        super().__init__(config)
        stem_stride = cast("tuple[int, int, int]", tuple(config.stem_stride))
        self.conv1 = T3DConv3d(
            config.num_channels,
            config.embedding_size,
            kernel_size=tuple(config.stem_kernel_size),
            stride=stem_stride,
            padding=tuple(size // 2 for size in config.stem_kernel_size),
            bias=False,
        )
        self.bn1 = norm_layer(config, config.embedding_size)
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1) if config.stem_pool else nn.Identity()

        block_class = T3DResNetBasicBlock if config.layer_type == "basic" else T3DResNetBottleneckBlock
        self.feature_channels = [config.embedding_size, *config.hidden_sizes]
        self.feature_strides = [stem_stride]
        self.layer_names = [f"layer{stage + 1}" for stage in range(len(config.depths))]
        stage_stride = 2 if config.stem_pool else 1
        for stage, name in enumerate(self.layer_names):
            block_stride = 1 if stage == 0 else 2
            stage_stride *= block_stride
            in_channels, out_channels = self.feature_channels[stage : stage + 2]
            blocks = [block_class(config, in_channels, out_channels, block_stride)]
            blocks += [block_class(config, out_channels, out_channels, 1) for _ in range(config.depths[stage] - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            depth, height, width = (stride * stage_stride for stride in stem_stride)
            self.feature_strides.append((depth, height, width))

    def get_input_embeddings(self) -> nn.Module:
        """The stem's convolution."""
        return self.conv1

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> T3DEncoderOutput:
        """Encode views of shape `(batch, num_channels, depth, height, width)`, of any size."""
        hidden_states = self.act(self.bn1(self.conv1(self.prepare_input(pixel_values))))
        feature_maps = [hidden_states]
        hidden_states = self.maxpool(hidden_states)
        for name in self.layer_names:
            hidden_states = self.get_submodule(name)(hidden_states)
            feature_maps.append(hidden_states)
        return T3DEncoderOutput(last_hidden_state=hidden_states, feature_maps=tuple(feature_maps))


class T3DViT(T3DEncoder):
    """
    3D vision transformer without a class token: patches, fixed position codes, pre-norm layers, a final norm.

    Every map of the pyramid has the patch's stride; it holds the layers of `config.feature_layers`, each through the
    final norm.
    """

    def __init__(self, config: T3DVisionConfig):
        super().__init__(config)
        if config.hidden_size < 6:
            raise ValueError(
                f"hidden_size={config.hidden_size} is too small for positions on three axes; use 6 or more"
            )
        self.patch_size = cast("tuple[int, int, int]", tuple(config.patch_size))
        # Linear over a patch's voxels in order (channel, z, y, x): a convolution whose stride is its kernel.
        self.patch_embedding = nn.Linear(config.num_channels * prod(self.patch_size), config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(T3DViTLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feature_channels = [self.hidden_size] * len(config.feature_layers)
        self.feature_strides = [self.patch_size] * len(config.feature_layers)

    def get_input_embeddings(self) -> nn.Module:
        """The projection of patches to tokens."""
        return self.patch_embedding

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> T3DEncoderOutput:
        """Encode views `(batch, num_channels, depth, height, width)` whose sides are multiples of the patch."""
        pixel_values = self.prepare_input(pixel_values)
        if any(side % patch for side, patch in zip(pixel_values.shape[2:], self.patch_size, strict=True)):
            raise ValueError(
                f"views of {tuple(pixel_values.shape[2:])} voxels (z, y, x) are no whole number of patches of "
                f"{self.patch_size}; choose view sizes in the processor that are multiples of patch_size"
            )
        depth, height, width = grid = tuple(
            side // patch for side, patch in zip(pixel_values.shape[2:], self.patch_size, strict=True)
        )
        # (batch, channels, z, y, x) -> (batch, tokens, channels * patch voxels)
        patches = pixel_values.unflatten(4, (width, -1)).unflatten(3, (height, -1)).unflatten(2, (depth, -1))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        hidden_states = self.patch_embedding(patches)
        positions = sincos_positions(grid, self.hidden_size, hidden_states.device)
        hidden_states = self.dropout(hidden_states + positions.to(hidden_states.dtype))

        feature_maps = []
        for number, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, **kwargs)
            if number in self.config.feature_layers:
                feature_maps.append(self.post_layernorm(hidden_states).transpose(1, 2).unflatten(2, grid))
        return T3DEncoderOutput(last_hidden_state=feature_maps[-1], feature_maps=tuple(feature_maps))


class T3DLocalContrast(T3DEncoder):
    """
    Small bright and dark spots and their places in the body. Our own, for little compute: an hour on two CPU cores
    learns focal lesions of phantoms with it.

    Per cell of the grid the largest responses of fixed operations ([`contrast_responses`]), batch-normalised and told
    in bins; then one linear layer per cell, which is sparse where training asks for it (`place_soft_threshold`).
    """

    def __init__(self, config: T3DVisionConfig):
        super().__init__(config)
        every_channel = list(range(config.num_channels))
        self.bright_channels = every_channel if config.bright_channels is None else list(config.bright_channels)
        self.dark_channels = every_channel if config.dark_channels is None else list(config.dark_channels)
        count = num_responses(config.num_channels, self.bright_channels, self.dark_channels)
        self.norm = nn.BatchNorm3d(count, eps=config.norm_eps, affine=False)
        num_binned = count * (len(config.response_edges) - 1)
        self.projection = T3DPlaceProjection(num_binned, self.hidden_size, config.grid_size)
        self.feature_channels = [num_binned, self.hidden_size]
        self.feature_strides = [(config.cell_size,) * 3] * 2

    def get_input_embeddings(self) -> nn.Module:
        """The first layer that learns, the one that all cells share."""
        return self.projection.shared

    def initialize_parameters(self) -> None:
        """A normal distribution for what is learnt of places."""
        init.normal_(self.projection.place_weight, mean=0.0, std=self.config.initializer_range)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> T3DEncoderOutput:
        """Encode views of shape `(batch, num_channels, depth, height, width)`, of any size of at least a cell."""
        dtype = self.prepare_input(pixel_values).dtype
        cell_size = self.config.cell_size
        if min(pixel_values.shape[2:]) < cell_size:
            raise ValueError(
                f"views of {tuple(pixel_values.shape[2:])} voxels (z, y, x) are smaller than one cell of "
                f"{cell_size} voxels; choose larger views in the processor or a smaller cell_size"
            )
        # Of the values as given: rounded to the weights' precision they would have noise of their own.
        levels = contrast_responses(pixel_values.detach(), self.bright_channels, self.dark_channels, cell_size)
        # Whole numbers hold no NaN: a volume that is not finite stays so, as in the other encoders.
        finite = 0 * pixel_values.detach().float().mean(dim=(1, 2, 3, 4), keepdim=True)
        responses = binned(self.norm((levels + finite).to(dtype)), self.config.response_edges)
        if self.training and self.projection.gradient_checkpointing and not torch.compiler.is_compiling():
            # Re-entrant checkpoints pass gradients on to weights only where an input takes some.
            responses.requires_grad_()
        hidden_states = self.projection(responses)
        return T3DEncoderOutput(last_hidden_state=hidden_states, feature_maps=(responses, hidden_states))


ENCODERS: dict[str, type[T3DEncoder]] = {"resnet": T3DResNet, "vit": T3DViT, "local_contrast": T3DLocalContrast}


def build_encoder(config: T3DVisionConfig) -> T3DEncoder:
    """The encoder that `config.encoder_type` names in `ENCODERS`."""
    if config.encoder_type not in ENCODERS:
        nearest = difflib.get_close_matches(config.encoder_type, ENCODERS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"unknown encoder_type {config.encoder_type!r}; the encoders are {', '.join(map(repr, ENCODERS))}{hint}"
        )
    return ENCODERS[config.encoder_type](config)


def initialize_encoder_module(module: nn.Module, initializer_range: float = 0.02) -> None:
    """
    Initialise one module of an encoder, where its weights were not loaded; for `_init_weights`.

    Convolutions draw from MONAI's law (normal, variance `2 / fan_out`), linear layers from a normal of standard
    deviation `initializer_range`; norms start as the identity, running statistics as those of a standard normal.
    """
    if isinstance(module, nn.Conv3d):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, mean=0.0, std=initializer_range)
    elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, _BatchNorm, _InstanceNorm)):
        if module.weight is not None:
            init.ones_(module.weight)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
    elif isinstance(module, T3DEncoder):
        module.initialize_parameters()
        return
    else:
        return
    if module.bias is not None:
        init.zeros_(module.bias)


def trains_batch_norm(module: nn.Module) -> bool:
    """Whether `module` holds a batch norm in training mode: views or pairs that it sees then depend on each other."""
    return any(isinstance(child, _BatchNorm) and child.training for child in module.modules())


@contextmanager
def frozen_batch_norm_statistics(module: nn.Module) -> Iterator[None]:
    """
    Within it, batch norms of `module` in training mode normalise as ever but leave their running statistics alone.

    `track_running_stats` stays as it is: without it, a recomputed block would save fewer tensors than the first run.
    """
    batch_norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    saved = [(child.momentum, child.num_batches_tracked) for child in batch_norms]
    for child in batch_norms:
        child.momentum = 0.0
        # One that is synchronised over processes insists on counting: it counts on a copy.
        synchronised = isinstance(child, nn.SyncBatchNorm)
        child.num_batches_tracked = child.num_batches_tracked.clone() if synchronised else None
    try:
        yield
    finally:
        for child, (momentum, num_batches_tracked) in zip(batch_norms, saved, strict=True):
            child.momentum, child.num_batches_tracked = momentum, num_batches_tracked


def checkpoint_counting_once(
    module: nn.Module, checkpoint_function: Callable[..., Any], block: Callable[..., Any], *args: Any
) -> Any:
    """
    Run `checkpoint_function(block, *args)` so that batch norms of `module` count each batch once: when the backward
    pass runs the block again, running statistics stay as they are.
    """
    if torch.compiler.is_compiling():  # a compiled graph updates each buffer once, however much it recomputes
        if _COMPILED_GRAPHS_COUNT_TWICE and any(isinstance(child, _BatchNorm) for child in module.modules()):
            return block(*args)
        return checkpoint_function(block, *args)
    is_first_run = True

    def run(*args: Any) -> Any:
        nonlocal is_first_run
        if is_first_run:
            is_first_run = False
            return block(*args)
        with frozen_batch_norm_statistics(module):
            return block(*args)

    return checkpoint_function(run, *args)


__all__ = [
    "ENCODERS",
    "T3DEncoder",
    "T3DEncoderBlock",
    "T3DEncoderOutput",
    "T3DLocalContrast",
    "T3DResNet",
    "T3DResNetBasicBlock",
    "T3DResNetBottleneckBlock",
    "T3DViT",
    "T3DViTAttention",
    "T3DViTLayer",
    "build_encoder",
    "checkpoint_counting_once",
    "eager_attention_forward",
    "frozen_batch_norm_statistics",
    "initialize_encoder_module",
    "sincos_positions",
    "trains_batch_norm",
]
