# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Models leave Python by `torch.export`, for batches of any size, and compute the same there."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from modeling_t3d import T3DConfig, T3DForImageClassification, T3DModel, T3DVisionModel

VIT = {
    "encoder_type": "vit",
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def make_inputs(batch_size: int, num_channels: int, with_text: bool) -> dict[str, torch.Tensor]:
    inputs = {"pixel_values": torch.randn(batch_size, num_channels, 16, 24, 32)}
    if with_text:
        inputs["input_ids"] = torch.randint(5, 100, (batch_size, 12))
        inputs["attention_mask"] = torch.ones(batch_size, 12, dtype=torch.long)
        inputs["attention_mask"][:, 9:] = 0
    return inputs


def assert_same_outputs(exported: torch.nn.Module, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        ours, theirs = tree_leaves(model(**inputs)), tree_leaves(exported(**inputs))
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", ["resnet", "vit"])
@pytest.mark.parametrize("model_class", [T3DVisionModel, T3DForImageClassification, T3DModel])
def test_an_exported_model_takes_batches_of_any_size(model_class, encoder):
    config = T3DConfig.from_preset("tiny", vision_config={"num_channels": 2, **(VIT if encoder == "vit" else {})})
    with_text = model_class is T3DModel
    model = model_class(config if with_text else config.vision_config).eval()
    inputs = make_inputs(2, 2, with_text)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})
    for batch_size in (1, 2, 5):
        assert_same_outputs(program.module(), model, make_inputs(batch_size, 2, with_text))


def test_an_exported_residual_network_takes_views_of_any_size():
    model = T3DVisionModel(T3DConfig.from_preset("tiny").vision_config).eval()
    inputs = {"pixel_values": torch.randn(2, 1, 16, 24, 32)}
    sizes = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.AUTO)
    program = torch.export.export(model, (), inputs, dynamic_shapes={"pixel_values": sizes})
    for shape in ((3, 1, 16, 24, 32), (2, 1, 32, 40, 48)):
        assert_same_outputs(program.module(), model, {"pixel_values": torch.randn(shape)})
