# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the models compute: embeddings, fusion, both alignments, freezing, localisation, classification."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_inputs import tiny_batch, tiny_config, tiny_vit_config
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, DistilBertConfig, RobertaConfig, RobertaModel

from modeling_t3d.modeling_t3d import (
    T3DForImageClassification,
    T3DForPreTraining,
    T3DModel,
    T3DVisionModel,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
OBJECTIVES = [(query, negatives) for query in ("text", "none", "vision") for negatives in ("same_query", "own_query")]


def image_inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("pixel_values", "local_pixel_values", "local_mask", "local_positions")}


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [tiny_config(), tiny_vit_config()], ids=["resnet", "vit"])
def test_embeddings_follow_the_method(config):
    model, batch = T3DModel(config).eval(), tiny_batch()
    output = model(**batch)
    tokens = model.vision_model(batch["pixel_values"])
    torch.testing.assert_close(tokens.pooler_output, tokens.last_hidden_state.mean(dim=(2, 3, 4)))
    torch.testing.assert_close(tokens.feature_maps[-1], tokens.last_hidden_state)
    image = model.visual_projection(tokens.pooler_output)
    text = model.text_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
    text = model.text_projection(text)
    torch.testing.assert_close(model.get_image_features(**image_inputs(batch)).pooler_output, image)
    torch.testing.assert_close(output.text_model_output.pooler_output, text)
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(3))
    expected = nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(text, dim=-1).T / 0.07
    torch.testing.assert_close(output.logits_per_image, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    assert output.loss is None


def test_prompts_and_volumes_may_differ_in_number():
    model, batch = T3DModel(tiny_config()).eval(), tiny_batch(5)
    output = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:2])
    assert output.logits_per_image.shape == (2, 5)
    with pytest.raises(ValueError, match="one report per volume, got 5 for 2"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:2], return_loss=True)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_several_windows_enter_as_channels(num_channels):
    model = T3DModel(tiny_config(vision_config={"num_channels": num_channels}))
    views = torch.randn(2, num_channels, 8, 16, 16)
    assert model.get_image_features(views).pooler_output.shape == (2, 16)
    with pytest.raises(ValueError, match="num_channels"):
        model.get_image_features(torch.randn(2, num_channels + 1, 8, 16, 16))


@pytest.mark.parametrize(
    "text_config",
    [
        BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
        RobertaConfig(
            vocab_size=99,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            type_vocab_size=1,
        ),
        DistilBertConfig(vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=16),
    ],
    ids=["bert", "roberta", "distilbert"],
)
@pytest.mark.parametrize("text_pooling", ["first", "mean"])
def test_any_text_encoder_and_its_padding(text_config, text_pooling):
    config = tiny_config(text_pooling=text_pooling)
    config.text_config = text_config
    model, batch = T3DModel(config).eval(), tiny_batch()
    assert not any("pooler" in name for name in model.state_dict())
    pad = text_config.pad_token_id
    input_ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    token_type_ids = torch.zeros_like(input_ids)
    features = model.get_text_features(input_ids, batch["attention_mask"], token_type_ids).pooler_output
    padded = model.get_text_features(
        nn.functional.pad(input_ids, (0, 5), value=pad),
        nn.functional.pad(batch["attention_mask"], (0, 5)),
        nn.functional.pad(token_type_ids, (0, 5)),
    ).pooler_output
    torch.testing.assert_close(padded, features, **CLOSE)


# --- views and their fusion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [tiny_config, tiny_vit_config], ids=["resnet", "vit"])
@pytest.mark.parametrize("fusion", ["global", "mean", "attention"])
def test_empty_views_change_nothing(config, fusion):
    model, batch = T3DModel(config(view_fusion=fusion)).eval(), tiny_batch()
    batch["local_mask"][1, 2] = False
    features = model.get_image_features(**image_inputs(batch)).pooler_output
    padded = dict(batch)
    # What stands in a view that does not exist must not matter, not even NaN.
    for name in ("local_pixel_values", "local_positions"):
        filler = torch.full_like(batch[name][:, :2], torch.nan)
        padded[name] = torch.cat([batch[name], filler], dim=1)
    padded["local_mask"] = nn.functional.pad(batch["local_mask"], (0, 2))
    padded["local_pixel_values"][1, 2] = torch.nan
    torch.testing.assert_close(model.get_image_features(**image_inputs(padded)).pooler_output, features, **CLOSE)
    # No view at all is the same as not giving any.
    without = model.get_image_features(batch["pixel_values"]).pooler_output
    padded["local_mask"] = torch.zeros_like(padded["local_mask"])
    torch.testing.assert_close(model.get_image_features(**image_inputs(padded)).pooler_output, without, **CLOSE)
    assert torch.allclose(without, features) == (fusion == "global")


