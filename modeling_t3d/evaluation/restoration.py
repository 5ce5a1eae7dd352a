# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Does the report help restoration? The error with true reports against that with the reports of other volumes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# What belongs to a report and moves with it.
REPORT_KEYS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class RestorationReport:
    """Mean squared errors of restored views, with true and with shuffled reports.

    Attributes:
        loss: over all voxels.
        loss_corrupted: over the zeroed blocks alone.
        loss_shuffled: over all voxels, each volume restored with another volume's report.
        loss_corrupted_shuffled: the same over the zeroed blocks alone.
        num_shuffles: shuffles in the means of the last two.
    """

    loss: float
    loss_corrupted: float
    loss_shuffled: float
    loss_corrupted_shuffled: float
    num_shuffles: int

    @property
    def help_of_text(self) -> float:
        """Share of the zeroed blocks' error that the true report saves; about 0 where the report is not used."""
        return 1 - self.loss_corrupted / self.loss_corrupted_shuffled

    def describe(self) -> str:
        """One line for a log or a table."""
        return (
            f"TIR error {self.loss:.4f}, on zeroed blocks {self.loss_corrupted:.4f}; with shuffled reports "
            f"{self.loss_shuffled:.4f} and {self.loss_corrupted_shuffled:.4f}: "
            f"the report saves {self.help_of_text:.2%}"
        )


def shuffle_reports(batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
    """
    The batch with every report at another volume: all move on by the same random number of places.

    Args:
        batch: of at least two pairs; `REPORT_KEYS` move, all else stays.
        generator: on the CPU; the number of places is drawn from it.
    """
    num_pairs = len(batch["input_ids"])
    places = int(torch.randint(1, num_pairs, (1,), generator=generator))
    return {**batch, **{key: batch[key].roll(places, dims=0) for key in REPORT_KEYS if batch.get(key) is not None}}


@torch.no_grad()
def measure_restoration(
    model: Any, batches: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, num_shuffles: int = 1, seed: int = 0
) -> RestorationReport:
    """Restore the views of a `T3DForPreTraining` with true and with shuffled reports, in evaluation mode.

    Views are corrupted in the same way both times. A report that is identical to the true one counts as shuffled.

    Args:
        model: with `lambda_tir` above 0; its training mode is restored.
        batches: the model's keyword arguments, one batch or several, each with at least two pairs and their local
            views; moved to the model's device.
        num_shuffles: independent shuffles per batch.
        seed: of the shuffles.
    """
    if model.restoration is None:
        raise ValueError("the control of restoration needs a model that restores: one trained with lambda_tir above 0")
    generator = torch.Generator().manual_seed(seed)
    true, shuffled = [], []
    was_training = model.training
    model.eval()
    try:
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            if batch.get("local_pixel_values") is None or len(batch["input_ids"]) < 2:
                raise ValueError("the control of restoration needs local views of at least two pairs in every batch")
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            true.append(_sums(model, inputs))
            shuffled += [_sums(model, shuffle_reports(inputs, generator)) for _ in range(num_shuffles)]
    finally:
        model.train(was_training)
    if not true:
        raise ValueError("the control of restoration needs at least one batch")
    means = []
    for parts in (true, shuffled):
        sums, counts = torch.stack(parts).sum(dim=0)
        means += (sums / counts.clamp(min=1)).tolist()
    return RestorationReport(means[0], means[1], means[2], means[3], num_shuffles)


def _sums(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Squared errors and numbers of voxels, `(2, 2)`: over all and over zeroed blocks of the views that exist."""
    features = model(**inputs, stage="encode")
    exists = features.local_mask[..., None]
    parts = (features.restoration_errors, features.restoration_voxels)
    return torch.stack([torch.where(exists, part, 0).sum(dim=(0, 1)) for part in parts]).cpu().double()


__all__ = ["RestorationReport", "measure_restoration", "shuffle_reports"]
