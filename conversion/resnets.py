# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""3D ResNets in MONAI's layout: depths, configurations, the key map, and the checks of outputs.

Neither the stem's stride and pooling nor activation and epsilon leave a trace in the weights: MONAI's network, made
with the same settings, cannot tell a wrong one. A reference of the source network's own output can.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from monai.networks.nets.resnet import ResNet

from conversion.engine import ConversionError, ConversionReport, KeyRule, read_tensors, sha256_of
from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.modeling_t3d import T3DVisionModel

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


def key_rules() -> list[KeyRule]:
    """The key map: every parameter and statistic keeps its name, below `encoder.`."""
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    names = [
        r"conv1\.weight",
        rf"bn1\.{norm}",
        r"layer[1-4]\.\d+\.conv[1-3]\.weight",
        rf"layer[1-4]\.\d+\.bn[1-3]\.{norm}",
        r"layer[1-4]\.\d+\.downsample\.0\.(weight|bias)",
        rf"layer[1-4]\.\d+\.downsample\.1\.{norm}",
    ]
    return [KeyRule(rf"({name})", r"encoder.\1") for name in names]


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
    try:
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
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"no such network can be made, check the options and the file: {reason}") from error


def check_outputs(
    model: T3DVisionModel,
    state_dict: Mapping[str, Any],
    report: ConversionReport,
    reference: str | Path | None = None,
) -> None:
    """
    Run every check of a converted model's outputs that can be run, and note in the report what was checked.

    Args:
        model (`T3DVisionModel`): the converted model, in evaluation mode.
        state_dict (`Mapping[str, torch.Tensor]`): the source under MONAI's names, ignored entries included.
        report ([`ConversionReport`]): of the conversion.
        reference (`str` or `Path`, *optional*): a file for [`check_against_reference`].
    """
    network = {key: value for key, value in state_dict.items() if key not in report.ignored}
    difference = check_against_monai(model, network)
    report.checked += [
        "every key and shape",
        "token map and pooled output against MONAI's ResNet with the same weights and settings, largest difference "
        f"{difference:.1e}",
    ]
    config = model.config
    stem = {"stem_stride": list(config.stem_stride), "stem_pool": config.stem_pool}
    if reference is None:
        report.assumed = {**stem, "activation": "relu", "norm_eps": config.norm_eps}
        return
    difference = check_against_reference(model, reference)
    settings = ", ".join(f"{name} {value}" for name, value in stem.items())
    report.checked.append(
        f"pooled output with {settings} against the source network's in {Path(reference).name} (SHA-256 "
        f"{sha256_of(reference)}), largest difference {difference:.1e}"
    )


def check_against_monai(model: T3DVisionModel, state_dict: Mapping[str, Any]) -> float:
    """
    Compare a converted model with MONAI's network of the same settings, loaded from the source's own keys, on a random
    view.

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
    difference = max(_difference(result, expected) for result, expected in pairs)
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"the converted model differs from MONAI's network with the same weights and settings by {difference:.2e} "
            f"(allowed: {TOLERANCE:.0e}); this is no fault of the checkpoint: report it with the version of MONAI"
        )
    return difference


def check_against_reference(model: T3DVisionModel, path: str | Path) -> float:
    """
    Compare a converted model's pooled output with what the source network gave.

    Args:
        model (`T3DVisionModel`): the converted model, in evaluation mode.
        path (`str` or `Path`): a safetensors or PyTorch file with the tensors `input`, `(batch, channels, z, y, x)`,
            and `output`, `(batch, features)`: what MONAI's `feed_forward=False` gives in evaluation mode.

    Returns:
        `float`: the largest difference, relative to the largest value where that is above 1. More than `TOLERANCE`
        raises a [`ConversionError`], and so does a reference that another stem would fit as well.
    """
    pixel_values, expected = _read_reference(path, model.config)
    difference = _difference(_pooled(model, pixel_values), expected)
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"the converted model's pooled output differs from the one in {str(path)!r} by {difference:.2e} (allowed: "
            f"{TOLERANCE:.0e}); give the stem stride and pooling of the source network, and an output of these weights"
        )
    for other in _other_stems(model):
        if _difference(_pooled(other, pixel_values), expected) <= TOLERANCE:
            raise ConversionError(
                f"the reference {str(path)!r} fits stem_stride {list(other.config.stem_stride)}, stem_pool "
                f"{other.config.stem_pool} as well, so it checks neither; make it from a larger random input"
            )
    return difference


def _read_reference(path: str | Path, config: T3DVisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a reference file, in float32."""
    content = read_tensors(path)
    found = []
    for name, axes, size in (("input", 5, config.num_channels), ("output", 2, config.hidden_sizes[-1])):
        tensor = content.get(name)
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
        if len(shape) != axes or shape[1] != size or 0 in shape:
            was = f"shape {shape}" if isinstance(tensor, torch.Tensor) else "none"
            raise ConversionError(
                f"the reference {str(path)!r} must hold a tensor {name!r} of {axes} axes, the second of size {size}; "
                f"found {was}"
            )
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{name!r} of the reference {str(path)!r} holds NaN or infinity; make it again")
        found.append(tensor.float())
    if len(found[0]) != len(found[1]):
        raise ConversionError(
            f"the reference {str(path)!r} has {len(found[0])} inputs and {len(found[1])} outputs; give one for each"
        )
    return found[0], found[1]


def _other_stems(model: T3DVisionModel) -> Iterator[T3DVisionModel]:
    """The same weights behind stems of every other stride of 1 and 2, pooling or not."""
    config = model.config
    for *stride, pool in product((1, 2), (1, 2), (1, 2), (False, True)):
        if (stride, pool) != (list(config.stem_stride), config.stem_pool):
            settings = {**config.to_dict(), "stem_stride": stride, "stem_pool": pool}
            with torch.device("meta"):  # the weights are those of the model itself
                other = T3DVisionModel(T3DVisionConfig.from_dict(settings))
            other.load_state_dict(model.state_dict(), assign=True)
            yield other.eval()


def _pooled(model: T3DVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).pooler_output


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value where that is above 1."""
    return ((result - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


__all__ = [
    "ARCHITECTURES",
    "TOLERANCE",
    "WIDTHS",
    "check_against_monai",
    "check_against_reference",
    "check_outputs",
    "key_rules",
    "resnet_config",
]
