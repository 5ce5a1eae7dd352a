# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Parameter groups, the schedule as a pure function of progress, and what happens to weights after a step."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import ConfigurationError, T3DTrainingArguments

# Of matrices that place or scale something, and are no map from one space to another.
_NOT_DECAYED = ("position_embeddings", "prototypes")
# Of matrices of which there is one for each place in the body, and which the reports say little about.
_PLACES = "place_weight"


def parameter_groups(model: nn.Module, args: T3DTrainingArguments) -> list[dict]:
    """
    Trainable parameters by tower and by whether weight decay applies, in the model's order.

    Below `vision_model` and `text_model` the towers' rates hold, elsewhere the heads'. Vectors and scalars (biases,
    norms, temperature), learnt positions and prototypes are not decayed. Weights of single places stand by themselves.

    Raises:
        ConfigurationError: nothing trains, or there are no weights of places to shrink.
    """
    rates = {
        "vision": args.vision_learning_rate,
        "text": args.text_learning_rate,
        "heads": args.head_learning_rate,
        "places": args.vision_learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        tower = "vision" if "vision_model" in parts else "text" if "text_model" in parts else "heads"
        tower = "places" if parts[-1] == _PLACES else tower
        is_decayed = parameter.ndim > 1 and not any(part.endswith(_NOT_DECAYED) for part in parts)
        groups.setdefault((tower, is_decayed), []).append(parameter)
    if not groups:
        raise ConfigurationError("the model has no trainable parameter; freeze less")
    if args.place_soft_threshold and ("places", True) not in groups:
        raise ConfigurationError(
            f"training.place_soft_threshold={args.place_soft_threshold} shrinks weights of single places, of which "
            'the model trains none: set it to 0, or vision_config.encoder_type="local_contrast"'
        )
    return [
        {
            "params": parameters,
            "name": tower if decayed else f"{tower}_no_decay",
            "lr": rates[tower],
            "peak_lr": rates[tower],
            "weight_decay": args.weight_decay if decayed else 0.0,
            **({"soft_threshold": args.place_soft_threshold} if tower == "places" else {}),
        }
        for (tower, decayed), parameters in groups.items()
    ]


def learning_rate(peak: float, progress: float, *, minimum: float, warmup_ratio: float) -> float:
    """
    Linear warm-up, then a cosine.

    Args:
        peak (`float`): the rate after the warm-up.
        progress (`float`): share of the run that is over, in [0, 1].
        minimum (`float`): the rate at the end (never above the peak).
        warmup_ratio (`float`): share of the run that warms up.
    """
    if progress < warmup_ratio:
        return peak * progress / warmup_ratio
    minimum = min(minimum, peak)
    share = min(1.0, (progress - warmup_ratio) / (1 - warmup_ratio))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def clamp_logit_scale(model: PreTrainedModel) -> None:
    """
    Keep learnt log scales at or below `log(config.max_logit_scale)`.

    This stands after the optimiser step and not in the forward pass, where a clamp would stop the gradient.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.split(".")[-1] == "logit_scale":
            parameter.clamp_(max=math.log(model.config.max_logit_scale))


@torch.no_grad()
def shrink_place_weights(optimizer: torch.optim.Optimizer) -> None:
    """
    Move weights of single places towards 0 by their group's `soft_threshold` times its learning rate, and no further.

    The proximal step of an L1 penalty, decoupled from the gradient as AdamW's decay is: a weight whose gradients do
    not agree from step to step becomes and stays exactly 0.
    """
    for group in optimizer.param_groups:
        if group.get("soft_threshold"):
            for parameter in group["params"]:
                size = (parameter.abs() - group["soft_threshold"] * group["lr"]).clamp(min=0)
                parameter.copy_(parameter.sign() * size)


__all__ = ["clamp_logit_scale", "learning_rate", "parameter_groups", "shrink_place_weights"]
