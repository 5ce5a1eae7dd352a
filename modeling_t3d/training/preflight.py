# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is decided or refused before the first step: processes, batch, precision."""

import torch
from accelerate import Accelerator

from .arguments import ConfigurationError, T3DTrainingArguments
from .parallel import running_strategy


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
    if args.strategy not in (None, strategy):
        raise ConfigurationError(
            f"training.strategy={args.strategy}, but {strategy} was started; launch with the file of "
            f"examples/accelerate that is named after it, or change the setting"
        )
    if strategy not in ("single", "ddp"):
        raise ConfigurationError(
            f"this trainer runs alone or data-parallel, not as {strategy}; change the Accelerate configuration"
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


def choose_precision(args: T3DTrainingArguments) -> str:
    """Accelerate's name of the precision that the settings come to on this machine."""
    if args.mixed_precision != "auto":
        return args.mixed_precision
    if torch.cuda.is_available() and not args.use_cpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def device_name(device: torch.device) -> str:
    """For the model card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


__all__ = ["choose_precision", "device_name", "refuse_before_training"]
