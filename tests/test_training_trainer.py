# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The trainer trains what was asked for, resumes where it stood, and two processes see disjoint samples."""

import json
import math
import random

import pytest
import torch
from model_inputs import tiny_contrast_config
from torch.optim import AdamW
from training_runs import assert_same_weights, launch, log_of, status, weights
from training_stub import NUM_SAMPLES, StubConfig, StubModel, build_trainer

from modeling_t3d.modeling_t3d import T3DModel
from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments
from modeling_t3d.training.checkpoints import CheckpointError, list_checkpoints
from modeling_t3d.training.optimization import (
    clamp_logit_scale,
    learning_rate,
    parameter_groups,
    shrink_place_weights,
)

# ---------------------------------------------------------------------------------------------- training


def test_trains_logs_and_saves(tmp_path):
    metrics = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        metrics.append(1.0)
        return {"score": float(len(metrics))}

    trainer = build_trainer(tmp_path, evaluate=evaluate, eval_steps=6, trackers=["tensorboard"])
    before = {name: value.clone() for name, value in trainer.unwrapped_model.state_dict().items()}
    result = trainer.train()
    assert result.status == status(tmp_path)["status"] == "completed"
    assert result.state.step == 12
    assert result.state.num_volumes == 48
    after = trainer.unwrapped_model.state_dict()
    assert all(not torch.equal(before[name], value) for name, value in after.items())
    assert after["logit_scale"].item() == pytest.approx(math.log(StubConfig.max_logit_scale))
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 4, 6, 8, 9, 12]
    assert [line["score"] for line in lines if line["kind"] == "validation"] == [1.0, 2.0]
    assert result.metrics == {"score": 2.0}
    for line in lines:
        if line["kind"] == "train":
            assert {"loss", "loss_part", "grad_norm", "volumes_per_second", "data_wait_share"} < line.keys()
            assert line["loss_part"] == pytest.approx(2 * line["loss"], rel=1e-5)
    assert list((tmp_path / "tracker").glob("events.out.tfevents.*"))
    reloaded = StubModel.from_pretrained(result.model_dir)
    assert all(torch.equal(value, after[name]) for name, value in reloaded.state_dict().items())
    card = (result.model_dir / "README.md").read_text()
    assert "Not a medical device" in card
    assert "| score | 2.0000 |" in card
    assert "12 optimiser steps, 48 volume-report pairs" in card
    assert str(tmp_path) not in card


def test_first_step_is_the_mean_gradient_of_the_micro_batches(tmp_path):
    settings = {"max_steps": 1, "dropout": 0.0, "max_grad_norm": None, "warmup_ratio": 0.0}
    whole = build_trainer(tmp_path / "whole", per_device_train_batch_size=8, **settings)
    parts = build_trainer(tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    whole.train()
    parts.train()
    assert whole.train_dataset.seen == parts.train_dataset.seen
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], value, rtol=1e-5, atol=1e-6)


def test_every_epoch_visits_every_sample_at_most_once(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=None, num_train_epochs=2.0, save_steps=None)
    assert trainer.train().state.step == 10
    seen = trainer.train_dataset.seen
    first, second = seen[:20], seen[20:]
    assert len(set(first)) == len(set(second)) == 20
    assert set(first) != set(second), "the pairs that fill no step are others in every epoch"


def test_incomplete_last_step(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=None, num_train_epochs=1.0, drop_last=False)
    assert trainer.train().state.num_volumes == NUM_SAMPLES
    assert sorted(trainer.train_dataset.seen) == list(range(NUM_SAMPLES))


def test_minutes_bound_the_run_and_drive_the_schedule(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=None, max_train_minutes=0.02, seconds=0.005, logging_steps=1)
    result = trainer.train()
    assert 1.2 <= result.state.elapsed_seconds < 5
    rates = [line["learning_rate"] for line in log_of(tmp_path)]
    assert rates[-1] < 0.1 * max(rates)
    assert trainer.total_steps is None


def test_groups():
    args = T3DTrainingArguments("x", vision_learning_rate=1.0, text_learning_rate=2.0, head_learning_rate=3.0)
    model = StubModel(StubConfig())
    model.text_model.weight.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(model, args)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "vision": (1.0, 0.05),
        "vision_no_decay": (1.0, 0.0),
        "text_no_decay": (2.0, 0.0),
        "heads": (3.0, 0.05),
        "heads_no_decay": (3.0, 0.0),
    }
    assert any(parameter is model.logit_scale for parameter in groups["heads_no_decay"]["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters())) - 1
    AdamW(list(groups.values()))
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), args)


def test_schedule():
    def rate(progress):
        return learning_rate(1.0, progress, minimum=0.1, warmup_ratio=0.2)

    assert [rate(progress) for progress in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])
    assert rate(1.5) == pytest.approx(0.1)
    assert learning_rate(1e-7, 1.0, minimum=1e-6, warmup_ratio=0.0) == pytest.approx(1e-7), "never above the peak"


def test_clamp_leaves_a_fixed_temperature_alone():
    model = StubModel(StubConfig())
    model.logit_scale.data.fill_(9.0)
    model.logit_scale.requires_grad_(False)
    clamp_logit_scale(model)
    assert model.logit_scale.item() == 9.0
    model.logit_scale.requires_grad_(True)
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(math.log(20.0))


