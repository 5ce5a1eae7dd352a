# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures the objectives: contrast forward and backward against open_clip's `ClipLoss`, and Sinkhorn-Knopp against
the usual divisions of rows and columns.

    pip install --no-deps open_clip_torch        # its loss alone is loaded, which needs torch and nothing else
    python benchmarks/objectives.py --output benchmarks/objectives.md  # the stated sizes; 2 GiB and some minutes
    python benchmarks/objectives.py --device cuda                      # only printed

Peers take turns in this process, their results compared first. Memory is the peak above where the process stood, or of
the device's allocator.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import add_output_argument, medians, publish, synchronise
from torch import nn

from modeling_t3d.clustering_loss_t3d import sinkhorn_codes
from modeling_t3d.contrastive_loss_t3d import contrastive_softmax
from modeling_t3d.evaluation.protocol import processor_name

EPSILON, NUM_ITERATIONS = 0.05, 3


def clip_loss() -> nn.Module:
    """`open_clip.loss.ClipLoss`, loaded from its own file: the package's imports want torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("open_clip is not installed: pip install --no-deps open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss(cache_labels=True)


def tiled_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Ours, as the mean over pairs."""
    total, count = contrastive_softmax(image, text, image, text, scale)
    return total / count


def extra_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs at once above what was there before."""
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def contrast_rows(num_pairs: int, dim: int, target: str, repetitions: int, device: torch.device) -> list[str]:
    """Forward and backward of one contrastive batch."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        nn.functional.normalize(torch.randn(num_pairs, dim, generator=generator), dim=-1).to(device).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    inputs = (image, text, scale)

    def step(loss: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    losses = {"open_clip ClipLoss": clip_loss(), "modeling_t3d": tiled_loss}
    theirs, ours = (step(loss) for loss in losses.values())
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))
    assert error < 1e-4, f"values or gradients differ by {error:.1e} of their largest"
    del theirs, ours
    memory = {name: extra_memory(lambda loss=loss: step(loss), device) for name, loss in losses.items()}
    found = medians({name: lambda loss=loss: step(loss) for name, loss in losses.items()}, repetitions, device)
    speed = found["open_clip ClipLoss"] / found["modeling_t3d"]
    share = memory["modeling_t3d"] / memory["open_clip ClipLoss"]
    what = f"contrast, N={num_pairs}, D={dim}, forward + backward"
    is_large = num_pairs > 4096  # below, a process's resident pages are too coarse a measure
    return [
        *(f"| {what} | {name} | {1e3 * found[name]:.1f} ms | {memory[name] / 2**20:.0f} MiB | |" for name in losses),
        f"| {what} | speed over ClipLoss | {speed:.2f} | | {target} |",
        *([f"| {what} | extra memory over ClipLoss's | | {share:.3f} | <= 0.15 |"] if is_large else []),
        f"| {what} | largest difference of values and gradients | {error:.1e} | | |",
    ]


def divide_rows_and_columns(scores: torch.Tensor) -> torch.Tensor:
    """Sinkhorn-Knopp as it is usually written: the matrix is divided, prototypes first, again and again."""
    codes = torch.exp(scores / EPSILON).T
    codes /= codes.sum()
    for _ in range(NUM_ITERATIONS):
        codes /= codes.sum(dim=1, keepdim=True)
        codes /= codes.shape[0]
        codes /= codes.sum(dim=0, keepdim=True)
        codes /= codes.shape[1]
    return (codes * codes.shape[1]).T


def sinkhorn_rows(num_views: int, num_prototypes: int, repetitions: int, device: torch.device) -> list[str]:
    """Assignments of a batch of views."""
    generator = torch.Generator().manual_seed(0)
    views, prototypes = (
        nn.functional.normalize(torch.randn(count, 128, generator=generator), dim=-1).to(device)
        for count in (num_views, num_prototypes)
    )
    scores, mask = views @ prototypes.T, torch.ones(num_views, dtype=torch.bool, device=device)
    ways = {
        "divided rows and columns": lambda: divide_rows_and_columns(scores),
        "modeling_t3d": lambda: sinkhorn_codes(scores, mask, epsilon=EPSILON, num_iterations=NUM_ITERATIONS),
    }
    theirs, ours = (function() for function in ways.values())
    error = ((ours - theirs).abs().max() / theirs.max()).item()
    assert error < 1e-4, f"assignments differ by {error:.1e} of the largest"
    del theirs, ours
    found = medians(ways, repetitions, device)
    what = f"Sinkhorn-Knopp, {num_views} x {num_prototypes}, {NUM_ITERATIONS} iterations"
    speed = found["divided rows and columns"] / found["modeling_t3d"]
    return [
        *(f"| {what} | {name} | {1e3 * found[name]:.1f} ms | | |" for name in ways),
        f"| {what} | speed over divisions | {speed:.2f} | | >= 1.5 |",
        f"| {what} | largest difference of assignments | {error:.1e} | | |",
        f"| {what} | all-reduces, as counted in `tests/distributed` | {1 + NUM_ITERATIONS} | | <= 1 + 3 |",
    ]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_argument(parser)
    parser.add_argument("--repetitions", type=int, default=7, help="the small contrast is repeated ten times as often")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device, repetitions = torch.device(arguments.device), arguments.repetitions
    lines = contrast_rows(512, 512, ">= 0.95", 10 * repetitions, device)
    lines += contrast_rows(8192, 512, ">= 1.3", repetitions, device)
    lines += sinkhorn_rows(8192, 3000, repetitions, device)
    if device.type == "cpu":
        lines.append("| the same on a CUDA GPU | | not measured | | |")
        hardware = f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    else:
        hardware = torch.cuda.get_device_name()
    publish(
        [
            "# Objectives",
            "",
            f"`python benchmarks/objectives.py --repetitions {repetitions} --device {device}`; float32, seed 0; "
            f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}, open_clip_torch "
            f"{importlib.metadata.version('open_clip_torch')}.",
            "",
            "Times are medians of rounds in which the peers take turns. Memory is what a call needs above its inputs.",
            "",
            "| work | by | time or ratio | extra memory | target |",
            "| --- | --- | ---: | ---: | --- |",
            *lines,
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