def test_mean_fusion_is_the_mean_over_the_views_that_exist():
    model, batch = T3DModel(tiny_config(view_fusion="mean")).eval(), tiny_batch(1)
    batch["local_mask"][0, 1] = False
    views = [batch["local_pixel_values"][:, 0], batch["local_pixel_values"][:, 2], batch["pixel_values"]]
    mean = torch.stack([model.vision_model(view).pooler_output for view in views]).mean(dim=0)
    features = model.get_image_features(**image_inputs(batch)).pooler_output
    torch.testing.assert_close(features, model.visual_projection(mean), **CLOSE)


def test_attention_fusion_ignores_the_order_of_views_but_not_their_place():
    model, batch = T3DModel(tiny_config(view_fusion="attention")).eval(), tiny_batch()
    features = model.get_image_features(**image_inputs(batch)).pooler_output
    turned = {name: value.flip(1) if name.startswith("local") else value for name, value in batch.items()}
    torch.testing.assert_close(model.get_image_features(**image_inputs(turned)).pooler_output, features, **CLOSE)
    moved = {**batch, "local_positions": batch["local_positions"].flip(1)}
    assert not torch.allclose(model.get_image_features(**image_inputs(moved)).pooler_output, features, atol=1e-6)
    with pytest.raises(ValueError, match="local_positions"):
        model.get_image_features(batch["pixel_values"], batch["local_pixel_values"])


@pytest.mark.parametrize(("fusion", "same"), [("global", True), ("mean", False)])
def test_running_statistics_are_those_of_the_views_that_the_embedding_rests_on(fusion, same):
    statistics = []
    for with_views in (False, True):
        torch.manual_seed(0)
        batch = tiny_batch() if with_views else {k: v for k, v in tiny_batch().items() if "local" not in k}
        overrides = {"lambda_tma": float(with_views), "view_fusion": fusion, "projection_norm": "batch"}
        model = T3DForPreTraining(tiny_config(vision_config={"norm": "batch"}, **overrides)).train()
        model(**batch)
        buffers = dict(model.t3d.vision_model.named_buffers())
        statistics.append([values.clone() for name, values in buffers.items() if name.endswith("running_mean")])
    assert statistics[0]
    assert all(torch.equal(one, other) for one, other in zip(*statistics, strict=True)) is same


def test_padding_is_not_encoded():
    model, batch = T3DForPreTraining(tiny_config()), tiny_batch()
    batch["local_mask"] = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    encoded = []
    model.t3d.vision_model.encoder.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    model(**batch)
    assert encoded == [3, 6]
    encoded.clear()
    T3DModel(tiny_config()).get_image_features(**image_inputs(batch))
    model.t3d.get_image_features(**image_inputs(batch))  # view_fusion="global": nobody asks for the local views
    assert encoded == [3]


def test_local_views_need_their_shape():
    model, batch = T3DModel(tiny_config(view_fusion="mean")), tiny_batch()
    with pytest.raises(ValueError, match=r"expected \(batch, views"):
        model.get_image_features(batch["pixel_values"], batch["local_pixel_values"][:, 0])
    with pytest.raises(ValueError, match="local_mask"):
        model.get_image_features(batch["pixel_values"], batch["local_pixel_values"], torch.ones(3, 2))
    with pytest.raises(ValueError, match="local views of 2 volumes"):
        model.get_image_features(batch["pixel_values"], batch["local_pixel_values"][:2])


