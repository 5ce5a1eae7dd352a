# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Batches from loader processes in memory that is used again: asking the system for new shared pages for every batch
costs more than making it."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

_HEADER = 64  # bytes before the first tensor; the first one says whether the block is lent
_ALIGNMENT = 64
_HEADROOM = 1.125  # of a new block: batches differ a little in size, with the longest of their texts
_Layout = list[tuple[str, torch.dtype, tuple[int, ...], int]]


class SharedBatchCollator:
    """
    A collator whose batches, dictionaries of tensors, leave a loader's worker in one block of shared memory each.

    A worker keeps its blocks. One is written again when the last tensor of its batch, and the last view of one, is
    gone in the process that received it; there are never more of them than batches that are waiting or in use. In the
    main process batches are passed through as they are.

    Args:
        collator (callable): list of samples -> dictionary of tensors.

    Example:

    ```python
    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from modeling_t3d.data.shared_batches import SharedBatchCollator

    >>> collator = SharedBatchCollator(lambda samples: {"index": torch.tensor(samples)})
    >>> loader = DataLoader(range(4), batch_size=2, collate_fn=collator, num_workers=1)
    >>> [batch["index"].tolist() for batch in loader]
    [[0, 1], [2, 3]]

    ```"""

    def __init__(self, collator: Callable[[list[Any]], dict[str, torch.Tensor]]) -> None:
        self.collator = collator
        self._blocks: list[torch.Tensor] = []

    @property
    def identity(self) -> Any:
        """What the collator says of its batches."""
        return getattr(self.collator, "identity", None)

    def __call__(self, samples: list[Any]) -> Any:
        """The batch, or in a worker what arrives as the batch."""
        batch = self.collator(samples)
        return batch if get_worker_info() is None else self._packed(batch)

    def _packed(self, batch: dict[str, torch.Tensor]) -> "_PackedBatch":
        layout: _Layout = []
        end = _HEADER
        for name, tensor in batch.items():
            layout.append((name, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        block = self._free_block(end)
        for (_, dtype, shape, offset), tensor in zip(layout, batch.values(), strict=True):
            block[offset : offset + tensor.nbytes].view(dtype).view(shape).copy_(tensor)
        block[0] = 1
        return _PackedBatch(block, layout)

    def _free_block(self, size: int) -> torch.Tensor:
        for block in self._blocks:
            if block.numel() >= size and not block[0]:
                return block
        # What is too small for this batch would be too small for others; the rest is lent.
        self._blocks = [block for block in self._blocks if block[0]]
        block = torch.empty(int(size * _HEADROOM), dtype=torch.uint8).share_memory_()
        self._blocks.append(block)
        return block


class _PackedBatch:
    """A batch in a block; where it is unpickled it becomes a dictionary of tensors."""

    def __init__(self, block: torch.Tensor, layout: _Layout) -> None:
        self.block = block
        self.layout = layout

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _unpacked, (self.block, self.layout)


class _Loan:
    """The bytes of a block for numpy, whose arrays hold on to it; the block is free when the last of them is gone."""

    def __init__(self, block: torch.Tensor) -> None:
        self.block = block
        self.process = os.getpid()
        self.__array_interface__ = block.numpy().__array_interface__

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        # A process that was forked in the meantime has a copy of the loan and owes nothing.
        if getpid() == self.process:
            self.block[0] = 0


def _unpacked(block: torch.Tensor, layout: _Layout) -> dict[str, torch.Tensor]:
    # Storages of `from_numpy` hold the array, which holds the loan: `frombuffer` and slices of the block would not.
    values = torch.from_numpy(np.asarray(_Loan(block)))
    batch = {}
    for name, dtype, shape, offset in layout:
        length = dtype.itemsize * int(np.prod(shape))
        batch[name] = values[offset : offset + length].view(dtype).view(shape)
    return batch


__all__ = ["SharedBatchCollator"]
