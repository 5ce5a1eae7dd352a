# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""3D ResNets in MONAI's layout: depths, configurations, the key map, and the check against MONAI's own network."""

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets.resnet import ResNet

from conversion.engine import ConversionError, KeyRule
from modeling_t3d.configuration_t3d import T3DVisionConfig

# Depth -> (residual block, blocks per stage).
ARCHITECTURES = {
    10: ("basic", [1, 1, 1, 1]),
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
    200: ("bottleneck", [3, 24, 36, 3]),
}
WIDTHS = [64, 128, 256, 512]
_EXPANSION = {"basic": 1, "bottleneck": 4}
_CHECK_SHAPE = (32, 40, 48)
TOLERANCE = 1e-5


def key_rules(prefix: str = "") -> list[KeyRule]:
    """The key map: every parameter and statistic keeps its name, below `encoder.`; `prefix` is removed."""
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    names = [
        r"conv1\.weight",
        rf"bn1\.{norm}",
        r"layer[1-4]\.\d+\.conv[1-3]\.weight",
        rf"layer[1-4]\.\d+\.bn[1-3]\.{norm}",
        r"layer[1-4]\.\d+\.downsample\.0\.(weight|bias)",
        rf"layer[1-4]\.\d+\.downsample\.1\.{norm}",
    ]
    return [KeyRule(rf"{prefix}({name})", r"encoder.\1") for name in names]


def resnet_config(
    depth: int,
    *,
    shortcut_type: str,
    downsample_bias: bool,
    num_channels: int = 1,
    widths: list[int] | None = None,
    stem_stride: int | list[int] = 1,
    stem_kernel_size: int | list[int] = 7,
    stem_pool: bool = True,
) -> T3DVisionConfig:
    """The vision configuration of a batch-normalised ResNet of `depth` layers; `widths` are its stages' inner ones."""
    layer_type, depths = ARCHITECTURES[depth]
    widths = WIDTHS if widths is None else widths
    return T3DVisionConfig(
        num_channels=num_channels,
        embedding_size=widths[0],
        hidden_sizes=[width * _EXPANSION[layer_type] for width in widths],
        depths=depths,
        layer_type=layer_type,
        stem_kernel_size=stem_kernel_size,
        stem_stride=stem_stride,
        stem_pool=stem_pool,
        shortcut_type=shortcut_type,
        downsample_bias=downsample_bias,
        norm="batch",
    )


def check_against_monai(model: torch.nn.Module, state_dict: Mapping[str, Any]) -> float:
    """
    Compare a converted model with MONAI's network, loaded from the source's own keys, on a random view.

    Args:
        model (`T3DVisionModel`): the converted model, in evaluation mode.
        state_dict (`Mapping[str, torch.Tensor]`): the source under MONAI's names, without a classifier.

    Returns:
        `float`: the largest difference of the token map and the pooled output, relative to their largest value where
        that is above 1. More than `TOLERANCE` raises a [`ConversionError`].
    """
    config = model.config
    network = ResNet(
        config.layer_type,
        list(config.depths),
        [size // _EXPANSION[config.layer_type] for size in config.hidden_sizes],
        n_input_channels=config.num_channels,
        conv1_t_size=tuple(config.stem_kernel_size),
        conv1_t_stride=tuple(config.stem_stride),
        no_max_pool=not config.stem_pool,
        shortcut_type=config.shortcut_type,
        bias_downsample=config.downsample_bias,
        feed_forward=False,
    ).eval()
    network.load_state_dict(state_dict, strict=True)
    token_maps = []
    network.layer4.register_forward_hook(lambda module, args, output: token_maps.append(output))
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, config.num_channels, *_CHECK_SHAPE, generator=generator)
    with torch.no_grad():
        pooled = network(pixel_values)
        output = model(pixel_values)
    pairs = [(output.last_hidden_state, token_maps[0]), (output.pooler_output, pooled)]
    difference = max(
        ((result - expected).abs().max() / expected.abs().max().clamp(min=1)).item() for result, expected in pairs
    )
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"the converted model differs from MONAI's network by {difference:.2e} (allowed: {TOLERANCE:.0e}); "
            "stem stride, pooling or shortcut type do not belong to these weights"
        )
    return difference


__all__ = ["ARCHITECTURES", "TOLERANCE", "WIDTHS", "check_against_monai", "key_rules", "resnet_config"]
