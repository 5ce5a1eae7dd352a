# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a run will be, before it is: parameters, memory, steps, checkpoints, and whether all of it fits."""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from .arguments import ConfigurationError
from .batch_norm import training_mode
from .memory_forecast import forecast_peak, like_parts_encoded_twice
from .optimization import parameter_groups
from .parallel import step_gradients
from .prefetch import PREFETCHED

if TYPE_CHECKING:
    from .trainer import T3DTrainer

# Of a process that trains on a CPU, beside its tensors: glibc keeps part of the blocks that were freed. Measured: 1.1
# to 1.8; MALLOC_MMAP_THRESHOLD_=65536 makes it return them.
_HELD_ON_CPU = 1.8


@dataclass(frozen=True)
class RunPlan:
    """
    What a run will be.

    Args:
        parameters (`dict[str, tuple[int, int]]`): of each tower: all, and those that train.
        pairs_per_step (`int`), total_steps, steps_per_epoch (`int`): as the trainer counts them.
        peak_bytes (`int`): of tensors, on the device that trains.
        bytes_per_pair, bytes_per_local_view (`int`): what one more pair, or view of every pair, adds to it.
        waiting_bytes (`int`): of batches that wait or are being made, in main memory.
        device (`str`), memory_bytes (`int`): what trains, and what it has free.
        num_checkpoints (`int`), checkpoint_bytes (`int`): kept at the same time, and of each.
        disk_bytes (`int`): free where the run writes.
    """

    parameters: dict[str, tuple[int, int]]
    pairs_per_step: int
    total_steps: int | None
    steps_per_epoch: int
    peak_bytes: int
    bytes_per_pair: int
    bytes_per_local_view: int
    waiting_bytes: int
    device: str
    memory_bytes: int
    num_checkpoints: int
    checkpoint_bytes: int
    disk_bytes: int

    @property
    def memory_needed(self) -> int:
        """Bytes that the device must have free."""
        on_cpu = self.device == "cpu"
        return round((self.peak_bytes + self.waiting_bytes) * _HELD_ON_CPU) if on_cpu else self.peak_bytes

    @property
    def disk_needed(self) -> int:
        """Bytes of checkpoints, of the one that is written before an old one goes, and of the saved model."""
        return (self.num_checkpoints + 2) * self.checkpoint_bytes

    @property
    def fits(self) -> bool:
        """Whether memory and disk have room for it."""
        return self.memory_needed <= self.memory_bytes and self.disk_needed <= self.disk_bytes

    def describe(self) -> str:
        """The plan as a table."""
        rows = [
            (f"parameters of {name}", f"{count:,}, of which {trained:,} train")
            for name, (count, trained) in self.parameters.items()
        ]
        steps = "as many as time allows" if self.total_steps is None else f"{self.total_steps:,}"
        rows += [
            ("steps", f"{steps}, {self.steps_per_epoch:,} per epoch, of {self.pairs_per_step} pairs"),
            ("peak of tensors", f"{_size(self.peak_bytes)} on {self.device}"),
            ("each pair", _size(self.bytes_per_pair)),
            ("each local view, of all pairs", _size(self.bytes_per_local_view)),
            ("batches made ahead", _size(self.waiting_bytes)),
            ("memory", _verdict(self.memory_needed, self.memory_bytes)),
            ("checkpoints", f"{self.num_checkpoints} at a time, {_size(self.checkpoint_bytes)} each"),
            ("disk", _verdict(self.disk_needed, self.disk_bytes)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def plan_run(trainer: "T3DTrainer", batch: Mapping[str, torch.Tensor]) -> RunPlan:
    """
    The plan of a trainer that has not begun; takes a step without content, and changes no weight.

    Args:
        trainer ([`T3DTrainer`]): of one process.
        batch (mapping of tensors): what its collator makes of two samples or more, as long as they come.
    """
    if trainer.accelerator.num_processes > 1:
        raise ConfigurationError("a plan is made by one process; start --dry-run without a launcher")
    args, device = trainer.args, trainer.accelerator.device
    num_pairs = args.per_device_train_batch_size

    def transform(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = trainer.batch_transform(batch)
        # That all views count is the most that a batch can need, and known without looking.
        return {name: value for name, value in changed.items() if name != "local_mask"}

    def step(micro_batches: list[dict[str, torch.Tensor]]) -> None:
        with like_parts_encoded_twice(trainer.model) if args.gradient_caching else nullcontext():
            step_gradients(trainer.accelerator, trainer.model, micro_batches, args, transform)

    def forecast(batch: Mapping[str, torch.Tensor], num_pairs: int) -> int:
        return forecast_peak(
            trainer.unwrapped_model,
            dict(batch),
            step,
            lambda model: torch.optim.AdamW(parameter_groups(model, args)),
            num_pairs=num_pairs,
            num_micro_batches=args.gradient_accumulation_steps,
        )

    training_mode(trainer.model, args)
    peak = forecast(batch, num_pairs)
    more = forecast(batch, 2 * num_pairs)
    more_views = peak
    if "local_pixel_values" in batch:
        # Not fewer: prototypes may need every view that there is.
        views = {name: value for name, value in batch.items() if name.startswith("local_")}
        longer = {name: torch.cat([value, value[:, :1]], dim=1) for name, value in views.items()}
        more_views = forecast({**batch, **longer}, num_pairs)
    weights = sum(value.numel() * value.element_size() for value in trainer.unwrapped_model.state_dict().values())
    trained = sum(value.numel() for value in trainer.unwrapped_model.parameters() if value.requires_grad)
    averages = 4 * trained if args.ema_decay is not None else 0
    pair_bytes = sum(value[0].numel() * value.element_size() for value in batch.values())
    saves = None if args.save_steps is None else (trainer.total_steps or 2**31) // args.save_steps
    kept = args.save_total_limit if args.save_total_limit is not None else saves
    return RunPlan(
        parameters=_parameters(trainer.unwrapped_model),
        pairs_per_step=trainer.pairs_per_step,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.steps_per_epoch,
        peak_bytes=peak + averages,
        bytes_per_pair=(more - peak) // num_pairs,
        bytes_per_local_view=more_views - peak,
        waiting_bytes=(PREFETCHED + 1) * args.per_device_train_batch_size * pair_bytes,
        device=str(device),
        memory_bytes=_free_memory(device),
        num_checkpoints=max(1, min(kept or 1, saves or 1)) + (args.metric_for_best_model is not None),
        # Two moments for every weight that trains; where an average is kept, it and the model that it makes.
        checkpoint_bytes=weights + 8 * trained + averages + (weights if averages else 0),
        disk_bytes=_free_disk(trainer.output_dir),
    )


def _parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    counts = {"the vision tower": (0, 0), "the text tower": (0, 0), "the heads": (0, 0)}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        tower = "vision" if "vision_model" in parts else "text" if "text_model" in parts else ""
        key = f"the {tower} tower" if tower else "the heads"
        count, trained = counts[key]
        counts[key] = count + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return counts


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _free_disk(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _verdict(needed: int, free: int) -> str:
    return f"{_size(needed)} of {_size(free)} free: {'fits' if needed <= free else 'DOES NOT FIT'}"


__all__ = ["RunPlan", "plan_run"]
