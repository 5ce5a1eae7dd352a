# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Zero-shot scores by hand, encoding with a real tiny model, and the whole evaluation from samples to results."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.evaluation.encoding import (
    Embeddings,
    embed_samples,
    encode_prompts,
    encode_reports,
    stack_samples,
)
from modeling_t3d.evaluation.findings import mean_over_studies, sigmoid
from modeling_t3d.evaluation.localisation import boxes_from_affines, evaluate_localisation, localisation_case
from modeling_t3d.evaluation.probes import study_identity
from modeling_t3d.evaluation.statistics import area_under_roc
from modeling_t3d.evaluation.zero_shot import (
    evaluate_embeddings,
    evaluate_zero_shot,
    logit_scale_of,
    make_prompts,
    mean_prompt_embeds,
    softmax_scores,
    zero_shot_logits,
)
from modeling_t3d.geometry_t3d import Volume
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.modeling_t3d import T3DModel

FINDINGS = ["effusion", "nodule"]
PROMPTS = {
    "effusion": [("effusion is present", "effusion is not present"), ("there is effusion", "no effusion")],
    "nodule": [("nodule is present", "nodule is not present")],
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[CLS]", "[UNK]", "effusion", "nodule", "is", "not", "present", "there", "no", "the", "left"]
    words += ["right", "lung", "clear"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", unk_token="[UNK]", model_max_length=32
    )


@pytest.fixture(scope="module")
def processor() -> SimpleNamespace:
    return SimpleNamespace(tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def model() -> T3DModel:
    torch.manual_seed(0)
    return T3DModel(T3DConfig.from_preset("tiny"))


@pytest.fixture(scope="module")
def fused_model() -> T3DForPreTraining:
    torch.manual_seed(0)
    return T3DForPreTraining(T3DConfig.from_preset("tiny", view_fusion="attention"))


def make_samples(count: int = 10, num_views: int | None = None) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number in range(count):
        sample = {
            "pixel_values": torch.randn(1, 16, 16, 16, generator=generator) + number % 3,
            "labels": {"effusion": number % 2, "nodule": None if number == 0 else int(number % 3 == 0)},
            "patient_id": f"patient {number // 2}",
            "study_id": f"study {number}",
            "reconstruction": "1",
            "report": ["the left lung is clear", "effusion is present", "no nodule there"][number % 3]
            + " left" * number,
        }
        if num_views is not None:
            views = 1 + (number + num_views) % num_views
            sample["local_pixel_values"] = torch.randn(views, 1, 16, 16, 16, generator=generator)
            sample["local_positions"] = torch.rand(views, 6, generator=generator)
        samples.append(sample)
    return samples


# ---------------------------------------------------------------- scores


def test_scores_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    logits = zero_shot_logits(images, positive, negative, logit_scale=1 / 0.07)
    assert logits.dtype == torch.float64
    assert logits.ravel().tolist() == pytest.approx([1 / 0.07, -0.2 / 0.07])


def test_confident_scores_do_not_tie():
    """At the highest temperature that a model may learn, margins from 0.37 on are probabilities of 1 in float64."""
    heights = torch.tensor([0.20, 0.25, 0.30, 0.35])
    images = torch.stack([torch.sqrt(1 - heights**2), heights], dim=1)
    embeddings = Embeddings(
        image_embeds=images.numpy(),
        labels=np.array([[0.0], [0.0], [1.0], [1.0]]),
        findings=("nodule",),
        patient_ids=tuple("abcd"),
        study_ids=tuple("abcd"),
        reconstructions=("1",) * 4,
        reports=("",) * 4,
    )
    sides = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -1.0]])
    assert (sigmoid(zero_shot_logits(images, *sides, 100.0).numpy()) == 1.0).sum() == 4
    for unit in ("study", "reconstruction"):
        settings = {"prompts": {"nodule": PROMPTS["nodule"]}, "unit": unit, "thresholds": {"nodule": 0.5}}
        table = evaluate_embeddings(embeddings, *sides, 100.0, num_resamples=0, **settings).zero_shot
        assert table.auroc("nodule") == 1.0
        assert table.findings[0].average_precision == 1.0
        assert table.findings[0].at_threshold.sensitivity == 1.0, "thresholds are compared with probabilities"
        assert table.findings[0].at_threshold.specificity == 0.0


def test_softmax_over_labels():
    images = torch.tensor([[1.0, 0.0]])
    scores = softmax_scores(images, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), logit_scale=2.0)
    expected = np.exp([2.0, 0.0, -2.0]) / np.exp([2.0, 0.0, -2.0]).sum()
    np.testing.assert_allclose(scores[0], expected)


