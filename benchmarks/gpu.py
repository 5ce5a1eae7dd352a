# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures training on a CUDA GPU: throughput and memory of the `base` encoder, its share of the roofline given by
measured copy bandwidth and matrix rate, and steps that the store feeds against steps on one resident batch.

    python benchmarks/gpu.py --output benchmarks/gpu.md

Without a CUDA GPU nothing is measured, and no page is written. `--device cpu` with small sizes runs the same code, for
its tests, and prints what it finds.
"""

import argparse
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import monai
import numpy as np
import torch
from measuring import add_output_argument, publish
from monai.networks.nets.resnet import resnet50
from torch import nn

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DVisionModel
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.training.prefetch import prefetched
from modeling_t3d.volume_transforms_t3d import whole_volume_mask


@dataclass(frozen=True)
class Sizes:
    """
    How large everything is.

    Args:
        preset (`str`): of the model.
        view (`int`): edge of a view in voxels.
        views (`int`): per step of the encoder.
        pairs, local_views (`int`): of the whole step, whose views have the processor's own sizes.
        matrix (`int`): edge of the matrices that give the matrix rate.
        copied (`int`): bytes that give the copy bandwidth.
        repetitions (`int`): of everything; the median counts.
    """

    preset: str = "base"
    view: int = 128
    views: int = 4
    pairs: int = 32
    local_views: int = 4
    matrix: int = 8192
    copied: int = 1 << 30
    repetitions: int = 10


def median_seconds(function: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Seconds of a call, the device waited for, after two that do not count."""
    seconds = []
    for turn in range(repetitions + 2):
        synchronise(device)
        begun = time.perf_counter()
        function()
        synchronise(device)
        if turn > 1:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def synchronise(device: torch.device) -> None:
    """Wait for what was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated during a call; 0 where the device does not count."""
    if device.type != "cuda":
        function()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device)


# ---------------------------------------------------------------------------------------------- roofline


