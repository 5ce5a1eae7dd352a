# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The configurations: what Transformers asks of every one, strictness, presets and sub-configurations."""

import json
from copy import deepcopy

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, CLIPConfig, RobertaConfig

from modeling_t3d.configuration_t3d import T3DConfig, T3DVisionConfig

PRESETS = ["tiny", "base", "base-batchnorm"]
CONFIGS = {
    "vision": T3DVisionConfig,
    "vit": lambda **kwargs: T3DVisionConfig(encoder_type="vit", hidden_size=48, num_hidden_layers=3, **kwargs),
    "default": T3DConfig,
    **{name: lambda name=name, **kwargs: T3DConfig.from_preset(name, **kwargs) for name in PRESETS},
}


@pytest.fixture(params=CONFIGS)
def make(request):
    return CONFIGS[request.param]


# --- what Transformers asks of every configuration


def test_towers_answer_to_the_common_names():
    for config in (T3DVisionConfig(), CONFIGS["vit"](), T3DConfig().text_config):
        assert config.hidden_size > 0
        assert config.num_hidden_layers > 0


def test_json_round_trip(make, tmp_path):
    config = make()
    assert json.loads(config.to_json_string())["model_type"] == config.model_type
    config.to_json_file(tmp_path / "config.json")
    assert type(config).from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_save_and_load(make, tmp_path, subfolder):
    config = make()
    config.save_pretrained(tmp_path / subfolder)
    loaded = type(config).from_pretrained(tmp_path, subfolder=subfolder)
    assert loaded.to_dict() == config.to_dict()
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


def test_no_instance_shares_state_with_another(make):
    first, second = make(), make()
    before = deepcopy(second.to_dict())
    vision = first if isinstance(first, T3DVisionConfig) else first.vision_config
    vision.stem_stride[0] = 5
    assert second.to_dict() == before
    assert make().to_dict() == before


def test_number_of_labels_and_base_settings(make, tmp_path):
    config = make(num_labels=5, dtype="bfloat16", attn_implementation="eager")
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == 3
    assert config._attn_implementation == "eager"
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.num_labels == 3
    assert str(loaded.dtype).endswith("bfloat16")


def test_loading_with_changes(tmp_path):
    T3DConfig.from_preset("tiny").save_pretrained(tmp_path)
    config, unused = T3DConfig.from_pretrained(
        tmp_path, view_fusion="mean", vision_config={"norm": "batch"}, unknown=1, return_unused_kwargs=True
    )
    assert (config.view_fusion, config.vision_config.norm, config.vision_config.embedding_size) == (
        "mean",
        "batch",
        16,
    )
    assert unused == {"unknown": 1}


