# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures steps that hold few activations against the step that holds all, and what multi-view alignment adds to a
step of global alignment over the same views.

    python benchmarks/memory.py --output benchmarks/memory.md   # 16 views of 96^3; about 5 GiB and some minutes
    python benchmarks/memory.py --size 48 --repetitions 2       # quick, and only printed

Peers run in turn in this process, their gradients compared first. Peak memory is that of a process of its own for
each, above what it held before the step, with glibc told to give freed blocks back: what it keeps of them depends on
their order.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from measuring import add_output_argument, medians, publish

from modeling_t3d import T3DConfig, T3DForPreTraining
from modeling_t3d.evaluation.protocol import processor_name
from modeling_t3d.training.gradient_caching import accumulated_backward, cached_backward, split_pairs

NUM_PAIRS, NUM_VIEWS = 8, 2  # 16 local views
CHUNK_SIZE = 2  # views that are recomputed at once
MICRO_BATCH_SIZE = 1  # pairs that are encoded at once, with all their views
STEPS = ("full graph", "view-wise recomputation", "gradient caching")


def build_model(**overrides: object) -> T3DForPreTraining:
    """A small ResNet of bottleneck blocks with group norm, and a small text tower without dropout."""
    torch.manual_seed(0)
    vision = {
        "embedding_size": 32,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [1, 1, 1, 1],
        "layer_type": "bottleneck",
        "stem_stride": 2,
    }
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = T3DConfig.from_preset("tiny", vision_config=vision, text_config=text, **overrides)
    return T3DForPreTraining(config)


