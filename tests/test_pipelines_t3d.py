# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The zero-shot pipeline: every kind of input, the scores' definition, bounded memory, errors that name the item."""

import logging
import re
import runpy
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from model_inputs import tiny_config
from testing_utils import shared_data
from tiny_checkpoint import storage_order, tiny_processor, tiny_scan, tiny_volume
from transformers import pipeline
from transformers.utils.logging import warning_once

from modeling_t3d import (
    T3DConfig,
    T3DForImageClassification,
    T3DForPreTraining,
    T3DModel,
    VolumeError,
    VolumeReadError,
    ZeroShotVolumeClassificationPipeline,
)

TASK = "zero-shot-volume-classification"
LABELS = ["pleural effusion", "lung nodule", "emphysema"]
ROOT = Path(__file__).resolve().parents[1]


def make_model(fusion="global", model_class=T3DModel, **fields):
    torch.manual_seed(0)
    model = model_class(T3DConfig.from_preset("tiny", view_fusion=fusion, **fields)).eval()
    # Far from its initial symmetry, so that labels, volumes and views move the scores by more than rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_pipeline(fusion="global", **fields):
    return pipeline(TASK, model=make_model(fusion, **fields), processor=tiny_processor(), device="cpu")


def by_label(result):
    return {entry["label"]: entry["score"] for entry in result}


@pytest.fixture(scope="module")
def classifier():
    return make_pipeline()


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return tiny_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="module")
def other_scan(tmp_path_factory):
    return tiny_scan(tmp_path_factory.mktemp("scan"), seed=1, shape=(44, 28, 32))


def test_pipeline_loads_a_saved_folder(tmp_path, scan):
    model = make_model("mean", T3DForPreTraining)
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert isinstance(loaded, ZeroShotVolumeClassificationPipeline)
    loading = {"use_safetensors": True, "max_memory": {"cpu": "8GiB"}}
    pipeline(TASK, model=str(tmp_path), device="cpu", model_kwargs=loading)
    direct = pipeline(TASK, model=model, processor=tiny_processor(), device="cpu")
    # Some CPUs round products by address: copies lie as new weights do, loaded ones where the file has them.
    loaded.model._apply(torch.clone)
    assert loaded(scan, LABELS) == direct(scan, LABELS)


def test_scores_are_sorted_and_one_per_label(classifier, scan):
    result = classifier(str(scan), candidate_labels=LABELS)
    assert {entry["label"] for entry in result} == set(LABELS)
    scores = [entry["score"] for entry in result]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(LABELS)
    assert all(0 < score < 1 for score in scores)


@pytest.mark.parametrize("objective", [{}, {"contrastive_loss": "sigmoid"}, {"learnable_temperature": True}])
def test_multi_label_compares_present_with_absent(objective, scan):
    classifier = make_pipeline(**objective)
    processor, model = classifier.processor, classifier.model
    prompts = [f"{label} is present." for label in LABELS] + [f"{label} is not present." for label in LABELS]
    with torch.no_grad():
        logits = model(**processor(images=scan, text=prompts)).logits_per_image[0]
    scores = by_label(classifier(scan, LABELS))
    expected = (logits[:3] - logits[3:]).sigmoid()
    assert [scores[label] for label in LABELS] == pytest.approx(expected.tolist(), rel=1e-5)


def test_single_label_is_a_softmax_over_labels(classifier, scan):
    prompts = [f"scan shows {label}" for label in LABELS]
    with torch.no_grad():
        logits = classifier.model(**classifier.processor(images=scan, text=prompts)).logits_per_image[0]
    scores = by_label(classifier(scan, LABELS, hypothesis_template="scan shows {}", multi_label=False))
    assert [scores[label] for label in LABELS] == pytest.approx(logits.softmax(0).tolist(), rel=1e-5)


