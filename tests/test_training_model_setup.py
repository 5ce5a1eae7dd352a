# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Frozen layers, memory format, recomputation by stage and compilation change what they name and no result."""

import pytest
import torch
from training_footprint import build as build_pretraining
from training_runs import log_of
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_t3d import T3DConfig, T3DForPreTraining
from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments
from modeling_t3d.training.batch_norm import training_mode
from modeling_t3d.training.model_setup import encoder_stages, set_up_model, vision_encoder
from modeling_t3d.training.optimization import parameter_groups


def build(**overrides):
    torch.manual_seed(0)
    return T3DForPreTraining(T3DConfig.from_preset("tiny", **overrides))


def arguments(**settings):
    return T3DTrainingArguments("unused", **settings)


def vision_features(model):
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, 1, 16, 16, 16, generator=generator)
    return model.t3d.vision_model(views).last_hidden_state


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def tower(model):
    return {name for name in frozen(model) if ".encoder." in name}


def test_reports_that_would_all_have_one_embedding_are_refused():
    gpt2 = {"model_type": "gpt2", "vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 2}
    with pytest.raises(ConfigurationError, match=r"left to right.*\(model\.overrides\.text_pooling=mean\)"):
        set_up_model(build(text_config=gpt2), arguments())
    model = build(text_config=gpt2, text_pooling="mean")
    set_up_model(model, arguments())
    assert model.training == build().training, "a check leaves the model as it was"


def test_frozen_vision_layers():
    model = build()
    set_up_model(model, arguments(frozen_vision_layers=2))
    assert {name.split(".")[3] for name in tower(model)} == {"conv1", "bn1", "layer1", "layer2"}
    assert [name for name, _ in encoder_stages(vision_encoder(model))] == ["layer1", "layer2", "layer3", "layer4"]
    vision_features(model).square().mean().backward()
    assert model.t3d.vision_model.encoder.conv1.weight.grad is None
    assert model.t3d.vision_model.encoder.layer3[0].conv1.weight.grad is not None
    trained = {id(parameter) for group in parameter_groups(model, arguments()) for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    with pytest.raises(ConfigurationError, match=r"_layers=5, but the vision tower has 4 layers \(layer1"):
        set_up_model(build(), arguments(frozen_vision_layers=5))


def test_frozen_layers_of_a_transformer():
    model = build(vision_config={"encoder_type": "vit", "patch_size": [8, 8, 8], "hidden_size": 48})
    depth = len(encoder_stages(vision_encoder(model)))
    set_up_model(model, arguments(frozen_vision_layers=1))
    names = frozen(model)
    assert any("patch_embedding" in name for name in names)
    assert any("layers.0." in name for name in names)
    assert not any("layers.1." in name or "post_layernorm" in name for name in names)
    with pytest.raises(ConfigurationError, match=f"but the vision tower has {depth} layers"):
        set_up_model(model, arguments(frozen_vision_layers=depth + 1))


def test_frozen_parameters():
    model = build()
    set_up_model(model, arguments(frozen_parameters=["t3d.text_model.embeddings", "t3d.logit_scale"]))
    names = frozen(model)
    assert "t3d.logit_scale" in names
    assert "t3d.text_model.embeddings.word_embeddings.weight" in names
    assert not any("encoder" in name for name in names)
    with pytest.raises(ConfigurationError, match=r"begins with 'text_model'; they begin with t3d.logit_scale, t3d"):
        set_up_model(build(), arguments(frozen_parameters=["text_model"]))


def test_batch_norms_of_frozen_layers_keep_their_statistics():
    model = build(vision_config={"norm": "batch"})
    args = arguments(frozen_vision_layers=1)
    set_up_model(model, args)
    training_mode(model, args)
    encoder = vision_encoder(model)
    before = encoder.bn1.running_mean.clone(), encoder.layer2[0].bn1.running_mean.clone()
    vision_features(model)
    assert torch.equal(before[0], encoder.bn1.running_mean)
    assert not torch.equal(before[1], encoder.layer2[0].bn1.running_mean)


def test_channels_last_changes_no_result():
    model, other = build(), build()
    set_up_model(other, arguments(memory_format="channels_last"))
    weight = other.t3d.vision_model.encoder.layer2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    features = vision_features(other)
    torch.testing.assert_close(features, vision_features(model), rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_stages_that_are_recomputed():
    model = build()
    set_up_model(
        model, arguments(activation_checkpointing=True, activation_checkpointing_stages=["layer1", "text_model"])
    )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    chosen = {name for name, layer in layers.items() if layer.gradient_checkpointing}
    assert chosen == {name for name in layers if ".layer1." in name or "text_model" in name}
    assert 0 < len(chosen) < len(layers)
    model.train()
    plain = build().train()
    for one in (model, plain):
        vision_features(one).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert torch.equal(one.grad, other.grad), name
    with pytest.raises(ConfigurationError, match=r"no block lies below 'layer9'; blocks are t3d.vision_model.encoder"):
        set_up_model(build(), arguments(activation_checkpointing=True, activation_checkpointing_stages=["layer9"]))
    with pytest.raises(ConfigurationError, match=r"needs training\.activation_checkpointing=true"):
        arguments(activation_checkpointing_stages=["layer1"])


def test_the_encoder_alone_is_compiled():
    model = build().eval()
    expected, names = vision_features(model), list(model.state_dict())
    set_up_model(model, arguments(compile_encoder=True))
    assert vision_encoder(model)._compiled_call_impl is not None
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == names, "names of parameters stay"
    torch.testing.assert_close(vision_features(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_run_ends_where_a_plain_one_does(tmp_path):
    logs, weights = [], []
    for name, compiled in (("plain", False), ("compiled", True)):
        trainer = build_pretraining(tmp_path / name, num_pairs=3, logging_steps=1, compile_encoder=compiled)
        trainer.train()
        logs.append([line["loss"] for line in log_of(tmp_path / name)])
        weights.append(trainer.unwrapped_model.state_dict())
    assert len(logs[0]) == 2
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    # What rounding leaves after two steps of AdamW, each of which moves a weight by 1e-4 at most.
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=2e-5)


def test_what_is_not_decayed():
    model = build()
    groups = {group["name"]: group for group in parameter_groups(model, arguments())}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert groups.keys() == {f"{tower}{kind}" for tower in ("vision", "text", "heads") for kind in ("", "_no_decay")}
    kept = {names[id(parameter)] for name in groups if "no_decay" in name for parameter in groups[name]["params"]}
    assert "t3d.text_model.embeddings.position_embeddings.weight" in kept
    decayed = set(names.values()) - kept
    assert "t3d.text_model.embeddings.word_embeddings.weight" in decayed
    assert all("norm" not in name.lower() and "bn" not in name for name in decayed)