def build_batch(size: int, num_pairs: int, num_views: int) -> dict[str, torch.Tensor]:
    """Pairs with smooth, noisy local views of `size`^3 voxels and global views of half the size."""
    generator = torch.Generator().manual_seed(1)

    def views(count: int, extent: int) -> torch.Tensor:
        # White noise alone looks the same to the network in every view, and smooth views alone leave channels of group
        # norm without variance: either way gradients would be differences of rounding.
        coarse = torch.randn(count, 1, 4, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(extent,) * 3, mode="trilinear")
        return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)

    return {
        "input_ids": torch.randint(5, 1000, (num_pairs, 64), generator=generator),
        "pixel_values": views(num_pairs, size // 2),
        "local_pixel_values": views(num_pairs * num_views, size).unflatten(0, (num_pairs, num_views)),
    }


def run_step(model: T3DForPreTraining, batch: dict[str, torch.Tensor], name: str) -> None:
    """One forward and backward pass in the way that is named."""
    model.zero_grad(set_to_none=True)
    model.set_view_chunk_size(CHUNK_SIZE if name == "view-wise recomputation" else None)
    if name == "gradient caching":
        cached_backward(model, model, split_pairs(batch, MICRO_BATCH_SIZE))
    else:
        accumulated_backward(model, [batch])


def peak_of_step(name: str, size: int) -> int:
    """Bytes by which this process's resident memory rises at most during a step."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    model, batch = build_model(), build_batch(size, NUM_PAIRS, NUM_VIEWS)
    # A step on small views fills what stays from step to step, such as gradients and kernels.
    run_step(model, build_batch(32, NUM_PAIRS, NUM_VIEWS), name)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run_step(model, batch, name)
    return status("VmHWM") - before


def measured_peak(name: str, size: int) -> int:
    """`peak_of_step` in a process of its own, whose allocator gives every larger block back when it is freed."""
    command = [sys.executable, __file__, "--size", str(size), "--peak-of", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(json.loads(result.stdout))


def gradients_of_steps(size: int, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients, in float64, of one step in each way."""
    model = build_model().to(dtype)
    batch = build_batch(size, NUM_PAIRS, NUM_VIEWS)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    gradients = {}
    for name in STEPS:
        run_step(model, batch, name)
        gradients[name] = {
            key: parameter.grad.double() for key, parameter in model.named_parameters() if parameter.requires_grad
        }
    return gradients


def gradient_errors(size: int) -> dict[torch.dtype, dict[str, float]]:
    """Largest difference from the gradients of the full graph in float64, in units of their largest entry."""
    gradients = {dtype: gradients_of_steps(size, dtype) for dtype in (torch.float64, torch.float32)}
    reference = gradients[torch.float64][STEPS[0]]
    scale = max(gradient.abs().max() for gradient in reference.values())
    return {
        dtype: {
            name: max(((found[key] - gradient).abs().max() / scale).item() for key, gradient in reference.items())
            for name, found in steps.items()
        }
        for dtype, steps in gradients.items()
    }


def memory_rows(size: int, repetitions: int) -> list[str]:
    """The three ways to take one step over 16 views."""
    errors = gradient_errors(size)
    assert max(errors[torch.float64].values()) < 1e-10, f"gradients differ: {errors}"
    model, batch = build_model(), build_batch(size, NUM_PAIRS, NUM_VIEWS)
    seconds = medians(
        {name: (lambda name=name: run_step(model, batch, name)) for name in STEPS}, repetitions, warm_up=1
    )
    peaks = {name: measured_peak(name, size) for name in STEPS}
    first = STEPS[0]
    return [
        f"| {name} | {peaks[name] / 2**20:.0f} MiB | {peaks[name] / peaks[first]:.2f} | {seconds[name]:.2f} s | "
        f"{seconds[name] / seconds[first]:.2f} | {errors[torch.float64][name]:.1e} | "
        f"{errors[torch.float32][name]:.1e} |"
        for name in STEPS
    ]


def alignment_rows(size: int, repetitions: int) -> list[str]:
    """Both models encode the same global and local views; one aligns the local ones, too."""
    batch = build_batch(size, 8, 4)
    models = {
        "GCA alone": build_model(view_fusion="mean", lambda_tma=0.0),
        "GCA and TMA": build_model(view_fusion="mean"),
    }
    steps = {name: (lambda m=m: run_step(m, batch, STEPS[0])) for name, m in models.items()}
    seconds = medians(steps, repetitions, warm_up=1)
    first = next(iter(models))
    return [f"| {name} | {seconds[name]:.2f} s | {seconds[name] / seconds[first]:.2f} |" for name in models]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="voxels along each axis of a local view")
    parser.add_argument("--repetitions", type=int, default=5)
    add_output_argument(parser)
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(json.dumps(peak_of_step(arguments.peak_of, arguments.size)))
        return
    size, repetitions = arguments.size, arguments.repetitions
    lines = [
        "# Memory of a step, and the cost of multi-view alignment",
        "",
        f"`python benchmarks/memory.py --size {size} --repetitions {repetitions}`; {torch.get_num_threads()} threads "
        f"of {processor_name()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        "seed 0. A ResNet of bottleneck blocks with group norm, stem stride 2.",
        "",
        f"{NUM_PAIRS} pairs, each with a global view of {size // 2}^3 and {NUM_VIEWS} local views of {size}^3 "
        f"voxels. Recomputation holds {CHUNK_SIZE} views, caching {MICRO_BATCH_SIZE} pair. The error is the "
        "distance of the gradients from those of the full graph in float64, in units of their largest entry: in "
        "float32 rounding flips a choice of a ReLU now and then, in either way to take the step. Peak and time are "
        "those in float32.",
        "",
        "| step | peak | of full | time | of full | error, float64 | error, float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *memory_rows(size, repetitions),
        "",
        "4,096 pairs x 4 local views with gradient caching need a CUDA GPU: a row of [gpu.md](gpu.md).",
        "",
        f"8 pairs, each with a global view of {size // 2}^3 and 4 local views of {size}^3 voxels, which both encode.",
        "",
        "| step | time | of GCA alone |",
        "| --- | ---: | ---: |",
        *alignment_rows(size, repetitions),
    ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
