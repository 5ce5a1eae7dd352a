# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is decided or refused before the first step: processes, batch, precision."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from .arguments import ConfigurationError, T3DTrainingArguments
from .parallel import running_strategy, shards
from .validation import ValidationLosses

if TYPE_CHECKING:
    from .trainer import T3DTrainer

logger = logging.getLogger(__name__)

# Name of a tracker -> the extra that installs it.
_TRACKER_EXTRAS = {"tensorboard": "train", "trackio": "track", "wandb": "track"}


def refuse_before_training(
    accelerator: Accelerator, args: T3DTrainingArguments, num_pairs: int, steps_per_epoch: int
) -> None:
    """
    Raise on a run that could only fail or train something else than was asked for.

    Args:
        accelerator (`Accelerator`): says how many processes there really are.
        args ([`T3DTrainingArguments`]): says what was asked for.
        num_pairs (`int`): size of the training data.
        steps_per_epoch (`int`): optimiser steps that they fill.
    """
    world_size = accelerator.num_processes
    if args.num_processes not in (None, world_size):
        raise ConfigurationError(
            f"training.num_processes={args.num_processes}, but {world_size} were started; on CPUs start them with "
            f"torchrun --nproc_per_node {args.num_processes} (accelerate launch --cpu starts one)"
        )
    strategy = running_strategy(accelerator)
    # Plain processes shard a model as well as they copy it.
    possible = ("ddp", "fsdp2") if strategy == "ddp" else (strategy,)
    if args.strategy not in (None, *possible):
        raise ConfigurationError(
            f"training.strategy={args.strategy}, but {strategy} was started; launch with the file of "
            f"examples/accelerate that is named after it, or change the setting"
        )
    if strategy not in ("single", "ddp", "fsdp2"):
        raise ConfigurationError(
            f"this trainer runs alone, data-parallel (ddp) or fully sharded (fsdp2), not as {strategy}; fsdp2 shards "
            "what ZeRO-3 does: launch with examples/accelerate/fsdp2.yaml"
        )
    if shards(accelerator, args):
        if args.ema_decay is not None:
            raise ConfigurationError(
                "training.ema_decay averages whole weights, which fsdp2 has spread; leave it out or train as ddp"
            )
        if args.mixed_precision == "fp16":
            raise ConfigurationError(
                "training.mixed_precision=fp16 scales whole gradients, which fsdp2 has spread; set it to bf16"
            )
    pairs_per_loss = args.per_device_train_batch_size * world_size
    if args.gradient_caching:
        pairs_per_loss *= args.gradient_accumulation_steps
    if pairs_per_loss < 2:
        raise ConfigurationError(
            "a contrastive batch needs at least 2 pairs; raise training.per_device_train_batch_size"
        )
    if not steps_per_epoch:
        pairs = args.per_device_train_batch_size * world_size * args.gradient_accumulation_steps
        raise ConfigurationError(
            f"{num_pairs} pairs do not fill one step of {pairs}; lower training.per_device_train_batch_size or "
            "training.gradient_accumulation_steps"
        )


def refuse_unmeasured_metric(args: T3DTrainingArguments, evaluate: Callable[..., Any] | None) -> None:
    """Raise if a metric was named and nothing validates: no checkpoint would be best, and no run would stop early."""
    if args.metric_for_best_model is not None and evaluate is None:
        need = "needs" if args.early_stopping_patience is None else "and training.early_stopping_patience need"
        raise ConfigurationError(
            f"training.metric_for_best_model={args.metric_for_best_model} {need} a validation, and there is none; set "
            "data.validation_split, or name no metric"
        )


def refuse_scarce_views(trainer: "T3DTrainer", num_views: int, validation: ValidationLosses | None = None) -> None:
    """
    Raise if some batch would have fewer views than prototypes, which its forward pass refuses in mid-training.

    Args:
        trainer ([`T3DTrainer`]): that has not begun.
        num_views (`int`): local views of a pair, as the image processor cuts them.
        validation ([`ValidationLosses`], *optional*): whose batches count, too.
    """
    config: Any = trainer.unwrapped_model.config
    if not getattr(config, "lambda_tma", 0.0) or config.tma_loss != "swav":
        return
    needed = ceil(config.num_prototypes / num_views)
    lower = f"lower model.overrides.num_prototypes={config.num_prototypes}"
    num_pairs = smallest_training_batch(trainer)
    if num_pairs < needed:
        cause = "" if trainer.args.drop_last else "set training.drop_last=true, "
        raise ConfigurationError(
            f"the smallest training batch has {num_pairs} pairs of {num_views} views, and each prototype needs a "
            f"view: {cause}raise training.per_device_train_batch_size, or {lower}"
        )
    if validation is not None and validation.global_batch_size < needed:
        raise ConfigurationError(
            f"a validation batch has {validation.global_batch_size} pairs of {num_views} views, and each prototype "
            f"needs a view: give {needed} pairs to data.validation_split and to a step of all processes "
            f"(training.per_device_train_batch_size), or {lower}, or set data.validation_split=null"
        )


