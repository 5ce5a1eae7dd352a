# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The complete evaluation on phantom files, the supervised classifier, and tables that compare like with like."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.phantoms import (
    EVALUATION_PROMPTS,
    FINDINGS,
    ORGANS,
    phantom_seeds,
    train_phantom_tokenizer,
    write_phantoms,
)
from modeling_t3d.data.sources import read_row
from modeling_t3d.evaluation.classification import (
    LabelledFeatures,
    evaluate_classifier,
    evaluate_probe,
    labelled_shortcuts,
)
from modeling_t3d.evaluation.encoding import embed_samples, evaluation_samples
from modeling_t3d.evaluation.localisation import mask_on_grid
from modeling_t3d.evaluation.pretraining import evaluate_pretrained, leak_batches, localisation_cases, plot_case
from modeling_t3d.evaluation.results import load_results
from modeling_t3d.evaluation.statistics import area_under_roc
from modeling_t3d.geometry_t3d import Volume
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.modeling_t3d import T3DForImageClassification
from modeling_t3d.volume_io_t3d import read_label_map, to_volume, write_nifti

GROUPS = {
    extent: [name for name, finding in FINDINGS.items() if finding.extent == extent] for extent in ("diffuse", "focal")
}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SimpleNamespace:
    """Phantom files of two splits, a processor, data sets and an untrained model."""
    folder = tmp_path_factory.mktemp("phantoms")
    seeds = [*phantom_seeds("train", 10), *phantom_seeds("test", 6)]
    manifest = read_manifest(write_phantoms(folder, seeds, masks=True, resolution=8.0))
    image_processor = T3DImageProcessor(
        spacing=(8, 8, 8), global_size=(16, 16, 16), local_size=(16, 16, 16), num_local_views=2
    )
    processor = SimpleNamespace(
        image_processor=image_processor,
        tokenizer=train_phantom_tokenizer([row.report for row in manifest.rows], vocab_size=300),
        max_report_tokens=128,
    )
    processor.tokenizer.model_max_length = 256
    torch.manual_seed(0)
    return SimpleNamespace(
        processor=processor,
        train=PretrainingDataset(manifest.split("train"), image_processor),
        test=PretrainingDataset(manifest.split("test"), image_processor),
        model=T3DForPreTraining(T3DConfig.from_preset("tiny")),
        collator=PretrainingCollator(processor),
    )


def test_everything_is_measured_and_written(study, tmp_path):
    results = evaluate_pretrained(
        study.model,
        study.processor,
        study.test,
        EVALUATION_PROMPTS,
        train=study.train,
        validation=study.train,
        collator=study.collator,
        read_row=read_row,
        read_label_map=read_label_map,
        lesion_values={name: finding.index for name, finding in FINDINGS.items()},
        organ_values=ORGANS,
        groups=GROUPS,
        leak_batch_size=3,
        num_resamples=20,
    )
    loaded = load_results(results.save(Path(tmp_path)))
    assert list(loaded["zero_shot"]["groups"]) == ["diffuse", "focal", "macro"]
    assert set(loaded["comparisons"]) == {"shortcut baseline", "linear probe"}
    assert set(loaded["retrieval"]) == {"report_to_volume", "volume_to_report"}
    assert loaded["leak"]["chance"] == pytest.approx(math.log(3 * 2 - 1), rel=0.2)
    assert loaded["study_identity"]["num_views"] == 12
    assert loaded["localisation"]["all"]["num_scored"] > 0
    assert loaded["segmentation"]["num_volumes"] + loaded["segmentation"]["num_fitted_volumes"] == 6
    assert set(loaded["segmentation"]["dice"]) == set(ORGANS)
    assert "Segmentation probe: mean Dice" in results.to_markdown()
    assert "validation" in loaded["protocol"]["threshold_source"]
    assert loaded["protocol"]["num_units"] == 6
    # Each table is scored on the same units.
    rows = results.zero_shot.findings
    for table in results.comparisons.values():
        assert [(row.finding, row.num_units, row.num_positive) for row in table.findings] == [
            (row.finding, row.num_units, row.num_positive) for row in rows
        ]
    text = results.to_markdown()
    assert "AUROC, shortcut baseline" in text
    assert "Leak control" in text


