# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Averaged weights are those of the definition, are validated, saved and resumed, and leave training alone."""

import math

import pytest
import torch
from safetensors.torch import load_file
from training_stub import StubModel, build_trainer

from modeling_t3d.training.averaging import WeightAverage
from modeling_t3d.training.checkpoints import CheckpointError, list_checkpoints, verify_checkpoint


def test_equals_the_definition():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, expected = WeightAverage(model, 0.6), model.weight.detach().clone()
    for step in range(8):
        model.weight.data += torch.randn(2, 3)
        average.update()
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    weights, bias = model.weight.detach().clone(), model.bias.clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, weights)
    with pytest.raises(RuntimeError, match="stop"), average.applied():
        raise RuntimeError("stop")
    assert torch.equal(model.weight, weights), "also when something fails"


def test_the_saved_and_validated_model_is_the_average(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model.projection.weight.detach().clone())
        return {}

    trainer = build_trainer(tmp_path / "averaged", ema_decay=0.9, evaluate=evaluate)
    result = trainer.train()
    plain = build_trainer(tmp_path / "plain")
    plain.train()
    for name, value in plain.unwrapped_model.state_dict().items():
        assert torch.equal(value, trainer.unwrapped_model.state_dict()[name]), "training is that of the run without"
    saved = load_file(result.model_dir / "model.safetensors")
    averages = trainer.average.state_dict()["averages"]
    for name, value in averages.items():
        assert torch.equal(saved[name], value)
    assert torch.equal(seen[-1], averages["projection.weight"])
    assert not torch.equal(saved["projection.weight"], plain.unwrapped_model.projection.weight)


def test_the_best_checkpoint_holds_the_validated_average(tmp_path):
    """In a folder of its own: a run goes on with the weights."""
    seen = {}

    def evaluate(model):
        seen[trainer.state.step] = {name: value.clone() for name, value in model.state_dict().items()}
        return {"score": -abs(trainer.state.step - 8)}

    trainer = build_trainer(
        tmp_path, ema_decay=0.9, evaluate=evaluate, eval_steps=4, save_total_limit=1, metric_for_best_model="score"
    )
    assert trainer.train().state.best_step == 8
    best = list_checkpoints(tmp_path)[0]
    averaged = StubModel.from_pretrained(best / "averaged").state_dict()
    weights = StubModel.from_pretrained(best).state_dict()
    for name, value in seen[8].items():
        assert torch.equal(averaged[name], value)
    assert not torch.equal(weights["projection.weight"], averaged["projection.weight"])
    for folder in (best, best / "averaged"):
        assert "Measured after step 8 of 8, on the averaged weights" in (folder / "README.md").read_text()
    verify_checkpoint(best)
    (best / "averaged" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"averaged/model\.safetensors is missing"):
        verify_checkpoint(best)


def test_an_averaged_temperature_keeps_its_bound(tmp_path):
    """The stub's is pushed up, and clamped after every step."""
    trainer = build_trainer(tmp_path, ema_decay=0.9, max_steps=30, head_learning_rate=0.5)
    saved = load_file(trainer.train().model_dir / "model.safetensors")
    bound = torch.tensor(math.log(trainer.unwrapped_model.config.max_logit_scale))
    assert trainer.unwrapped_model.logit_scale == bound
    assert saved["logit_scale"] <= bound
    assert torch.isclose(saved["logit_scale"], bound, rtol=1e-3)


def test_resumes(tmp_path):
    build_trainer(tmp_path / "whole", ema_decay=0.9).train()
    build_trainer(tmp_path / "parts", ema_decay=0.9, max_steps=8).train()
    resumed = build_trainer(tmp_path / "parts", ema_decay=0.9)
    resumed.train(resume=True)
    # The schedule of the first part was shorter: what must be equal is what a resumed run begins with.
    assert resumed.average.num_updates == 12
    again = build_trainer(tmp_path / "parts", ema_decay=0.9)
    again._resume()
    for name, value in resumed.average.state_dict()["averages"].items():
        assert torch.equal(again.average.state_dict()["averages"][name], value)
    build_trainer(tmp_path / "without").train()
    with pytest.raises(CheckpointError, match="the run had ema_decay=None, this one has"):
        build_trainer(tmp_path / "without", ema_decay=0.9).train(resume=True)