def test_templates(classifier, scan):
    pair = classifier(scan, LABELS, hypothesis_template=("scan shows {}.", "scan shows no {}."))
    single = classifier(scan, LABELS, hypothesis_template="scan shows {}.")
    assert pair != single
    assert single == classifier(scan, LABELS, hypothesis_template=("scan shows {}.", "{} is not present."))
    assert classifier(scan, LABELS) == classifier(
        scan, LABELS, hypothesis_template=("{} is present.", "{} is not present.")
    )
    with pytest.raises(ValueError, match=r"'scan shows' must hold \{\} exactly once"):
        classifier(scan, LABELS, hypothesis_template="scan shows")
    with pytest.raises(ValueError, match="pair"):
        classifier(scan, LABELS, hypothesis_template=("{}", "no {}", "maybe {}"))


def test_prompts_carry_the_processors_descriptions(scan):
    model, processor = make_model(), tiny_processor()
    processor.finding_descriptions = {"Emphysema": "nodule"}
    explained = by_label(pipeline(TASK, model=model, processor=processor, device="cpu")(scan, LABELS))
    plain = pipeline(TASK, model=model, processor=tiny_processor(), device="cpu")
    asked = by_label(plain(scan, [*LABELS[:2], "emphysema (nodule)"]))
    assert [explained[label] for label in LABELS] == pytest.approx(
        list(map(asked.get, [*LABELS[:2], "emphysema (nodule)"]))
    )
    assert explained["emphysema"] != by_label(plain(scan, LABELS))["emphysema"]


def test_options_at_construction_are_defaults(scan):
    model, processor = make_model(), tiny_processor()
    given = {"candidate_labels": LABELS, "multi_label": False, "hypothesis_template": "scan shows {}"}
    fixed = pipeline(TASK, model=model, processor=processor, device="cpu", **given)
    free = pipeline(TASK, model=model, processor=processor, device="cpu")
    assert fixed(scan) == free(scan, **given)
    assert fixed(scan, ["lung nodule"], multi_label=True) == free(
        scan, ["lung nodule"], hypothesis_template="scan shows {}"
    )


@pytest.mark.parametrize("empty", [[], "", (), None])
def test_no_labels_is_an_error(classifier, scan, empty):
    with pytest.raises(ValueError, match=r"candidate_labels is (empty|missing): pass the names"):
        classifier(scan, candidate_labels=empty)


@pytest.mark.parametrize("labels", [["emphysema", " "], "emphysema,,nodule", ["emphysema", 3]])
def test_a_label_that_is_no_name_is_an_error(classifier, scan, labels):
    with pytest.raises(ValueError, match="which is no name"):
        classifier(scan, candidate_labels=labels)
    with pytest.raises(ValueError, match="is 3, which is no list"):
        classifier(scan, candidate_labels=3)


def test_a_string_of_labels_is_split_on_commas(classifier, scan):
    assert classifier(scan, "pleural effusion, lung nodule") == classifier(scan, ["pleural effusion", "lung nodule"])


def test_a_label_too_long_for_the_text_tower_is_an_error(classifier, scan):
    with pytest.raises(ValueError, match="at most 32 fit"):
        classifier(scan, ["lung nodule " * 20])


def test_unknown_option_is_an_error(classifier, scan):
    with pytest.raises(TypeError, match="hypothesis_templates"):
        classifier(scan, LABELS, hypothesis_templates="{}")


def test_all_ways_to_give_a_volume_agree(classifier, scan):
    expected = classifier(str(scan), LABELS)
    volume = tiny_volume()
    array, affine = storage_order(volume)
    assert classifier(scan, LABELS) == expected
    assert classifier(volume, LABELS) == expected
    assert classifier(nibabel.load(scan), LABELS) == expected
    assert classifier(volume.array, LABELS, affine=volume.affine) == expected
    assert classifier(array, LABELS, affine=affine) == expected
    assert classifier(torch.from_numpy(np.ascontiguousarray(array)), LABELS, affine=affine) == expected
    assert classifier({"volume": array, "affine": affine}, LABELS) == expected


