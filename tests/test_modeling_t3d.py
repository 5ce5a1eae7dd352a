# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the models compute: embeddings, fusion, freezing, classification."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_inputs import tiny_batch, tiny_config, tiny_vit_config
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    GPT2Config,
    GPT2Model,
    MT5Config,
    MT5EncoderModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
    XLMConfig,
)

from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.modeling_t3d import T3DForImageClassification, T3DModel, T3DVisionModel

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TINY_LAYERS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY_T5 = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


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
        T5Config(**TINY_T5),
    ],
    ids=["bert", "roberta", "distilbert", "t5"],
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


@pytest.mark.parametrize("text_pooling", ["first", "mean"])
def test_padding_on_the_left_is_no_part_of_the_text(text_pooling):
    # T5 knows no absolute positions, which padding on the left would move.
    config = tiny_config(text_pooling=text_pooling)
    config.text_config = T5Config(**TINY_T5)
    model, texts = T3DModel(config).eval(), torch.tensor([[5, 6, 7], [8, 9, 4]])
    padded = nn.functional.pad(texts, (2, 0))
    features = [
        model.get_text_features(ids, mask).pooler_output
        for ids, mask in ((texts, torch.ones_like(texts)), (padded, (padded > 0).long()), (padded, padded > 0))
    ]
    torch.testing.assert_close(features[1], features[0], **CLOSE)
    assert torch.equal(features[2], features[1])
    assert torch.equal(features[0], model.get_text_features(texts).pooler_output)


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


def test_starts_from_the_vision_tower_of_any_model():
    config = tiny_config()
    text = BertModel(config.text_config)
    for model in (T3DModel(config), T3DForPreTraining(config), T3DForImageClassification(config.vision_config)):
        tower = getattr(model.base_model, "vision_model", model.base_model)
        other = T3DModel.from_vision_text_pretrained(model, text, num_fusion_heads=2)
        torch.testing.assert_close(other.vision_model.state_dict(), tower.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("text_class", [T5Model, T5EncoderModel, T5ForConditionalGeneration, MT5EncoderModel])
@pytest.mark.parametrize("as_folder", [False, True])
def test_the_encoder_of_an_encoder_decoder_is_a_text_tower(tmp_path, text_class, as_folder):
    text = text_class((MT5Config if text_class is MT5EncoderModel else T5Config)(**TINY_T5))
    text.save_pretrained(tmp_path / "text")
    model = T3DModel.from_vision_text_pretrained(
        T3DVisionModel(tiny_config().vision_config),
        tmp_path / "text" if as_folder else text,
        num_frozen_text_layers=1,
        num_fusion_heads=2,
    ).eval()
    assert type(model.text_model).__name__.endswith("T5EncoderModel")
    for name, weight in model.text_model.state_dict().items():
        assert torch.equal(text.state_dict()[name], weight)
    trained = {name for name, parameter in model.text_model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".layer.")[0] for name in trained} == {"encoder.block.1", ""}
    assert {name for name in trained if ".layer." not in name} == {"encoder.final_layer_norm.weight"}
    model.save_pretrained(tmp_path / "model")
    loaded, report = T3DModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {name for name, parameter in loaded.text_model.named_parameters() if parameter.requires_grad} == trained
    texts = tiny_batch()["input_ids"]
    assert torch.equal(loaded.get_text_features(texts).pooler_output, model.get_text_features(texts).pooler_output)


def test_what_is_no_text_encoder_is_refused():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=small, vision_config={**small, "image_size": 32, "patch_size": 16}))
    bart = BartModel(BartConfig(vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1))
    vision = T3DVisionModel(tiny_config().vision_config)
    for text in (clip, bart):
        name = type(text.config).__name__
        with pytest.raises(ValueError, match=rf"^{name} describes more than a text encoder.* give the text part"):
            T3DModel.from_vision_text_pretrained(vision, text, num_fusion_heads=2)
    config = tiny_config()
    config.text_config = bart.config
    with pytest.raises(ValueError, match=r"^BartConfig describes more than a text encoder"):
        T3DModel(config)
    T3DModel.from_vision_text_pretrained(vision, clip.text_model, text_pooling="mean", num_fusion_heads=2)


