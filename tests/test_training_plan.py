# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The plan of a run says what the run will be: memory within 15 % of what the allocator hands out."""

from dataclasses import replace

import pytest
import torch
from training_footprint import allocated_peak, build

from modeling_t3d.presets_t3d import OBJECTIVES
from modeling_t3d.training.memory_forecast import AllocationMeter
from modeling_t3d.training.plan import plan_run


def plan_of(trainer):
    batch = trainer.collator([0, 1])
    if trainer.unwrapped_model.restoration is not None:
        batch["corruption_seeds"] = torch.zeros(2, dtype=torch.long)
    return plan_run(trainer, batch)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_pairs": 6, "num_views": 2},
        {"num_pairs": 10, "num_views": 3, "activation_checkpointing": True},
        pytest.param({"num_pairs": 16, "num_views": 4, "view_chunk_size": 4}, marks=pytest.mark.slow),
        pytest.param({"num_pairs": 8, "overrides": {"lambda_tma": 0.0}}, marks=pytest.mark.slow),
        {
            "num_pairs": 6,
            "overrides": {"vision_config": {"norm": "batch"}},
            "batch_norm": "frozen",
            "view_chunk_size": 2,
        },
        {"num_pairs": 96, "num_views": 3, "gradient_caching": True, "caching_micro_batch_size": 4},
        *({"num_pairs": 4, "overrides": {**OBJECTIVES[name], "tir_block_size": 8}} for name in OBJECTIVES),
        # As many prototypes as views: one fewer would be refused.
        {"num_pairs": 6, "num_views": 3, "overrides": {"tma_loss": "swav", "num_prototypes": 18}},
        {"num_pairs": 6, "mixed_precision": "bf16"},
    ],
)
def test_predicted_memory(tmp_path, settings):
    trainer = build(tmp_path, **settings)
    before = {name: value.clone() for name, value in trainer.unwrapped_model.state_dict().items()}
    forward = trainer.model.forward
    predicted = plan_of(trainer).peak_bytes
    for name, value in trainer.unwrapped_model.state_dict().items():
        assert torch.equal(value, before[name]), "the plan changes nothing"
    assert all(parameter.grad is None for parameter in trainer.unwrapped_model.parameters())
    assert trainer.model.forward == forward
    measured = allocated_peak(trainer)
    assert 0.85 * measured <= predicted <= 1.15 * measured


def test_what_a_plan_says(tmp_path):
    trainer = build(tmp_path / "deep" / "run", num_pairs=4, save_steps=1, save_total_limit=None, ema_decay=0.9)
    plan = plan_of(trainer)
    assert not (tmp_path / "deep").exists()
    model = trainer.unwrapped_model
    assert sum(count for count, _ in plan.parameters.values()) == sum(value.numel() for value in model.parameters())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert sum(count for _, count in plan.parameters.values()) == trained
    assert (plan.total_steps, plan.steps_per_epoch, plan.pairs_per_step) == (2, 2, 4)
    assert 0 < plan.bytes_per_pair < plan.peak_bytes
    assert plan.num_checkpoints == 2
    trainer.train()
    written = sum(path.stat().st_size for path in (tmp_path / "deep/run/checkpoints/step-00000002").rglob("*"))
    assert plan.checkpoint_bytes == pytest.approx(written, rel=0.15)
    text = plan.describe()
    assert "fits" in text
    assert plan.fits
    for tight in (replace(plan, memory_bytes=plan.memory_needed - 1), replace(plan, disk_bytes=plan.disk_needed - 1)):
        assert not tight.fits
        assert "DOES NOT FIT" in tight.describe()


def test_the_meter_counts_what_is_alive():
    with AllocationMeter() as meter:
        first = torch.zeros(100)
        views = first[10:], first.view(10, 10)
        assert meter.live_bytes == 400, "a view is no new memory"
        second = first + 1
        del first, views
        assert meter.live_bytes == 400
        del second
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 800
