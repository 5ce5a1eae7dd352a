# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The named objectives through the pre-training script, from their own configuration files; contradictions refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DImageProcessor, T3DProcessor
from modeling_t3d.data.caption_masks import MaskCaptioner, read_label_names
from modeling_t3d.data.captions import write_captions
from modeling_t3d.data.collators import changing_collator, objective_collator
from modeling_t3d.data.phantom_files import write_phantoms
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.data.phantom_studies import phantom_seeds
from modeling_t3d.presets_t3d import NUM_LOCAL_VIEWS, OBJECTIVES
from modeling_t3d.training.arguments import ConfigurationError, load_configuration

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
VISION = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_norm_groups": 4, "num_channels": 2}


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain", EXAMPLES / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> dict[str, Path]:
    """Phantoms with reports, and the same with captions of their masks instead."""
    folder = tmp_path_factory.mktemp("phantoms")
    seeds = [*phantom_seeds("train", 5), *phantom_seeds("validation", 2)]
    reports = write_phantoms(folder, seeds, compress=False, resolution=8.0, masks=True)
    source = MaskCaptioner(read_label_names(EXAMPLES / "label_names" / "phantoms.json"), described=["lesions"])
    write_captions(reports, folder / "captions.csv", source, overwrite=True)
    return {"v1": reports, "gtgm": folder / "captions.csv"}