@pytest.mark.parametrize("as_folders", [False, True])
def test_towers_that_were_stored_in_16_bits_train_in_32(tmp_path, as_folders):
    config = tiny_config()
    parts = [T3DVisionModel(config.vision_config).bfloat16(), BertModel(config.text_config).half()]
    if as_folders:
        for part, name in zip(parts, ("vision", "text"), strict=True):
            part.save_pretrained(tmp_path / name)
        parts = [tmp_path / "vision", tmp_path / "text"]
    model = T3DModel.from_vision_text_pretrained(*parts, num_fusion_heads=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(input_ids=torch.tensor([[2, 5]]), pixel_values=torch.zeros(1, 1, 8, 8, 8)).logits_per_image.sum().backward()


def test_a_text_tower_that_reads_from_left_to_right_is_pooled_by_its_mean():
    vision = T3DVisionModel(tiny_config().vision_config)
    text = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r'GPT2Model reads from left to right.* text_pooling="mean"'):
        T3DModel.from_vision_text_pretrained(vision, text, num_fusion_heads=2)
    model = T3DModel.from_vision_text_pretrained(vision, text, text_pooling="mean", num_fusion_heads=2)
    one, other = model.get_text_features(torch.tensor([[3, 7], [3, 8]])).pooler_output
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_temperature_among_the_keywords_counts(tmp_path, learnable):
    T3DForPreTraining(tiny_config(learnable_temperature=learnable)).save_pretrained(tmp_path)
    for auto in (T3DModel, T3DForPreTraining, AutoModel, AutoModelForPreTraining):
        model = auto.from_pretrained(tmp_path, gca_temperature=0.2)
        assert 1 / model.base_model.logit_scale.exp().item() == pytest.approx(0.2)
        assert model.base_model.logit_scale.requires_grad == learnable
        # Saved and loaded again without it, the model keeps the temperature and leaves no trace of the keyword.
        model.save_pretrained(tmp_path / "saved")
        again = auto.from_pretrained(tmp_path / "saved")
        assert torch.equal(again.base_model.logit_scale, model.base_model.logit_scale)
        assert "_replaces_temperature" not in (tmp_path / "saved" / "config.json").read_text()
        assert 1 / auto.from_pretrained(tmp_path).base_model.logit_scale.exp().item() == pytest.approx(0.07)


@pytest.mark.parametrize("auto", [T3DModel, T3DForPreTraining, AutoModel])
def test_a_temperature_among_the_keywords_counts_where_weights_lie_on_disk(tmp_path, auto):
    T3DForPreTraining(tiny_config()).save_pretrained(tmp_path / "model")
    settings = {"device_map": "auto", "max_memory": {"cpu": 1000, "disk": 10**9}}
    models = [
        auto.from_pretrained(tmp_path / "model", gca_temperature=0.5, **placement).base_model
        for placement in ({}, {**settings, "offload_folder": tmp_path / "offloaded"})
    ]
    assert models[1].logit_scale.is_meta
    batch = tiny_batch()
    with torch.no_grad():
        torch.testing.assert_close(*(model(**batch).logits_per_image for model in models))


def test_freezing_a_learnt_temperature_keeps_it(tmp_path):
    model = T3DModel(tiny_config(learnable_temperature=True))
    model.logit_scale.data.fill_(3.5)
    model.save_pretrained(tmp_path)
    for auto in (T3DModel, AutoModel):
        assert auto.from_pretrained(tmp_path, learnable_temperature=False).logit_scale == 3.5


def test_a_model_without_volumes_says_what_it_needs():
    with pytest.raises(ValueError, match="needs its global view: pass pixel_values"):
        T3DModel(tiny_config())(input_ids=torch.tensor([[2, 5]]))


@pytest.mark.parametrize(
    ("input_ids", "given"),
    [(None, "none"), (torch.tensor([2, 5, 3]), r"shape \(3,\)"), (torch.ones(1, 2, 3).long(), r"shape \(1, 2, 3\)")],
)
def test_a_model_without_a_batch_of_texts_says_what_it_needs(input_ids, given):
    model = T3DModel(tiny_config())
    message = rf"needs input_ids of shape \(batch, tokens\), got {given}; pass what the processor returns"
    with pytest.raises(ValueError, match=message):
        model(input_ids=input_ids, **image_inputs(tiny_batch()))
    with pytest.raises(ValueError, match=message):
        model.get_text_features(input_ids)


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


