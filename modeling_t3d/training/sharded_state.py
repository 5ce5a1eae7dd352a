# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tensors of a model and its optimiser as one process has them, also where `fully_shard` has spread them: gathered to
be written, spread again when read, so that a checkpoint depends on no number of processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .files import as_system_error


def model_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once, whole, in main memory. Collective where the model is sharded; a
    process that has no use for them says so."""
    tensors = {}
    for name, tensor in _named_tensors(model).items():
        whole = _whole(tensor.detach())
        if keep:
            tensors[name] = whole.cpu().contiguous()
    return tensors


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, or raise what the operating system said."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise as_system_error(error, path) or error from None


@torch.no_grad()
def load_model_tensors(model: nn.Module, path: Path) -> None:
    """Fill a model with what [`write_tensors`] wrote; another model raises. Collective where it is sharded."""
    loaded = load_file(path)
    targets = _named_tensors(model)
    if loaded.keys() != targets.keys():
        names = sorted(loaded.keys() ^ targets.keys())
        raise ValueError(f"{names[0]} is in one of the two only" + (f", and {len(names) - 1} more" * (len(names) > 1)))
    for name, target in targets.items():
        if loaded[name].shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(loaded[name].shape)} instead of {tuple(target.shape)}")
        target.copy_(_spread_like(loaded[name], target))


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """The optimiser's `state_dict`, its tensors whole, as [`model_tensors`] gives the model's."""
    return _map_tensors(optimizer.state_dict(), lambda tensor: _kept(tensor, keep))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """
    Undo [`optimizer_state`], but for the settings: rates, decay and betas stay the optimiser's own, so that a run may
    go on with others. Collective where the parameters are sharded.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        parameter = parameters[index]
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim:
                entries[name] = _spread_like(value, parameter)
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers; one that has two names under its first."""
    first_names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if first_names.setdefault(id(tensor), name) == name}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _kept(tensor: torch.Tensor, keep: bool) -> torch.Tensor:
    whole = _whole(tensor)
    return whole.cpu() if keep else torch.empty(0)


def _spread_like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`value`, whole on every process, in the way `target` is spread."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_tensors(entry, function) for name, entry in value.items()}
    if isinstance(value, list):
        return [_map_tensors(entry, function) for entry in value]
    return value


__all__ = ["load_model_tensors", "load_optimizer_state", "model_tensors", "optimizer_state", "write_tensors"]
