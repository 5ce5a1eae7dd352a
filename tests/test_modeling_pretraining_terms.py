# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Which terms a configuration switches on, what they read and train: restoration, aligned views, named objectives."""

from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from model_inputs import tiny_batch, tiny_config, tiny_vit_config
from torch import nn

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DModel
from modeling_t3d.layers_t3d import unit_norm
from modeling_t3d.presets_t3d import OBJECTIVES
from modeling_t3d.restoration_t3d import corrupt_views, view_seeds

RESTORES = {"lambda_tir": 1.0, "tir_block_size": 4, "num_tir_heads": 2}
ALONE = {"lambda_gca": 0.0, "lambda_tma": 0.0}
ALIGNS_VIEWS = {"gca_views": "local", "lambda_tma": 0.0}


def model_of(**overrides) -> T3DForPreTraining:
    torch.manual_seed(0)
    return T3DForPreTraining(tiny_config(**overrides))


def moved(model: nn.Module) -> set[str]:
    """The top-level parts that a gradient reached."""
    names = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    return {".".join(name.split(".")[: 2 if name.startswith("t3d.") else 1]) for name in names}


# ----------------------------------------------------------------------------------------- restoration


def test_restoration_is_the_mean_squared_error_of_what_the_parts_give():
    model = model_of(**RESTORES).double().eval()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in tiny_batch().items()}
    batch["local_mask"][1, 2] = False
    seeds = torch.tensor([5, 9, -3])
    output = model(**batch, corruption_seeds=seeds)
    views = batch["local_pixel_values"].flatten(0, 1)
    corrupted, zeroed = corrupt_views(views, view_seeds(seeds, 3).flatten(), block_size=4, ratio=0.5, noise=0.1)
    maps = model.t3d.vision_model(corrupted).last_hidden_state.unflatten(0, (3, 3))
    text = model.t3d.get_text_features(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    restored = model.restoration(maps, model.t3d.text_projection(text), batch["attention_mask"], (8, 8, 8))
    valid = batch["local_mask"].flatten()
    squares = (restored - views).square()[valid]
    torch.testing.assert_close(output.loss_tir, squares.mean())
    torch.testing.assert_close(output.loss_tir_corrupted, squares[zeroed[valid]].mean())
    torch.testing.assert_close(output.loss, output.loss_gca + output.loss_tma + output.loss_tir)


def test_restoration_alone_trains_what_it_uses():
    model = model_of(**RESTORES, **ALONE)
    output = model(**tiny_batch())
    assert output.loss == output.loss_tir
    assert output.loss_gca is output.loss_tma is output.image_embeds is None
    output.loss.backward()
    assert moved(model) == {"restoration", "t3d.vision_model", "t3d.text_model", "t3d.text_projection"}
    # A bias of the keys moves all scores of a query alike.
    still = [name for name, value in model.restoration.named_parameters() if not value.grad.any()]
    assert set(still) <= {"key_projection.bias"}


def test_restoration_with_reports_of_others_is_the_control():
    model, batch, seeds = model_of(**RESTORES, **ALONE).eval(), tiny_batch(), torch.arange(3)
    reports = {name: batch[name].roll(1, dims=0) for name in ("input_ids", "attention_mask")}
    moved_reports = model(**{**batch, **reports}, corruption_seeds=seeds).loss_tir
    assert moved_reports != model(**batch, corruption_seeds=seeds).loss_tir
    model.config.tir_report = "other"
    assert model(**batch, corruption_seeds=seeds).loss_tir == moved_reports
    with pytest.raises(ValueError, match="encode at least 2 pairs at a time"):
        model(**tiny_batch(1))


def test_a_whole_batch_of_one_pair_can_be_restored():
    assert torch.isfinite(model_of(**RESTORES, **ALONE)(**tiny_batch(1)).loss)


def test_corruption_is_replayed_by_its_seeds_and_drawn_anew_in_training():
    model, batch = model_of(**RESTORES, **ALONE), tiny_batch()
    seeds = torch.arange(3)
    drawn = [model(**batch).loss_tir for _ in range(2)]
    assert drawn[0] != drawn[1]
    model.eval()
    assert model(**batch, corruption_seeds=seeds).loss_tir == model(**batch).loss_tir, "evaluation draws nothing"
    assert model(**batch, corruption_seeds=seeds + 3).loss_tir != model(**batch).loss_tir
    state = torch.get_rng_state()
    model(**batch)
    assert torch.equal(torch.get_rng_state(), state)
    permuted = {name: value[[2, 0, 1]] for name, value in batch.items()}
    again = model(**permuted, corruption_seeds=seeds[[2, 0, 1]]).loss_tir
    torch.testing.assert_close(again, model(**batch, corruption_seeds=seeds).loss_tir)


def test_features_of_restored_pairs_do_not_depend_on_the_others():
    model = model_of(**RESTORES).double().eval()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in tiny_batch(4).items()}
    batch["corruption_seeds"] = torch.tensor([7, 1, 1, 4])
    together = model.encode_pairs(**batch)
    parts = [
        model.encode_pairs(**{name: value[at] for name, value in batch.items()}) for at in (slice(0, 1), slice(1, 4))
    ]
    joined = type(together).concatenate(parts)
    assert joined.keys() == together.keys()
    for name, value in together.items():
        torch.testing.assert_close(joined[name], value, rtol=1e-10, atol=1e-12)
    assert model.align(joined).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