def test_prompts_of_a_finding_are_averaged_and_renormalised():
    embeds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    means = mean_prompt_embeds(embeds, [2, 1])
    torch.testing.assert_close(means, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_make_prompts():
    prompts = make_prompts(["lung nodule"], [("{} seen.", "No {}."), ("There is {}.", "Without {}.")])
    assert prompts["lung nodule"] == [
        ("lung nodule seen.", "No lung nodule."),
        ("There is lung nodule.", "Without lung nodule."),
    ]
    described = make_prompts(["lung nodule", "cyst"], descriptions={"Lung nodule": "a round opacity"})
    assert described["lung nodule"] == [
        ("lung nodule (a round opacity) is present.", "lung nodule (a round opacity) is not present.")
    ]
    assert described["cyst"] == [("cyst is present.", "cyst is not present.")]


def test_study_scores_are_means_over_reconstructions():
    scores = np.array([[0.2, 1.0], [0.6, 0.0], [0.9, 0.5]])
    labels = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 1.0]])
    means, known, first = mean_over_studies(scores, labels, ["a", "a", "b"])
    np.testing.assert_allclose(means, [[0.4, 0.5], [0.9, 0.5]])
    np.testing.assert_array_equal(known, [[1.0, np.nan], [0.0, 1.0]])
    assert first.tolist() == [0, 2]
    with pytest.raises(ValueError, match="disagree"):
        mean_over_studies(scores, np.array([[1.0, 0], [0.0, 0], [0.0, 0]]), ["a", "a", "b"])


# ---------------------------------------------------------------- encoding


