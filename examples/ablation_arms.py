# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The arms of the ablation, how each is trained, and what is measured of it; `ablation.py` runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_t3d import T3DConfig, T3DForImageClassification, T3DForPreTraining, T3DImageProcessor, T3DProcessor
from modeling_t3d.data.caption_masks import MaskCaptioner, read_label_names
from modeling_t3d.data.captions import write_captions
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.phantoms import EVALUATION_PROMPTS, FINDINGS, ORGANS, phantom_seeds, write_phantoms
from modeling_t3d.data.sources import read_row
from modeling_t3d.evaluation.classification import labelled_shortcuts
from modeling_t3d.evaluation.encoding import embed_samples, evaluation_mode, evaluation_samples, label_row
from modeling_t3d.evaluation.findings import to_units
from modeling_t3d.evaluation.pretraining import evaluate_pretrained
from modeling_t3d.evaluation.probes import probe_findings
from modeling_t3d.evaluation.protocol import processor_name
from modeling_t3d.evaluation.zero_shot import encode_prompt_pairs, logit_scale_of, zero_shot_logits
from modeling_t3d.presets_t3d import NUM_LOCAL_VIEWS, OBJECTIVES
from modeling_t3d.training.arguments import PretrainingConfiguration, load_configuration
from modeling_t3d.training.checkpoints import write_text_atomically
from modeling_t3d.training.trainer import T3DTrainer
from modeling_t3d.volume_io_t3d import read_label_map

PRETRAIN = Path(__file__).with_name("pretrain.py")
LABEL_NAMES = Path(__file__).with_name("label_names") / "phantoms.json"
SPLITS = ("train", "validation", "test")
CAPTIONS = "captions.csv"  # beside the manifest of reports
FINDING_NAMES = list(EVALUATION_PROMPTS)
GROUPS = {
    "macro": FINDING_NAMES,
    **{extent: [name for name in FINDING_NAMES if FINDINGS[name].extent == extent] for extent in ("diffuse", "focal")},
}
DEFAULT = "default"  # the arm that every other one differs from by one switch
# Every value of each switch; the one that the configuration holds is the default arm.
SWITCHES = {
    "tma_query": ("model.overrides", ("text", "none", "vision")),
    "tma_negatives": ("model.overrides", ("same_query", "own_query")),
    "tma_loss": ("model.overrides", ("supcon", "swav", "barlow")),
    "view_sampling": ("image_processor", ("independent", "overlapping", "aligned")),
    "view_fusion": ("model.overrides", ("global", "mean", "attention")),
}


class ArmFailedError(RuntimeError):
    """Training of one arm ended without a model; the others can still run."""


class InterruptedArmError(RuntimeError):
    """A signal stopped an arm, which has written a checkpoint to continue from."""


@dataclass(frozen=True)
class Arm:
    """
    One row of the table.

    Args:
        name (`str`): on the command line and in file names.
        label (`str`): in the table.
        overrides (`tuple[str, ...]`): what differs from the default, as dotted overrides of the configuration.
        kind (`"pretraining"`, `"supervised"` or `"shortcut"`): how it learns; the last has no seed.
    """

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    kind: str = "pretraining"

    def run_name(self, seed: int) -> str:
        """Name of the files of this arm with a seed."""
        return self.name if self.kind == "shortcut" else f"{self.name}-seed{seed}"


def _objective(name: str) -> tuple[str, ...]:
    """Overrides that give a configuration the objective of a publication, and as many local views."""
    terms = [f"model.overrides.{key}={value}" for key, value in OBJECTIVES[name].items()]
    return (*terms, f"image_processor.num_local_views={NUM_LOCAL_VIEWS[name]}")