def test_changes_while_loading_must_fit_together(tmp_path):
    T3DConfig.from_preset("tiny").save_pretrained(tmp_path)
    for change, message in (
        ({"num_frozen_text_layers": -1}, "num_frozen_text_layers=-1, but the text tower has 2 layers"),
        ({"gca_temperature": -0.2}, "temperatures must be positive"),
        ({"num_tma_heads": 7}, "num_tma_heads=7 must divide"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            T3DConfig.from_pretrained(tmp_path, **change)


def test_a_quantised_model_can_be_reloaded(tmp_path):
    config = T3DConfig.from_preset("tiny")
    config.quantization_config = {"quant_method": "torchao"}
    config.save_pretrained(tmp_path)
    assert T3DConfig.from_pretrained(tmp_path).quantization_config == {"quant_method": "torchao"}


# --- sub-configurations


def test_a_tower_loads_its_section_of_the_joint_folder(tmp_path):
    config = T3DConfig.from_preset("tiny")
    config.save_pretrained(tmp_path)
    assert T3DVisionConfig.from_pretrained(tmp_path).to_dict() == config.vision_config.to_dict()
    assert config.get_text_config() is config.text_config


def test_labels_of_the_whole_model_are_those_of_its_vision_tower_where_they_are_set(tmp_path):
    for settings, num_labels in (
        ({"vision_config": {"num_labels": 5}}, 5),
        ({"vision_config": {"num_labels": 5}, "num_labels": 3}, 3),
        ({"num_labels": 3}, 3),
        ({}, 2),
    ):
        config = T3DConfig.from_preset("tiny", **settings)
        config.save_pretrained(tmp_path)
        assert config.to_vision_config().num_labels == num_labels
        assert T3DVisionConfig.from_pretrained(tmp_path).to_dict() == config.to_vision_config().to_dict()


def test_sub_configurations_from_nothing_dicts_and_instances():
    assert isinstance(T3DConfig().text_config, RobertaConfig)
    assert T3DConfig().vision_config.to_dict() == T3DVisionConfig().to_dict()
    vision, text = T3DVisionConfig(norm="batch"), BertConfig(num_hidden_layers=3)
    config = T3DConfig(vision_config=vision, text_config=text)
    assert config.vision_config.norm == "batch"
    assert config.text_config.num_hidden_layers == 3
    config = T3DConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    assert config.vision_config.to_dict() == vision.to_dict()
    assert isinstance(config.text_config, BertConfig)
    assert T3DConfig(text_config={"model_type": "distilbert"}).text_config.model_type == "distilbert"


def test_single_fields_of_the_text_tower_leave_the_layout_of_roberta():
    text = T3DConfig(text_config={"vocab_size": 100}).text_config
    assert (text.model_type, text.vocab_size) == ("roberta", 100)
    assert (text.max_position_embeddings, text.type_vocab_size) == (514, 1)
    assert T3DConfig(text_config={"max_position_embeddings": 130}).text_config.max_position_embeddings == 130
    assert T3DConfig(text_config={"model_type": "bert"}).text_config.type_vocab_size == BertConfig().type_vocab_size


def test_attention_implementation_reaches_the_towers():
    config = T3DConfig.from_preset("tiny", attn_implementation="eager")
    assert config.vision_config._attn_implementation == config.text_config._attn_implementation == "eager"


# --- strictness


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (
            T3DConfig,
            {"projection_dims": 64},
            "T3DConfig has no field 'projection_dims'; did you mean 'projection_dim'",
        ),
        (T3DConfig, {"tma_querry": "text"}, "did you mean 'tma_query'"),
        (T3DVisionConfig, {"hiden_sizes": [8]}, "T3DVisionConfig has no field 'hiden_sizes'; .* 'hidden_sizes'"),
        (T3DConfig, {"vision_config": {"depth": [1]}}, "T3DVisionConfig has no field 'depth'; did you mean 'depths'"),
        (T3DConfig, {"xyzzy": 1}, "its fields are .*gca_temperature"),
    ],
)
def test_unknown_field_names_the_nearest(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


def test_unknown_field_in_a_file(tmp_path):
    T3DConfig.from_preset("tiny").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"]["stem_strid"] = 2
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="did you mean 'stem_stride'"):
        T3DConfig.from_pretrained(tmp_path)


def test_keys_that_saving_and_the_hub_add_are_no_typos():
    extras = {"auto_map": {"AutoConfig": "x.Y"}, "custom_pipelines": {}, "_name_or_path": "", "architectures": ["A"]}
    assert T3DConfig.from_preset("tiny", **extras).auto_map == extras["auto_map"]
    assert T3DVisionConfig(transformers_version="5.0.0", **extras).architectures == ["A"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_channels", 1.0),
        ("num_channels", "1"),
        ("stem_pool", 1),
        ("norm", "layer"),
        ("shortcut_type", "C"),
        ("hidden_sizes", [8.0, 16]),
        ("depths", 4),
        ("stem_stride", "2"),
        ("encoder_options", []),
    ],
)
def test_types_are_enforced_everywhere(field, value, tmp_path):
    with pytest.raises((StrictDataclassError, TypeError)):
        T3DVisionConfig(**{field: value})
    config = T3DVisionConfig()
    with pytest.raises(StrictDataclassError):
        setattr(config, field, value)
    content = T3DVisionConfig().to_dict()
    content[field] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises((StrictDataclassError, TypeError)):
        T3DVisionConfig.from_pretrained(tmp_path)


