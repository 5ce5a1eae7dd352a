# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A step that is not finite is named, with its samples, and left out or the end of the run."""

import json

import pytest
import torch
from torch import nn
from training_stub import StubModel, build_trainer

from modeling_t3d.training.guard import NonFiniteError


def break_steps(trainer, steps, value=float("nan"), of_loss=True):
    """Let some steps (counted from 1) have a loss, or a gradient alone, that is not finite."""
    forward = trainer.unwrapped_model.forward

    def broken(**batch):
        output = forward(**batch)
        if trainer.state.step + 1 in steps:
            weight = trainer.unwrapped_model.projection.weight
            if of_loss:
                output["loss"] = output["loss"] + (weight * value).sum()
            else:
                weight.register_hook(lambda gradient: gradient * value)
        return output

    trainer.unwrapped_model.forward = broken


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_parameter_and_the_samples_are_named(tmp_path, value):
    trainer = build_trainer(tmp_path, max_steps=6)
    trainer.guard.row_numbers = [1000 + index for index in range(23)]
    trainer.sampler.seek(0, 1)
    rows = ", ".join(str(1000 + key.sample) for key in next(iter(trainer.sampler)))
    break_steps(trainer, {2}, value, of_loss=False)
    expected = (
        rf"^step 2: grad_norm became (nan|inf), the gradient of projection.weight is not finite on rows {rows} of "
        r"the manifest; the last checkpoint is whole: resume from it with a lower"
    )
    with pytest.raises(NonFiniteError, match=expected):
        trainer.train()
    assert trainer.state.step == 1


def test_a_loss_is_named(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=6)
    break_steps(trainer, {2})
    with pytest.raises(NonFiniteError, match=r"^step 2: loss became nan, .* on samples \d+, \d+, \d+, \d+;"):
        trainer.train()


def test_a_step_that_is_left_out_changes_no_weight(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=6, non_finite="skip", logging_steps=1)
    trainer.unwrapped_model.vision_model.append(nn.BatchNorm1d(8, affine=False))
    break_steps(trainer, {3, 4})
    states, step = {}, trainer._step

    def recorded(micro_batches):
        terms = step(micro_batches)
        state = trainer.unwrapped_model.state_dict().items()
        states[trainer.state.step] = {name: value.clone() for name, value in state}
        return terms

    trainer._step = recorded
    result = trainer.train()
    assert result.state.step == 6
    assert result.state.skipped_steps == 2
    for name, value in states[2].items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, states[4][name]), name
    assert any(not torch.equal(value, states[5][name]) for name, value in states[4].items())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert "loss" not in lines[2]
    assert "loss" in lines[4]


def test_too_many_in_a_row_stop_the_run(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=12, non_finite="skip", max_skipped_steps=2)
    break_steps(trainer, {2, 3, 5, 6, 7})
    with pytest.raises(NonFiniteError, match=r"^step 7: loss became nan"):
        trainer.train()
    assert trainer.state.skipped_steps == 4


def test_scaled_gradients_overflow_and_the_steps_are_counted(tmp_path):
    """The scaler's part, on the CPU: a scale that is too large is halved until gradients are finite."""
    trainer = build_trainer(tmp_path, max_steps=12, dropout=0.0)
    plain = build_trainer(tmp_path / "plain", max_steps=12, dropout=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.accelerator.scaler = trainer.extra_state["scaler"] = scaler
    result = trainer.train()
    assert 0 < result.state.skipped_steps < 12
    assert scaler.get_scale() == 2.0 ** (127 - result.state.skipped_steps)
    assert plain.train().state.skipped_steps == 0
    reloaded = StubModel.from_pretrained(result.model_dir)
    assert all(torch.isfinite(value).all() for value in reloaded.parameters())


def test_fp16_is_refused_where_it_cannot_run(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        build_trainer(tmp_path, mixed_precision="fp16")