# --- pre-training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("query", "negatives"), OBJECTIVES)
@pytest.mark.parametrize("fusion", ["global", "attention"])
def test_pre_training_reaches_every_parameter(query, negatives, fusion):
    model = T3DForPreTraining(tiny_config(tma_query=query, tma_negatives=negatives, view_fusion=fusion))
    output = model(**tiny_batch(4))
    torch.testing.assert_close(output.loss, output.loss_gca + output.loss_tma)
    assert output.local_embeds.shape == (4, 3, 16)
    assert (output.num_valid_anchors, output.num_skipped_pairs) == (12, 0)
    assert output.log_num_candidates.item() == pytest.approx(math.log(11))
    output.loss.backward()
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "t3d.logit_scale" not in learnt
    # A bias of the keys moves all scores of a query alike.
    without = [name for name, p in learnt.items() if p.grad is None or (not p.grad.any() and "key" not in name)]
    assert without == [] or all("embeddings" in name for name in without)


@pytest.mark.parametrize("config", [tiny_config, tiny_vit_config], ids=["resnet", "vit"])
def test_a_fresh_model_starts_at_chance(config):
    batch = tiny_batch(16)
    gca, tma = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        output = T3DForPreTraining(config()).eval()(**batch)
        gca.append(output.loss_gca.item())
        tma.append(output.loss_tma.item())
    assert math.log(16) - 0.05 < sum(gca) / 4 < math.log(16) + 1
    assert sum(tma) / 4 == pytest.approx(math.log(16 * 3 - 1), abs=0.5)


@pytest.mark.parametrize(("query", "negatives"), OBJECTIVES)
def test_padding_leaves_the_losses_alone(query, negatives):
    model = T3DForPreTraining(tiny_config(tma_query=query, tma_negatives=negatives, view_fusion="attention")).eval()
    batch = tiny_batch()
    padded = dict(batch)
    for name in ("input_ids", "attention_mask"):
        padded[name] = nn.functional.pad(batch[name], (0, 4))
    for name in ("local_pixel_values", "local_positions"):
        padded[name] = torch.cat([batch[name], torch.full_like(batch[name][:, :1], torch.nan)], dim=1)
    padded["local_mask"] = nn.functional.pad(batch["local_mask"], (0, 1))
    first, second = model(**batch), model(**padded)
    for term in ("loss", "loss_gca", "loss_tma", "log_num_candidates", "image_embeds", "text_embeds"):
        torch.testing.assert_close(second[term], first[term], **CLOSE)
    torch.testing.assert_close(second.local_embeds[:, :3], first.local_embeds, **CLOSE)
    gradients = []
    for inputs in (batch, padded):
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[1].isfinite().all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_pairs_with_fewer_than_two_views_are_skipped_and_counted():
    model, batch = T3DForPreTraining(tiny_config()), tiny_batch(4)
    batch["local_mask"] = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    output = model(**batch)
    assert (output.num_valid_anchors, output.num_skipped_pairs) == (5, 2)
    # Six views exist; an anchor is compared with the other five.
    assert output.log_num_candidates.item() == pytest.approx(math.log(5))
    batch["local_mask"][:] = False
    output = model(**batch)
    assert (output.num_valid_anchors, output.num_skipped_pairs, output.loss_tma) == (0, 4, 0)
    output.loss.backward()


@pytest.mark.parametrize("kind", ["study_ids", "report_ids"])
def test_pairs_of_one_study_or_report_are_not_negatives(kind):
    model = T3DForPreTraining(tiny_config(contrastive_loss="softmax")).eval()
    batch = tiny_batch(4)
    plain, masked = model(**batch), model(**batch, **{kind: torch.tensor([1, 1, 2, -1])})
    logits = masked.logits_per_image.detach().clone()
    logits[0, 1] = logits[1, 0] = -torch.inf
    target = torch.arange(4)
    expected = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(masked.loss_gca, expected)
    # Six anchors lose the three views of one other pair as candidates, six keep all eleven.
    assert masked.log_num_candidates.item() == pytest.approx((math.log(8) + math.log(11)) / 2)
    assert masked.loss_tma != plain.loss_tma
    unrelated = model(**batch, **{kind: torch.tensor([-1, -1, 3, 4])})
    torch.testing.assert_close(unrelated.loss, plain.loss)


@pytest.mark.parametrize("query", ["text", "none", "vision"])
def test_negative_pairs_limit_the_candidates(query):
    batch = tiny_batch(6)
    losses = {}
    for number in (2, 5, None):
        torch.manual_seed(0)
        model = T3DForPreTraining(tiny_config(tma_query=query, tma_negative_pairs=number)).eval()
        losses[number] = model(**batch)
    assert losses[2].log_num_candidates.item() == pytest.approx(math.log(3 * 3 - 1))
    torch.testing.assert_close(losses[5].loss_tma, losses[None].loss_tma)  # all other pairs


