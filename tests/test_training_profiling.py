# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A profile has every part of a step, adds up, and leaves nothing behind; operations are those of products."""

import json
import time

import pytest
import torch
from training_footprint import build
from training_stub import build_trainer

from modeling_t3d import T3DForPreTraining
from modeling_t3d.training.profiling import PARTS, StepClock, count_operations, profile_steps


def test_parts_nest_and_add_up():
    clock = StepClock(torch.device("cpu"))
    start = time.perf_counter()
    with clock.part("optimiser"):
        time.sleep(0.01)
        with clock.part("vision"):
            time.sleep(0.02)
            clock.credit("transfer")
            time.sleep(0.01)
    seconds = time.perf_counter() - start
    assert clock.seconds["optimiser"] >= 0.01
    assert clock.seconds["transfer"] >= 0.02
    assert clock.seconds["vision"] >= 0.01
    assert sum(clock.seconds.values()) <= seconds
    with pytest.raises(KeyError, match="broken"), clock.part("text"):
        raise KeyError("broken")
    assert not clock._open


def test_table_and_trace(tmp_path):
    trainer = build(tmp_path / "run", num_pairs=3)
    trainer.args.max_steps = 4
    functions, transform = (torch.autograd.backward, torch.autograd.grad), trainer.batch_transform
    table = profile_steps(trainer, tmp_path / "profile", num_steps=2, warmup_steps=1)
    assert (tmp_path / "profile" / "table.md").read_text() == table + "\n"
    rows = dict(line.strip("| ").split(" | ")[:2] for line in table.splitlines()[2:])
    assert list(rows) == [*PARTS, "other", "step"]
    for part in ("vision", "text", "objectives", "backward", "optimiser"):
        assert float(rows[part]) > 0
    total = sum(float(value) for name, value in rows.items() if name != "step")
    assert total == pytest.approx(float(rows["step"]), abs=0.6)
    names = {
        event.get("name") for event in json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert {"vision", "text", "objectives", "backward", "aten::convolution"} <= names
    assert (torch.autograd.backward, torch.autograd.grad) == functions
    assert trainer.batch_transform == transform
    assert "align" not in vars(trainer.unwrapped_model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("settings", "num_parts"),
    [({"gradient_caching": True, "caching_micro_batch_size": 2}, 3), ({"view_chunk_size": 3}, 1)],
)
def test_every_part_gets_its_own_time(tmp_path, monkeypatch, settings, num_parts):
    class HeardClock(StepClock):
        def __init__(self, device):
            super().__init__(device)
            clocks.append(self)

    def slow_align(*args, **options):
        time.sleep(0.2)
        return align(*args, **options)

    clocks, align = [], T3DForPreTraining.align
    monkeypatch.setattr("modeling_t3d.training.profiling.StepClock", HeardClock)
    monkeypatch.setattr(T3DForPreTraining, "align", slow_align)
    trainer = build(tmp_path / "run", num_pairs=6, **settings)
    trainer.args.max_steps = 2
    weight = trainer.unwrapped_model.t3d.visual_projection.input_projection.weight
    weight.register_hook(lambda gradient: time.sleep(0.2))
    profile_steps(trainer, tmp_path / "profile", num_steps=1, warmup_steps=1)
    seconds = clocks[0].seconds
    assert seconds["objectives"] >= 0.2
    assert seconds["backward"] >= 0.2 * num_parts
    assert seconds["transfer"] < seconds["backward"]
    assert not clocks[0]._open


@pytest.mark.parametrize("settings", [{}, {"batch_norm": "frozen", "view_chunk_size": 2}])
def test_batch_norms_are_in_the_mode_in_which_they_train(tmp_path, settings):
    trainer = build(tmp_path / "run", num_pairs=3, overrides={"vision_config": {"norm": "batch"}}, **settings)
    trainer.args.max_steps = 3
    norm = trainer.unwrapped_model.t3d.vision_model.encoder.bn1
    before = norm.running_mean.clone()
    assert "| step |" in profile_steps(trainer, tmp_path / "profile", num_steps=1, warmup_steps=0)
    assert count_operations(trainer) > 0
    assert torch.equal(norm.running_mean, before) == bool(settings)


def test_a_model_without_towers(tmp_path):
    table = profile_steps(build_trainer(tmp_path), tmp_path / "profile", num_steps=1, warmup_steps=0)
    assert "| step |" in table


def test_operations_of_a_step_are_those_of_its_products(tmp_path):
    """Four samples: two layers of 4 x 8 whose input has no gradient, one of 8 x 1 whose input has one."""
    once = 2 * (2 * 4 * 4 * 8) * 2 + (2 * 4 * 8 * 1) * 3
    assert count_operations(build_trainer(tmp_path / "one")) == once
    assert count_operations(build_trainer(tmp_path / "two", gradient_accumulation_steps=2)) == 2 * once


def test_a_step_over_fewer_local_views_has_fewer_operations(tmp_path):
    few, many = (count_operations(build(tmp_path / str(n), num_pairs=3, num_views=n)) for n in (2, 4))
    assert few < many < 2 * few
