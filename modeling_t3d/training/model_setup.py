# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is done to a model once before it trains: frozen layers, memory layout, recomputation, compilation."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .arguments import ConfigurationError, T3DTrainingArguments


def set_up_model(model: PreTrainedModel, args: T3DTrainingArguments) -> None:
    """
    Change a model in place as the settings say; names of parameters stay.

    Args:
        model (`PreTrainedModel`): not wrapped.
        args ([`T3DTrainingArguments`]): frozen layers, memory format, checkpointing, compilation.

    Raises:
        ConfigurationError: no layer has a name that the settings give, or every text would have one embedding.
    """
    _refuse_blind_text_tower(model)
    freeze(model, args.frozen_vision_layers, args.frozen_parameters)
    if args.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last_3d)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
        _checkpoint_only(model, args.activation_checkpointing_stages)
    if args.compile_encoder:
        # In place; views of another size make another graph, not one for all sizes, which is slower.
        vision_encoder(model).compile(dynamic=False)


def _refuse_blind_text_tower(model: PreTrainedModel) -> None:
    """Raise for a dual encoder whose reports all have one embedding: its loss would stay at chance without a word."""
    if hasattr(model.base_model, "refuse_blind_first_token"):
        try:
            model.base_model.refuse_blind_first_token()
        except ValueError as error:
            raise ConfigurationError(f"{error} (model.overrides.text_pooling=mean)") from None


def vision_encoder(model: nn.Module) -> nn.Module:
    """The module that turns views into tokens: `encoder` below the first `vision_model`."""
    for name, module in model.named_modules():
        if name.split(".")[-2:] == ["vision_model", "encoder"]:
            return module
    raise ConfigurationError(
        f"{type(model).__name__} has no vision_model.encoder; leave training.compile_encoder and "
        "training.frozen_vision_layers as they are by default"
    )


def encoder_stages(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """An encoder's stages in order, by name: its `nn.Sequential` children, and the members of its `nn.ModuleList`s."""
    stages: list[tuple[str, nn.Module]] = []
    for name, child in encoder.named_children():
        if isinstance(child, nn.ModuleList):
            stages += [(f"{name}.{index}", member) for index, member in enumerate(child)]
        elif isinstance(child, nn.Sequential):
            stages.append((name, child))
    return stages


def freeze(model: nn.Module, num_vision_layers: int, prefixes: list[str]) -> None:
    """
    Let parameters keep their values.

    Args:
        model (`nn.Module`): changed in place.
        num_vision_layers (`int`): stages of the vision encoder, from the views on, with what lies before them.
        prefixes (`list[str]`): of parameters' names; each must be the beginning of one.
    """
    if num_vision_layers:
        encoder = vision_encoder(model)
        stages = encoder_stages(encoder)
        if num_vision_layers > len(stages):
            raise ConfigurationError(
                f"training.frozen_vision_layers={num_vision_layers}, but the vision tower has {len(stages)} layers "
                f"({', '.join(name for name, _ in stages)}); lower it"
            )
        deeper = {parameter for _, stage in stages[num_vision_layers:] for parameter in stage.parameters()}
        last = stages[-1][0].split(".")[0]
        names = [name for name, _ in encoder.named_children()]
        behind = names[names.index(last) + 1 :]
        deeper |= {parameter for name in behind for parameter in encoder.get_submodule(name).parameters()}
        for parameter in encoder.parameters():
            if parameter not in deeper:
                parameter.requires_grad_(False)
    for prefix in prefixes:
        matching = [
            parameter
            for name, parameter in model.named_parameters()
            if f"{name}.".startswith(f"{prefix.rstrip('.')}.")
        ]
        if not matching:
            names = list(dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in model.named_parameters()))
            raise ConfigurationError(
                f"training.frozen_parameters: no parameter's name begins with {prefix!r}; they begin with "
                f"{', '.join(names)}"
            )
        for parameter in matching:
            parameter.requires_grad_(False)


def _checkpoint_only(model: nn.Module, stages: list[str]) -> None:
    """Leave the recomputation of blocks to the stages whose names are given; to all of them if none is."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    for stage in stages:
        if not any(_is_below(name, stage) for name in layers):
            raise ConfigurationError(
                f"training.activation_checkpointing_stages: no block lies below {stage!r}; blocks are "
                f"{', '.join(layers)}"
            )
    for name, layer in layers.items():
        if stages and not any(_is_below(name, stage) for stage in stages):
            layer.gradient_checkpointing = False


def _is_below(name: str, stage: str) -> bool:
    """Whether the parts of a stage's name follow each other in a module's name."""
    return f".{stage}." in f".{name}."


__all__ = ["encoder_stages", "freeze", "set_up_model", "vision_encoder"]
