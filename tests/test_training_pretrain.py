# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The pre-training script from manifest to a folder that reloads: on a few phantoms, and on real CTs."""

import csv
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from testing_utils import shared_data
from training_runs import assert_same_weights, log_of, wait_until
from transformers import AutoModelForPreTraining, AutoProcessor, BertConfig, BertModel

from modeling_t3d import T3DConfig, T3DImageProcessor, T3DModel, T3DVisionModel
from modeling_t3d.data.manifest import ManifestError
from modeling_t3d.data.phantom_files import write_phantoms
from modeling_t3d.data.phantom_findings import FINDINGS
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.data.phantom_studies import phantom_seeds
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.training.arguments import ConfigurationError, ModelArguments, load_configuration
from modeling_t3d.training.checkpoints import CheckpointError, list_checkpoints, read_state
from modeling_t3d.training.files import hash_file

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "configs" / "quickstart.yaml"
CTS = (
    "totalsegmentator_abdomen/ct.nii.gz",
    "totalsegmentator_abdomen/ct_small.nii.gz",
    "lidc_idri_0314_chest/ct_4mm.nii.gz",
    "metaimage/lidc_idri_0003_slab.mha",
    "totalsegmentator_dicom_j2k/series",
)
VISION = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_norm_groups": 4, "stem_stride": 2}


@pytest.fixture(scope="module")
def pretrain():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "examples" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    seeds = [*phantom_seeds("train", 6), *phantom_seeds("validation", 3)]
    return write_phantoms(folder, seeds, compress=False, resolution=8.0)


def settings_for(manifest: Path, output_dir: Path, *overrides: str):
    """The quickstart's settings, made tiny."""
    return load_configuration(QUICKSTART, settings_overrides(manifest, output_dir, *overrides))


def settings_overrides(manifest: Path, output_dir: Path, *overrides: str) -> list[str]:
    return [
        f"data.manifest={manifest}",
        "data.num_preparation_workers=0",
        "data.validation_split=null",
        "image_processor={spacing: [8, 8, 8], global_size: [16, 16, 16], local_size: [8, 8, 8], num_local_views: 2}",
        f"model.overrides={json.dumps({'vision_config': VISION})}",
        f"training.output_dir={output_dir}",
        "training.per_device_train_batch_size=2",
        "training.max_steps=3",
        "training.save_steps=2",
        "training.use_cpu=true",
        *overrides,
    ]


