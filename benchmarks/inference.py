# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures the vision encoder on a CPU against the same weights in MONAI's network, eager and in float32.

    python benchmarks/inference.py --output benchmarks/inference.md

All settings take turns in one process; their embeddings are compared with MONAI's before anything is timed. Which
instructions for bfloat16 the CPU has is read from the system: without any, bfloat16 is emulated and slow.
"""

import argparse
import platform
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import monai
import torch
from measuring import add_output_argument, medians, publish
from monai.networks.nets.resnet import ResNet

from modeling_t3d import T3DConfig, T3DVisionModel

Encoder = Callable[[torch.Tensor], torch.Tensor]
EXPANSION = {"basic": 1, "bottleneck": 4}


def monai_network(model: T3DVisionModel) -> ResNet:
    """MONAI's network, in evaluation mode, with the weights of a batch-normalised `T3DVisionModel`."""
    config = model.config
    network = ResNet(
        config.layer_type,
        list(config.depths),
        [size // EXPANSION[config.layer_type] for size in config.hidden_sizes],
        n_input_channels=config.num_channels,
        conv1_t_size=tuple(config.stem_kernel_size),
        conv1_t_stride=tuple(config.stem_stride),
        no_max_pool=not config.stem_pool,
        shortcut_type=config.shortcut_type,
        bias_downsample=config.downsample_bias,
        feed_forward=False,
    )
    network.load_state_dict(model.encoder.state_dict())
    return network.eval()


def new_model(seed: int, branch_scale: float) -> T3DVisionModel:
    """
    ResNet-50 with random weights that rounding does to what it does to trained ones.

    Its batch norms have seen views, and each residual branch adds `branch_scale` of what it would at random: weights
    that were trained come from branches that began at zero (Goyal et al. 2017, arXiv 1706.02677), while with branches
    as large as their input (1.0) every block amplifies what the one before it has rounded.
    """
    torch.manual_seed(seed)
    model = T3DVisionModel(T3DConfig.from_preset("base-batchnorm").vision_config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = None
            if name.endswith("bn3"):
                torch.nn.init.constant_(module.weight, branch_scale)
    model.train()
    with torch.no_grad():
        model(structured_views(4, 32, seed))
    return model.eval()


def structured_views(count: int, size: int, seed: int) -> torch.Tensor:
    """Smooth structures of several sizes with noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    views = 0.1 * torch.randn(count, 1, size, size, size, generator=generator)
    for cells in (2, 4, 8):
        coarse = torch.randn(count, 1, cells, cells, cells, generator=generator)
        views += torch.nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear") / 2
    return views.clamp(-1, 1)


def settings(model: T3DVisionModel) -> dict[str, Encoder]:
    """Ways to encode views with the same weights."""
    network = monai_network(model)

    def copied(dtype: torch.dtype, memory_format: torch.memory_format) -> T3DVisionModel:
        other = T3DVisionModel(model.config)
        other.load_state_dict(model.state_dict())
        return other.eval().to(dtype).to(memory_format=memory_format)

    def pooled(encoder: T3DVisionModel, dtype: torch.dtype, memory_format: torch.memory_format) -> Encoder:
        return lambda views: encoder(views.to(dtype, memory_format=memory_format)).pooler_output.float()

    encoders: dict[str, Encoder] = {"MONAI, eager, float32": network}
    for dtype, dtype_name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for layout, layout_name in (
            (torch.contiguous_format, "contiguous"),
            (torch.channels_last_3d, "channels-last 3D"),
        ):
            encoders[f"T3D, {dtype_name}, {layout_name}"] = pooled(copied(dtype, layout), dtype, layout)
    return encoders


def measure(model: T3DVisionModel, size: int, count: int, repetitions: int, seed: int) -> list[str]:
    """Rows of the table."""
    encoders, views = settings(model), structured_views(count, size, seed + 1)
    with torch.inference_mode():
        outputs = {name: encoder(views) for name, encoder in encoders.items()}
        reference = outputs["MONAI, eager, float32"]
        cosines = {
            name: torch.nn.functional.cosine_similarity(output, reference).min().item()
            for name, output in outputs.items()
        }
        seconds = medians({name: partial(encoder, views) for name, encoder in encoders.items()}, repetitions)
    own = {name: value for name, value in seconds.items() if name.startswith("T3D")}
    best = min(own, key=lambda name: own[name])
    base = seconds["MONAI, eager, float32"]
    return [
        f"| ResNet-50, {count} views of {size}^3 | ms, median | times MONAI's speed | least cosine of embeddings |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {1000 * value:.0f} | {base / value:.2f} | {cosines[name]:.5f} |"
            for name, value in seconds.items()
        ),
        "",
        f"Best: {best}, {base / seconds[best]:.2f} times MONAI's speed (target >= 2.3 where the CPU computes in "
        f"bfloat16), cosine {cosines[best]:.5f} (target >= 0.999).",
    ]


def processor() -> str:
    """The CPU's name, and which instructions for bfloat16 it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor()
    name = re.search(r"model name\s*: (.+)", text)
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if re.search(rf"\b{flag}\b", text)]
    return f"{name[1] if name else platform.processor()} ({', '.join(found) or 'no instructions for bfloat16'})"


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="edge of a view in voxels")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--branch-scale", type=float, default=0.2, help="of the random weights; see new_model")
    parser.add_argument("--seed", type=int, default=0)
    add_output_argument(parser)
    arguments = parser.parse_args()
    model = new_model(arguments.seed, arguments.branch_scale)
    rows = measure(model, arguments.size, arguments.views, arguments.repetitions, arguments.seed)
    lines = [
        "# Inference on a CPU",
        "",
        f"`python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`; {torch.get_num_threads()} threads of "
        f"{processor()}; Python {platform.python_version()}, torch {torch.__version__}, MONAI {monai.__version__}; "
        f"random weights of seed {arguments.seed}, residual branches of {arguments.branch_scale:g}.",
        "",
        *rows,
    ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