def make_arms(settings: PretrainingConfiguration) -> list[Arm]:
    """The default of a configuration, an arm for each other value of each switch, other objectives, the controls."""
    config = T3DConfig.from_preset(settings.model.preset, **settings.model.overrides)
    if not config.lambda_tma:
        raise ValueError("the ablation varies multi-view alignment: give its configuration a lambda_tma above 0")
    processor = T3DImageProcessor(**settings.image_processor)
    defaults = {name: getattr(processor if name == "view_sampling" else config, name) for name in SWITCHES}
    arms = [
        Arm("gca-alone", "GCA alone", ("model.overrides.lambda_tma=0",)),
        Arm(DEFAULT, "GCA + TMA (default: " + ", ".join(f"{key} {value}" for key, value in defaults.items()) + ")"),
    ]
    for switch, (section, values) in SWITCHES.items():
        for value in values:
            if value != defaults[switch]:
                name = f"{switch}-{value}".replace("_", "-")
                arms.append(Arm(name, f"{switch} {value}", (f"{section}.{switch}={value}",)))
    restores = "model.overrides.lambda_tir=1"
    captions = (
        f"data.manifest={Path(settings.data.manifest).with_name(CAPTIONS)}",
        "data.sections=both",
        "data.num_sentence_texts=0",
        "data.crop_perturbation={}",
    )
    # A caption tells what the whole volume holds, of which crops of the default's size show little.
    most_of_the_body = ("image_processor.spacing=[12,12,12]", "image_processor.local_size=[24,20,24]")
    # A decorrelation sums over pairs of channels: as heavy as a contrast, it would drown the other terms.
    weight = OBJECTIVES["gtgm"]["lambda_tma"]
    light = ("model.overrides.tma_loss=barlow", f"model.overrides.lambda_tma={weight}")
    return [
        *arms,
        Arm("tma-loss-barlow-light", f"tma_loss barlow, GTGM's weight of {weight}", light),
        Arm("tir", "GCA + TMA + TIR", (restores,)),
        Arm(
            "tir-shuffled",
            "GCA + TMA + TIR with the reports of others",
            (restores, "model.overrides.tir_report=other"),
        ),
        Arm("v1", "TCL + TIR (v1)", _objective("v1")),
        Arm("gtgm", "GTGM, captions from masks", (*_objective("gtgm"), *captions)),
        Arm(
            "gtgm-large-crops",
            "GTGM, captions from masks, crops of 288 x 240 x 288 mm",
            (*_objective("gtgm"), *captions, *most_of_the_body),
        ),
        Arm("supervised-ceiling", "supervised ceiling (on labels)", kind="supervised"),
        Arm("shortcut-baseline", "shortcut baseline (headers and HU histogram)", kind="shortcut"),
    ]


# ------------------------------------------------------------------------------------------ data and training


def load_splits(
    settings: PretrainingConfiguration, image_processor: T3DImageProcessor
) -> dict[str, PretrainingDataset]:
    """The data sets of the three splits, prepared in one folder that all arms share."""
    data = settings.data
    manifest = read_manifest(data.manifest, sections=data.sections, min_report_words=data.min_report_words)
    cache = data.cache_dir or Path(data.manifest).parent / "prepared"
    return {
        name: PretrainingDataset(manifest.split(name), image_processor, cache, seed=settings.training.seed)
        for name in SPLITS
    }


def prepare_phantoms(
    settings: PretrainingConfiguration,
    arms: Sequence[Arm],
    counts: Mapping[str, int],
    resolution: float,
    num_threads: int,
) -> None:
    """Write the phantoms, captions of their lesions where an arm reads some, and prepare all volumes, once for all."""
    seeds = [seed for split in SPLITS for seed in phantom_seeds(split, counts[split])]
    workers = max(1, min(num_threads, settings.data.num_preparation_workers))
    folder = Path(settings.data.manifest).parent
    manifest = write_phantoms(folder, seeds, workers, compress=False, masks=True, resolution=resolution)
    if any(CAPTIONS in override for arm in arms for override in arm.overrides):
        captioner = MaskCaptioner(read_label_names(LABEL_NAMES), described=["lesions"])
        write_captions(manifest, folder / CAPTIONS, captioner, overwrite=True)
    for part in load_splits(settings, T3DImageProcessor(**settings.image_processor)).values():
        part.prepare_all(workers if workers > 1 else 0)