def test_global_alignment_alone_has_no_second_objective():
    model, batch = T3DForPreTraining(tiny_config(lambda_tma=0.0)), tiny_batch()
    assert not any(name.startswith("multi_view_alignment") for name, _ in model.named_parameters())
    for name in ("local_pixel_values", "local_mask", "local_positions"):
        del batch[name]
    output = model(**batch)
    assert output.loss_tma is None
    assert output.loss == output.loss_gca


@pytest.mark.parametrize(("query", "reaches_text"), [("text", True), ("vision", False), ("none", False)])
def test_multi_view_alignment_trains_the_text_tower_only_where_the_report_asks(query, reaches_text):
    model = T3DForPreTraining(tiny_config(lambda_gca=0.0, tma_query=query))
    model(**tiny_batch()).loss.backward()
    parameters = [*model.t3d.text_model.parameters(), *model.t3d.text_projection.parameters()]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in parameters) == reaches_text


def test_mean_text_pooling_is_the_mean_over_the_tokens_that_exist():
    model, batch = T3DModel(tiny_config(text_pooling="mean")).eval(), tiny_batch()
    output = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    means = [hidden[:length].mean(dim=0) for hidden, length in zip(output.last_hidden_state, lengths, strict=True)]
    torch.testing.assert_close(output.pooler_output, model.text_projection(torch.stack(means)))


def test_sentences_are_aligned_one_by_one():
    """The term is the mean of the global alignment's loss with each sentence in the report's place."""
    model, batch = T3DForPreTraining(tiny_config(lambda_tma=0.0, lambda_sentences=0.25)).eval(), tiny_batch()
    texts = [tiny_batch(seed=seed) for seed in (1, 2)]
    ids = torch.tensor([[1, 2], [3, 2], [1, 4]])
    sentences = {
        "sentence_input_ids": torch.stack([text["input_ids"] for text in texts], dim=1),
        "sentence_attention_mask": torch.stack([text["attention_mask"] for text in texts], dim=1),
        "sentence_token_type_ids": torch.zeros(3, 2, 8, dtype=torch.int64),
    }
    output = model(**batch, **sentences, sentence_ids=ids)
    in_place = []
    for index, text in enumerate(texts):
        replaced = {**batch, "input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        in_place.append(model(**replaced, report_ids=ids[:, index]).loss_gca)
    torch.testing.assert_close(output.loss_sentences, torch.stack(in_place).mean())
    torch.testing.assert_close(output.loss, output.loss_gca + 0.25 * output.loss_sentences)
    assert model(**batch).loss_sentences is None
    assert model(**batch, **sentences, return_loss=False).loss_sentences is None
    assert (model(**batch, **sentences).loss_sentences - output.loss_sentences).abs() > 1e-4, "the ids exclude"


def test_weights_of_the_terms():
    batch = tiny_batch()
    output = T3DForPreTraining(tiny_config(lambda_gca=0.5, lambda_tma=2.0)).eval()(**batch)
    torch.testing.assert_close(output.loss, 0.5 * output.loss_gca + 2.0 * output.loss_tma)
    output = T3DForPreTraining(tiny_config(lambda_gca=0.0)).eval()(**batch)
    assert output.loss_gca is None
    assert output.loss == output.loss_tma


@pytest.mark.parametrize("overrides", [{"lambda_tma": 0.0}, {"lambda_gca": 0.0}])
def test_one_pair_has_no_negatives(overrides):
    with pytest.raises(ValueError, match="needs negatives: the global batch holds 1 pair"):
        T3DForPreTraining(tiny_config(**overrides))(**tiny_batch(1))


def test_multi_view_alignment_needs_views():
    batch = tiny_batch()
    del batch["local_pixel_values"]
    model = T3DForPreTraining(tiny_config())
    with pytest.raises(ValueError, match=r"lambda_tma=1.0 needs local views"):
        model(**batch)
    assert model(**batch, return_loss=False).loss is None


def test_autocast_keeps_the_losses_in_float32():
    model, batch = T3DForPreTraining(tiny_config()).eval(), tiny_batch(8)
    expected = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.loss.dtype == output.image_embeds.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.05, atol=0.05)