@pytest.mark.parametrize(
    ("text_config", "below"),
    [
        (GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2), {"wte", "wpe"}),
        (XLMConfig(vocab_size=50, emb_dim=16, n_layers=3, n_heads=2), {"position_embeddings", "layer_norm_emb"}),
        (
            AlbertConfig(**TINY_LAYERS, embedding_size=8, num_hidden_groups=3),
            {"embeddings", "encoder.embedding_hidden_mapping_in"},
        ),
    ],
    ids=["gpt2", "xlm", "albert"],
)
def test_all_that_frozen_text_layers_rest_on_is_frozen(text_config, below):
    config = tiny_config(text_pooling="mean")
    config.text_config, config.num_frozen_text_layers = text_config, 2
    model = T3DModel(config)
    model.freeze_text_layers()
    for name, parameter in model.text_model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if layer is not None:
            assert parameter.requires_grad == (layer == 2), name
    for name in below:
        assert not any(parameter.requires_grad for parameter in model.text_model.get_submodule(name).parameters())


def test_more_frozen_layers_than_the_tower_has_are_refused():
    config = tiny_config()
    parts = (T3DVisionModel(config.vision_config), BertModel(config.text_config))
    with pytest.raises(StrictDataclassError, match="num_frozen_text_layers=9, but the text tower has 2 layers"):
        T3DModel.from_vision_text_pretrained(*parts, num_frozen_text_layers=9, num_fusion_heads=2)


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


def test_an_auto_class_makes_a_classifier_of_a_dual_encoder(tmp_path):
    T3DForPreTraining(tiny_config()).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, classifier_dropout=0.25, num_labels=3)
    assert (loaded.dropout.p, loaded.classifier.out_features) == (0.25, 3)
    made = AutoModelForImageClassification.from_config(tiny_config(num_labels=3))
    assert isinstance(made, T3DForImageClassification)
    assert made.classifier.out_features == 3


def test_vision_fields_among_an_auto_classs_keywords_count_as_everywhere(tmp_path):
    T3DModel(tiny_config()).save_pretrained(tmp_path / "dual")
    for changes in ({"stem_stride": 1}, {"depths": [2, 1]}, {"hidden_sizes": [8, 32]}):
        loaded, direct = (
            auto.from_pretrained(tmp_path / "dual", ignore_mismatched_sizes=True, **changes)
            for auto in (AutoModelForImageClassification, T3DForImageClassification)
        )
        assert loaded.config.to_dict() == direct.config.to_dict()
        assert loaded(tiny_batch()["pixel_values"]).logits.shape == (3, 2)
        loaded.save_pretrained(tmp_path / "classifier")
        T3DForImageClassification.from_pretrained(tmp_path / "classifier")
    with pytest.raises(StrictDataclassError, match="must name the same stages"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "dual", depths=[1, 1, 1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (2, None)),
        ({"vision_config": {"num_labels": 5, "problem_type": "regression"}}, (5, "regression")),
        ({"num_labels": 5, "problem_type": "regression"}, (5, "regression")),
        ({"num_labels": 3, "vision_config": {"num_labels": 5}}, (3, None)),
    ],
)
def test_a_dual_encoders_labels_are_the_same_for_every_class_that_loads_them(tmp_path, settings, expected):
    T3DModel(tiny_config(**settings)).save_pretrained(tmp_path)
    for auto in (AutoModelForImageClassification, T3DForImageClassification):
        config = auto.from_pretrained(tmp_path).config
        assert (config.num_labels, config.problem_type) == expected
        for num_labels in (2, 4):
            assert auto.from_pretrained(tmp_path, num_labels=num_labels).config.num_labels == num_labels


def test_temperature_and_bias_stay_in_32_bits_where_a_model_is_made_in_16():
    model = AutoModel.from_config(tiny_config(contrastive_loss="sigmoid"), dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    in_32_bits = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert in_32_bits == {"logit_scale", "logit_bias"}
