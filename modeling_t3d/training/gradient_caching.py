# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The gradients of a step of several micro-batches. Accumulated: the mean of their losses. Cached: the loss of all
their pairs as one contrastive batch, in the memory of one micro-batch (Gao et al. 2021, arXiv 2101.06983)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..communication_t3d import all_reduce_sum, world_size
from .checkpoints import random_state, restore_random_state

Batch = dict[str, torch.Tensor]

# The states have content also where tensors get none, in a forecast of memory.
_random_state = _disable_current_modes()(random_state)
_restore_random_state = _disable_current_modes()(restore_random_state)


@runtime_checkable
class TwoStageModel(Protocol):
    """A model whose `forward` takes `stage="encode"` for what knows one pair at a time, and what follows it."""

    def align(self, features: Any) -> Any:
        """The loss over the pairs of all processes."""

    def loss_stage_parameters(self) -> list[nn.Parameter]:
        """What `align` uses and encoding does not."""


@contextmanager
def withheld_loss_stage(model: TwoStageModel) -> Iterator[None]:
    """
    Within it, parameters of the loss stage are out of sight of whoever looks for what trains: data parallelism built
    here neither waits for their gradients nor touches them.
    """
    withheld = [parameter for parameter in model.loss_stage_parameters() if parameter.requires_grad]
    for parameter in withheld:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in withheld:
            parameter.requires_grad_(True)


def split_pairs(batch: Batch, size: int | None) -> list[Batch]:
    """
    A batch as micro-batches of at most `size` pairs; `None` leaves it whole.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.training.gradient_caching import split_pairs

    >>> [len(part["input_ids"]) for part in split_pairs({"input_ids": torch.zeros(5, 3)}, 2)]
    [2, 2, 1]

    ```"""
    num_pairs = len(next(iter(batch.values())))
    step = num_pairs if size is None else size
    return [
        {name: value[start : start + step] for name, value in batch.items()} for start in range(0, num_pairs, step)
    ]


def accumulated_backward(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    prepare: Callable[[Batch], Batch] = dict,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> dict[str, torch.Tensor]:
    """
    Add to every parameter's gradient that of the mean of the micro-batches' losses, each over all processes.

    Args:
        model (`nn.Module`): wrapped or not; its output has `loss`.
        micro_batches (sequence of `dict`): this process's shares; all processes have as many.
        prepare (callable): micro-batch -> arguments of the model.
        no_sync (callable): context in which a backward pass averages nothing over processes.
        backward (callable): is given each loss.

    Returns:
        The scalars of the model's output, averaged over the micro-batches.
    """
    terms: dict[str, torch.Tensor] = {}
    for position, batch in enumerate(micro_batches, start=1):
        # Gradients are averaged over processes once, with the last micro-batch.
        with nullcontext() if position == len(micro_batches) else no_sync():
            output = model(**prepare(batch))
            backward(output["loss"] / len(micro_batches))
        for name, value in scalars(output).items():
            terms[name] = terms.get(name, 0.0) + value / len(micro_batches)
    return terms


def scalars(output: Any) -> dict[str, torch.Tensor]:
    """The terms of a model's output that are single numbers, detached."""
    return {
        name: value.detach() for name, value in output.items() if isinstance(value, torch.Tensor) and value.ndim == 0
    }


def cached_backward(
    encoder: nn.Module,
    model: TwoStageModel,
    micro_batches: Sequence[Batch],
    *,
    prepare: Callable[[Batch], Batch] = dict,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> dict[str, torch.Tensor]:
    r"""
    Add to every parameter's gradient that of one loss over all pairs of all micro-batches and processes.

    ```python
    features = [encode(batch) for batch in micro_batches]            # no graph
    loss = align(concatenate(features))                              # once: the collectives of the loss are here
    cached, of_loss_stage = gradients(loss, by=(features, loss_stage_parameters))
    for batch, gradient in zip(micro_batches, cached):               # the same random numbers as the first time
        encode(batch).backward(gradient)                             # processes average with the last one alone
    average_over_processes(of_loss_stage)
    ```

    Exact as long as no pair's features depend on another pair: no batch norm in training mode. Memory is that of one
    micro-batch's graph, of all features, and of what `align` needs.

    Args:
        encoder (`nn.Module`): `model`, or what wraps it; wrappers are built within [`withheld_loss_stage`].
        model ([`TwoStageModel`]): has `align` and `loss_stage_parameters`.
        micro_batches (sequence of `dict`): this process's pairs; other processes may have more micro-batches or fewer.
        prepare (callable): micro-batch -> arguments of the model; called twice with the same random numbers, so that
            neither copies on the device nor augmented views are kept.
        no_sync (callable): context in which a backward pass of `encoder` averages nothing over processes.
        autocast (callable): context of `align`; the encoder has its own.
        scale (callable): multiplies the loss, for half precision.

    Returns:
        The scalars of what `align` returned.
    """
    states, parts = [], []
    for batch in micro_batches:
        states.append(_random_state())
        with torch.no_grad(), no_sync():
            parts.append(encoder(**prepare(batch), stage="encode"))
    leaves = [
        {name: value.detach().requires_grad_() for name, value in part.items() if value.is_floating_point()}
        for part in parts
    ]
    features = type(parts[0]).concatenate(
        [type(part)(**{**part, **own}) for part, own in zip(parts, leaves, strict=True)]
    )
    del parts
    parameters = [parameter for parameter in model.loss_stage_parameters() if parameter.requires_grad]
    with autocast():
        output = model.align(features)
    # Not `backward`: hooks of the parameters would take this for the gradients of their step.
    gradients = torch.autograd.grad(
        scale(output["loss"]), [*(leaf for own in leaves for leaf in own.values()), *parameters], allow_unused=True
    )
    terms = scalars(output)
    del features, output
    remaining = iter(gradients)
    cached = [{name: next(remaining) for name in own} for own in leaves]
    of_loss_stage = list(remaining)

    after_loss = _random_state()
    for position, (batch, state, own) in enumerate(zip(micro_batches, states, cached, strict=True), start=1):
        _restore_random_state(state)
        with nullcontext() if position == len(micro_batches) else no_sync():
            encoded = encoder(**prepare(batch), stage="encode")
            names = [name for name, gradient in own.items() if gradient is not None and encoded[name].requires_grad]
            torch.autograd.backward([encoded[name] for name in names], [own[name] for name in names])
    _restore_random_state(after_loss)
    add_averaged(parameters, of_loss_stage)
    return terms


def add_averaged(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    """
    Add gradients, averaged over processes, to those of the parameters; one collective per data type. What no process
    used keeps no gradient, as in data-parallel training.
    """
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        chosen = [
            (parameter, gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if parameter.dtype == dtype
        ]
        is_used = [gradient is not None for _, gradient in chosen]
        flat = [
            torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
            for parameter, gradient in chosen
        ]
        if world_size() > 1:
            mean = all_reduce_sum(torch.cat(flat)) / world_size()
            flat = list(mean.split([parameter.numel() for parameter, _ in chosen]))
            users = all_reduce_sum(torch.tensor(is_used, dtype=torch.int64, device=mean.device))
            is_used = (users > 0).tolist()
        for (parameter, _), gradient, used in zip(chosen, flat, is_used, strict=True):
            if used:
                gradient = gradient.view_as(parameter)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


__all__ = [
    "TwoStageModel",
    "accumulated_backward",
    "add_averaged",
    "cached_backward",
    "scalars",
    "split_pairs",
    "withheld_loss_stage",
]
