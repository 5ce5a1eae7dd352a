# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Cached gradients draw the same random numbers twice and hold one micro-batch; what cannot be cached is refused. That
they equal the gradients of one loss stands in `distributed`, for one, two and four processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from model_inputs import tiny_batch, tiny_config
from process_memory import allocated_peak
from training_stub import StubConfig, StubModel

from modeling_t3d import T3DForPreTraining
from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments
from modeling_t3d.training.checkpoints import random_state
from modeling_t3d.training.gradient_caching import (
    accumulated_backward,
    cached_backward,
    split_pairs,
    withheld_loss_stage,
)
from modeling_t3d.training.parallel import step_gradients, wrap_model


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_augmentation_is_drawn_once_and_replayed():
    model = T3DForPreTraining(tiny_config()).train()
    drawn = []

    def augment(batch):
        noise = torch.randn_like(batch["pixel_values"]) + float(np.random.default_rng().random() < 2)
        noise = noise * np.random.uniform(0.5, 1.0)
        drawn.append(noise)
        return batch | {"pixel_values": batch["pixel_values"] + noise}

    states = []
    align = model.align
    model.align = lambda features: (align(features), states.append(random_state()))[0]
    cached_backward(model, model, split_pairs(tiny_batch(5), 2), prepare=augment)
    assert len(drawn) == 6
    for first, second in zip(drawn[:3], drawn[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(drawn[0], drawn[1])
    # What is drawn next follows on the loss, not on the second passes.
    assert torch.equal(random_state()["torch"], states[0]["torch"])
    assert torch.equal(random_state()["numpy"][1], states[0]["numpy"][1])


def test_gradients_are_added_to_those_that_are_there():
    model = T3DForPreTraining(tiny_config(text_config={"hidden_dropout_prob": 0.0})).double().eval()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in tiny_batch(4).items()}
    accumulated_backward(model, [batch])
    once = gradients_of(model)
    expected = {name: 2 * gradient for name, gradient in once.items()}
    cached_backward(model, model, split_pairs(batch, 1))
    found = gradients_of(model)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-10 * largest, name


def test_scale_multiplies_every_gradient():
    model = T3DForPreTraining(tiny_config()).double().eval()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in tiny_batch(4).items()}
    cached_backward(model, model, split_pairs(batch, 2))
    expected = gradients_of(model)
    model.zero_grad()
    terms = cached_backward(model, model, split_pairs(batch, 2), scale=lambda loss: 1024 * loss)
    assert terms["loss"] < 100
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, 1024 * expected[name])


def test_loss_stage_is_out_of_sight_of_wrappers_alone():
    model = T3DForPreTraining(tiny_config(learnable_temperature=True))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with withheld_loss_stage(model):
        seen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "t3d.logit_scale" not in seen
    assert not any(name.startswith("multi_view_alignment.") for name in seen)
    assert "t3d.vision_model.encoder.conv1.weight" in seen
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_memory_is_that_of_a_micro_batch():
    """Counted by allocation, so that neither load nor the allocator matters."""
    model = T3DForPreTraining(tiny_config()).train()
    batch = tiny_batch(24)
    batch["local_pixel_values"] = torch.randn(24, 3, 1, 16, 16, 16)
    micro_batches = split_pairs(batch, 2)
    for _ in range(2):  # gradients exist before anything is counted
        cached_backward(model, model, micro_batches)
    full = allocated_peak(lambda: accumulated_backward(model, [batch]))
    cached = allocated_peak(lambda: cached_backward(model, model, micro_batches))
    assert cached < 0.3 * full


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_caching": True}, "training.gradient_caching has one part to cache; set"),
        ({"caching_micro_batch_size": 2}, "training.caching_micro_batch_size needs training.gradient_caching=true"),
        ({"gradient_caching": True, "caching_micro_batch_size": 0}, "caching_micro_batch_size must be positive"),
        ({"view_chunk_size": 0}, "training.view_chunk_size must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        T3DTrainingArguments("unused", **settings)


def test_a_model_in_one_stage_is_refused():
    args = T3DTrainingArguments("unused", gradient_caching=True, gradient_accumulation_steps=2)
    with pytest.raises(ConfigurationError, match="needs a model in two stages, which StubModel is not"):
        wrap_model(Accelerator(cpu=True), StubModel(StubConfig()), args)


def test_cached_steps_of_the_trainer_are_one_contrastive_batch():
    """Accumulation and caching differ in what a step's loss is, and the setting decides."""
    accelerator = Accelerator(cpu=True)
    found = {}
    for caches in (False, True):
        args = T3DTrainingArguments("unused", gradient_accumulation_steps=2, gradient_caching=caches)
        torch.manual_seed(0)
        model = T3DForPreTraining(tiny_config()).eval()
        wrapped = wrap_model(accelerator, model, args)
        found[caches] = step_gradients(accelerator, wrapped, [tiny_batch(3, seed=1), tiny_batch(3, seed=2)], args)
    assert found[True]["loss_gca"] > found[False]["loss_gca"] + 0.3  # log 6 instead of log 3, less what is known
    assert found[True]["num_valid_anchors"] == 2 * found[False]["num_valid_anchors"]


def test_half_precision_on_the_way():
    """Under autocast the features are float32 where the stages meet, and the gradients those of one pass."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    found = []
    for settings in ({}, {"gradient_caching": True, "caching_micro_batch_size": 2}):
        args = T3DTrainingArguments("unused", **settings)
        torch.manual_seed(0)
        model = T3DForPreTraining(tiny_config()).eval()
        step_gradients(accelerator, wrap_model(accelerator, model, args), [tiny_batch(6)], args)
        found.append(gradients_of(model))
    assert found[0].keys() == found[1].keys()
    for part in ("vision_model.encoder.conv1.weight", "text_model.embeddings.word_embeddings.weight"):
        one, other = (gradients[f"t3d.{part}"].flatten() for gradients in found)
        assert torch.cosine_similarity(one, other, dim=0) > 0.99, part
