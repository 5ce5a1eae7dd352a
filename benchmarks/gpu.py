# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures training on a CUDA GPU: throughput and memory of the `base` encoder, its share of the roofline given by
measured copy bandwidth and matrix rate, whole steps, steps that the store feeds against steps on one resident batch,
and resampling of scans that are uploaded.

    python benchmarks/gpu.py --output benchmarks/gpu.md
    python benchmarks/gpu.py --targets-only --output benchmarks/gpu.md   # without a GPU: what is to be measured

Without a CUDA GPU nothing is measured. `--device cpu` with small sizes runs the same code, for its tests, and prints
what it finds.
"""

import argparse
import copy
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import monai
import numpy as np
import torch
from inference import monai_network
from measuring import add_output_argument, medians, publish
from torch import nn

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DVisionModel
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.resample_t3d import resample, spacing_sampling
from modeling_t3d.training.gradient_caching import cached_backward
from modeling_t3d.training.prefetch import prefetched
from modeling_t3d.volume_transforms_t3d import whole_volume_mask

MONAI = "MONAI, batch norm, eager autocast"
TOLERANCE = 1e-9  # of embeddings in float64
SCAN_SPACING = (1.0, 0.703125, 0.703125)  # mm, z y x
LARGEST_RESAMPLING_ERROR = 0.1  # HU, from what the CPU makes
NOT_MEASURED = "not measured"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """
    How large everything is.

    Args:
        preset (`str`): of the model.
        view (`int`): edge of a view in voxels.
        views (`int`): per step of the encoder.
        pairs, local_views (`int`): of the whole step, whose views have the processor's own sizes.
        cached_pairs (`int`): of the step with cached gradients.
        scan (three ints, z y x): voxels of an uploaded scan.
        matrix (`int`): edge of the matrices that give the matrix rate.
        copied (`int`): bytes that give the copy bandwidth.
        repetitions (`int`): of everything; the median counts.
    """

    preset: str = "base"
    view: int = 128
    views: int = 4
    pairs: int = 32
    local_views: int = 4
    cached_pairs: int = 4096
    scan: tuple[int, int, int] = (300, 512, 512)
    matrix: int = 8192
    copied: int = 1 << 30
    repetitions: int = 10


def target_rows(sizes: Sizes, found: Mapping[str, str]) -> list[str]:
    """Every target, and what was found of it by its name."""
    pair = f"(1 global + {sizes.local_views} local) views"
    targets = {
        "throughput": ("encoder's views/s over those of MONAI's, eager autocast, equal operations", ">= 1.5"),
        "roofline": ("encoder's share of the roofline", ">= 50 %"),
        "views": ("time per view with four times the views of the full graph, over the full graph's", "<= 1.35"),
        "step": (f"peak of the whole step, {sizes.pairs} x {pair}", "<= 80 GiB"),
        "caching": (f"peak with gradient caching, {sizes.cached_pairs:,} x {pair} as one batch", "<= 80 GiB"),
        "store": ("steps/s fed from the store over those on one resident batch", ">= 0.95"),
        "upload": ("time of int16 upload and resampling over that of the pinned copy alone", "<= 1.3"),
        "versions": ("torch, cuDNN", "recorded"),
    }
    return [
        "| on one CUDA GPU | target | found |",
        "| --- | ---: | ---: |",
        *(f"| {what} | {target} | {found.get(name, NOT_MEASURED)} |" for name, (what, target) in targets.items()),
    ]


def median_seconds(function: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Seconds of a call, after two that do not count."""
    return medians({"": function}, repetitions, device, warm_up=2)[""]


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
            embeddings = pooled(model, views)
        embeddings.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def encoders(preset: str) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """MONAI's network and ours with its weights and batch norms; and ours with the group norms of the preset."""
    torch.manual_seed(0)
    batch = T3DVisionModel(T3DConfig.from_preset(preset, vision_config={"norm": "batch"}).vision_config)
    group = T3DVisionModel(T3DConfig.from_preset(preset).vision_config)

    def channels_last(model: T3DVisionModel) -> T3DVisionModel:
        return copy.deepcopy(model).to(memory_format=torch.channels_last_3d)

    same = {
        MONAI: monai_network(batch),
        "T3D, batch norm, contiguous": batch,
        "T3D, batch norm, channels-last 3D": channels_last(batch),
    }
    return same, {
        "T3D, group norm, contiguous": group,
        "T3D, group norm, channels-last 3D": channels_last(group),
    }


