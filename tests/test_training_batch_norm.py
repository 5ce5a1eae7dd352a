# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Batch norms are synchronised where that exists, frozen where asked, and refused elsewhere; `distributed` has the
tests on several processes."""

import pytest
import torch
from model_inputs import tiny_batch, tiny_config
from torch import nn

from modeling_t3d import T3DForPreTraining
from modeling_t3d.encoders_t3d import frozen_batch_norm_statistics
from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments
from modeling_t3d.training.batch_norm import prepare_batch_norm, training_mode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def build_model(**overrides) -> T3DForPreTraining:
    return T3DForPreTraining(tiny_config(vision_config={"norm": "batch"}, **overrides))


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def test_synchronised_norms_have_the_same_names_and_values():
    """That their statistics span processes is torch's affair, and CUDA's: it is not run here."""
    model = build_model(projection_norm="batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = prepare_batch_norm(model, T3DTrainingArguments("unused"), 2, CUDA)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_synchronised_norms_count_no_batch_while_their_statistics_rest():
    norm = nn.SyncBatchNorm(4)
    with frozen_batch_norm_statistics(norm):
        assert norm.num_batches_tracked is not None  # it refuses to run without
        norm.num_batches_tracked.add_(1)
        assert norm.momentum == 0.0
    assert norm.num_batches_tracked.item() == 0
    assert norm.momentum == 0.1


def test_several_processes_on_cpus_are_refused_and_one_is_not():
    args = T3DTrainingArguments("unused")
    model = build_model()
    assert prepare_batch_norm(model, args, 1, CPU) is model
    with pytest.raises(ConfigurationError, match=r"batch norm over 2 processes needs .* training.batch_norm=frozen"):
        prepare_batch_norm(model, args, 2, CPU)
    group_norm = T3DForPreTraining(tiny_config())
    assert prepare_batch_norm(group_norm, args, 2, CPU) is group_norm


def test_frozen_statistics_stay_and_scales_train():
    args = T3DTrainingArguments("unused", batch_norm="frozen")
    model = prepare_batch_norm(build_model(), args, 2, CPU)
    training_mode(model, args)
    assert model.t3d.text_model.training
    before = statistics(model)
    model(**tiny_batch()).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    assert model.t3d.vision_model.encoder.bn1.weight.grad.abs().max() > 0
    training_mode(model, T3DTrainingArguments("unused"))
    model(**tiny_batch())
    assert any(not torch.equal(value, before[name]) for name, value in statistics(model).items())
