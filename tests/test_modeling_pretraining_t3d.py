# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What pre-training computes: its two stages, both alignments, their weights and refusals, localisation."""

import math

import pytest
import torch
from model_inputs import tiny_batch, tiny_config, tiny_vit_config
from torch import nn

from modeling_t3d.modeling_outputs_t3d import T3DPairFeatures
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.modeling_t3d import T3DModel

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
OBJECTIVES = [(query, negatives) for query in ("text", "none", "vision") for negatives in ("same_query", "own_query")]


# --- the two stages --------------------------------------------------------------------------------------------------


def staged_model(query: str = "text", **overrides) -> T3DForPreTraining:
    """In float64 without dropout, with everything that a loss stage can own."""
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tiny_config(tma_query=query, contrastive_loss="sigmoid", text_config=text, **overrides)
    return T3DForPreTraining(config).double().train()


def staged_batch() -> dict[str, torch.Tensor]:
    batch = tiny_batch(5)
    batch["local_mask"][1, 2] = False
    texts = [tiny_batch(5, seed=seed) for seed in (1, 2)]
    return {
        **{name: value.double() if value.is_floating_point() else value for name, value in batch.items()},
        "study_ids": torch.tensor([1, 2, 1, -1, 3]),
        "sentence_input_ids": torch.stack([text["input_ids"] for text in texts], dim=1),
        "sentence_attention_mask": torch.stack([text["attention_mask"] for text in texts], dim=1),
        "sentence_ids": torch.arange(10).view(5, 2),
    }


@pytest.mark.parametrize("query", ["text", "none", "vision"])
def test_encoding_in_parts_then_aligning_once_is_the_forward_pass(query):
    """Values, and the gradients that reach the towers through the features and the loss stage directly."""
    model, batch = staged_model(query), staged_batch()
    expected = model(**batch)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    parts = []
    for start, stop in ((0, 2), (2, 5)):
        part = {name: value[start:stop] for name, value in batch.items()}
        longest = int(part["attention_mask"].sum(dim=1).max())
        part |= {name: part[name][:, :longest] for name in ("input_ids", "attention_mask")}
        parts.append(model(**part, stage="encode"))
    features = T3DPairFeatures.concatenate(parts)
    leaves = T3DPairFeatures(**features)
    for name, value in features.items():
        if value.requires_grad:
            leaves[name] = value.detach().requires_grad_()
    output = model(features=leaves, stage="align")
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=1e-12, atol=1e-12)
    output.loss.backward()
    own = {id(parameter) for parameter in model.loss_stage_parameters()}
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert {"t3d.logit_scale", "t3d.logit_bias", "multi_view_alignment.head.norm.weight"} <= reached
    handed_down = [name for name in leaves if leaves[name].grad is not None]
    assert handed_down[:3] == ["image_features", "text_features", "local_tokens"]
    torch.autograd.backward([features[name] for name in handed_down], [leaves[name].grad for name in handed_down])
    largest = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-12 * largest, name


def test_features_of_a_pair_do_not_depend_on_the_others():
    model, batch = staged_model("vision"), staged_batch()
    together = model.encode_pairs(**batch)
    alone = model.encode_pairs(**{name: value[3:4] for name, value in batch.items()})
    assert (
        together.keys()
        == alone.keys()
        == set(T3DPairFeatures.__annotations__)
        - {
            "report_ids",
            "local_features",
            "restoration_errors",
            "restoration_voxels",
        }
    )
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name][3:4], rtol=1e-12, atol=1e-12)


def test_aligning_needs_features():
    with pytest.raises(ValueError, match='stage="align" needs features'):
        staged_model()(stage="align")


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


@pytest.mark.parametrize(
    "overrides",
    [
        {"tma_query": "text"},
        {"tma_query": "vision"},
        {"objective": "gtgm"},
        {"lambda_tir": 1.0, "lambda_tma": 0.0, "tir_block_size": 4},
    ],
    ids=["text asks", "vision asks", "gtgm", "restoration"],
)
def test_padding_stays_out_of_the_statistics_of_the_heads(overrides):
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tiny_config(projection_norm="batch", text_config=without_dropout, **overrides)
    batch = tiny_batch()
    batch["local_mask"] = torch.ones_like(batch["local_mask"])
    padded = {name: nn.functional.pad(batch[name], (0, 4)) for name in ("input_ids", "attention_mask")}
    for name in ("local_pixel_values", "local_positions"):
        padded[name] = torch.cat([batch[name], torch.full_like(batch[name][:, :2], torch.nan)], dim=1)
    padded["local_mask"] = nn.functional.pad(batch["local_mask"], (0, 2))
    seen = []
    for inputs in (batch, {**batch, **padded}):
        torch.manual_seed(0)
        model = T3DForPreTraining(config).train()
        loss = model(**inputs, corruption_seeds=torch.arange(3)).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        heads = (model.t3d.visual_projection.norm, model.t3d.text_projection.norm)
        statistics = [value for head in heads for value in (head.running_mean, head.running_var)]
        seen.append((loss, torch.cat(gradients), torch.cat(statistics)))
    for first, second in zip(*seen, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)


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


def test_negative_pairs_are_drawn_anew_in_training_alone():
    """Validations can be compared, and what a step draws after one is not what it would draw without."""
    model, batch = T3DForPreTraining(tiny_config(tma_negative_pairs=2)), tiny_batch(8)

    def losses() -> set[float]:
        found = set()
        for seed in range(4):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.add(model(**batch).loss_tma.item())
            assert torch.equal(torch.get_rng_state(), before) != model.training
        return found

    model.eval()
    assert len(losses()) == 1
    # As in training, without dropout, which would draw too.
    model.training = True
    assert len(losses()) > 1


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