def pooled(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The embeddings, of MONAI's network or ours."""
    output = model(views)
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def largest_difference(models: dict[str, nn.Module], views: torch.Tensor) -> float:
    """
    Of the embeddings of training mode from MONAI's, in units of their largest; more than `TOLERANCE` ends the run.

    In float64, where neither TF32 nor the order of sums hides a difference.
    """
    outputs = {}
    for name, model in models.items():
        model.to(views.device, torch.float64).train()
        with torch.no_grad():
            outputs[name] = pooled(model, views.double())
        model.to("cpu", torch.float32)
    reference = outputs[MONAI]
    found = {name: ((out - reference).abs().max() / reference.abs().max()).item() for name, out in outputs.items()}
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            sys.exit(f"error: {name} differs from {MONAI} by {difference:.1e}; nothing is timed before they agree")
    return max(found.values())


def encoder_rows(sizes: Sizes, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Throughput and memory of the encoder and MONAI's with the same weights in turn, and shares of the roofline."""
    same, others = encoders(sizes.preset)
    models = {**same, **others}
    channels = same["T3D, batch norm, contiguous"].config.num_channels
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(sizes.views, channels, *[sizes.view] * 3, generator=generator).to(device)
    difference = largest_difference(same, views)
    bandwidth, rate = device_limits(sizes, device)
    limits, peaks = {}, {}
    for name, model in models.items():  # one at a time: the peak is that of a model that has the device to itself
        model.to(device).train()
        limits[name] = roofline_seconds(model, views, bandwidth, rate)
        step = training_step(model, views)
        step()  # what libraries allocate once is there before the peak counts
        peaks[name] = peak_bytes(step, device) / 2**30
        model.cpu()
    steps = {name: training_step(model.to(device), views) for name, model in models.items()}
    seconds = medians(steps, sizes.repetitions, device, warm_up=2)
    lines = [
        f"| encoder, {sizes.views} views of {sizes.view}^3, bf16 | views/s | times MONAI's speed | peak GiB "
        "| share of the roofline |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    speeds = {name: seconds[MONAI] / seconds[name] for name in same}
    shares = {name: least / seconds[name] for name, (least, _) in limits.items()}
    for name, (_, operations) in limits.items():
        speed = f"{speeds[name]:.2f}" if name in same else ""
        lines.append(
            f"| {name} ({operations / 1e12:.2f} TFLOP) | {sizes.views / seconds[name]:.1f} | {speed} "
            f"| {peaks[name]:.2f} | {shares[name]:.1%} |"
        )
    lines += [
        "",
        f"All take turns. Those with batch norm have MONAI's weights; before anything was timed their embeddings in "
        f"float64 were compared with MONAI's: {difference:.1e} of the largest at most.",
        "",
        f"Measured limits: copies {bandwidth / 1e9:.0f} GB/s, matrix products {rate / 1e12:.0f} TFLOP/s in bfloat16.",
    ]
    del speeds[MONAI], shares[MONAI]
    return lines, {"throughput": f"{max(speeds.values()):.2f}", "roofline": f"{max(shares.values()):.1%}"}


# ---------------------------------------------------------------------------------------------- the whole step


def pretraining_batch(
    sizes: Sizes, processor: T3DImageProcessor, vocabulary: int, device: torch.device, first: int = 0
) -> Batch:
    """Random pairs from the `first`-th on with the processor's sizes of views, made on the device."""
    pairs, channels = sizes.pairs, processor.num_channels
    generator = torch.Generator(device).manual_seed(first)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    return {
        "input_ids": torch.randint(3, vocabulary, (pairs, 128), generator=generator, device=device),
        "attention_mask": torch.ones(pairs, 128, dtype=torch.long, device=device),
        "pixel_values": random(pairs, channels, *processor.global_size),
        "local_pixel_values": random(pairs, sizes.local_views, channels, *processor.local_size),
        "local_mask": torch.ones(pairs, sizes.local_views, dtype=torch.bool, device=device),
        "local_positions": torch.zeros(pairs, sizes.local_views, 6, device=device),
        "study_ids": torch.arange(first, first + pairs, device=device),
        "report_ids": torch.arange(first, first + pairs, device=device),
    }


def cached_step(model: T3DForPreTraining, sizes: Sizes, processor: T3DImageProcessor, at_once: int) -> None:
    """
    Gradients of `sizes.cached_pairs` pairs as one contrastive batch, encoded a few at once.

    A micro-batch is made when it is encoded, the same both times: all of them would not fit into any memory.
    """
    device = model.device

    def prepare(part: Batch) -> Batch:
        small = replace(sizes, pairs=int(part["count"]))
        return pretraining_batch(small, processor, model.config.text_config.vocab_size, device, int(part["first"]))

    def encode(**batch: torch.Tensor) -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return model(**batch)

    parts = [
        {"first": torch.tensor(first), "count": torch.tensor(min(at_once, sizes.cached_pairs - first))}
        for first in range(0, sizes.cached_pairs, at_once)
    ]
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    cached_backward(encode, model, parts, prepare=prepare, autocast=autocast)
    model.zero_grad(set_to_none=True)


def step_rows(sizes: Sizes, device: torch.device, processor: T3DImageProcessor) -> tuple[list[str], dict[str, str]]:
    """Memory and time of whole steps: all views at once, more of them in recomputed chunks, with cached gradients."""
    lines = ["| whole step | ms | ms per view | peak GiB |", "| --- | ---: | ---: | ---: |"]
    config = T3DConfig.from_preset(sizes.preset)
    few = max(2, sizes.pairs // 4)
    variants = {
        f"full graph, {few} pairs": (few, None, False),
        f"{sizes.pairs} pairs, views in chunks": (sizes.pairs, 4, True),
    }
    per_view, peaks = [], []

    def add(name: str, pairs: int, seconds: float, peak: int) -> None:
        per_view.append(seconds / (pairs * (1 + sizes.local_views)))
        peaks.append(peak / 2**30)
        lines.append(f"| {name} | {1000 * seconds:.0f} | {1000 * per_view[-1]:.2f} | {peaks[-1]:.2f} |")

    def new_model() -> T3DForPreTraining:
        torch.manual_seed(0)
        return T3DForPreTraining(config).to(device).train()

    for name, (pairs, chunk, checkpointing) in variants.items():
        model = new_model()
        model.set_view_chunk_size(chunk)
        if checkpointing:
            model.activation_checkpointing_enable()
        batch = pretraining_batch(replace(sizes, pairs=pairs), processor, config.text_config.vocab_size, device)

        def step(model: nn.Module = model, batch: Batch = batch) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        add(name, pairs, median_seconds(step, device, sizes.repetitions), peak_bytes(step, device))
        del model, batch, step
    model, seconds = new_model(), []
    peak = peak_bytes(
        lambda: seconds.append(medians({"": lambda: cached_step(model, sizes, processor, few)}, 1, device)[""]), device
    )
    add(f"{sizes.cached_pairs:,} pairs, gradients cached, {few} at once", sizes.cached_pairs, seconds[0], peak)
    lines += ["", "Times are medians, that of cached gradients the time of one step, which makes its views twice."]
    return lines, {
        "views": f"{per_view[1] / per_view[0]:.2f}",
        "step": f"{peaks[1]:.1f} GiB",
        "caching": f"{peaks[2]:.1f} GiB",
    }


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


def store_rows(sizes: Sizes, device: torch.device) -> tuple[list[str], dict[str, str]]:
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
    lines = [
        "| steps of the encoder | steps/s, median |",
        "| --- | ---: |",
        f"| on one resident batch | {1 / on_resident:.2f} |",
        f"| fed from the store | {1 / from_store:.2f} |",
    ]
    return lines, {"store": f"{on_resident / from_store:.3f}"}


# ---------------------------------------------------------------------------------------------- uploaded scans


def upload_rows(sizes: Sizes, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """A scan that is copied to the device as int16 and resampled there, against the copy alone."""
    generator = torch.Generator().manual_seed(0)
    scan = torch.randint(-1000, 1000, sizes.scan, dtype=torch.int16, generator=generator)
    samplings = [
        spacing_sampling(*axis) for axis in zip(sizes.scan, SCAN_SPACING, T3DImageProcessor().spacing, strict=True)
    ]
    pinned = scan.pin_memory() if device.type == "cuda" else scan

    def upload() -> torch.Tensor:
        return pinned.to(device, non_blocking=True)

    difference = (resample(upload(), samplings).cpu() - resample(scan, samplings)).abs().max().item()
    if not difference <= LARGEST_RESAMPLING_ERROR:
        sys.exit(
            f"error: scans resampled on {device} differ by {difference:.2g} HU; nothing is timed before they agree"
        )
    ways = {"pinned copy alone": upload, "copy and resampling": lambda: resample(upload(), samplings)}
    seconds = medians(ways, sizes.repetitions, device, warm_up=2)
    lines = [
        f"| int16 scan of {' x '.join(map(str, sizes.scan))} voxels | ms, median |",
        "| --- | ---: |",
        *(f"| {name} | {1000 * seconds[name]:.2f} |" for name in ways),
        "",
        f"Before they were timed, the voxels were compared with those of the CPU: within {difference:.2g} HU.",
    ]
    return lines, {"upload": f"{seconds['copy and resampling'] / seconds['pinned copy alone']:.2f}"}


def measure(sizes: Sizes, device: torch.device, processor: T3DImageProcessor) -> list[str]:
    """All tables, the one of the targets first."""
    parts = [
        encoder_rows(sizes, device),
        store_rows(sizes, device),
        upload_rows(sizes, device),
        step_rows(sizes, device, processor),
    ]
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else "none"
    found = {"versions": f"{torch.__version__}, {cudnn}"}
    for _, of_part in parts:
        found |= of_part
    tables = [target_rows(sizes, found), *(lines for lines, _ in parts)]
    return "\n\n".join("\n".join(table) for table in tables).splitlines()


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--targets-only", action="store_true", help="measure nothing, and say what is to be measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--view", type=int, default=128)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--cached-pairs", type=int, default=4096)
    parser.add_argument("--scan", type=int, nargs=3, default=(300, 512, 512), help="z y x")
    parser.add_argument("--matrix", type=int, default=8192)
    parser.add_argument("--copied", type=int, default=1 << 30)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--global-size", type=int, nargs=3, default=(128, 256, 256))
    parser.add_argument("--local-size", type=int, nargs=3, default=(64, 128, 128))
    add_output_argument(parser)
    arguments = vars(parser.parse_args())
    output, device = arguments.pop("output"), torch.device(arguments.pop("device"))
    targets_only = arguments.pop("targets_only")
    edges = {name: tuple(arguments.pop(name)) for name in ("global_size", "local_size")}
    sizes = Sizes(**{**arguments, "scan": tuple(arguments["scan"])})
    command = f"`python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`"
    if targets_only:
        publish(["# Training on a GPU", "", f"{command}; nothing was measured.", "", *target_rows(sizes, {})], output)
        return
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    if not is_cuda and (device.type == "cuda" or output is not None):
        where = f", and {str(output)!r} stays as it is" if output is not None else ""
        sys.exit(
            f"error: nothing is measured on a CUDA GPU{where}; run where one is, or --device cpu without --output"
        )
    name = torch.cuda.get_device_name(device) if is_cuda else "no CUDA GPU"
    lines = [
        "# Training on a GPU",
        "",
        f"{command}; {name}; Python {platform.python_version()}, MONAI {monai.__version__}; seed 0.",
        "",
        *measure(sizes, device, T3DImageProcessor(**edges)),
    ]
    publish(lines, output)


if __name__ == "__main__":
    main()
