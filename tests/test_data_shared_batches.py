# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Batches in memory that is used again are the batches, and nothing is written that anyone still reads."""

import doctest
import gc
import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from modeling_t3d.data import shared_batches
from modeling_t3d.data.shared_batches import SharedBatchCollator, _unpacked


def make_batch(samples: list[int]) -> dict[str, torch.Tensor]:
    """Every kind of tensor that a batch holds, of sizes that change."""
    generator = torch.Generator().manual_seed(samples[0])
    length = 3 + samples[0] % 5
    return {
        "pixel_values": torch.randn(len(samples), 1, 4, 5, 6, generator=generator),
        "input_ids": torch.randint(0, 99, (len(samples), length), generator=generator),
        "mask": torch.rand(len(samples), length, generator=generator) > 0.5,
        "halves": torch.randn(7, 3, generator=generator).to(torch.bfloat16).T,  # not contiguous
        "none": torch.empty(len(samples), 0, 3),
        "number": torch.tensor(float(samples[0])),
    }


def assert_same(batch, expected):
    assert list(batch) == list(expected)
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype, name
        assert batch[name].shape == tensor.shape, name
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_collator(num_workers, keep):
    loader = DataLoader(
        range(40), batch_size=2, collate_fn=SharedBatchCollator(make_batch), num_workers=num_workers, timeout=0
    )
    kept = []
    for number, batch in enumerate(loader):
        assert_same(batch, make_batch([2 * number, 2 * number + 1]))
        if keep:
            kept.append(batch)
    for number, batch in enumerate(kept):
        assert_same(batch, make_batch([2 * number, 2 * number + 1]))


def test_a_worker_has_no_more_blocks_than_batches_are_under_way():
    def collate(samples):
        return {"blocks": torch.tensor(len(collator._blocks)), "values": torch.full((1000,), samples[0])}

    collator = SharedBatchCollator(collate)
    loader = DataLoader(range(60), batch_size=1, collate_fn=collator, num_workers=1, prefetch_factor=2)
    counts = [int(batch["blocks"]) for batch in loader]
    # Two ahead, one in the loop, one that the loop holds until it has the next.
    assert max(counts) <= 4
    assert len(counts) == 60


def test_a_block_is_lent_until_the_last_view_is_gone():
    collator = SharedBatchCollator(make_batch)
    first = collator._packed(make_batch([0, 1]))
    batch = _unpacked(first.block, first.layout)
    row = batch["pixel_values"][1, 0, 2]
    expected = row.clone()
    del batch
    gc.collect()
    second = collator._packed(make_batch([5, 6]))
    assert second.block is not first.block
    assert torch.equal(row, expected)
    del row
    gc.collect()
    third = collator._packed(make_batch([10, 11]))
    assert third.block is first.block
    assert_same(_unpacked(third.block, third.layout), make_batch([10, 11]))


def test_blocks_grow_with_batches():
    collator = SharedBatchCollator(make_batch)
    small = collator._packed({"values": torch.zeros(10)})
    del_later = _unpacked(small.block, small.layout)
    large = {"values": torch.arange(10_000)}
    packed = collator._packed(large)
    assert_same(_unpacked(packed.block, packed.layout), large)
    assert torch.equal(del_later["values"], torch.zeros(10))


def _drop(batch) -> None:
    batch.clear()
    gc.collect()


def test_a_forked_process_gives_nothing_back():
    collator = SharedBatchCollator(make_batch)
    packed = collator._packed(make_batch([0, 1]))
    batch = _unpacked(packed.block, packed.layout)
    child = multiprocessing.get_context("fork").Process(target=_drop, args=(batch,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert packed.block[0] == 1
    _drop(batch)
    assert packed.block[0] == 0


def test_examples_in_the_docstrings():
    results = doctest.testmod(shared_batches)
    assert results.attempted > 0
    assert results.failed == 0
