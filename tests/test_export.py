# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Models leave Python by `torch.export`, for batches of any size, and compute the same there."""

import pytest
import torch
from model_inputs import tiny_batch, tiny_config, tiny_vit_config
from torch.utils._pytree import tree_leaves

from modeling_t3d import T3DConfig, T3DForImageClassification, T3DModel, T3DVisionModel


def assert_same_outputs(exported: torch.nn.Module, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        ours, theirs = tree_leaves(model(**inputs)), tree_leaves(exported(**inputs))
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make_config", [tiny_config, tiny_vit_config])
@pytest.mark.parametrize("model_class", [T3DVisionModel, T3DForImageClassification, T3DModel])
def test_an_exported_model_takes_batches_of_any_size(model_class, make_config):
    is_dual = model_class is T3DModel
    model = model_class(make_config() if is_dual else make_config().vision_config).eval()
    names = ("input_ids", "attention_mask", "pixel_values") if is_dual else ("pixel_values",)
    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = {name: tiny_batch(2)[name] for name in names}
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in names})
    for num_pairs in (1, 2, 5):
        assert_same_outputs(program.module(), model, {name: tiny_batch(num_pairs, seed=1)[name] for name in names})


def test_an_exported_residual_network_takes_views_of_any_size():
    model = T3DVisionModel(T3DConfig.from_preset("tiny").vision_config).eval()
    inputs = {"pixel_values": torch.randn(2, 1, 16, 24, 32)}
    sizes = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.AUTO)
    program = torch.export.export(model, (), inputs, dynamic_shapes={"pixel_values": sizes})
    for shape in ((3, 1, 16, 24, 32), (2, 1, 32, 40, 48)):
        assert_same_outputs(program.module(), model, {"pixel_values": torch.randn(shape)})