def test_whole_numbers_serve_as_real_ones():
    config = T3DConfig.from_preset("tiny", lambda_tma=0, gca_temperature=1, tma_temperature=1, max_logit_scale=50)
    assert (config.lambda_tma, config.gca_temperature) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_channels": 0}, "num_channels must be at least 1"),
        ({"depths": [1, 1]}, "must name the same stages"),
        ({"depths": [3, 0, 6, 3]}, "at least one block"),
        ({"hidden_sizes": [256, 512, 1024, 2050]}, "multiples of 4"),
        ({"hidden_sizes": []}, "hidden_sizes must name at least one stage"),
        ({"num_norm_groups": 7}, "does not divide every width"),
        ({"num_norm_groups": 0}, "does not divide every width"),
        ({"stem_stride": [1, 2]}, "stem_stride must be one positive integer or three"),
        ({"stem_kernel_size": 0}, "stem_kernel_size must be one positive integer or three"),
        ({"encoder_type": "vit", "patch_size": [4, -4, 4]}, "patch_size must be"),
        ({"encoder_type": "vit", "num_attention_heads": 7}, "not a multiple of num_attention_heads=7"),
        ({"encoder_type": "vit", "num_attention_heads": 0}, "not a multiple of num_attention_heads=0"),
        ({"encoder_type": "vit", "hidden_act": "gelo"}, "unknown hidden_act 'gelo'; Transformers has gelu"),
        ({"encoder_type": "vit", "feature_layers": [3, 6]}, "end with the last layer"),
        ({"encoder_type": "vit", "feature_layers": [6, 3, 12]}, "must ascend"),
        ({"encoder_type": "local_contrast", "cell_size": 5}, "cell_size must be an even number of voxels, got 5"),
        (
            {"encoder_type": "local_contrast", "grid_size": [4, 0, 4]},
            "grid_size must be one positive integer or three",
        ),
        ({"encoder_type": "local_contrast", "bright_channels": [1]}, "numbers below num_channels=1, got \\[1\\]"),
        ({"encoder_type": "local_contrast", "dark_channels": [0, 0]}, "dark_channels must be different numbers"),
        ({"encoder_type": "local_contrast", "response_edges": [1.0, 0.0]}, "two ascending numbers, got"),
        ({"encoder_type": "local_contrast", "num_hidden_layers": 2}, "one layer, not num_hidden_layers=2"),
    ],
)
def test_vision_fields_must_fit_together(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        T3DVisionConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gca_temperature": 0.0}, "temperatures must be positive"),
        ({"tma_temperature": -0.1}, "temperatures must be positive"),
        ({"num_tma_heads": 5}, "num_tma_heads=5 must divide projection_dim=64"),
        ({"num_tma_heads": 0}, "num_tma_heads=0 must divide"),
        ({"num_fusion_heads": 5}, "num_fusion_heads=5"),
        ({"num_fusion_heads": 0}, "num_fusion_heads=0"),
        ({"num_tir_heads": 0, "lambda_tir": 1.0}, "num_tir_heads=0 must divide"),
        ({"max_logit_scale": 0}, "max_logit_scale must be positive, got 0"),
        ({"soft_targets": True, "contrastive_loss": "sigmoid"}, "soft_targets belong to"),
        ({"tma_negative_pairs": 0}, "at least 1 or None"),
        ({"tma_negative_pairs": 2, "tma_loss": "swav"}, "tma_negative_pairs=2 limits the negatives .* leave it out"),
        ({"tma_negative_pairs": 2, "tma_loss": "barlow"}, "'barlow' has none"),
        ({"sinkhorn_epsilon": 0.0}, "must be positive, .* sinkhorn_epsilon=0.0"),
        ({"num_prototypes": 1}, "num_prototypes must be at least 2"),
        ({"num_sinkhorn_iterations": 0}, "num_sinkhorn_iterations at least 1"),
        ({"barlow_off_diagonal_weight": -1.0}, "barlow_off_diagonal_weight at least 0"),
        ({"num_frozen_text_layers": 3}, "the text tower has 2 layers"),
        ({"num_frozen_text_layers": -1}, "num_frozen_text_layers=-1"),
    ],
)
def test_joint_fields_must_fit_together(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        T3DConfig.from_preset("tiny", **settings)


def test_a_model_of_several_towers_is_no_text_tower():
    with pytest.raises(StrictDataclassError, match="'clip' has no num_hidden_layers: give that of a text encoder"):
        T3DConfig(text_config=CLIPConfig())


def test_saving_checks_again(tmp_path):
    config = T3DVisionConfig()
    config.num_norm_groups = 7
    with pytest.raises(StrictDataclassError, match="does not divide"):
        config.save_pretrained(tmp_path)


# --- derived values and presets


def test_values_are_derived():
    config = T3DVisionConfig(stem_stride=2, stem_kernel_size=[3, 5, 5])
    assert (config.stem_stride, config.stem_kernel_size) == ([2, 2, 2], [3, 5, 5])
    assert (config.hidden_size, config.num_hidden_layers) == (2048, 16)
    vit = T3DVisionConfig(encoder_type="vit")
    assert (vit.hidden_size, vit.num_hidden_layers, vit.intermediate_size) == (768, 12, 3072)
    assert vit.feature_layers == [3, 6, 9, 12]
    assert CONFIGS["vit"]().feature_layers == [1, 2, 3]
    contrast = T3DVisionConfig(encoder_type="local_contrast", grid_size=4)
    assert (contrast.hidden_size, contrast.num_hidden_layers, contrast.grid_size) == (48, 1, [4, 4, 4])


def test_presets_are_what_they_claim():
    tiny, base, batchnorm = (T3DConfig.from_preset(name) for name in PRESETS)
    assert tiny.vision_config.hidden_size == 128
    assert base.to_dict() == T3DConfig().to_dict()
    assert (base.vision_config.norm, batchnorm.vision_config.norm) == ("group", "batch")
    difference = {
        key for key, value in base.vision_config.to_dict().items() if batchnorm.vision_config.to_dict()[key] != value
    }
    assert difference == {"norm"}
    # The layout of RoBERTa-base, which is RadBERT-RoBERTa's.
    text = base.text_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == ("roberta", 768, 12)
    assert (text.vocab_size, text.max_position_embeddings, text.type_vocab_size) == (50265, 514, 1)


def test_preset_overrides_change_single_fields():
    config = T3DConfig.from_preset(
        "tiny", projection_dim=32, vision_config={"norm": "batch"}, text_config={"num_hidden_layers": 1}
    )
    assert (config.projection_dim, config.projection_hidden_size) == (32, 128)
    assert (config.vision_config.norm, config.vision_config.embedding_size) == ("batch", 16)
    assert (config.text_config.num_hidden_layers, config.text_config.vocab_size) == (1, 1024)
    assert T3DConfig.from_preset("tiny").vision_config.norm == "group"


def test_preset_overrides_exchange_a_tower():
    other = T3DConfig.from_preset("tiny", text_config={"model_type": "roberta", "num_hidden_layers": 1})
    assert (other.text_config.model_type, other.text_config.vocab_size) == ("roberta", 50265)
    vision = T3DVisionConfig(encoder_type="vit", hidden_size=48, num_hidden_layers=2)
    assert T3DConfig.from_preset("tiny", vision_config=vision).vision_config.encoder_type == "vit"
    assert T3DConfig.from_preset("tiny", text_config=BertConfig(hidden_size=24)).text_config.hidden_size == 24


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset 'tinny'; .* did you mean 'tiny'"):
        T3DConfig.from_preset("tinny")
    with pytest.raises(ValueError, match="the presets are 'tiny', 'base', 'base-batchnorm'"):
        T3DConfig.from_preset("gigantic")


def test_provenance_is_saved(make, tmp_path):
    config = make(provenance={"source": "weights.pth", "sha256": "0" * 64, "license": "mit"})
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).provenance["license"] == "mit"


