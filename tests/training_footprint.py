# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Two real steps of a small model, and the bytes that torch's allocator handed out for them."""

import torch
from torch.profiler import ProfilerActivity, profile

from modeling_t3d import T3DConfig, T3DForPreTraining
from modeling_t3d.training.arguments import T3DTrainingArguments
from modeling_t3d.training.trainer import T3DTrainer

VIEW, LOCAL_VIEW, NUM_TOKENS = 24, 16, 24


class Pairs:
    """Random pairs; what is in them does not matter."""

    def __init__(self, num_pairs: int, num_views: int) -> None:
        self.num_pairs = num_pairs
        self.num_views = num_views

    def __len__(self):
        return self.num_pairs

    def __getitem__(self, key):
        return key.sample

    def collate(self, samples):
        size = len(samples)
        # A generator of its own: a thread makes batches while the step before draws its dropout.
        generator = torch.Generator().manual_seed(samples[0])
        shape = (size, self.num_views, 1, LOCAL_VIEW, LOCAL_VIEW, LOCAL_VIEW)
        return {
            "input_ids": torch.ones(size, NUM_TOKENS, dtype=torch.long),
            "attention_mask": torch.ones(size, NUM_TOKENS, dtype=torch.long),
            "pixel_values": torch.rand(size, 1, VIEW, VIEW, VIEW, generator=generator),
            "local_pixel_values": torch.rand(shape, generator=generator),
            "local_mask": torch.ones(size, self.num_views, dtype=torch.bool),
            "local_positions": torch.zeros(size, self.num_views, 6),
            "study_ids": torch.tensor(samples),
            "report_ids": torch.tensor(samples),
        }


def build(output_dir, *, num_pairs: int = 8, num_views: int = 2, overrides=None, **settings) -> T3DTrainer:
    """A trainer of the smallest preset."""
    args = T3DTrainingArguments(
        str(output_dir),
        max_steps=2,
        per_device_train_batch_size=num_pairs,
        use_cpu=True,
        trackers=[],
        plot=False,
        **{"mixed_precision": "no", **settings},
    )
    torch.manual_seed(0)
    pairs = Pairs(2 * num_pairs, num_views)
    return T3DTrainer(
        T3DForPreTraining(T3DConfig.from_preset("tiny", **(overrides or {}))), args, pairs, pairs.collate
    )


def allocated_peak(trainer: T3DTrainer) -> int:
    """Most bytes of two steps that torch's allocator had handed out at once, kernels' own workspaces included."""
    weights = sum(value.numel() * value.element_size() for value in trainer.unwrapped_model.state_dict().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_two_steps(trainer)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return weights + peak


def take_two_steps(trainer: T3DTrainer) -> None:
    """Without loader, so that only the batch of the step is in memory."""
    size = trainer.args.per_device_train_batch_size
    for _ in range(2):
        trainer._step([trainer.collator(list(range(size)))])