def test_only_what_is_given_is_measured(study):
    prompts = {"emphysema": EVALUATION_PROMPTS["emphysema"]}
    results = evaluate_pretrained(study.model, study.processor, study.test, prompts, num_resamples=0)
    assert results.comparisons == {}
    assert results.localisation == {}
    assert results.leak is None
    assert results.study_identity.num_studies == 6


def test_the_same_call_gives_the_same_numbers(study):
    prompts = {"emphysema": EVALUATION_PROMPTS["emphysema"]}
    settings = {"collator": study.collator, "leak_batch_size": 3, "num_resamples": 10}
    first, second = (
        evaluate_pretrained(study.model, study.processor, study.test, prompts, **settings).to_dict() for _ in range(2)
    )
    assert first == second


def test_leak_batches_are_full(study):
    batches = list(leak_batches(study.test, study.collator, 4, max_batches=8))
    assert [len(batch["pixel_values"]) for batch in batches] == [4]
    assert len(list(leak_batches(study.test, study.collator, 2, max_batches=2))) == 2


def test_lesions_of_a_label_map_lie_where_the_volume_shows_them(study):
    """The grid covers the volume, so no lesion is outside every view, and boxes tile the mask."""
    values = {name: FINDINGS[name].index for name in GROUPS["diffuse"]}
    cases = list(localisation_cases(study.test, read_label_map, values))
    assert cases
    for case in cases:
        for finding, mask in case["lesions"].items():
            boxes = case["boxes"][finding]
            places = np.argwhere(mask) + 0.5
            covered = ((places[:, None] >= boxes[:, :3] - 1e-6) & (places[:, None] <= boxes[:, 3:] + 1e-6)).all(
                axis=-1
            )
            assert covered.any(axis=1).all()


def test_a_probe_of_a_perfect_feature_is_perfect(study):
    """With the label itself as the only feature, AUROC is 1 wherever both splits hold both classes."""
    findings = list(FINDINGS)
    train, test = (labelled_shortcuts(part.rows, findings, read_row) for part in (study.train, study.test))
    both = [
        column
        for column in range(len(findings))
        if all(0 < part.labels[:, column].mean() < 1 for part in (train, test))
    ]
    assert len(both)
    for column in both:
        oracle = [
            LabelledFeatures(part.labels[:, [column]], part.labels[:, [column]], part.patient_ids, part.study_ids)
            for part in (train, test)
        ]
        table = evaluate_probe(*oracle, [findings[column]], inverse_penalty=1.0, num_resamples=0)
        assert table.auroc("macro") == 1.0


def test_classifier_table_holds_the_classifiers_own_scores(study):
    config = T3DConfig.from_preset("tiny").vision_config
    config.num_labels, config.problem_type = 2, "multi_label_classification"
    torch.manual_seed(1)
    model = T3DForImageClassification(config).train()
    findings = ["hepatic steatosis", "lung nodule"]
    table = evaluate_classifier(
        model, evaluation_samples(study.train), findings, num_resamples=0, unit="reconstruction"
    )
    assert model.training
    samples = list(evaluation_samples(study.train))
    with torch.no_grad():
        logits = model.eval()(torch.stack([sample["pixel_values"] for sample in samples])).logits
    for column, finding in enumerate(findings):
        labels = [sample["labels"][finding] for sample in samples]
        expected = area_under_roc(np.array(labels), logits[:, column].numpy())
        np.testing.assert_allclose(table.auroc(finding), expected)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_classifier(model, [], findings)


def test_samples_depend_on_the_seed_and_the_row_alone(study):
    whole = list(evaluation_samples(study.test, views=2, seed=1))
    one = next(evaluation_samples(study.test, views=2, seed=1, indices=[3]))
    assert torch.equal(one["local_pixel_values"], whole[3]["local_pixel_values"])
    other = next(evaluation_samples(study.test, views=2, seed=2, indices=[3]))
    assert not torch.equal(one["local_positions"], other["local_positions"])
    assert "local_pixel_values" not in next(evaluation_samples(study.test))