def test_prompt_embeddings_do_not_depend_on_the_batch(model, processor):
    prompts = ["effusion is present", "no nodule", "the left lung is not clear"]
    together = encode_prompts(model, processor.tokenizer, prompts)
    alone = encode_prompts(model, processor.tokenizer, prompts, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    assert together.dtype == torch.float32
    assert not together.requires_grad


def test_pretraining_and_dual_model_give_the_same_embeddings(fused_model, processor):
    whole = encode_prompts(fused_model, processor.tokenizer, ["no nodule"])
    assert torch.equal(whole, encode_prompts(fused_model.t3d, processor.tokenizer, ["no nodule"]))
    assert logit_scale_of(fused_model) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "no prompts"), (["nodule", " "], "empty"), (["nodule " * 40], "32 tokens")]
)
def test_bad_prompts_are_refused(model, processor, prompts, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(model, processor.tokenizer, prompts)


def test_identical_reports_are_embedded_once_and_long_ones_counted(model, processor):
    long = "left " * 50
    embeds, cut = encode_reports(model, processor.tokenizer, ["no nodule", long, "no nodule", long + "lung"])
    assert torch.equal(embeds[0], embeds[2])
    assert torch.equal(embeds[1], embeds[3])  # equal up to the cut
    assert cut == 2


def test_stacking_pads_and_masks_missing_views():
    samples = make_samples(3, num_views=3)
    inputs = stack_samples(samples)
    assert inputs["local_pixel_values"].shape == (3, 3, 1, 16, 16, 16)
    assert inputs["local_mask"].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert torch.equal(inputs["local_positions"][1, :2], samples[1]["local_positions"])
    assert not inputs["local_pixel_values"][0, 1:].any()
    del samples[0]["local_pixel_values"]
    with pytest.raises(ValueError, match="all or to none"):
        stack_samples(samples)


def test_a_generator_is_drawn_batch_by_batch(model, processor):
    """Memory is bounded: a sample is drawn only after all earlier batches have passed through the model."""
    passed = []
    handle = model.vision_model.register_forward_hook(lambda *_: passed.append(1))
    drawn_after = []

    def draw():
        for sample in make_samples(6):
            drawn_after.append(len(passed))
            yield sample

    embed_samples(model, processor, draw(), FINDINGS, batch_size=2, with_reports=False)
    handle.remove()
    assert drawn_after == [0, 0, 1, 1, 2, 2]


def test_embeddings_keep_labels_ids_and_the_training_mode(model, processor):
    model.train()
    embeddings = embed_samples(model, processor, make_samples(5), ["nodule", "mass"], batch_size=2)
    assert model.training
    model.eval()
    np.testing.assert_array_equal(embeddings.labels[:, 0], [np.nan, 0, 0, 1, 0])
    assert np.isnan(embeddings.labels[:, 1]).all()
    assert embeddings.patient_ids == ("patient 0", "patient 0", "patient 1", "patient 1", "patient 2")
    assert embeddings.image_embeds.dtype == np.float32
    with torch.no_grad():
        direct = model.get_image_features(make_samples(5)[3]["pixel_values"][None]).pooler_output
    direct = torch.nn.functional.normalize(direct, dim=-1)
    np.testing.assert_allclose(embeddings.image_embeds[3], direct[0], atol=1e-5)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        embed_samples(model, processor, [], FINDINGS)
    for name in ("patient_id", "study_id"):
        samples = make_samples(2)
        del samples[1][name]
        with pytest.raises(ValueError, match=f"sample 1 has no '{name}'"):
            embed_samples(model, processor, samples, FINDINGS, with_reports=False)


def test_global_fusion_does_not_encode_local_views(model, processor):
    batches = []
    handle = model.vision_model.register_forward_hook(lambda *arguments: batches.append(1))
    embed_samples(model, processor, make_samples(4, num_views=3), FINDINGS, batch_size=4, with_reports=False)
    handle.remove()
    assert len(batches) == 1


def test_fused_embeddings_do_not_depend_on_the_batch(fused_model, processor):
    samples = make_samples(5, num_views=3)
    settings = {"with_reports": False, "with_view_features": True}
    together = embed_samples(fused_model, processor, samples, FINDINGS, batch_size=5, **settings)
    alone = embed_samples(fused_model, processor, samples, FINDINGS, batch_size=1, **settings)
    np.testing.assert_allclose(together.image_embeds, alone.image_embeds, atol=1e-5)
    np.testing.assert_allclose(together.view_features, alone.view_features, atol=1e-5)
    np.testing.assert_array_equal(together.view_mask, alone.view_mask)
    without = embed_samples(fused_model, processor, make_samples(5), FINDINGS, with_reports=False)
    assert np.abs(without.image_embeds - together.image_embeds).max() > 1e-4
    assert 0 <= study_identity(together.view_features, together.study_ids, together.view_mask).chance < 1


# ---------------------------------------------------------------- the whole evaluation


def direct_scores(model, processor, samples, finding):
    """The score of each sample with the first prompt pair, from the model's own forward pass."""
    tokens = processor.tokenizer(list(PROMPTS[finding][0]), padding=True, return_tensors="pt")
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
    with torch.no_grad():
        output = model.eval()(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixel_values
        )
    return torch.sigmoid(output.logits_per_image[:, 0] - output.logits_per_image[:, 1]).numpy()


def test_evaluation_from_samples_to_results(model, processor, tmp_path):
    samples = make_samples(12)
    results = evaluate_zero_shot(
        model, processor, iter(samples), PROMPTS, groups={"focal": ["nodule"]}, ks=(1, 5), num_resamples=50
    )
    # The table holds what the model's own forward pass gives.
    labels = [np.nan if sample["labels"]["nodule"] is None else sample["labels"]["nodule"] for sample in samples]
    expected = area_under_roc(np.array(labels), direct_scores(model, processor, samples, "nodule"))
    assert results.zero_shot.auroc("nodule") == pytest.approx(expected)
    assert results.zero_shot.auroc("focal") == pytest.approx(expected)
    assert results.zero_shot.findings[0].at_threshold is None
    card = results.protocol
    assert (card.num_units, card.num_patients, card.unit, card.protocol, card.optimistic) == (
        12,
        6,
        "study",
        "clean",
        False,
    )
    assert card.temperature == pytest.approx(0.07)
    assert card.bootstrap["level"] == "patient"
    assert set(results.retrieval) == {"report_to_volume", "volume_to_report"}
    assert results.retrieval["report_to_volume"].num_candidates == 12
    assert set(results.metrics()) >= {"auroc_macro", "auroc_focal", "report_to_volume_recall_at_5"}
    assert results.save(tmp_path).exists()


def test_published_protocol_is_flagged_optimistic(model, processor):
    results = evaluate_zero_shot(
        model, processor, make_samples(10), PROMPTS, protocol="ct-clip", retrieval=False, num_resamples=0
    )
    assert results.protocol.optimistic
    assert "optimistic" in results.protocol.threshold_source
    assert "optimistic" in results.to_markdown()
    assert results.zero_shot.groups["macro"].weighted_f1 is not None
    assert set(results.protocol.thresholds) == set(FINDINGS)


def test_clean_thresholds_come_from_validation_samples(model, processor):
    """The same thresholds whatever the evaluation set holds."""
    settings = {"validation_samples": make_samples(12), "retrieval": False, "num_resamples": 0}
    one = evaluate_zero_shot(model, processor, make_samples(10), PROMPTS, **settings)
    flipped = make_samples(10)
    for sample in flipped:
        sample["labels"] = {"effusion": 1 - sample["labels"]["effusion"], "nodule": 1}
    other = evaluate_zero_shot(model, processor, flipped, PROMPTS, **settings)
    assert one.protocol.thresholds == other.protocol.thresholds
    assert "validation" in one.protocol.threshold_source
    assert one.zero_shot.groups["macro"].f1 is not None
    assert not one.protocol.optimistic


def test_units(model, processor):
    samples = make_samples(6)
    for sample in samples:
        sample["study_id"] = sample["patient_id"]
        sample["labels"] = {"effusion": int(sample["patient_id"] == "patient 1"), "nodule": 0}
        sample["report"] = "no nodule in " + sample["patient_id"]
    by_study = evaluate_zero_shot(model, processor, samples, PROMPTS, num_resamples=0, ks=(1,))
    every = evaluate_zero_shot(model, processor, samples, PROMPTS, unit="reconstruction", num_resamples=0, ks=(1,))
    assert (by_study.protocol.num_units, every.protocol.num_units) == (3, 6)
    assert (by_study.protocol.num_volumes, every.protocol.num_volumes) == (6, 6)
    assert by_study.zero_shot.findings[0].num_units == 3
    assert every.retrieval["report_to_volume"].num_candidates == 6
    assert np.isnan(by_study.zero_shot.auroc("nodule"))
    assert by_study.zero_shot.groups["macro"].num_undefined == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "ct-clip", "thresholds": {"nodule": 0.5}}, "drop the given"),
        ({"thresholds": {}, "validation_samples": []}, "not both"),
        ({"unit": "scan"}, "unit must be"),
        ({"protocol": "best"}, "protocol must be"),
        ({"prompts": {}}, "at least one finding"),
        ({"prompts": {"nodule": []}}, "'nodule' has no prompts"),
        ({"samples": []}, "nothing to evaluate"),
    ],
)
def test_refusals(model, processor, settings, message):
    arguments = {"samples": make_samples(4), "prompts": PROMPTS, "num_resamples": 0, **settings}
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot(model, processor, **arguments)


