# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Batch norm, the one layer that makes pairs depend on each other: over all processes, frozen, or refused where a
step would compute something else than one process with the whole batch."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .arguments import ConfigurationError, T3DTrainingArguments

_REMEDY = (
    "set training.batch_norm=frozen, which needs pretrained statistics, or model.overrides.vision_config.norm=group "
    "(and projection_norm=layer)"
)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer takes statistics over the batch when it trains."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def prepare_batch_norm(
    model: nn.Module, args: T3DTrainingArguments, num_processes: int, device: torch.device
) -> nn.Module:
    """
    The model with batch norms that share their statistics over processes; refuses where none can be right.

    Args:
        model (`nn.Module`): not wrapped; layers are replaced in place.
        args ([`T3DTrainingArguments`]): says whether statistics are frozen, and what cuts batches into parts.
        num_processes (`int`): how many share a batch.
        device (`torch.device`): where the model trains; statistics are synchronised on CUDA devices alone.
    """
    if args.batch_norm == "frozen" or not has_batch_norm(model):
        return model
    for name in ("gradient_caching", "view_chunk_size"):
        if getattr(args, name):
            raise ConfigurationError(
                f"training.{name} cuts batches into parts, and batch norm would take its statistics over each part; "
                + _REMEDY
            )
    if num_processes == 1:
        return model
    if device.type != "cuda":
        raise ConfigurationError(
            f"batch norm over {num_processes} processes needs synchronised statistics, which exist on CUDA devices "
            f"alone; {_REMEDY}"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def training_mode(model: nn.Module, args: T3DTrainingArguments) -> None:
    """Training mode, except for batch norms whose statistics, or whose parameters, are frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            is_frozen = module.weight is not None and not module.weight.requires_grad
            if args.batch_norm == "frozen" or is_frozen:
                module.eval()


__all__ = ["has_batch_norm", "prepare_batch_norm", "training_mode"]