def test_weights_of_places_shrink_by_their_rate_and_stop_at_zero():
    args = T3DTrainingArguments("x", vision_learning_rate=0.5, place_soft_threshold=0.2)
    model = T3DModel(tiny_contrast_config())
    weights = model.vision_model.encoder.projection.place_weight
    before = weights.detach().normal_(std=0.1).clone()
    others = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("place_weight")}
    shrink_place_weights(AdamW(parameter_groups(model, args)))
    torch.testing.assert_close(weights.detach(), torch.nn.functional.softshrink(before, 0.1))
    assert 0.2 < (weights == 0).float().mean() < 0.8
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_places_are_a_group_of_their_own(threshold):
    """With and without a threshold, so that a run may go on with another one."""
    model = T3DModel(tiny_contrast_config())
    groups = parameter_groups(model, T3DTrainingArguments("x", place_soft_threshold=threshold))
    places = [group for group in groups if group["name"] == "places"]
    assert [(len(group["params"]), group["soft_threshold"]) for group in places] == [(1, threshold)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1, "a fixed temperature"


def test_a_threshold_without_places_is_refused():
    with pytest.raises(ConfigurationError, match=r"place_soft_threshold=0\.2 shrinks weights of single places"):
        parameter_groups(StubModel(StubConfig()), T3DTrainingArguments("x", place_soft_threshold=0.2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, r"num_processes=2, but 1 were started; .* torchrun --nproc_per_node 2"),
        ({"per_device_train_batch_size": 1}, r"at least 2 pairs; raise"),
        ({"per_device_train_batch_size": 24}, r"23 pairs do not fill one step of 24; lower"),
        ({"gradient_accumulation_steps": 6}, r"23 pairs do not fill one step of 24; lower"),
    ],
)
def test_refused_before_the_first_step(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        build_trainer(tmp_path, **settings)


def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    trainer = build_trainer(tmp_path, max_steps=8)
    nan = torch.full_like(trainer.unwrapped_model.projection.weight, float("nan"))
    forward = trainer.unwrapped_model.forward

    def broken(**batch):
        output = forward(**batch)
        if trainer.state.step == 6:
            output["loss"] = output["loss"] + (trainer.unwrapped_model.projection.weight * nan).sum()
        return output

    trainer.unwrapped_model.forward = broken
    with pytest.raises(FloatingPointError, match=r"step 7: loss became nan, .*; .* resume from it with a lower"):
        trainer.train(resume=True)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000004"]
    assert status(tmp_path)["status"] == "failed"


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "drop_last": False}])
def test_resuming_in_the_middle_of_an_epoch_changes_nothing(tmp_path, settings):
    build_trainer(tmp_path / "whole", **settings).train()

    class Stop(Exception):
        pass

    trainer = build_trainer(tmp_path / "parts", **settings)
    step = trainer._step

    def stop_after_seven(micro_batches):
        if trainer.state.step == 7:
            raise Stop
        return step(micro_batches)

    trainer._step = stop_after_seven
    with pytest.raises(Stop):
        trainer.train()
    torch.rand(5)
    trainer = build_trainer(tmp_path / "parts", dataloader_num_workers=1, **settings)
    assert trainer.train(resume=True).state.step == 12
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    steps = [line["step"] for line in log_of(tmp_path / "parts")]
    assert steps == sorted(set(steps)), "no step is logged twice"


def test_evaluation_does_not_reach_training(tmp_path):
    def evaluate(model):
        torch.rand(7)
        random.random()
        return {}

    build_trainer(tmp_path / "without").train()
    build_trainer(tmp_path / "with", evaluate=evaluate, eval_steps=2).train()
    assert_same_weights(tmp_path / "without", tmp_path / "with")


def test_a_former_run_is_neither_overwritten_nor_mixed_up(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(ConfigurationError, match=r"holds the checkpoints of a run; resume it or choose another"):
        build_trainer(tmp_path, max_steps=8).train()
    with pytest.raises(CheckpointError, match=r"the run had seed=42, this one has 1; resume with the same"):
        build_trainer(tmp_path, max_steps=8, seed=1).train(resume=True)
    assert build_trainer(tmp_path, max_steps=8).train(resume=True).state.step == 8


def test_resuming_nothing_starts_anew(tmp_path):
    assert build_trainer(tmp_path).train(resume=True).state.step == 12


def test_a_damaged_checkpoint_is_refused(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    path = tmp_path / "checkpoints" / "step-00000004" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer.pt is not what was written; no older checkpoint is intact"):
        build_trainer(tmp_path, max_steps=8).train(resume=True)


# ---------------------------------------------------------------------------------------------- two processes


def test_two_processes_see_disjoint_samples_and_train_one_model(tmp_path):
    settings = {"max_steps": 6, "dropout": 0.0, "max_grad_norm": None}
    process = launch(tmp_path / "two", 2, per_device_train_batch_size=4, **settings)
    build_trainer(tmp_path / "one", per_device_train_batch_size=8, **settings).train()
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    first, second = (json.loads((tmp_path / "two" / f"seen_{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 24
    for epoch in range(3):
        shares = first[epoch * 8 : epoch * 8 + 8], second[epoch * 8 : epoch * 8 + 8]
        assert len({*shares[0], *shares[1]}) == 16
    # AdamW's first steps take the sign of a gradient: rounding may turn it where the gradient is nearly zero.
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-4)
    losses = [[line["loss"] for line in log_of(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    resumed = build_trainer(tmp_path / "two", per_device_train_batch_size=8, **{**settings, "max_steps": 8})
    assert resumed.train(resume=True).state.step == 8