def test_from_pretrained_refuses_an_unknown_keyword(tmp_path):
    T3DConfig.from_preset("tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'view_fusion'"):
        T3DConfig.from_pretrained(tmp_path, view_fussion="mean")
    with pytest.raises(ValueError, match="did you mean 'depths'"):
        T3DVisionConfig.from_pretrained(tmp_path, dephts=[1, 1, 1, 2])
    assert T3DConfig.from_pretrained(tmp_path, view_fusion="mean").view_fusion == "mean"
    _, unused = T3DConfig.from_pretrained(tmp_path, other=1, return_unused_kwargs=True)
    assert unused == {"other": 1}


def test_from_pretrained_derives_anew_what_a_change_decides(tmp_path):
    T3DConfig.from_preset("tiny").vision_config.save_pretrained(tmp_path)
    assert T3DVisionConfig.from_pretrained(tmp_path, depths=[1, 1, 1, 2]).num_hidden_layers == 5
    vit = T3DVisionConfig.from_pretrained(tmp_path, encoder_type="vit")
    assert (vit.hidden_size, vit.num_hidden_layers, list(vit.feature_layers)) == (768, 12, [3, 6, 9, 12])


def test_from_pretrained_keeps_what_was_given_to_a_vision_transformer(tmp_path):
    T3DVisionConfig(
        encoder_type="vit", hidden_size=384, num_attention_heads=6, intermediate_size=512, num_hidden_layers=12
    ).save_pretrained(tmp_path / "given")
    vit = T3DVisionConfig.from_pretrained(tmp_path / "given", num_hidden_layers=6)
    assert (vit.hidden_size, vit.intermediate_size, list(vit.feature_layers)) == (384, 512, [2, 3, 4, 6])
    resnet = T3DVisionConfig.from_pretrained(tmp_path / "given", encoder_type="resnet")
    assert (resnet.hidden_size, resnet.num_hidden_layers) == (2048, 16)
    T3DVisionConfig(encoder_type="vit", feature_layers=[5, 12]).save_pretrained(tmp_path / "derived")
    vit = T3DVisionConfig.from_pretrained(tmp_path / "derived", hidden_size=384)
    assert (vit.intermediate_size, vit.num_hidden_layers, list(vit.feature_layers)) == (1536, 12, [5, 12])
    with pytest.raises(StrictDataclassError, match="end with the last layer"):
        T3DVisionConfig.from_pretrained(tmp_path / "derived", num_hidden_layers=6)


def test_a_size_that_contradicts_the_resnet_is_refused():
    with pytest.raises(ValueError, match="hidden_size=99 contradicts"):
        T3DVisionConfig(hidden_size=99)