@pytest.mark.parametrize("fusion", ["global", "attention"])
def test_batches_equal_single_calls(fusion, scan, other_scan):
    classifier = make_pipeline(fusion)
    singles = [classifier(path, LABELS) for path in (scan, other_scan)]
    assert by_label(singles[0]) != pytest.approx(by_label(singles[1]), rel=1e-4)
    assert classifier([scan, other_scan], LABELS) == singles
    assert list(classifier((path for path in (scan, other_scan)), candidate_labels=LABELS)) == singles
    # One batch holds grids of different sizes: empty views change nothing.
    for batched, single in zip(classifier([scan, other_scan], LABELS, batch_size=2), singles, strict=True):
        assert by_label(batched) == pytest.approx(by_label(single), rel=1e-5)


def test_images_of_torchio_are_volumes_though_they_are_dictionaries(classifier, scan):
    torchio = pytest.importorskip("torchio")
    image = torchio.ScalarImage(scan)
    expected = classifier(scan, LABELS)
    assert classifier(image, LABELS) == expected
    assert classifier([image], LABELS) == [expected]
    with pytest.raises(ValueError, match=r"a dictionary needs the key 'volume', .* it has 'image'"):
        classifier({"image": str(scan)}, LABELS)
    with pytest.raises(TypeError, match="a volume's dictionary has no key 'serie'; did you mean 'series'"):
        classifier({"volume": str(scan), "serie": 1}, LABELS)


def test_list_of_arrays_takes_affines(classifier):
    volumes = [tiny_volume(0), tiny_volume(1)]
    arrays, affines = [volume.array for volume in volumes], [volume.affine for volume in volumes]
    expected = [classifier(volume, LABELS) for volume in volumes]
    assert classifier(arrays, LABELS, affine=affines) == expected
    assert classifier(tuple(arrays), LABELS, affine=affines[0]) == expected
    assert classifier([], LABELS) == []
    assert classifier([arrays[0], volumes[1]], LABELS, affine=[affines[0], None]) == expected
    with pytest.raises(ValueError, match="affine has 1 entries for 2 volumes"):
        classifier(arrays, LABELS, affine=affines[:1])


def test_series_and_time_are_chosen_per_volume_or_for_all(classifier, tmp_path):
    volumes = [tiny_volume(0), tiny_volume(1)]
    values = np.stack([volume.array for volume in volumes], axis=-1)
    path = tmp_path / "four.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0, 3), volumes[0].affine @ np.eye(4)[[2, 1, 0, 3]]), path)
    expected = [classifier(volume, LABELS) for volume in volumes]
    assert classifier(path, LABELS, time_index=1) == expected[1]
    assert classifier([path, path], LABELS, time_index=[1, 0]) == expected[::-1]
    assert classifier([path, path], LABELS, time_index=1) == [expected[1]] * 2
    assert classifier([{"volume": path, "time_index": 1}], LABELS) == expected[1:]
    with pytest.raises(VolumeReadError, match=r"choose one with time_index=0..1"):
        classifier(path, LABELS)
    with pytest.raises(VolumeReadError, match="series= is for DICOM"):
        classifier(path, LABELS, series=0)


def test_labels_are_embedded_once_per_call(scan, other_scan):
    classifier = make_pipeline()
    calls = []
    classifier.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    classifier([scan, other_scan], LABELS)
    assert len(calls) == 1


@pytest.mark.parametrize("fusion", ["mean", "attention"])
def test_view_batch_size_bounds_the_views_at_once_and_changes_nothing_else(fusion, scan):
    classifier = make_pipeline(fusion)
    batch_sizes = []
    classifier.model.vision_model.register_forward_hook(lambda _, args, __: batch_sizes.append(len(args[0])))
    inputs = classifier.processor(images=scan, text=[f"{LABELS[0]} is present."], views="grid")
    num_tiles = int(inputs["local_mask"].sum())
    assert num_tiles == 8
    with torch.no_grad():
        whole = classifier.model(**inputs).logits_per_image
    batch_sizes.clear()
    results = {}
    for size in (1, 3, num_tiles):
        results[size] = by_label(classifier(scan, LABELS, view_batch_size=size))
        assert max(batch_sizes) == size
        assert sum(batch_sizes) == 1 + num_tiles
        batch_sizes.clear()
    assert results[1] == pytest.approx(results[num_tiles], abs=1e-6)
    assert results[3] == pytest.approx(results[num_tiles], abs=1e-6)
    single = classifier.preprocess(scan)
    text_embeds = classifier._embed_prompts([f"{LABELS[0]} is present."])
    logits = classifier.forward(single, text_embeds=text_embeds, view_batch_size=3)["logits"]
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="view_batch_size must be at least 1"):
        classifier(scan, LABELS, view_batch_size=0)