def two_sentences() -> tuple[list[dict], dict[str, torch.Tensor], torch.Tensor]:
    """Two texts for each volume of `tiny_batch`, by themselves and as the model takes them, and their ids."""
    texts = [tiny_batch(seed=seed) for seed in (1, 2)]
    sentences = {
        "sentence_input_ids": torch.stack([text["input_ids"] for text in texts], dim=1),
        "sentence_attention_mask": torch.stack([text["attention_mask"] for text in texts], dim=1),
        "sentence_token_type_ids": torch.zeros(3, 2, 8, dtype=torch.int64),
    }
    return texts, sentences, torch.tensor([[1, 2], [3, 2], [1, 4]])


def test_sentences_are_aligned_one_by_one():
    """The term is the mean of the global alignment's loss with each sentence in the report's place."""
    model, batch = T3DForPreTraining(tiny_config(lambda_tma=0.0, lambda_sentences=0.25)).eval(), tiny_batch()
    texts, sentences, ids = two_sentences()
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
    assert output.loss_texts is None


def test_reports_are_aligned_with_their_own_sentences():
    """As the volumes are, with the reports' embeddings in the place of theirs, and without any of the volumes'."""
    weights = {"lambda_gca": 0.0, "lambda_tma": 0.0, "lambda_sentences": 0.0, "lambda_texts": 0.5}
    model, batch = T3DForPreTraining(tiny_config(**weights)).eval(), tiny_batch()
    texts, sentences, ids = two_sentences()
    output = model(**batch, **sentences, sentence_ids=ids, study_ids=torch.tensor([7, 8, 9]))
    reports = model.t3d.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    losses = []
    for index, text in enumerate(texts):
        sentence = model.t3d.get_text_features(text["input_ids"], text["attention_mask"]).pooler_output
        cosines = torch.nn.functional.cosine_similarity(reports[:, None], sentence[None], dim=-1)
        logits = cosines / model.config.gca_temperature
        same = ids[:, index, None] == ids[None, :, index]
        logits = logits.masked_fill(same & ~torch.eye(3, dtype=torch.bool), float("-inf"))
        target = torch.arange(3)
        losses += [torch.nn.functional.cross_entropy(one, target) for one in (logits, logits.T)]
    torch.testing.assert_close(output.loss_texts, torch.stack(losses).mean())
    torch.testing.assert_close(output.loss, 0.5 * output.loss_texts)
    assert output.loss_sentences is None
    assert output.image_embeds is None


@pytest.mark.parametrize("num_pairs", [1, 5])
@pytest.mark.parametrize("overrides", [{"text_pooling": "mean", "projection_norm": "batch"}, {}])
def test_sentences_of_like_length_share_their_padding(num_pairs, overrides):
    """Fewer tokens than the batch has pass the text tower; embeddings and gradients are those of all at once.

    A process with fewer texts than groups makes as many passes as the others: they may share a sharded tower.
    """
    model = staged_model(**overrides)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (num_pairs, 3), generator=generator)
    mask = (torch.arange(30) < lengths[..., None]).long()
    ids = torch.randint(3, 99, (num_pairs, 3, 30), generator=generator) * mask
    token_counts = []
    model.t3d.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: token_counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    def gradients_of(embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (embeddings * weights).sum().backward()
        parameters = [*model.t3d.text_model.named_parameters(), *model.t3d.text_projection.named_parameters()]
        found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    embeddings = model.encode_sentences(ids, mask)
    found = gradients_of(embeddings)
    assert len(token_counts) == 4
    assert sum(token_counts) < ids.numel()
    whole = model.t3d.get_text_features(ids.flatten(0, 1), mask.flatten(0, 1)).pooler_output
    torch.testing.assert_close(embeddings, whole.unflatten(0, (num_pairs, 3)), rtol=1e-10, atol=1e-12)
    expected = gradients_of(whole)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


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
    model.config.return_dict = False
    assert torch.equal(model.get_text_attention(batch["input_ids"], batch["attention_mask"], *views), attention)


@pytest.mark.parametrize(
    "overrides",
    [{"lambda_tma": 0.0}, {"tma_query": "vision"}, {"tma_query": "text"}, {"objective": "v1"}],
    ids=["gca", "vision", "text", "v1"],
)
def test_text_attention_of_an_offloaded_model(tmp_path, overrides):
    model, batch = T3DForPreTraining(tiny_config(**overrides)).eval(), tiny_batch()
    model.save_pretrained(tmp_path / "model")
    offloaded = T3DForPreTraining.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 30_000}, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.t3d.logit_scale.is_meta
    for num_volumes in (1, 3):
        inputs = (batch["input_ids"], batch["attention_mask"], batch["local_pixel_values"][:num_volumes])
        attention = [one.get_text_attention(*inputs) for one in (model, offloaded)]
        torch.testing.assert_close(*attention)


def test_text_attention_without_a_text_query_is_the_softmax_of_similarities():
    model, batch = T3DForPreTraining(tiny_config(lambda_tma=0.0)).eval(), tiny_batch()
    texts = (batch["input_ids"], batch["attention_mask"])
    attention = model.get_text_attention(*texts, batch["local_pixel_values"])
    tokens = model.project_tokens(model.t3d.encode_local_views(batch["local_pixel_values"])[0])
    queries = model.t3d.get_text_features(*texts).pooler_output
    similarities = torch.cosine_similarity(queries[:, None, None], tokens, dim=-1)
    torch.testing.assert_close(attention.flatten(2), (similarities / 0.07).softmax(dim=-1), **CLOSE)


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