def pretrain(config: Path, overrides: Sequence[str], num_threads: int) -> None:
    """`accelerate launch examples/pretrain.py`, continued from its newest checkpoint if there is one."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launcher += ["--num_cpu_threads_per_process", str(num_threads)]
    command = [*launcher, str(PRETRAIN), "--config", str(config), "--resume", *overrides]
    # A session of its own: the launcher dies of a signal without passing it on to the script.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        _wait_for_group(process.pid)
        raise
    settings = load_configuration(config, overrides)
    status = read_status(settings)["status"]
    if status == "interrupted":
        raise InterruptedArmError(f"{settings.training.output_dir}: interrupted; run the same command to continue")
    if process.returncode or status != "completed":
        raise ArmFailedError(f"{settings.training.output_dir}: pre-training ended with status {process.returncode}")


def _wait_for_group(group: int) -> None:
    """Until the script has written its checkpoint and gone."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)


def read_status(settings: PretrainingConfiguration) -> dict[str, Any]:
    """What the trainer left about its end."""
    path = Path(settings.training.output_dir) / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"status": "not started"}


class LabelledDataset(Dataset):
    """Prepared volumes with their labels, for the supervised ceiling; takes the trainer's keys."""

    def __init__(self, dataset: PretrainingDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        """Of the rows."""
        return self.dataset.fingerprint

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        index = key[-1]
        prepared = self.dataset.prepared(index)
        return {
            "pixel_values": self.dataset.image_processor.global_view(prepared),
            "labels": torch.tensor(label_row(self.dataset.rows[index].labels, FINDING_NAMES)),
        }


def collate_labelled(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples of a [`LabelledDataset`] to a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}


def build_classifier_trainer(settings: PretrainingConfiguration, train: PretrainingDataset) -> T3DTrainer:
    """Of the vision tower with a linear classifier on the labels: the batches and views of global alignment alone."""
    torch.manual_seed(settings.training.seed)
    config = T3DConfig.from_preset(settings.model.preset, **settings.model.overrides).vision_config
    config.num_labels, config.problem_type = len(FINDING_NAMES), "multi_label_classification"
    model = T3DForImageClassification(config)
    return T3DTrainer(model, settings.training, LabelledDataset(train), collate_labelled)


def train_classifier(settings: PretrainingConfiguration, train: PretrainingDataset) -> T3DForImageClassification:
    """The classifier at the end of its training."""
    trainer = build_classifier_trainer(settings, train)
    if trainer.train(resume=True).status != "completed":
        raise InterruptedArmError(f"{settings.training.output_dir}: interrupted; run the same command to continue")
    return T3DForImageClassification.from_pretrained(trainer.output_dir / "model").eval()


# ------------------------------------------------------------------------------------------ measuring


def scored(log_odds: np.ndarray, dataset: PretrainingDataset) -> dict[str, Any]:
    """Scores per study with labels and patients, as a result file keeps them: intervals over seeds need them all.

    Scores are log-odds, which rank where probabilities round to 1; the files of earlier commits hold probabilities, of
    which the table reads the ranks alone.
    """
    rows = dataset.rows
    labels = np.array([label_row(row.labels, FINDING_NAMES) for row in rows])
    scores, labels, patients = to_units(
        log_odds, labels, [row.study_id for row in rows], [row.patient_id for row in rows], "study"
    )
    # Seven digits are what float32 holds, and make files that are small enough to keep beside the table.
    digits = [[float(f"{score:.7g}") for score in row] for row in scores]
    return {"scores": digits, "labels": labels.tolist(), "patients": [str(patient) for patient in patients]}


def measure_pretrained(settings: PretrainingConfiguration, views: int | str | None) -> dict[str, Any]:
    """Zero-shot scores of both held-out splits, and on the test split everything else that stands in the table."""
    folder = Path(settings.training.output_dir) / "model"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model, processor = T3DForPreTraining.from_pretrained(folder).to(device), T3DProcessor.from_pretrained(folder)
    splits, batch_size = (
        load_splits(settings, processor.image_processor),
        settings.training.per_device_train_batch_size,
    )
    if views is None:
        views = processor.image_processor.num_local_views or None
    positive, negative = encode_prompt_pairs(model, processor.tokenizer, EVALUATION_PROMPTS)
    measured: dict[str, Any] = {}
    for name in ("validation", "test"):
        samples = evaluation_samples(splits[name], views=None if model.config.view_fusion == "global" else views)
        embeds = embed_samples(model, processor, samples, batch_size=batch_size, with_reports=False).image_embeds
        logits = zero_shot_logits(torch.from_numpy(embeds), positive, negative, logit_scale_of(model))
        measured[name] = scored(logits.numpy(), splits[name])
    results = evaluate_pretrained(
        model,
        processor,
        splits["test"],
        EVALUATION_PROMPTS,
        collator=PretrainingCollator(processor),
        read_row=read_row,
        read_label_map=read_label_map,
        lesion_values={name: FINDINGS[name].index for name in GROUPS["focal"]},
        organ_values=ORGANS,
        groups=GROUPS,
        views=views,
        batch_size=batch_size,
    )
    return measured | {"measurements": results.to_dict()}


def measure_classifier(settings: PretrainingConfiguration) -> dict[str, Any]:
    """Train the supervised ceiling and score both held-out splits."""
    splits = load_splits(settings, T3DImageProcessor(**settings.image_processor))
    model = train_classifier(settings, splits["train"])
    measured = {}
    for name in ("validation", "test"):
        with evaluation_mode(model):
            logits = [
                model(pixel_values=sample["pixel_values"][None].to(model.device)).logits
                for sample in evaluation_samples(splits[name])
            ]
        measured[name] = scored(torch.cat(logits).double().cpu().numpy(), splits[name])
    return measured


def measure_shortcuts(settings: PretrainingConfiguration) -> dict[str, Any]:
    """A linear model on headers and the global histogram, scored on both held-out splits."""
    splits = load_splits(settings, T3DImageProcessor(**settings.image_processor))
    features = {name: labelled_shortcuts(part.rows, FINDING_NAMES, read_row) for name, part in splits.items()}
    known = features.pop("train")
    measured = {}
    for name, unseen in features.items():
        scores = probe_findings(
            known.features,
            known.labels,
            unseen.features,
            train_patient_ids=known.patient_ids,
            test_patient_ids=unseen.patient_ids,
        )
        measured[name] = scored(scores, splits[name])
    return measured


def run_arm(
    arm: Arm, config: Path, overrides: Sequence[str], *, num_threads: int, views: int | str | None
) -> dict[str, Any]:
    """Train an arm to the end of its budget and measure it.

    Args:
        arm ([`Arm`]): what to run.
        config (`Path`), overrides (sequence of `str`): the configuration with paths, budget, seed and switch.
        num_threads (`int`): of the training process.
        views (`int` or `"grid"`, *optional*): local views of evaluation; as in training by default.
    """
    # What an arm reads is its own; what measures it are the reports that measure every arm.
    reports = [override for override in overrides if override.startswith("data.") and override not in arm.overrides]
    settings = load_configuration(config, [*overrides, *reports])
    if arm.kind == "shortcut":
        return measure_shortcuts(settings)
    if arm.kind == "supervised":
        measured = measure_classifier(settings)
    else:
        pretrain(config, overrides, num_threads)
        measured = measure_pretrained(settings, views)
    status = read_status(settings)
    return measured | {"steps": status["step"], "minutes": status["elapsed_seconds"] / 60}


# ------------------------------------------------------------------------------------------ files


def settle(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new folder of results, or refuse one that holds results of others."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if former.get(name) != settings[name]]
        if changed:
            sys.exit(f"{folder} holds results with another {changed[0]}; choose another --output or remove it")
    (folder / "results").mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(settings, indent=2))


def result_path(folder: Path, arm: Arm, seed: int) -> Path:
    """Where the result of an arm with a seed lies."""
    return folder / "results" / f"{arm.run_name(seed)}.json"


def read_results(folder: Path, arms: list[Arm], seeds: list[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm -> seed -> result, of the files that exist."""
    paths = {(arm.name, seed): result_path(folder, arm, seed) for arm in arms for seed in seeds}
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for (name, seed), path in paths.items():
        if path.is_file():
            results.setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return results


def hardware(num_threads: int) -> str:
    """Processor, cores and threads; the accelerator where there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {os.cpu_count()} cores, {num_threads} threads{gpu}"


__all__ = [
    "FINDING_NAMES",
    "GROUPS",
    "SPLITS",
    "SWITCHES",
    "Arm",
    "ArmFailedError",
    "InterruptedArmError",
    "build_classifier_trainer",
    "hardware",
    "load_splits",
    "make_arms",
    "prepare_phantoms",
    "read_results",
    "result_path",
    "run_arm",
    "settle",
]
