# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Leak control of the multi-view alignment: how much of its loss falls without any information in the views.

Views are shuffled independently over the batch while reports stay; what the loss still gains comes from the query.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Below this distance from ln n the denominator is noise, and the ratio is undefined.
MINIMUM_GAIN = 0.05
# What belongs to a view and therefore moves with it.
VIEW_KEYS = ("local_pixel_values", "local_mask", "local_positions")


@dataclass(frozen=True)
class LeakReport:
    """Losses of the multi-view alignment with true and with shuffled views.

    Attributes:
        loss: loss with the views where they belong.
        loss_shuffled: mean loss over the shuffles.
        chance: loss of views that carry no information: ln n for n candidates, as the model says for other losses.
        leak: `(ln n - loss_shuffled) / (ln n - loss)`, or None while the model gains less than 0.05.
        num_shuffles: number of shuffles in the mean.
    """

    loss: float
    loss_shuffled: float
    chance: float
    leak: float | None
    num_shuffles: int

    def describe(self) -> str:
        """One line for a log or a table."""
        leak = "undefined (the loss is not 0.05 below chance)" if self.leak is None else f"{self.leak:.3f}"
        return (
            f"TMA loss {self.loss:.3f}, with shuffled views {self.loss_shuffled:.3f}, "
            f"chance {self.chance:.3f}, leak {leak}"
        )


def leak_ratio(loss: float, loss_shuffled: float, chance: float) -> float | None:
    """Share of the gain over chance that survives shuffled views; None ("undefined") while that gain is below 0.05.

    Args:
        loss: contrastive loss with the views where they belong.
        loss_shuffled: the same loss with each view shuffled independently over the batch.
        chance: that loss where views carry no information; `ln(B * S - 1)` for the clustering loss.

    Example:

    ```python
    >>> import math
    >>> from modeling_t3d.evaluation.leak import leak_ratio
    >>> round(leak_ratio(loss=1.62, loss_shuffled=math.log(127), chance=math.log(127)), 3)
    0.0
    >>> leak_ratio(loss=4.83, loss_shuffled=4.84, chance=4.844) is None
    True

    ```
    """
    gain = chance - loss
    return None if gain < MINIMUM_GAIN else (chance - loss_shuffled) / gain


def shuffle_views(batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
    """The batch with view slot s permuted over the pairs by its own permutation; reports and global views stay.

    Whole volumes shuffled together would prove nothing: views of one volume would still find each other.

    Args:
        batch: with `local_pixel_values` of shape `(B, S, C, d, h, w)` and, where present, `local_mask` `(B, S)` and
            `local_positions` `(B, S, 6)`, which move with their view.
        generator: on the CPU; the permutations are drawn from it.
    """
    num_pairs, num_views = batch["local_pixel_values"].shape[:2]
    sources = torch.stack([torch.randperm(num_pairs, generator=generator) for _ in range(num_views)], dim=1)
    slots = torch.arange(num_views).expand(num_pairs, num_views)
    shuffled = dict(batch)
    for key in VIEW_KEYS:
        if batch.get(key) is not None:
            device = batch[key].device
            shuffled[key] = batch[key][sources.to(device), slots.to(device)]
    return shuffled


@torch.no_grad()
def measure_leak(
    model: Any, batches: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, num_shuffles: int = 1, seed: int = 0
) -> LeakReport:
    """Recompute the multi-view alignment of a `T3DForPreTraining` with shuffled views, in evaluation mode.

    Args:
        model: its outputs hold `loss_tma` and `log_num_candidates`; its training mode is restored.
        batches: the model's keyword arguments, one batch or several, each with at least two pairs and their local
            views; moved to the model's device. Losses are averaged over batches.
        num_shuffles: independent shuffles per batch.
        seed: of the shuffles.
    """
    generator = torch.Generator().manual_seed(seed)
    true, shuffled, chances = [], [], []
    was_training = model.training
    model.eval()
    try:
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            views = batch.get("local_pixel_values")
            if views is None or len(views) < 2:
                raise ValueError("the leak control needs local_pixel_values of at least two pairs in every batch")
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            output = model(**inputs)
            true.append(float(output.loss_tma))
            chances.append(float(output.log_num_candidates))
            for _ in range(num_shuffles):
                shuffled.append(float(model(**shuffle_views(inputs, generator)).loss_tma))
    finally:
        model.train(was_training)
    if not true:
        raise ValueError("the leak control needs at least one batch")
    loss, loss_shuffled = sum(true) / len(true), sum(shuffled) / len(shuffled)
    chance = sum(chances) / len(chances)
    return LeakReport(
        loss=loss,
        loss_shuffled=loss_shuffled,
        chance=chance,
        leak=leak_ratio(loss, loss_shuffled, chance),
        num_shuffles=num_shuffles,
    )


__all__ = ["LeakReport", "leak_ratio", "measure_leak", "shuffle_views"]