def refuse_lonely_reports(trainer: "T3DTrainer", validation: ValidationLosses | None = None) -> None:
    """
    Raise if restoration with the reports of others would take them from a part of a batch, or find none there.

    Args:
        trainer ([`T3DTrainer`]): that has not begun.
        validation ([`ValidationLosses`], *optional*): whose batches count, too.
    """
    config: Any = trainer.unwrapped_model.config
    if not getattr(config, "lambda_tir", 0.0) or config.tir_report != "other":
        return
    remedy = "set model.overrides.tir_report=own"
    if trainer.args.gradient_caching:
        raise ConfigurationError(
            "model.overrides.tir_report=other takes reports from the batch that is encoded, and gradient caching "
            "encodes it in parts, on whose size the loss would depend: leave out training.gradient_caching and "
            f"training.caching_micro_batch_size, or {remedy}"
        )
    if smallest_training_batch(trainer) < 2 * trainer.accelerator.num_processes:
        is_rest = not trainer.args.drop_last and trainer.args.per_device_train_batch_size > 1
        cause = "set training.drop_last=true, " if is_rest else ""
        raise ConfigurationError(
            "model.overrides.tir_report=other needs another report, and some training batch has a single pair for a "
            f"process: {cause}raise training.per_device_train_batch_size, or {remedy}"
        )
    if validation is not None and validation.sampler().batch_size < 2:
        raise ConfigurationError(
            "model.overrides.tir_report=other needs another report, and a validation batch has a single pair for a "
            "process: give 2 pairs for each process to data.validation_split, or set it to null, or "
            f"{remedy}"
        )


def smallest_training_batch(trainer: "T3DTrainer") -> int:
    """Pairs of the smallest contrastive batch of a run, over all processes."""
    args, num_steps = trainer.args, trainer.steps_per_epoch
    if trainer.total_steps is not None:
        num_steps = min(num_steps, trainer.total_steps)
    size = args.gradient_accumulation_steps
    num_batches = min(trainer.sampler.num_batches, num_steps * size)
    sizes = [trainer.sampler.global_size(batch) for batch in range(num_batches)]
    # Cached gradients are those of one batch per step.
    if args.gradient_caching:
        sizes = [sum(sizes[first : first + size]) for first in range(0, num_batches, size)]
    return min(sizes)


def refuse_missing_trackers(trackers: list[str]) -> None:
    """Raise if an experiment tracker is unknown or not installed, which Accelerate would leave out in silence."""
    for name in trackers:
        if name not in _TRACKER_EXTRAS:
            raise ConfigurationError(f"training.trackers: {name!r} is none of {', '.join(_TRACKER_EXTRAS)}")
        if find_spec(name) is None:
            raise ConfigurationError(
                f"training.trackers: {name} is not installed; pip install 'modeling_t3d[{_TRACKER_EXTRAS[name]}]', or "
                "leave it out"
            )


def choose_precision(args: T3DTrainingArguments) -> str:
    """Accelerate's name of the precision that the settings come to on this machine."""
    if args.mixed_precision == "fp16" and (args.use_cpu or not torch.accelerator.is_available()):
        raise ConfigurationError(
            "training.mixed_precision=fp16 needs a CUDA device; CPUs train in bf16 or with mixed_precision=no"
        )
    if args.mixed_precision != "auto":
        return args.mixed_precision
    if torch.cuda.is_available() and not args.use_cpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def warn_of_inexact_resumption(accelerator: Accelerator) -> None:
    """Say that a run which is resumed in half precision on a CPU will not be bit for bit that of one go."""
    if accelerator.is_main_process and accelerator.device.type == "cpu" and accelerator.mixed_precision != "no":
        logger.warning(
            "resumed in %s on a CPU, whose rounding may differ from run to run: the weights will not be bit for bit "
            "those of a run in one go; where they must be, train with training.mixed_precision=no from the start",
            accelerator.mixed_precision,
        )


def device_name(device: torch.device) -> str:
    """For the model card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


__all__ = [
    "choose_precision",
    "device_name",
    "refuse_before_training",
    "refuse_lonely_reports",
    "refuse_missing_trackers",
    "refuse_scarce_views",
    "refuse_unmeasured_metric",
    "smallest_training_batch",
    "warn_of_inexact_resumption",
]
