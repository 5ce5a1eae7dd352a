# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How processes share a model, data-parallel or fully sharded: which strategy runs, what wraps the model, how a step
gets its gradients, and that no two processes train on the same samples."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from .arguments import ConfigurationError, T3DTrainingArguments
from .batch_norm import prepare_batch_norm
from .gradient_caching import TwoStageModel, accumulated_backward, cached_backward, split_pairs, withheld_loss_stage
from .sampling import BatchStream, ShardedBatchSampler, stable_seed
from .sharding import average_replicated, shard_model, unsynchronised

Batch = dict[str, torch.Tensor]


def running_strategy(accelerator: Accelerator) -> str:
    """The name that `training.strategy` has for what was started, or Accelerate's own where it has none."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "single"
    if kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return "ddp"
    if kind == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return kind.value.lower()


def shards(accelerator: Accelerator, args: T3DTrainingArguments) -> bool:
    """Whether the model is fully sharded: because Accelerate was told so, or, of plain processes, the trainer."""
    return "fsdp2" in (args.strategy, running_strategy(accelerator))


def _shard(accelerator: Accelerator, model: Any, args: T3DTrainingArguments) -> nn.Module:
    """The model fully sharded, with Accelerate's settings where it has any."""
    if args.view_chunk_size is not None or (args.caching_micro_batch_size is not None and not args.drop_last):
        name = "view_chunk_size" if args.view_chunk_size is not None else "caching_micro_batch_size"
        raise ConfigurationError(
            f"training.{name} lets processes make different numbers of forward passes, for which a sharded model "
            "would wait for ever; set training.strategy=ddp, or use training.activation_checkpointing and "
            "training.gradient_accumulation_steps with training.drop_last=true"
        )
    options = {}
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ConfigurationError(
                "fsdp_offload_params=true keeps a part of the model off the device, where the trainer cannot clip its "
                "gradients with the others; set it to false in the Accelerate configuration"
            )
        options["reshard_after_forward"] = plugin.reshard_after_forward
    autocast = None if accelerator.mixed_precision == "no" else accelerator.autocast
    return shard_model(model, accelerator.device, autocast, **options)


def wrap_model(accelerator: Accelerator, model: nn.Module, args: T3DTrainingArguments) -> nn.Module:
    """
    The model on its device and ready for the strategy that runs.

    Args:
        accelerator (`Accelerator`): knows processes and device.
        model (`nn.Module`): changed in place.
        args ([`T3DTrainingArguments`]): what is cached, recomputed and frozen.
    """
    if args.gradient_caching and not isinstance(model, TwoStageModel):
        raise ConfigurationError(
            f"training.gradient_caching needs a model in two stages, which {type(model).__name__} is not; set it to "
            "false"
        )
    if args.view_chunk_size is not None:
        model.set_view_chunk_size(args.view_chunk_size)
    model = prepare_batch_norm(model, args, accelerator.num_processes, accelerator.device)
    if shards(accelerator, args):
        return _shard(accelerator, model, args)
    with withheld_loss_stage(model) if args.gradient_caching else nullcontext():
        return accelerator.prepare_model(model)


def step_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: list[Batch],
    args: T3DTrainingArguments,
    batch_transform: Callable[[Batch], Batch] = dict,
) -> dict[str, torch.Tensor]:
    """
    Add the gradients of one optimiser step to the parameters; returns the scalars of the model's output.

    Args:
        accelerator (`Accelerator`): knows processes, device and precision.
        model (`nn.Module`): from [`wrap_model`].
        micro_batches (`list[dict]`): this process's shares of the step.
        args ([`T3DTrainingArguments`]): accumulated or cached, see [`accumulated_backward`] and [`cached_backward`].
        batch_transform (callable): batch on its device -> arguments of the model.
    """

    def prepare(batch: Batch) -> Batch:
        return batch_transform(send_to_device(batch, accelerator.device, non_blocking=True))

    def no_sync() -> AbstractContextManager:
        return unsynchronised(model) if isinstance(model, FSDPModule) else accelerator.no_sync(model)

    if not args.gradient_caching:
        terms = accumulated_backward(
            model, micro_batches, prepare=prepare, no_sync=no_sync, backward=accelerator.backward
        )
        if isinstance(model, FSDPModule):
            average_replicated(model)
        return terms
    return cached_backward(
        model,
        accelerator.unwrap_model(model),
        [part for batch in micro_batches for part in split_pairs(batch, args.caching_micro_batch_size)],
        prepare=prepare,
        no_sync=no_sync,
        autocast=accelerator.autocast,
        scale=accelerator.scaler.scale if accelerator.scaler is not None else lambda loss: loss,
    )


def refuse_shared_samples(
    accelerator: Accelerator, sampler: ShardedBatchSampler | BatchStream, fingerprint: Any = None
) -> None:
    """
    Raise, on every process, if processes would train on the same samples or on different data.

    Args:
        accelerator (`Accelerator`): one collective of a few numbers per process.
        sampler ([`ShardedBatchSampler`] or [`BatchStream`]): its first batch is looked at; every later one is cut by
            the same rule.
        fingerprint (*optional*): of the data; compared as text.
    """
    if accelerator.num_processes == 1:
        return
    samples = sampler.first_samples()
    data = stable_seed(sampler.num_samples, *str(fingerprint).encode())
    row = [data, *samples, *[-1] * (sampler.batch_size - len(samples))]
    rows = accelerator.gather(torch.tensor([row], device=accelerator.device)).tolist()
    if len({row[0] for row in rows}) > 1:
        raise ConfigurationError("the processes have different training data; give all of them the same manifest")
    seen = [sample for row in rows for sample in row[1:] if sample >= 0]
    if len(rows) != accelerator.num_processes or len(set(seen)) < len(seen):
        raise ConfigurationError(
            f"processes would train on {len(seen) - len(set(seen))} of {len(seen)} samples twice; "
            "give each process its own index and all of them the same seed"
        )


__all__ = ["refuse_shared_samples", "running_strategy", "shards", "step_gradients", "wrap_model"]