def device_limits(sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Bytes per second that a copy reads and writes, and bfloat16 operations per second of a matrix product."""
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * sizes.copied / median_seconds(lambda: target.copy_(source), device, sizes.repetitions)
    left = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
    rate = 2 * sizes.matrix**3 / median_seconds(lambda: left @ left, device, sizes.repetitions)
    return bandwidth, rate


def roofline_seconds(model: nn.Module, views: torch.Tensor, bandwidth: float, rate: float) -> tuple[float, int]:
    """
    Least seconds of a training step, in which each layer takes the longer of arithmetic and traffic; and operations.

    A convolution computes three times what its forward pass does; any layer reads and writes its maps, in bfloat16,
    about three times as well: forward, and twice backward.
    """
    seconds, operations = 0.0, 0

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal seconds, operations
        if any(module.children()) or not isinstance(output, torch.Tensor):
            return
        count = 0
        if isinstance(module, nn.Conv3d):
            count = 2 * output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
        traffic = 2 * (inputs[0].numel() + output.numel() + sum(weight.numel() for weight in module.parameters()))
        seconds += 3 * max(count / rate, traffic / bandwidth)
        operations += 3 * count

    handles = [module.register_forward_hook(look) for module in model.modules()]
    with torch.no_grad(), torch.autocast(views.device.type, torch.bfloat16):
        model(views)
    for handle in handles:
        handle.remove()
    return seconds, operations


def training_step(model: nn.Module, views: torch.Tensor) -> Callable[[], None]:
    """Forward and backward pass in bfloat16 autocast."""

    def step() -> None:
        with torch.autocast(views.device.type, torch.bfloat16):
            output = model(views)
            pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
        pooled.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def encoder_rows(sizes: Sizes, device: torch.device) -> list[str]:
    """Throughput and memory of the encoder, MONAI's beside it in turn, and the share of the roofline."""
    config = T3DConfig.from_preset(sizes.preset).vision_config
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(sizes.views, config.num_channels, *[sizes.view] * 3, generator=generator).to(device)
    bandwidth, rate = device_limits(sizes, device)
    models: dict[str, nn.Module] = {
        "MONAI resnet50, eager autocast": resnet50(
            spatial_dims=3, n_input_channels=config.num_channels, conv1_t_stride=1, feed_forward=False
        ),
        "T3D, contiguous": T3DVisionModel(config),
        "T3D, channels-last 3D": T3DVisionModel(config).to(memory_format=torch.channels_last_3d),
    }
    lines = [
        f"| encoder, {sizes.views} views of {sizes.view}^3, bf16 | views/s | peak GiB | share of the roofline |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        model.to(device).train()
        least, operations = roofline_seconds(model, views, bandwidth, rate)
        step = training_step(model, views)
        seconds = median_seconds(step, device, sizes.repetitions)
        peak = peak_bytes(step, device) / 2**30
        lines.append(
            f"| {name} ({operations / 1e12:.2f} TFLOP) | {sizes.views / seconds:.1f} | {peak:.2f} "
            f"| {least / seconds:.1%} |"
        )
        model.cpu()
    return [
        *lines,
        "",
        f"Measured limits: copies {bandwidth / 1e9:.0f} GB/s, matrix products {rate / 1e12:.0f} TFLOP/s in bfloat16. "
        "Targets: >= 1.5 times MONAI's throughput at equal operations, >= 50 % of the roofline.",
    ]


# ---------------------------------------------------------------------------------------------- the whole step


def pretraining_batch(
    sizes: Sizes, processor: T3DImageProcessor, vocabulary: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random pairs with the processor's sizes of views."""
    pairs, channels = sizes.pairs, processor.num_channels
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, vocabulary, (pairs, 128), generator=generator),
        "attention_mask": torch.ones(pairs, 128, dtype=torch.long),
        "pixel_values": torch.rand(pairs, channels, *processor.global_size, generator=generator),
        "local_pixel_values": torch.rand(
            pairs, sizes.local_views, channels, *processor.local_size, generator=generator
        ),
        "local_mask": torch.ones(pairs, sizes.local_views, dtype=torch.bool),
        "local_positions": torch.zeros(pairs, sizes.local_views, 6),
        "study_ids": torch.arange(pairs),
        "report_ids": torch.arange(pairs),
    }
    return {name: value.to(device) for name, value in batch.items()}


def step_rows(sizes: Sizes, device: torch.device, processor: T3DImageProcessor) -> list[str]:
    """Memory and time of whole steps: all views at once, and with more views in recomputed chunks."""
    lines = ["| whole step | ms, median | ms per view | peak GiB |", "| --- | ---: | ---: | ---: |"]
    config = T3DConfig.from_preset(sizes.preset)
    variants = {
        f"full graph, {sizes.pairs // 4} pairs": (max(2, sizes.pairs // 4), None, False),
        f"{sizes.pairs} pairs, views in chunks": (sizes.pairs, 4, True),
    }
    for name, (pairs, chunk, checkpointing) in variants.items():
        torch.manual_seed(0)
        model = T3DForPreTraining(config).to(device).train()
        model.set_view_chunk_size(chunk)
        if checkpointing:
            model.activation_checkpointing_enable()
        small = Sizes(**{**vars(sizes), "pairs": pairs})
        batch = pretraining_batch(small, processor, config.text_config.vocab_size, device)

        def step(model: nn.Module = model, batch: dict[str, torch.Tensor] = batch) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        seconds = median_seconds(step, device, sizes.repetitions)
        num_views = pairs * (1 + sizes.local_views)
        peak = peak_bytes(step, device) / 2**30
        lines.append(f"| {name} | {1000 * seconds:.0f} | {1000 * seconds / num_views:.2f} | {peak:.2f} |")
    return [
        *lines,
        "",
        "Targets: four times the views of the full graph at <= 1.35 times the time per view; "
        f"{sizes.pairs} x (1 global + {sizes.local_views} local) views inside 80 GiB.",
    ]


# ---------------------------------------------------------------------------------------------- fed from the store


def stored_views(sizes: Sizes, folder: Path, count: int = 8) -> Iterator[torch.Tensor]:
    """Batches of random crops of stored volumes, scaled as in training, without end."""
    edge = sizes.view
    processor = T3DImageProcessor(local_size=(edge, edge, edge), num_local_views=1)
    store = VolumeStore.create(folder, processor)
    generator = np.random.default_rng(0)
    shape = (edge + 32,) * 3
    keys = [f"{number:040x}" for number in range(count)]
    affine = np.array([[0, 0, 0.75, 0], [0, 0.75, 0, 0], [1.5, 0, 0, 0], [0, 0, 0, 1.0]])
    for key in keys:
        scan = generator.integers(-1000, 1000, shape).astype(np.int16)
        store.add(key, PreparedVolume(scan, affine, whole_volume_mask(shape)))
    while True:
        chosen = generator.choice(keys, sizes.views)
        views = [processor.make_views(store.open(key), 1, generator).pixel_values for key in chosen]
        yield torch.cat(views)


def store_rows(sizes: Sizes, device: torch.device) -> list[str]:
    """The encoder's steps on what the store gives, against the same on one batch that stays on the device."""
    torch.manual_seed(0)
    model = T3DVisionModel(T3DConfig.from_preset(sizes.preset).vision_config).to(device).train()
    with tempfile.TemporaryDirectory() as folder:
        batches = prefetched(stored_views(sizes, Path(folder) / "store"))
        resident = next(batches).to(device)
        on_resident = median_seconds(training_step(model, resident), device, sizes.repetitions)

        def fed() -> None:
            batch = next(batches)
            on_device = batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch
            training_step(model, on_device)()

        from_store = median_seconds(fed, device, sizes.repetitions)
        batches.close()
    return [
        "| steps of the encoder | steps/s, median |",
        "| --- | ---: |",
        f"| on one resident batch | {1 / on_resident:.2f} |",
        f"| fed from the store | {1 / from_store:.2f} |",
        f"| share (target >= 0.95) | {on_resident / from_store:.3f} |",
    ]


def measure(sizes: Sizes, device: torch.device, processor: T3DImageProcessor) -> list[str]:
    """All tables."""
    tables = [encoder_rows(sizes, device), step_rows(sizes, device, processor), store_rows(sizes, device)]
    return "\n\n".join("\n".join(table) for table in tables).splitlines()


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--view", type=int, default=128)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--matrix", type=int, default=8192)
    parser.add_argument("--copied", type=int, default=1 << 30)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--global-size", type=int, nargs=3, default=(128, 256, 256))
    parser.add_argument("--local-size", type=int, nargs=3, default=(64, 128, 128))
    add_output_argument(parser)
    arguments = vars(parser.parse_args())
    output, device = arguments.pop("output"), torch.device(arguments.pop("device"))
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    if not is_cuda and (device.type == "cuda" or output is not None):
        where = f", and {str(output)!r} stays as it is" if output is not None else ""
        sys.exit(
            f"error: nothing is measured on a CUDA GPU{where}; run where one is, or --device cpu without --output"
        )
    edges = {name: tuple(arguments.pop(name)) for name in ("global_size", "local_size")}
    rows = measure(Sizes(**arguments), device, T3DImageProcessor(**edges))
    name = torch.cuda.get_device_name(device) if is_cuda else "no CUDA GPU"
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version() if is_cuda else 'none'}"
    lines = [
        "# Training on a GPU",
        "",
        f"`python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`; {name}; Python "
        f"{platform.python_version()}, {versions}, MONAI {monai.__version__}; seed 0.",
        "",
        *rows,
    ]
    publish(lines, output)


if __name__ == "__main__":
    main()
