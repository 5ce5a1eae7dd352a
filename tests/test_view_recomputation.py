# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Local views that are encoded in chunks and recomputed give the gradients of all at once, in less memory."""

import pytest
import torch
from model_inputs import tiny_batch, tiny_config
from process_memory import allocated_peak
from torch import nn

from modeling_t3d import T3DForPreTraining, T3DModel


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a step."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def double_batch(num_views: int = 4) -> dict[str, torch.Tensor]:
    batch = tiny_batch(2, num_views)
    batch["local_mask"][1, -1] = False  # 7 of 8 views: chunks are uneven
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("recomputes_blocks", [False, True])
def test_gradients_are_those_of_all_views_at_once(size, recomputes_blocks):
    model = T3DForPreTraining(tiny_config(view_fusion="mean")).double().eval()
    batch = double_batch()
    expected = step(model, batch)
    if recomputes_blocks:
        model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.t3d.text_model.eval()
    model.set_view_chunk_size(size)
    found = step(model, batch)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_holds_at_least_one_view(size):
    for model in (T3DModel(tiny_config()), T3DForPreTraining(tiny_config())):
        with pytest.raises(ValueError, match=f"at least 1 view, got {size}"):
            model.set_view_chunk_size(size)


@pytest.mark.parametrize("masked", [False, True])
def test_random_numbers_are_the_same_when_a_chunk_is_recomputed(masked):
    model = T3DModel(tiny_config()).double().train()
    encoder = model.vision_model.encoder
    encoder.layer1 = nn.Sequential(*encoder.layer1, nn.Dropout(0.5))
    views = torch.randn(2, 4, 1, 8, 8, 8, dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = not masked
    weights = None
    gradients = []
    for recomputes in (True, False):
        model.zero_grad()
        torch.manual_seed(3)
        if recomputes:
            model.set_view_chunk_size(2)
            maps = model.encode_local_views(views, mask)[0][mask]
        else:
            kept = views[mask]
            sizes = [len(kept) % 2] * (len(kept) % 2) + [2] * (len(kept) // 2)
            maps = torch.cat([model.vision_model(chunk).last_hidden_state for chunk in kept.split(sizes)])
        weights = torch.rand_like(maps) if weights is None else weights
        (maps * weights).sum().backward()
        gradients.append(encoder.conv1.weight.grad)
    assert gradients[0].abs().max() > 0
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12 * gradients[1].abs().max()


def test_memory_is_that_of_a_chunk():
    """Counted by allocation, so that neither load nor the allocator matters."""
    model = T3DModel(tiny_config()).train()
    views = torch.randn(1, 16, 1, 32, 32, 32)

    def encode_and_return() -> None:
        model.encode_local_views(views)[0].square().sum().backward()

    encode_and_return()  # gradients exist before anything is counted
    full = allocated_peak(encode_and_return)
    model.set_view_chunk_size(2)
    assert allocated_peak(encode_and_return) < 0.25 * full


def test_batch_norm_in_training_mode_is_refused():
    model = T3DForPreTraining(tiny_config(vision_config={"norm": "batch"})).train()
    model.set_view_chunk_size(2)
    with pytest.raises(ValueError, match="chunks of 2 views would change the statistics of batch norm"):
        model(**tiny_batch())
    model.t3d.vision_model.eval()
    assert model(**tiny_batch()).loss.isfinite()