def settings_for(objective: str, manifest: Path, output: Path, *overrides: str):
    """An objective's own configuration, made tiny."""
    return load_configuration(
        EXAMPLES / "configs" / f"{objective}.yaml",
        [
            f"data.manifest={manifest}",
            "data.num_preparation_workers=0",
            "image_processor.spacing=[8, 8, 8]",
            "image_processor.global_size=[8, 8, 8]",
            "image_processor.local_size=[16, 16, 16]",
            f"model.overrides.vision_config={json.dumps(VISION)}",
            f"training.output_dir={output}",
            "training.per_device_train_batch_size=2",
            "training.max_steps=2",
            "training.logging_steps=1",
            "training.use_cpu=true",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    ("objective", "terms"),
    [("v1", {"loss_tma", "loss_tir", "loss_tir_corrupted"}), ("gtgm", {"loss_gca", "loss_tma"})],
)
def test_an_objective_trains_from_its_own_configuration(pretrain, manifests, tmp_path, objective, terms):
    settings = settings_for(objective, manifests[objective], tmp_path / "run")
    assert settings.image_processor["num_local_views"] == NUM_LOCAL_VIEWS[objective]
    assert pretrain.train(settings, resume=False) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for entry in log:
        logged = {name for name in entry if name.startswith("loss_")}
        # Validation adds the controls: views or reports that are shuffled.
        controls = {f"{name}_shuffled" for name in terms} if entry["kind"] == "validation" else set()
        assert terms <= logged <= terms | controls, entry["kind"]
        if "loss_tir" in terms and controls:
            assert "loss_tir_shuffled" in logged
        assert all(torch.isfinite(torch.tensor(entry[name])) for name in logged)
    assert {entry["kind"] for entry in log} == {"train", "validation"}
    config = T3DConfig.from_pretrained(tmp_path / "run" / "model")
    assert {name: getattr(config, name) for name in OBJECTIVES[objective]} == OBJECTIVES[objective]
    assert T3DForPreTraining.from_pretrained(tmp_path / "run" / "model").config.tma_query == config.tma_query


@pytest.mark.parametrize(
    ("objective", "overrides"),
    [("v1", []), ("gtgm", []), ("v1", ["model.objective=v3", "data.augmentation={flip: 0.5}"])],
    ids=["v1", "gtgm", "v3 with augmentation"],
)
def test_an_objective_is_planned_and_nothing_is_written(pretrain, manifests, tmp_path, capsys, objective, overrides):
    original = manifests[objective]
    folder = shutil.copytree(original.parent, tmp_path / "data", ignore=shutil.ignore_patterns("prepared"))
    before = sorted(tmp_path.rglob("*"))
    options = ("data.keep_global_views=true", *overrides)
    settings = settings_for(objective, folder / original.name, tmp_path / "run", *options)
    assert pretrain.train(settings, resume=False, dry_run=True) == 0
    assert "peak of tensors" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_and_descriptions_reach_training_and_prompts(pretrain, manifests, tmp_path):
    descriptions = EXAMPLES / "finding_descriptions" / "ct.json"
    settings = settings_for(
        "v1",
        manifests["v1"],
        tmp_path / "run",
        "data.texts={sample_sentences: true, description_probability: 1.0}",
        f"data.finding_descriptions={descriptions}",
    )
    assert pretrain.train(settings, resume=False) == 0
    processor = T3DProcessor.from_pretrained(tmp_path / "run" / "model")
    assert processor.make_prompts(["ascites"])[0] == ["ascites (free fluid in the abdominal cavity) is present."]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crop_perturbation={}", "data.augmentation={flip: 0.5}"], "both change and flip the views; set one"),
        (["data.texts={description_probability: 0.5}"], r"name a file in data\.finding_descriptions"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(manifests, tmp_path, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        settings_for("v1", manifests["v1"], tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image_processor.num_local_views=1"], "needs at least 2 views of a volume"),
        (["model.overrides.tir_block_size=16"], "tir_block_size=16 covers a whole local view"),
        (
            ["model.overrides.tma_loss=swav", "model.overrides.num_prototypes=5"],
            "smallest training batch has 2 pairs of 2 views",
        ),
        (
            [
                "model.overrides.tma_loss=swav",
                "model.overrides.num_prototypes=5",
                "training.gradient_accumulation_steps=2",
                "training.gradient_caching=true",
                "model.overrides.projection_norm=layer",
            ],
            "a validation batch has 2 pairs of 2 views",
        ),
        (["model.objective=v9"], "unknown objective 'v9'"),
        (["data.crop_perturbation={kinds: [swirl]}"], "crop_perturbation.kinds must be some of"),
    ],
)
def test_what_could_only_fail_is_refused_before_the_first_step(pretrain, manifests, tmp_path, overrides, message):
    settings = settings_for("v1", manifests["v1"], tmp_path / "run", *overrides)
    with pytest.raises(ValueError, match=message):
        pretrain.train(settings, resume=False)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_volumes_without_text_are_refused_with_the_way_to_captions(pretrain, manifests, tmp_path):
    lines = manifests["gtgm"].read_text().splitlines()
    bare = manifests["gtgm"].parent / "bare.csv"
    bare.write_text("\n".join(line.split(",")[0] for line in lines) + "\n")
    with pytest.raises(ValueError, match=r"no text .*examples/generate_captions\.py"):
        pretrain.train(settings_for("gtgm", bare, tmp_path, "data.validation_split=null"), resume=False)


def test_collators_hold_what_the_terms_read():
    processor = T3DProcessor(
        T3DImageProcessor(local_size=(32, 32, 32), num_local_views=2), train_phantom_tokenizer(["No effusion."], 100)
    )
    read = {}
    for objective in (*OBJECTIVES, None):
        config = T3DConfig.from_preset("tiny", objective)
        collator = objective_collator(config, processor)
        read[objective] = (collator.num_local_views, collator.global_views, collator.corruption_seeds)
    assert read == {"v3": (2, True, False), "v1": (2, False, True), "gtgm": (2, False, False), None: (2, True, False)}
    alone = objective_collator(T3DConfig.from_preset("tiny", lambda_tma=0), processor)
    assert (alone.num_local_views, alone.global_views) == (0, True)
    assert changing_collator(alone) == (alone, None)
    with pytest.raises(ValueError, match="augmentation and crop_perturbation both change"):
        changing_collator(alone, augmentation={"flip": 1.0}, crop_perturbation={})