def test_training_learns_the_pairs():
    torch.manual_seed(0)
    model, batch = T3DForPreTraining(tiny_config(gca_temperature=0.2)), tiny_batch(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(40):
        output = model(**batch)
        first = first or output.loss_gca.item()
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss_gca < first - 1


def test_a_learnt_temperature_is_clamped_after_the_step():
    model = T3DForPreTraining(tiny_config(learnable_temperature=True, max_logit_scale=20.0))
    batch = tiny_batch()
    assert model.t3d.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.t3d.logit_scale.fill_(5.0)
    model(**batch).loss.backward()
    assert model.t3d.logit_scale.grad.abs() > 0  # a clamp in forward would have stopped it
    model.clamp_logit_scale()
    assert model.t3d.logit_scale.exp().item() == pytest.approx(20.0)


def test_sigmoid_learns_scale_and_bias():
    model = T3DModel(tiny_config(contrastive_loss="sigmoid"))
    assert model.logit_bias.item() == -10.0
    output = model(**tiny_batch(), return_loss=True)
    signs = 2 * torch.eye(3) - 1
    torch.testing.assert_close(output.loss, -nn.functional.logsigmoid(signs * output.logits_per_image).sum() / 3)
    output.loss.backward()
    assert model.logit_scale.grad is not None
    assert model.logit_bias.grad is not None


# --- pretrained parts and freezing -----------------------------------------------------------------------------------


def trainable_text_layers(model: T3DModel) -> list[bool]:
    return [next(layer.parameters()).requires_grad for layer in model.text_model.encoder.layer]


@pytest.mark.parametrize("text_class", [BertModel, BertForMaskedLM, RobertaModel])
@pytest.mark.parametrize("model_class", [T3DModel, T3DForPreTraining])
@pytest.mark.parametrize("as_folders", [False, True])
def test_starts_from_pretrained_towers(tmp_path, text_class, model_class, as_folders):
    config = tiny_config()
    text_config = text_class.config_class(**{**config.text_config.to_dict(), "model_type": None})
    vision, text = T3DVisionModel(config.vision_config), text_class(text_config)
    parts = (vision, text)
    if as_folders:
        vision.save_pretrained(tmp_path / "vision")
        text.save_pretrained(tmp_path / "text")
        parts = (tmp_path / "vision", str(tmp_path / "text"))
    model = model_class.from_vision_text_pretrained(
        *parts, num_frozen_text_layers=1, projection_dim=16, num_tma_heads=2, num_fusion_heads=2
    ).base_model
    for name, weight in vision.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], weight)
    for name, weight in model.text_model.state_dict().items():
        assert torch.equal(text.base_model.state_dict()[name], weight)
    assert trainable_text_layers(model) == [False, True]
    assert not any(parameter.requires_grad for parameter in model.text_model.embeddings.parameters())
    assert all(parameter.requires_grad for parameter in model.vision_model.parameters())


