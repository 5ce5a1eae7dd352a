# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Fully sharded data parallelism (FSDP2): each process keeps a part of every parameter, of its gradient and of the
optimiser's state. How such a model is saved stands in `sharded_state`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .gradient_caching import TwoStageModel, add_averaged


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What every process keeps whole: scalars, which cannot be divided, and the parameters of the loss stage."""
    loss_stage = model.loss_stage_parameters() if isinstance(model, TwoStageModel) else []
    chosen = {id(parameter) for parameter in loss_stage}
    return [parameter for parameter in model.parameters() if id(parameter) in chosen or not parameter.ndim]


def shard_model(
    model: PreTrainedModel, device: torch.device, autocast: Callable[[], Any] | None = None, **options: Any
) -> nn.Module:
    """
    Shard a model in place over all processes: its blocks, then its parts, then what remains.

    Args:
        model (`PreTrainedModel`): its `_no_split_modules` name the blocks; the first process's weights hold for all.
        device (`torch.device`): where it trains.
        autocast (callable, *optional*): context of the forward pass, whose outputs are then float32.
        options: of [`~torch.distributed.fsdp.fully_shard`].

    Returns:
        The model, now an `FSDPModule`.
    """
    model.to(device)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    replicated = set(replicated_parameters(model))
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    # A part is sharded by itself, so that it can be called without the whole.
    parts = [*model.base_model.children(), *(child for child in model.children() if child is not model.base_model)]
    for module in dict.fromkeys([*blocks, *parts]):
        own = set(module.parameters())
        if own and not own & replicated:
            fully_shard(module, **options)
    if autocast is not None:
        model.forward = _in_context(autocast, model.forward)  # type: ignore[method-assign]
    return fully_shard(model, ignored_params=replicated, **options)


def _in_context(context: Callable[[], Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    return convert_outputs_to_fp32(run)


@contextmanager
def unsynchronised(model: FSDPModule) -> Iterator[None]:
    """Backward passes within it keep their gradients whole on each process, to be added to those of the next one."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def average_replicated(model: nn.Module) -> None:
    """After the backward pass: average over processes the gradients of what every process keeps whole."""
    parameters = [parameter for parameter in replicated_parameters(model) if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    add_averaged(parameters, gradients)


@torch.no_grad()
def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of gradients together, sharded and whole ones: a scalar, the same on every process."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm(whole)
    norms = [nn.utils.get_total_norm(sharded).full_tensor()]
    norms += [nn.utils.get_total_norm(whole)] if whole else []
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scale gradients to a norm of at most `max_norm`, given the one they have from [`gradient_norm`]."""
    sharded = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    whole = [parameter for parameter in parameters if not isinstance(parameter.grad, DTensor)]
    for group in filter(None, (sharded, whole)):
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)


__all__ = [
    "average_replicated",
    "clip_gradients",
    "gradient_norm",
    "replicated_parameters",
    "shard_model",
    "unsynchronised",
]