def test_phantoms_train_and_the_card_is_filled(pretrain, phantoms, tmp_path):
    settings = settings_for(
        phantoms, tmp_path / "run", "data.validation_split=validation", "data.num_sentence_texts=2"
    )
    assert pretrain.train(settings, resume=False) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "loss_gca", "loss_tma", "num_valid_anchors", "num_skipped_pairs"} < log[0].keys()
    assert log[-1]["kind"] == "validation"
    assert 0 <= log[-1]["macro_auroc"] <= 1
    assert 0 < log[-1]["loss_tma_shuffled"] < 10  # the leak control, whose ratio a few steps leave undefined
    folder = tmp_path / "run" / "model"
    config = T3DConfig.from_pretrained(folder)
    assert config.provenance["training_data"] == ["phantoms: synthetic thorax-abdomen CT phantoms"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    for text in (
        "license: apache-2.0",
        "synthetic-data",
        "Trained on synthetic phantoms alone",
        "Not a medical device",
    ):
        assert text in card
    for text in (
        "split 'train': 6 volumes",
        "0 of 6 training reports",
        "8 x 8 x 8 mm",
        "| macro_auroc |",
        "from scratch",
    ):
        assert text in card
    for text in (
        "Metrics of split 'validation': 3 volumes of 3 studies and 3 patients",
        f"over those of {len(FINDINGS)} findings",
        f'{len(FINDINGS)} pairs of prompts: "{{}} is present." against "{{}} is not present."',
        "batches of at most 2 pairs per process",
        "Measured after step 3 of 3.",
    ):
        assert text in card
    assert "datasets:" not in card  # whose entries are data sets of the Hub
    assert "{{" not in card
    early, last = ((step / "README.md").read_text() for step in list_checkpoints(tmp_path / "run"))
    assert last == card
    assert "2 optimiser steps, 4 volume-report pairs" in early
    assert "No validation was run before these weights were saved." in early
    assert str(tmp_path) not in card
    assert str(phantoms.parent) not in card


def test_overrides_stand_before_between_and_after_options(pretrain):
    options = (["--config", "c.yaml"], ["--profile", "--max-hours", "2"])
    words = ["data.manifest=a.csv", *options[0], "training.max_steps=7", *options[1], "training.seed=1"]
    parsed = pretrain.parse_arguments(words)
    assert (parsed.config, parsed.profile, parsed.dry_run) == ("c.yaml", True, False)
    overrides = ["data.manifest=a.csv", "training.max_steps=7", "training.seed=1", "training.max_hours=2.0"]
    assert parsed.overrides == overrides


def test_the_plan_needs_no_volume_and_the_profile_no_checkpoint(pretrain, phantoms, tmp_path, capsys):
    settings = settings_for(phantoms, tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}")
    assert pretrain.train(settings, resume=False, dry_run=True) == 0
    plan = capsys.readouterr().out
    assert "parameters of the vision tower" in plan
    assert "fits" in plan
    assert not list(tmp_path.rglob("*.t3d"))
    with pytest.raises(ConfigurationError, match="a profile takes 7 steps, 2 of them to warm up, and the run has 3"):
        pretrain.train(settings, resume=False, profile=True)
    assert not (tmp_path / "run" / "profile").exists()
    settings.training.max_steps = 7
    assert pretrain.train(settings, resume=False, profile=True) == 0
    assert "| backward |" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == ["table.md", "trace.json"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_store_and_augmentation(pretrain, phantoms, tmp_path):
    """Volumes from an address, views changed on the device, reports with their sides; validation sees neither."""
    store = VolumeStore.create("memory://pretrain", T3DImageProcessor(spacing=(8, 8, 8)))
    settings = settings_for(
        phantoms,
        tmp_path / "run",
        "data.validation_split=validation",
        "data.store=memory://pretrain",
        "data.augmentation={probability: 1.0, flip: 1.0}",
    )
    assert pretrain.train(settings, resume=False) == 0
    assert len(store) == 9
    plain = settings_for(phantoms, tmp_path / "plain", "data.store=memory://pretrain")
    assert pretrain.train(plain, resume=False) == 0
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[0] for name in ("run", "plain")]
    losses = [json.loads(log)["loss"] for log in logs]
    assert losses[0] != losses[1], "the changed views reached the model"
    with pytest.raises(ValueError, match=r"augmentation\.noise must be 0 or more"):
        pretrain.train(settings_for(phantoms, tmp_path / "bad", "data.augmentation={noise: -1}"), resume=False)


def test_a_run_is_not_resumed_with_batches_that_are_made_otherwise(pretrain, phantoms, tmp_path):
    assert pretrain.train(settings_for(phantoms, tmp_path, "training.max_steps=2"), resume=False) == 0
    for override, message in (
        ("data.max_report_tokens=16", "batches.max_report_tokens=.*, this one has 16"),
        ("data.augmentation={flip: 1.0}", "batches.augmentation=None, this one has"),
        ("data.crop_perturbation={}", "batches.crop_perturbation=None, this one has"),
        ("data.texts={sample_sentences: true}", "batches.texts=None, this one has"),
        ("model.tokenizer_vocab_size=200", "batches.tokenizer=|model.*vocab_size="),
        ("training.ema_decay=0.9", "ema_decay=None, this one has 0.9"),
    ):
        with pytest.raises(CheckpointError, match=f"the run had {message}"):
            pretrain.train(settings_for(phantoms, tmp_path, override), resume=True)
    assert pretrain.train(settings_for(phantoms, tmp_path), resume=True) == 0


@pytest.mark.parametrize("study_sampling", ["together", "one"])
def test_a_stream_stops_in_an_epoch_and_goes_on(pretrain, phantoms, tmp_path, study_sampling):
    """Two steps and, from their checkpoint, two more are the four of one run; steps three and four end an epoch."""
    rows = list(csv.DictReader(phantoms.read_text().splitlines()))
    for split in ("train", "validation"):
        for number, row in enumerate(row for row in rows if row["split"] == split):
            row["patient_id"] = row["study_id"] = f"{split} {number // 2}"
    manifest = phantoms.with_name(f"{study_sampling}.csv")
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    stream = ("data.streaming=true", f"data.study_sampling={study_sampling}", "training.logging_steps=1")
    whole = settings_for(manifest, tmp_path / "whole", *stream, "training.num_train_epochs=2", "training.max_steps=4")
    assert pretrain.train(whole, resume=False) == 0
    parts = settings_for(manifest, tmp_path / "parts", *stream, "training.max_steps=4", "training.save_steps=1")

    class Stop(Exception):
        pass

    class StoppingTrainer(pretrain.T3DTrainer):
        def _step(self, micro_batches):
            if self.state.step == 2:
                raise Stop
            return super()._step(micro_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "T3DTrainer", StoppingTrainer)
        with pytest.raises(Stop):
            pretrain.train(parts, resume=False)
    state = read_state(tmp_path / "parts/checkpoints/step-00000002")
    assert state["run"]["order"] == {"shuffle": True, "study_sampling": study_sampling}
    per_epoch = 1 if study_sampling == "one" else 3  # batches of two, from three studies or six volumes
    assert [state["trainer"]["epoch"], state["trainer"]["next_batch"]] == ([1, 1] if per_epoch == 1 else [0, 2])
    other = settings_for(manifest, tmp_path / "parts", "training.max_steps=4")
    with pytest.raises(CheckpointError, match="the run had order="):
        pretrain.train(other, resume=True)
    parts.training.dataloader_num_workers = 1
    assert pretrain.train(parts, resume=True) == 0
    losses = []
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses.append([(line["step"], line["loss"]) for line in lines if line["kind"] == "train"])
    assert losses[0] == losses[1]
    with pytest.raises(ConfigurationError, match=r"set data\.streaming: true"):
        settings_for(manifest, tmp_path, "data.study_sampling=one")


def test_pretrained_towers_are_where_the_run_starts(pretrain, phantoms, tmp_path):
    config = T3DConfig.from_preset("tiny", vision_config=VISION)
    config.vision_config.provenance = {"license": "cc-by-nc-sa-4.0"}
    T3DVisionModel(config.vision_config).save_pretrained(tmp_path / "vision")
    first = settings_for(phantoms, tmp_path / "first", "training.max_steps=1")
    assert pretrain.train(first, resume=False) == 0
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "first" / "model").tokenizer
    text = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    settings = settings_for(
        phantoms,
        tmp_path / "run",
        f"model.vision_model_name_or_path={tmp_path / 'vision'}",
        f"model.text_model_name_or_path={tmp_path / 'text'}",
        "model.overrides={num_frozen_text_layers: 1, projection_dim: 16, num_tma_heads: 2, num_fusion_heads: 2}",
        "training.max_steps=1",
        "training.activation_checkpointing=true",
        f"training.checkpoint_copies={tmp_path / 'copies'}",
    )
    assert pretrain.train(settings, resume=False) == 0
    trained = T3DModel.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.projection_dim == 16
    assert trained.config.provenance["parents"] == [
        {
            "name": name,  # and not where on this machine it lay
            "sha256": {"model.safetensors": hash_file(tmp_path / name / "model.safetensors")},
            **terms,
        }
        for name, terms in (("vision", {"license": "cc-by-nc-sa-4.0"}), ("text", {}))
    ]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "\nlicense: other\n" in card
    assert str(tmp_path) not in card
    assert "apache-2.0; of vision, with which it began: cc-by-nc-sa-4.0." in card
    for file in (tmp_path / "run" / "model").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    weights = dict(text.named_parameters())
    assert torch.equal(
        trained.text_model.encoder.layer[0].output.dense.weight, weights["encoder.layer.0.output.dense.weight"]
    )
    moved = trained.text_model.encoder.layer[1].output.dense.weight - weights["encoder.layer.1.output.dense.weight"]
    assert 0 < moved.abs().max() < 0.01
    assert "| start | vision, text |" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vision_model_name_or_path": "v", "overrides": {"vision_config": {"norm": "batch"}}}, "vision_config desc"),
        ({"text_model_name_or_path": "t", "overrides": {"text_config": {"hidden_size": 8}}}, "text_config describes"),
        ({"overrides": {"num_frozen_text_layers": 1}}, "would freeze layers that have learnt nothing"),
        ({"overrides": {"gca_temprature": 3}}, "model.overrides: .*did you mean 'gca_temperature'"),
    ],
)
def test_settings_of_a_tower_that_would_not_count_are_refused(pretrain, model, message):
    tokenizer = train_phantom_tokenizer(["The heart is normal."], 50)
    with pytest.raises(ConfigurationError, match=message):
        pretrain.build_model(ModelArguments(preset="tiny", **model), tokenizer)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image_processor.windows=[[-1000, 1000], [-160, 240]]", r"takes 1 channel\(s\), and .*windows gives 2"),
        ("image_processor.num_local_views=1", "multi-view alignment needs at least 2 views"),
    ],
)
def test_what_does_not_fit_is_refused_before_volumes_are_prepared(pretrain, phantoms, tmp_path, override, message):
    with pytest.raises(ConfigurationError, match=message):
        pretrain.build_trainer(settings_for(phantoms, tmp_path, override))


