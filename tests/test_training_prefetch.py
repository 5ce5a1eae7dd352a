# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is made ahead of time is what would have been made in its turn, failures included."""

import threading

import pytest
import torch
from training_stub import build_trainer

from modeling_t3d.training.prefetch import prefetched


def numbers(asked, count):
    for number in range(count):
        asked.append(number)
        if number == 5:
            raise KeyError("five")
        yield number


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_order_and_content_are_kept(depth):
    assert list(prefetched(range(20), depth)) == list(range(20))
    assert list(prefetched((None for _ in range(3)), depth)) == [None] * 3
    assert not threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_failure_comes_in_its_turn(depth):
    items = prefetched(numbers([], 9), depth)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="five"):
        next(items)
    assert not threads()


def test_no_more_is_made_than_may_wait():
    asked: list[int] = []
    items = prefetched(numbers(asked, 5), 2)
    assert next(items) == 0
    items.close()
    # One was taken, two may wait.
    assert len(asked) <= 3
    assert not threads(), "closing ends the thread"
    assert next(items, "closed") == "closed"


def test_the_step_keeps_its_threads():
    before = torch.get_num_threads()
    items = prefetched((torch.get_num_threads() for _ in range(2)), 1)
    assert next(items) == 1
    assert torch.get_num_threads() == before
    items.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "drop_last": False}])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_those_of_the_sampler(tmp_path, settings, num_workers):
    """Over three epochs, and continued from any step."""
    trainer = build_trainer(tmp_path, max_steps=16, dataloader_num_workers=num_workers, **settings)
    size, expected = trainer.args.gradient_accumulation_steps, []
    for epoch in range(8):
        trainer.sampler.seek(epoch)
        batches = [trainer.collator([trainer.train_dataset[key] for key in keys]) for keys in trainer.sampler]
        for step in range(trainer.steps_per_epoch):
            micro_batches = batches[step * size : step * size + size]
            expected.append((epoch, step * size + len(micro_batches), micro_batches))
    for first in (0, 2, trainer.steps_per_epoch, trainer.steps_per_epoch + 1):
        if first:
            trainer.state.epoch, trainer.state.next_batch, _ = expected[first - 1]
        steps = trainer._steps()
        for epoch, next_batch, micro_batches in expected[first:16]:
            for batch, wanted in zip(next(steps), micro_batches, strict=True):
                assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
            assert (trainer.state.epoch, trainer.state.next_batch) == (epoch, next_batch)
        steps.close()


def test_a_sample_that_fails_stops_the_run_with_its_own_error(tmp_path):
    trainer = build_trainer(tmp_path)
    get = type(trainer.train_dataset).__getitem__

    class Failing(type(trainer.train_dataset)):
        def __getitem__(self, key):
            if key.epoch == 1:
                raise FileNotFoundError("scan.nii.gz: the volume of row 7 has vanished")
            return get(self, key)

    trainer.train_dataset.__class__ = Failing
    with pytest.raises(FileNotFoundError, match="row 7 has vanished"):
        trainer.train()
    assert trainer.state.step == trainer.steps_per_epoch, "the steps before it were taken"
    assert not threads()