def test_patients_in_both_splits_are_refused(study):
    features = labelled_shortcuts(study.test.rows, ["emphysema"], read_row)
    with pytest.raises(ValueError, match="split by patient"):
        evaluate_probe(features, features, ["emphysema"])


def test_shortcuts_read_the_file_as_stored(study):
    """Orientation is a feature: reading must not reorient first."""
    seen: list[Volume] = []

    def read(row):
        seen.append(read_row(row))
        return seen[-1]

    features = labelled_shortcuts(study.test.rows, ["emphysema"], read)
    assert len({volume.axis_codes for volume in seen}) > 1
    assert features.features.shape[0] == len(seen) == 6


def test_shortcuts_are_those_of_the_values_that_the_data_set_prepares(tmp_path):
    """The manifest's rescale counts, and RAD-ChestCT's arrays are read."""
    scan = np.full((20, 40, 40), -1000, dtype=np.int16)
    scan[:, 8:32, 8:32] = 40
    write_nifti(to_volume(scan + 1024, spacing=(0.8, 0.8, 0.8), axes="IPL"), tmp_path / "offset.nii.gz")
    np.savez_compressed(tmp_path / "array.npz", ct=scan)
    (tmp_path / "m.csv").write_text('volume,rescale,label:nodule\noffset.nii.gz,"[1, -1024]",1\narray.npz,,0\n')
    rows = read_manifest(tmp_path / "m.csv", require_report=False).rows
    features = labelled_shortcuts(rows, ["nodule"], read_row).features
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)


def test_a_model_without_local_views_is_evaluated(study):
    """Global alignment alone cuts none: nothing is said of them, and all else is measured."""
    image_processor = T3DImageProcessor(**{**study.processor.image_processor.to_dict(), "num_local_views": 0})
    processor = SimpleNamespace(**{**vars(study.processor), "image_processor": image_processor})
    test = PretrainingDataset(study.test.rows, image_processor)
    prompts = {"emphysema": EVALUATION_PROMPTS["emphysema"]}
    results = evaluate_pretrained(study.model, processor, test, prompts, num_resamples=0)
    assert results.study_identity is None
    assert results.zero_shot.findings[0].num_units == 6
    assert set(results.retrieval) == {"report_to_volume", "volume_to_report"}


def test_embedding_a_data_set_keeps_its_order(study):
    embeddings = embed_samples(
        study.model,
        study.processor,
        evaluation_samples(study.test),
        ["emphysema"],
        batch_size=4,
        max_report_tokens=128,
    )
    assert embeddings.study_ids == tuple(row.study_id for row in study.test.rows)
    assert embeddings.text_embeds.shape == embeddings.image_embeds.shape


def test_figure_of_a_case(study, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the eval extra")
    row, prepared = study.test.rows[0], study.test.prepared(0)
    label_map = read_label_map(row.masks["lesions"])
    lesion = Volume(label_map.array > 0, label_map.affine)
    path = plot_case(study.model, study.processor, prepared, "Emphysema.", tmp_path / "a.png", lesion=lesion)
    assert path.stat().st_size > 10_000


def test_a_mask_on_the_model_grid_lies_where_the_scan_shows_it(study):
    """The lungs of the organ map, brought to the model grid, hold air; what is around them does not."""
    row, prepared = study.test.rows[1], study.test.prepared(1)
    organs = read_label_map(row.masks["organs"])
    lungs = [value for name, value in ORGANS.items() if "lung" in name]
    mask = mask_on_grid(Volume(np.isin(organs.array, lungs), organs.affine), prepared.affine, prepared.array.shape)
    assert mask.any()
    assert np.median(prepared.array[mask]) < -600
    assert prepared.array[mask].mean() < prepared.array[np.roll(mask, 6, axis=1) & ~mask].mean() - 200