def test_views_default_to_what_the_fusion_reads(scan):
    assert set(make_pipeline("global").preprocess(scan)) == {"pixel_values"}
    classifier = make_pipeline("mean")
    assert len(classifier.preprocess(scan)["local_views"].boxes) == 8
    assert len(classifier.preprocess(scan, views=2)["local_views"].boxes) == 2
    assert classifier(scan, LABELS, views=2) == classifier(scan, LABELS, views=2)
    assert classifier(scan, LABELS, views=2) != classifier(scan, LABELS, views=2, seed=1)
    with pytest.raises(ValueError, match="views"):
        classifier(scan, LABELS, views="all")


def test_views_that_the_fusion_ignores_are_said(classifier, scan, caplog):
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="modeling_t3d"):
        assert classifier(scan, LABELS, views="grid") == classifier(scan, LABELS)
    assert "is not used: view_fusion='global'" in caplog.text
    with pytest.raises(ValueError, match="got 'gird'"):
        classifier(scan, LABELS, views="gird")


def test_dtype_follows_the_pipeline(tmp_path, scan):
    make_model("attention").save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    full = pipeline(TASK, model=str(tmp_path), device="cpu")
    half = pipeline(TASK, model=str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert half.model.vision_model.dtype == torch.bfloat16
    assert by_label(half(scan, LABELS)) == pytest.approx(by_label(full(scan, LABELS)), abs=0.1)


def test_a_model_in_training_mode_is_set_to_evaluate(scan):
    model = make_model(text_config={"hidden_dropout_prob": 0.5}).train()
    classifier = pipeline(TASK, model=model, processor=tiny_processor(), device="cpu")
    assert classifier(scan, LABELS) == classifier(scan, LABELS)


@pytest.mark.parametrize(
    ("training_data", "times"), [("phantoms", 1), (["phantoms 1.0"], 1), (["CT-RATE", "phantoms"], 0), (None, 0)]
)
def test_phantoms_alone_are_said_once_per_process(training_data, times, scan, caplog):
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="modeling_t3d"):
        classifiers = [make_pipeline(provenance={"training_data": training_data}) for _ in range(2)]
        assert "phantoms" not in caplog.text, "said before the model is used"
        for classifier in classifiers:
            classifier(scan, LABELS)
            classifier([scan, scan], LABELS)
    assert caplog.text.count("trained on phantoms alone; its scores on real scans mean nothing") == times
    assert caplog.text.count("not a medical device") == times


