# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Which samples each process sees at each step: a function of (seed, epoch, position) alone, so that a run resumes
where it stood, and processes never share a sample."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What a data set is asked for; random views and texts depend on nothing else (and the data set's own seed).

    Args:
        epoch (`int`): passes over the data so far.
        batch (`int`): position of the global batch in the epoch; the same on all processes.
        sample (`int`): which sample.
    """

    epoch: int
    batch: int
    sample: int


class KeyedDataset(Protocol):
    """A data set that is asked for [`SampleKey`]s and knows its size."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey) -> Any: ...


class BatchStream(Protocol):
    """Batches in an order of the stream's own; each process takes its share of it.

    Args:
        num_samples (`int`): size of the data set.
        batch_size (`int`): samples per process.
    """

    num_samples: int
    batch_size: int

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""

    @property
    def identity(self) -> Any:
        """What else must be the same for a resumed run to see the same samples; anything JSON holds."""

    def first_samples(self) -> list[int]:
        """This process's samples of the first batch of all."""

    def samples(self, epoch: int, batches: range) -> list[int]:
        """This process's samples of some batches of an epoch."""

    def global_size(self, batch: int) -> int:
        """Samples of a batch over all processes."""

    def seek(self, epoch: int, next_batch: int = 0) -> None:
        """Go to a batch of an epoch."""

    def batches(self, batches_per_epoch: int, num_workers: int = 0, **options: Any) -> Iterator[Any]:
        """From there on the batches, epoch after epoch, of each the first so many; options of a `DataLoader`."""


class ShardedBatchSampler(Sampler[list[SampleKey]]):
    """
    Batches of one process. Every epoch is one permutation of the samples, cut into global batches, each of which is
    cut into one share per process. Nothing is repeated to fill a batch.

    Args:
        num_samples (`int`): size of the data set.
        batch_size (`int`): samples per process.
        num_processes, process_index (`int`): how many share the data, and which one this is.
        seed (`int`): of the permutations.
        shuffle (`bool`, defaults to `True`): otherwise samples come in order, as for validation.
        drop_last (`bool`, defaults to `True`):
            Leave out the incomplete global batch. Otherwise it is shared as evenly as possible, and left out only if
            it has fewer than two samples for some process.

    Example:

    ```python
    >>> from modeling_t3d.training.sampling import ShardedBatchSampler

    >>> sampler = ShardedBatchSampler(5, 1, num_processes=2, process_index=1, seed=0, shuffle=False)
    >>> [[key.sample for key in batch] for batch in sampler]
    [[1], [3]]

    ```"""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.first_batch = 0
        global_batch_size = batch_size * num_processes
        remainder = num_samples % global_batch_size
        has_partial = not drop_last and remainder >= 2 * num_processes
        self.num_batches = num_samples // global_batch_size + has_partial
        self.identity = None  # as a [`BatchStream`] has one: the trainer's own settings say it all

    def seek(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration start at a batch of an epoch."""
        self.epoch, self.first_batch = epoch, first_batch

    def endless(self, batches_per_epoch: int) -> Iterator[list[SampleKey]]:
        """From where `seek` went, epoch after epoch; of each its first `batches_per_epoch` batches."""
        while True:
            yield from islice(iter(self), max(0, batches_per_epoch - self.first_batch))
            self.seek(self.epoch + 1)

    def first_samples(self) -> list[int]:
        """This process's samples of the next batch."""
        return [key.sample for key in next(iter(self), [])]

    def samples(self, epoch: int, batches: range) -> list[int]:
        """This process's samples of some batches of an epoch."""
        return [key.sample for share in self.keys(epoch, batches) for key in share]

    def global_size(self, batch: int) -> int:
        """Samples of a batch over all processes."""
        step = self.batch_size * self.num_processes
        return min(step, self.num_samples - batch * step)

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def keys(self, epoch: int, batches: range) -> Iterator[list[SampleKey]]:
        """This process's shares of some batches of an epoch; where `seek` went does not matter."""
        order = list(range(self.num_samples))
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch))
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        step = self.batch_size * self.num_processes
        for batch in batches:
            members = order[batch * step : (batch + 1) * step]
            bounds = [len(members) * rank // self.num_processes for rank in range(self.num_processes + 1)]
            share = members[bounds[self.process_index] : bounds[self.process_index + 1]]
            yield [SampleKey(epoch, batch, sample) for sample in share]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return self.keys(self.epoch, range(self.first_batch, self.num_batches))


def stable_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; neighbours share nothing (SplitMix64's mixing)."""
    mask = (1 << 64) - 1
    state = 0x243F6A8885A308D3
    for part in parts:
        state = (state ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


__all__ = ["BatchStream", "KeyedDataset", "SampleKey", "ShardedBatchSampler", "stable_seed"]