@pytest.mark.parametrize("config", [tiny_vit_config, partial(tiny_config, vision_config={"stem_stride": [1, 2, 2]})])
def test_restoration_works_with_a_transformer_and_with_strides_per_axis(config):
    loss = T3DForPreTraining(config(**RESTORES, **ALONE))(**tiny_batch()).loss
    loss.backward()
    assert torch.isfinite(loss)


NO_DROPOUT = {"text_config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}


def test_restoration_under_activation_checkpointing_and_half_precision():
    model, batch = model_of(**RESTORES, **ALONE, **NO_DROPOUT), {**tiny_batch(), "corruption_seeds": torch.arange(3)}
    model(**batch).loss.backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_restoration_in_chunks_of_views():
    model, batch = model_of(**RESTORES, **NO_DROPOUT), {**tiny_batch(), "corruption_seeds": torch.arange(3)}
    results = []
    for size in (None, 2):
        model.set_view_chunk_size(size)
        model.zero_grad()
        model(**batch).loss.backward()
        results.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert model.restoration.chunk_size == 2
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_it_learns_to_restore():
    """A few steps bring the error well below that of the best constant, for corruptions never seen."""
    model = model_of(**RESTORES, **ALONE, **NO_DROPOUT)
    batch = tiny_batch(2, 2)
    ramp = torch.linspace(-1, 1, 8)
    views = torch.stack([ramp.view(8, 1, 1).expand(8, 8, 8), ramp.view(1, 8, 1).expand(8, 8, 8)])
    batch["local_pixel_values"] = views[:, None, None].repeat(1, 2, 1, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        loss = model(**batch, corruption_seeds=torch.tensor([step, step + 1000])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * views.var()


# ----------------------------------------------------------------------------------------- aligned views


def test_aligned_views_are_the_sum_of_global_alignments():
    model, batch = model_of(**ALIGNS_VIEWS).eval(), tiny_batch(4, 2)
    batch |= {"study_ids": torch.tensor([1, 2, 1, 3]), "report_ids": torch.tensor([0, 1, 2, 1])}
    output = model(**batch)
    text = model.t3d.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    losses = []
    for view in batch["local_pixel_values"].unbind(dim=1):
        features = model.t3d.get_image_features(view).pooler_output
        ids = (batch["study_ids"], batch["report_ids"])
        losses.append(model.t3d.global_alignment_loss(unit_norm(features), unit_norm(text), text, *ids))
    torch.testing.assert_close(output.loss_gca, torch.stack(losses).sum())
    assert output.loss == output.loss_gca
    assert output.image_embeds is output.logits_per_image is None
    complete = model(**batch, return_loss=False)
    assert complete.image_embeds.shape == (4, 16)
    assert complete.loss is None


def test_a_view_that_is_missing_is_neither_anchor_nor_candidate():
    model, batch = model_of(**ALIGNS_VIEWS).eval(), tiny_batch(4, 2)
    batch["local_mask"][3, 1] = False
    output = model(**batch)
    changed = {**batch, "local_pixel_values": batch["local_pixel_values"].clone()}
    changed["local_pixel_values"][3, 1] += 5
    assert model(**changed).loss_gca == output.loss_gca
    one, three = (
        {
            name: value[:count, index : index + 1] if name.startswith("local_") else value[:count]
            for name, value in batch.items()
        }
        for count, index in ((4, 0), (3, 1))
    )
    torch.testing.assert_close(output.loss_gca, model(**one).loss_gca + model(**three).loss_gca)


def test_a_view_that_only_one_volume_has_adds_nothing():
    model, batch = model_of(**ALIGNS_VIEWS).eval(), tiny_batch(3, 2)
    batch["local_mask"][1:, 1] = False
    one = {name: value[:, :1] if name.startswith("local_") else value for name, value in batch.items()}
    torch.testing.assert_close(model(**batch).loss_gca, model(**one).loss_gca)
    batch["local_mask"][:] = False
    loss = model(**batch).loss
    assert loss == 0
    loss.backward()
    with pytest.raises(ValueError, match="the global batch holds 1 pair"):
        model(**{name: value[:1] for name, value in tiny_batch(3, 2).items()})


def test_the_mean_of_a_view_asks_nothing_and_has_no_parameters():
    model = model_of(tma_query="mean")
    assert model.multi_view_alignment is None
    output = model(**tiny_batch(4))
    output.loss_tma.backward()
    assert moved(model) == {"t3d.vision_model", "t3d.visual_projection"}
    views = model.eval()(**tiny_batch(4)).local_embeds
    features = model.t3d.get_image_features(tiny_batch(4)["local_pixel_values"].flatten(0, 1)).pooler_output
    torch.testing.assert_close(views, unit_norm(features).unflatten(0, (4, 3)))


@pytest.mark.parametrize("overrides", [OBJECTIVES["v1"], OBJECTIVES["gtgm"], OBJECTIVES["v3"], {**RESTORES, **ALONE}])
def test_running_statistics_move_whatever_is_encoded(overrides):
    """A tower whose statistics stayed where they began would be another one in evaluation."""
    batch_norm = {"vision_config": {"norm": "batch"}, "projection_norm": "batch"}
    model = model_of(**{"tir_block_size": 4, "num_tir_heads": 2, **overrides, **batch_norm})
    model(**tiny_batch(4, 2))
    norms = {name: module for name, module in model.named_modules() if hasattr(module, "num_batches_tracked")}
    still = {name for name, norm in norms.items() if not norm.num_batches_tracked}
    # Restoration has a projection of its own.
    assert still == ({"t3d.visual_projection.norm"} if overrides.get("lambda_tma") == 0 else set())


# ----------------------------------------------------------------------------------------- named objectives


def preset_model(objective: str) -> T3DForPreTraining:
    torch.manual_seed(0)
    config = tiny_config()
    return T3DForPreTraining(
        T3DConfig.from_preset(
            "tiny",
            objective=objective,
            **{name: getattr(config, name) for name in ("vision_config", "text_config", "projection_dim")},
            tir_block_size=4,
        )
    )


EXPECTED = {
    "v3": ({"loss_gca", "loss_tma"}, {"multi_view_alignment", "t3d.visual_projection", "t3d.text_projection"}),
    "v1": (
        {"loss_tma", "loss_tir"},
        {"multi_view_alignment", "restoration", "t3d.visual_projection", "t3d.text_projection"},
    ),
    "gtgm": ({"loss_gca", "loss_tma"}, {"t3d.visual_projection", "t3d.text_projection"}),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_computes_its_terms_and_trains_both_towers(objective, tmp_path):
    model, batch = preset_model(objective), tiny_batch(4, 2)
    output = model(**batch, corruption_seeds=torch.arange(4))
    terms, parts = EXPECTED[objective]
    assert {name for name, value in output.items() if name.startswith("loss_")} - {"loss_tir_corrupted"} == terms
    weights = {name: getattr(model.config, name.replace("loss", "lambda")) for name in terms}
    torch.testing.assert_close(output.loss, torch.stack([weights[name] * output[name] for name in terms]).sum())
    output.loss.backward()
    assert moved(model) == parts | {"t3d.vision_model", "t3d.text_model"}
    model.eval().save_pretrained(tmp_path)
    again = T3DForPreTraining.from_pretrained(tmp_path).eval()
    first, second = (each(**batch, corruption_seeds=torch.arange(4)) for each in (model, again))
    assert first.loss == second.loss
    _, report = T3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]


def test_the_default_objective_is_the_default_of_every_field():
    assert T3DConfig.from_preset("tiny", objective="v3").to_dict() == T3DConfig.from_preset("tiny").to_dict()


def test_an_objective_can_be_overridden_and_a_wrong_name_is_refused():
    assert T3DConfig.from_preset("tiny", objective="v1", lambda_tir=0.5).lambda_tir == 0.5
    message = "unknown objective 'gtg'; the objectives are 'v3', 'v1', 'gtgm'; did you mean 'gtgm'"
    with pytest.raises(ValueError, match=message):
        T3DConfig.from_preset("tiny", objective="gtg")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lambda_tir": 1.0, "num_tir_heads": 3}, "num_tir_heads=3 must divide projection_dim=16"),
        ({"lambda_tir": 1.0, "tir_mask_ratio": 1.0}, "restoration needs 0 < tir_mask_ratio < 1"),
        ({"lambda_tir": 1.0, "tir_norm_groups": 0}, "tir_norm_groups and tir_decoder_channels must be positive"),
        ({"lambda_tir": -1.0}, "weights of terms must be 0 or more"),
        ({"gca_views": "local", "view_fusion": "attention"}, 'gca_views="local" aligns each view by itself'),
        ({"tma_query": "mean", "tma_negatives": "own_query"}, 'tma_query="mean" asks nothing'),
    ],
)
def test_switches_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    ("overrides", "name"), [({**RESTORES, **ALONE}, "lambda_tir=1.0"), (ALIGNS_VIEWS, "lambda_gca=1.0")]
)
def test_terms_that_read_views_need_them(overrides, name):
    batch = tiny_batch()
    del batch["local_pixel_values"]
    with pytest.raises(ValueError, match=f"{name} needs local views: pass local_pixel_values"):
        model_of(**overrides)(**batch)