def test_retrieval_needs_reports_and_can_be_left_out(model, processor):
    samples = make_samples(4)
    samples[2]["report"] = None
    with pytest.raises(ValueError, match="retrieval=False"):
        evaluate_zero_shot(model, processor, samples, PROMPTS, num_resamples=0)
    results = evaluate_zero_shot(model, processor, samples, PROMPTS, num_resamples=0, retrieval=False)
    assert results.retrieval == {}


def test_localisation_from_a_scan_with_a_mask_in_another_orientation(fused_model, processor):
    image_processor = T3DImageProcessor(spacing=(3, 3, 3), global_size=(16, 16, 16), local_size=(16, 16, 16))
    scan = np.full((48, 40, 36), -1000, dtype=np.int16)
    scan[4:44, 4:36, 4:32] = 40
    affine = np.diag([3.0, 3.0, 3.0, 1.0])  # (x, y, z)
    prepared = image_processor.prepare(scan, affine=affine)
    views = image_processor.make_views(prepared, "grid")
    lesion = np.zeros(scan.shape, dtype=bool)
    lesion[20:24, 10:14, 30:33] = True
    flipped = affine @ np.diag([-1, 1, 1, 1.0])
    flipped[0, 3] = affine[0, 0] * (scan.shape[0] - 1)
    straight = localisation_case(prepared, views, {"nodule": Volume(lesion, affine)}, "p")
    turned = localisation_case(prepared, views, {"nodule": Volume(lesion[::-1], flipped)}, "p")
    np.testing.assert_allclose(turned["boxes"]["nodule"], straight["boxes"]["nodule"])
    np.testing.assert_array_equal(turned["lesions"]["nodule"], straight["lesions"]["nodule"])
    # On the same grid, a view's box is where it was cut.
    first = views.boxes[0]
    np.testing.assert_allclose(straight["boxes"]["nodule"][0], [*first.start, *first.stop])
    summaries = evaluate_localisation(fused_model, processor, [straight, turned], PROMPTS, num_resamples=10)
    assert set(summaries) == {"all", "nodule"}
    assert summaries["all"].num_scored == 2
    assert 0 < summaries["all"].chance < 0.2
    assert summaries["all"].average_precision.low == pytest.approx(summaries["all"].average_precision.high)
    with pytest.raises(ValueError, match="no prompts for the lesion 'stone'"):
        evaluate_localisation(fused_model, processor, [{**straight, "lesions": {"stone": lesion}}], PROMPTS)
    assert boxes_from_affines([prepared.affine], (1, 1, 1), prepared.affine).tolist() == [[0, 0, 0, 1, 1, 1]]
