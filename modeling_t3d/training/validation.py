# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The training losses on held-out pairs, the validation that every manifest allows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .arguments import ConfigurationError
from .sampling import KeyedDataset, ShardedBatchSampler


class ValidationLosses:
    """
    A callable for [`T3DTrainer`]: model -> mean of every `loss*` of its output over fixed batches of held-out pairs.

    Batches, views and texts are the same at every call. A contrastive loss depends on the size of its batch: only
    whole batches count, and numbers of different batch sizes cannot be compared.

    Args:
        dataset ([`KeyedDataset`]), collator (callable): as for training.
        batch_size (`int`): pairs per process.
    """

    def __init__(
        self, dataset: KeyedDataset, collator: Callable[[list[Any]], dict[str, torch.Tensor]], batch_size: int
    ):
        if len(dataset) < 2:
            raise ConfigurationError("validation needs at least 2 pairs; set data.validation_split to null")
        self.dataset = dataset
        self.collator = collator
        self.batch_size = min(batch_size, len(dataset))

    def sampler(self) -> ShardedBatchSampler:
        """This process's samples, batch by batch."""
        distributed = torch.distributed.is_initialized()
        num_processes = torch.distributed.get_world_size() if distributed else 1
        return ShardedBatchSampler(
            len(self.dataset),
            max(1, min(self.batch_size, len(self.dataset) // num_processes)),
            num_processes=num_processes,
            process_index=torch.distributed.get_rank() if distributed else 0,
            shuffle=False,
        )

    @property
    def global_batch_size(self) -> int:
        """Pairs of a batch, over all processes."""
        sampler = self.sampler()
        return sampler.batch_size * sampler.num_processes

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches; every process has as many, of the same size."""
        for keys in self.sampler():
            yield self.collator([self.dataset[key] for key in keys])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Means over the pairs of all processes."""
        device = next(model.parameters()).device
        sums: dict[str, float] = {}
        num_batches = 0
        for batch in self.batches():
            output = model(**{name: value.to(device) for name, value in batch.items()})
            num_batches += 1
            for name, value in output.items():
                if name.startswith("loss") and isinstance(value, torch.Tensor) and value.ndim == 0:
                    sums[name] = sums.get(name, 0.0) + float(value)
        return {name: value / num_batches for name, value in sums.items()}


__all__ = ["ValidationLosses"]