def test_unreadable_path_is_named_as_given(classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(VolumeReadError, match=r"^broken\.nii\.gz"):
        classifier("broken.nii.gz", LABELS)
    with pytest.raises(VolumeError, match=r"missing\.nii\.gz"):
        classifier("missing.nii.gz", LABELS)


def test_a_bad_array_in_a_batch_is_named_by_its_place(classifier):
    good, bad = tiny_volume(0), tiny_volume(1)
    array = bad.array.astype(np.float32)
    array[3, 4, 5] = np.nan
    with pytest.raises(VolumeError, match="volume 1"):
        classifier([good.array, array], LABELS, affine=good.affine)


REAL_SCANS = [
    "lidc_idri_0314_chest/ct_4mm.nii.gz",
    "totalsegmentator_abdomen/ct.nii.gz",
    "totalsegmentator_dicom_j2k/series",
    "metaimage/lidc_idri_0003_slab.mha",
]


@pytest.mark.parametrize("name", REAL_SCANS)
def test_real_scans(name):
    classifier = make_pipeline("mean")
    result = classifier(str(shared_data(name)), LABELS, view_batch_size=4)
    assert {entry["label"] for entry in result} == set(LABELS)
    assert all(0 < entry["score"] < 1 for entry in result)


def test_real_scans_as_a_batch():
    classifier = make_pipeline()
    paths = [shared_data(name) for name in REAL_SCANS[1::2]]
    assert classifier(paths, LABELS) == [classifier(path, LABELS) for path in paths]


def test_example_prints_a_table(tmp_path, scan, monkeypatch, capsys):
    make_model("mean").save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    script = str(ROOT / "examples" / "zero_shot_classification.py")
    options = ["--labels", *LABELS[:2], "--views", "grid", "--device", "cpu"]
    for scoring in ([], ["--multi-label"], ["--softmax"]):
        volumes = [str(tmp_path / "none.nii.gz"), str(scan)] if scoring else [str(scan)]
        monkeypatch.setattr(sys, "argv", [script, "--model", str(tmp_path), "--volume", *volumes, *options, *scoring])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        assert ended.value.code == len(volumes) - 1
        table, errors = capsys.readouterr()
        assert str(scan) in table
        assert ("none.nii.gz: no such file" in errors) == (len(volumes) == 2)
        scores = [float(line.split()[-1]) for line in table.splitlines() if line.strip().startswith(tuple(LABELS))]
        assert len(scores) == 2
        assert (sum(scores) == pytest.approx(1, abs=2e-3)) == (scoring == ["--softmax"])


def test_example_takes_the_wording_of_prompts(tmp_path, scan, monkeypatch, capsys):
    make_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    classifier = pipeline("zero-shot-volume-classification", model=str(tmp_path), device="cpu")
    script = str(ROOT / "examples" / "zero_shot_classification.py")
    plain = ["--model", str(tmp_path), "--volume", str(scan), "--labels", *LABELS[:2], "--device", "cpu"]
    printed = []
    for templates in ([], ["scan shows {}"], ["scan shows {}", "absent {}"]):
        given = ["--hypothesis-template", *templates] if templates else []
        monkeypatch.setattr(sys, "argv", [script, *plain, *given])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(script, run_name="__main__")
        printed.append(capsys.readouterr().out)
        options = {1: {"hypothesis_template": "scan shows {}"}, 2: {"hypothesis_template": templates}}
        for entry in classifier(str(scan), LABELS[:2], **options.get(len(templates), {})):
            assert re.search(rf"{entry['label']} +{entry['score']:.3f}\n", printed[-1])
    assert len(set(printed)) == 3


def test_example_ends_with_one_line_for_what_cannot_be_right(tmp_path, scan, monkeypatch):
    model, run, other = tmp_path / "run" / "model", tmp_path / "run", tmp_path / "classifier"
    make_model().save_pretrained(model)
    tiny_processor().save_pretrained(model)
    T3DForImageClassification(tiny_config().vision_config).save_pretrained(other)
    for options, message in (
        (["--model", run], f"no config.json in it; did you mean {model}?"),
        (["--model", tmp_path], "no config.json in it"),
        (["--model", other], "knows no texts"),
        (["--model", tmp_path / "none"], "neither a folder with a checkpoint"),
        (["--model", model, "--labels", ""], "candidate_labels is empty"),
        (["--model", model, "--view-batch-size", "0"], "view_batch_size"),
        (["--model", model, "--hypothesis-template", "shows"], "'shows' must hold {} exactly once"),
        (["--model", model, "--device", "cuda:0"], "finds no CUDA device"),
    ):
        if "--device" in options and torch.cuda.is_available():
            continue
        given = ["--volume", scan, *options, *([] if "--labels" in options else ["--labels", "nodule"])]
        script = str(ROOT / "examples" / "zero_shot_classification.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, given)])
        with pytest.raises(SystemExit, match=re.escape(message)):
            runpy.run_path(script, run_name="__main__")
