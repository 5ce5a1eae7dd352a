# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What happens when a loss or a gradient is not finite: it is named, with the samples, and the step is left out or the
run stopped; the same on all processes."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..communication_t3d import all_reduce_sum
from .arguments import T3DTrainingArguments
from .processes import ProcessGroup

logger = logging.getLogger(__name__)

_NAMED = 8  # parameters, and samples, that a message spells out


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite; the message names it, the samples and the remedy."""


class NonFiniteGuard:
    """
    Judges each step before the optimiser takes it.

    Args:
        model (`nn.Module`): not wrapped; its gradients are those of the step.
        args ([`T3DTrainingArguments`]): `non_finite` and `max_skipped_steps`.
        processes ([`ProcessGroup`]): of the run.
        row_numbers (sequence of `int`, *optional*): of each sample in its manifest, to be named instead of its index.
    """

    def __init__(
        self,
        model: nn.Module,
        args: T3DTrainingArguments,
        processes: ProcessGroup,
        row_numbers: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.policy = args.non_finite
        self.max_skipped_steps = args.max_skipped_steps
        self.processes = processes
        self.row_numbers = row_numbers
        self.num_skipped_in_a_row = 0
        self._statistics: dict[str, torch.Tensor] = {}

    def remember(self) -> None:
        """Before the forward pass: keep the running statistics that a step which is left out must not change."""
        if self.policy == "skip":
            self._statistics = {
                name: value.clone() for name, value in self.model.named_buffers() if value.is_floating_point()
            }

    def admits(
        self, terms: dict[str, torch.Tensor], step: int, samples: Callable[[], list[int]], scaled: bool
    ) -> bool:
        """
        Whether the optimiser may take the step; raises if the run must stop. Waits for the device once.

        Args:
            terms (`dict[str, torch.Tensor]`): the losses of the step and `grad_norm`.
            step (`int`): its number.
            samples (callable): this process's samples of the step.
            scaled (`bool`): gradients were scaled for float16, so that infinite ones belong to finding the scale.
        """
        judged = torch.stack([value.detach().float() for name, value in terms.items() if name != "grad_norm"])
        is_finite = torch.stack([torch.isfinite(judged).all(), torch.isfinite(terms["grad_norm"]).reshape(())])
        num_broken = all_reduce_sum((~is_finite).to(torch.float32)).tolist()
        losses_are_finite = not num_broken[0]
        if not any(num_broken):
            self.num_skipped_in_a_row = 0
            return True
        self.num_skipped_in_a_row += 1
        if scaled and losses_are_finite and self.num_skipped_in_a_row <= self.max_skipped_steps:
            return False
        cause = self._describe(terms, step, samples())
        if self.policy == "stop" or self.num_skipped_in_a_row > self.max_skipped_steps:
            raise NonFiniteError(
                f"{cause}; the last checkpoint is whole: resume from it with a lower learning rate or "
                "training.mixed_precision=no"
            )
        logger.warning("%s; the step is left out", cause)
        buffers = dict(self.model.named_buffers())
        for name, value in self._statistics.items():
            buffers[name].copy_(value)
        return False

    def _describe(self, terms: dict[str, torch.Tensor], step: int, samples: list[int]) -> str:
        """Which losses and gradients, on which samples; collective."""
        losses = [
            f"{name} became {value.item():g}" for name, value in terms.items() if not torch.isfinite(value.detach())
        ]
        gradients = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        everyone = self.processes.gather((losses, gradients, samples))
        # Where a loss itself is not finite, only the processes that saw it have the samples.
        is_local = [any(not loss.startswith("grad_norm") for loss in losses) for losses, _, _ in everyone]
        losses = list(dict.fromkeys(loss for losses, _, _ in everyone for loss in losses))
        gradients = list(dict.fromkeys(name for _, gradients, _ in everyone for name in gradients))
        indices = [
            index
            for (_, _, indices), local in zip(everyone, is_local, strict=True)
            if local or not any(is_local)
            for index in indices
        ]
        if self.row_numbers is None:
            named = f"samples {_shortened([str(index) for index in indices])}"
        else:
            named = f"rows {_shortened([str(self.row_numbers[index]) for index in indices])} of the manifest"
        parts = [*losses, *([f"the gradient of {_shortened(gradients)} is not finite"] if gradients else [])]
        return f"step {step}: {', '.join(parts)} on {named}"


def _shortened(names: list[str], count: int = _NAMED) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


__all__ = ["NonFiniteError", "NonFiniteGuard"]