def test_starts_from_the_vision_tower_of_any_folder(tmp_path):
    model = T3DForPreTraining(tiny_config())
    model.save_pretrained(tmp_path)
    text = BertModel(tiny_config().text_config)
    other = T3DModel.from_vision_text_pretrained(
        tmp_path, text, projection_dim=16, num_tma_heads=2, num_fusion_heads=2
    )
    torch.testing.assert_close(other.vision_model.state_dict(), model.t3d.vision_model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("model_class", [T3DModel, T3DForPreTraining])
def test_text_layers_are_frozen_after_loading(tmp_path, model_class):
    config = tiny_config(num_frozen_text_layers=1)
    model_class(config).save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert trainable_text_layers(loaded.base_model) == [False, True]
    assert not loaded.base_model.logit_scale.requires_grad  # fixed, whatever loading made of it
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert trainable_text_layers(loaded.base_model) == [False, True]


def test_more_frozen_layers_than_the_tower_has_are_refused():
    config = tiny_config()
    parts = (T3DVisionModel(config.vision_config), BertModel(config.text_config))
    with pytest.raises(StrictDataclassError, match="num_frozen_text_layers=9, but the text tower has 2 layers"):
        T3DModel.from_vision_text_pretrained(*parts, num_frozen_text_layers=9, num_fusion_heads=2)


# --- localisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{"tma_query": "text"}, {"tma_query": "vision"}, {"lambda_tma": 0.0}])
def test_text_attention_depends_on_the_text(overrides):
    model, batch = T3DForPreTraining(tiny_config(**overrides)).eval(), tiny_batch()
    batch["local_mask"][0, 1] = False
    views = (batch["local_pixel_values"], batch["local_mask"])
    attention = model.get_text_attention(batch["input_ids"], batch["attention_mask"], *views)
    assert attention.shape == (3, 3, 2, 2, 2)
    torch.testing.assert_close(attention.sum(dim=(2, 3, 4)), batch["local_mask"].float())
    other = model.get_text_attention(batch["input_ids"].flip(0), batch["attention_mask"].flip(0), *views)
    assert not torch.allclose(other, attention, rtol=1e-5)


def test_text_attention_is_what_the_loss_pools_by():
    model, batch = T3DForPreTraining(tiny_config()).eval(), tiny_batch()
    module = model.multi_view_alignment
    views = batch["local_pixel_values"]
    attention = model.get_text_attention(batch["input_ids"], batch["attention_mask"], views).flatten(2)
    tokens = model.project_tokens(model.t3d.encode_local_views(views)[0])
    queries = model.t3d.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    query = module.split_heads(module.query_projection(queries)[:, None, None])
    # Values that are one-hot over tokens turn what is pooled into the attention itself.
    key = module.key_and_value(tokens)[0]
    identity = torch.eye(tokens.shape[2]).expand(*key.shape[:3], -1, -1)
    pooled = nn.functional.scaled_dot_product_attention(query.expand(-1, 3, -1, -1, -1), key, identity)
    torch.testing.assert_close(pooled.squeeze(3).mean(dim=2), attention)


def test_many_texts_for_one_volume_encoded_once():
    model, batch = T3DForPreTraining(tiny_config()).eval(), tiny_batch(4)
    maps, mask = model.t3d.encode_local_views(batch["local_pixel_values"][:1])
    texts = (batch["input_ids"], batch["attention_mask"])
    attention = model.get_text_attention(*texts, local_hidden_state=maps, local_mask=mask)
    repeated = model.get_text_attention(*texts, batch["local_pixel_values"][:1].expand(4, -1, -1, -1, -1, -1))
    torch.testing.assert_close(attention, repeated)
    with pytest.raises(ValueError, match="4 texts for 3 volumes"):
        model.get_text_attention(*texts, batch["local_pixel_values"][:3])
    with pytest.raises(ValueError, match="needs views"):
        model.get_text_attention(*texts)


def test_the_control_looks_where_it_looks_whatever_the_text():
    model, batch = T3DForPreTraining(tiny_config(tma_query="none")).eval(), tiny_batch()
    views = batch["local_pixel_values"]
    first = model.get_text_attention(batch["input_ids"], batch["attention_mask"], views)
    second = model.get_text_attention(batch["input_ids"].flip(0), batch["attention_mask"].flip(0), views)
    torch.testing.assert_close(first, second)


# --- classification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1])),
        ("multi_label_classification", torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1]])),
        ("regression", torch.tensor([[0.5, 1.0, -1.0], [0.0, 0.0, 2.0], [1.0, 1.0, 1.0]])),
        (None, torch.tensor([0, 2, 1])),
        (None, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    ],
)
def test_classification_losses(problem_type, labels):
    config = tiny_config().vision_config
    config.num_labels, config.problem_type = 3, problem_type
    model, views = T3DForImageClassification(config).eval(), tiny_batch()["pixel_values"]
    output = model(views, labels=labels)
    pooled = model.vision_model(views).pooler_output
    torch.testing.assert_close(output.logits, model.classifier(pooled))
    if problem_type == "regression":
        expected = ((output.logits - labels) ** 2).mean()
    elif labels.ndim == 1:
        expected = -output.logits.log_softmax(dim=-1)[torch.arange(3), labels].mean()
    else:
        signs = 2 * labels.float() - 1
        expected = -nn.functional.logsigmoid(signs * output.logits).mean()
    torch.testing.assert_close(output.loss, expected)
    assert model(views).loss is None
    assert model.dropout.p == 0.3