def test_where_phantoms_come_from_is_said_where_their_manifest_is_missing(pretrain, tmp_path):
    manifest = tmp_path / "phantoms" / "manifest.csv"
    with pytest.raises(
        ManifestError,
        match=f"make_phantoms.py --output {manifest.parent}`, those of the quickstart by `make quickstart`",
    ):
        pretrain.build_trainer(settings_for(manifest, tmp_path / "run"))
    with pytest.raises(ManifestError, match=r"no such manifest; give the path of a \.csv"):
        pretrain.build_trainer(settings_for(manifest, tmp_path / "run", "data.synthetic=false"))


def test_reports_are_cut_where_the_settings_say(pretrain, phantoms, tmp_path):
    trainer, _ = pretrain.build_trainer(settings_for(phantoms, tmp_path, "data.max_report_tokens=7"))
    assert trainer.collator.max_report_tokens == trainer.processor.max_report_tokens == 7


@pytest.mark.slow
def test_a_run_of_every_random_thing_that_is_killed_ends_like_one_left_alone(phantoms, tmp_path):
    """Dropout, augmentation, cached gradients, an average of the weights and prototypes, which are frozen at first."""
    num_steps, moments = 40, random.Random(0)
    whole, run = tmp_path / "whole", tmp_path / "killed"

    def start(output_dir: Path) -> subprocess.Popen:
        overrides = settings_overrides(
            phantoms,
            output_dir,
            "data.num_sentence_texts=2",
            "data.augmentation={probability: 1.0, flip: 0.5}",
            "model.overrides.tma_loss=swav",
            "model.overrides.num_prototypes=4",
            "model.overrides.num_frozen_prototype_batches=10",
            "model.overrides.learnable_temperature=true",
            "model.overrides.text_config={hidden_dropout_prob: 0.2, attention_probs_dropout_prob: 0.2}",
            "training.mixed_precision=no",
            "training.num_processes=1",
            "training.strategy=single",
            "training.gradient_accumulation_steps=2",
            "training.gradient_caching=true",
            "training.caching_micro_batch_size=1",
            "training.ema_decay=0.9",
            f"training.max_steps={num_steps}",
            "training.logging_steps=1",
            "training.save_steps=3",
            "training.trackers=[]",
        )
        command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--config", str(QUICKSTART), "--resume"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, *overrides], env=environment, cwd=tmp_path)

    assert start(whole).wait() == 0
    process, num_lines = start(run), moments.randint(4, num_steps // 2)
    wait_until(lambda: len(log_of(run)) >= num_lines or process.poll() is not None, describe=lambda: "no steps")
    time.sleep(moments.uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert start(run).wait() == 0
    assert_same_weights(whole, run)
    losses = [[line["loss"] for line in log_of(folder)] for folder in (whole, run)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == num_steps


def test_real_scans_train_resume_and_reload(pretrain, tmp_path):
    volumes = [shared_data(name) for name in CTS]
    reports = sorted(shared_data("reports").glob("*.txt"))[: len(volumes)]
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume", "report", "patient_id", "study_id"])
        for number, (volume, report) in enumerate(zip(volumes, reports, strict=True)):
            writer.writerow([volume, report.read_text(), f"p{number}", f"s{number}"])
    overrides = ("data.synthetic=false", "data.license=null", "data.name=clinic/sample-scans", "data.sections=both")
    settings = settings_for(manifest, tmp_path / "run", *overrides)
    assert pretrain.train(settings, resume=False) == 0
    settings = settings_for(manifest, tmp_path / "run", *overrides, "training.max_steps=5")
    assert pretrain.train(settings, resume=True) == 0
    folder = tmp_path / "run" / "model"
    model, processor = AutoModelForPreTraining.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=[str(volume) for volume in volumes[:2]], text=["No effusion.", "A nodule."], views=2, seed=0
    )
    with torch.no_grad():
        output = model(**inputs)
    assert torch.isfinite(output.loss)
    assert output.image_embeds.shape == (2, 64)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    card = (folder / "README.md").read_text()
    assert "license: other" in card
    assert "datasets:\n- clinic/sample-scans\n" in card
    assert "synthetic" not in card


def test_two_processes_take_the_steps_of_one(phantoms, tmp_path):
    """The script under torchrun: same losses and gradient norms as one process with the whole batch."""
    logs = []
    for num_processes in (1, 2):
        output_dir = tmp_path / f"{num_processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        overrides = settings_overrides(
            phantoms,
            output_dir,
            f"training.per_device_train_batch_size={4 // num_processes}",
            f"training.num_processes={num_processes}",
            "training.strategy=ddp",
            "training.logging_steps=1",
            "training.max_steps=2",
            "training.mixed_precision=no",
            "data.validation_split=validation",
            "model.overrides={text_config: {hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}",
        )
        command = [sys.executable, *launcher, str(ROOT / "examples" / "pretrain.py"), "--config", str(QUICKSTART)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *overrides], env=environment, check=True, cwd=tmp_path)
        logs.append([json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()])
    for one, two in zip(*logs, strict=True):
        # Validation batches are as large as those of a process; only what is trained must agree.
        for name in ("loss", "loss_gca", "loss_sentences", "loss_tma", "grad_norm") if one["kind"] == "train" else ():
            assert one[name] == pytest.approx(two[name], rel=1e-4)
