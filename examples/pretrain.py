# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Pre-trains T3D on the volumes and reports of a manifest.

    accelerate launch examples/pretrain.py --config examples/configs/quickstart.yaml
    accelerate launch examples/pretrain.py --config my.yaml --resume training.max_steps=2000 model.preset=base

Settings are documented in `modeling_t3d/training/arguments.py`, manifests in `modeling_t3d/data/manifest.py`. A run
that a signal or `--max-hours` stops writes a checkpoint and exits with status 75 (under a launcher, see `status.json`
in its folder); `--resume` continues it. `--dry-run` says what a run would need, `--profile` where its time goes.
"""

import argparse
import atexit
import gc
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DImageProcessor, T3DProcessor, T3DVisionModel
from modeling_t3d.data.collators import changing_collator, objective_collator
from modeling_t3d.data.datasets import PretrainingDataset
from modeling_t3d.data.manifest import ManifestError, read_manifest
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.data.shared_batches import SharedBatchCollator
from modeling_t3d.data.streaming import StreamingDataset
from modeling_t3d.evaluation.held_out import HeldOutEvaluation
from modeling_t3d.processing_t3d import read_descriptions
from modeling_t3d.training.arguments import (
    ConfigurationError,
    ModelArguments,
    PretrainingConfiguration,
    load_configuration,
)
from modeling_t3d.training.model_card import provenance
from modeling_t3d.training.plan import plan_run
from modeling_t3d.training.preflight import refuse_lonely_reports, refuse_scarce_views
from modeling_t3d.training.profiling import profile_steps
from modeling_t3d.training.session import errors_in_one_line
from modeling_t3d.training.trainer import EXIT_STATUS_INTERRUPTED, T3DTrainer
from modeling_t3d.training.validation import ValidationLosses

logger = logging.getLogger("pretrain")


def build_processor(settings: PretrainingConfiguration, reports: list[str]) -> T3DProcessor:
    """Image processor from the settings; tokenizer of the text tower, or one trained on the reports."""
    source = settings.model.tokenizer_name_or_path or settings.model.text_model_name_or_path
    descriptions = settings.data.finding_descriptions
    return T3DProcessor(
        T3DImageProcessor(**settings.image_processor),
        AutoTokenizer.from_pretrained(source)
        if source
        else train_phantom_tokenizer(reports, settings.model.tokenizer_vocab_size),
        report_sections=settings.data.sections,
        min_report_words=settings.data.min_report_words,
        max_report_tokens=settings.data.max_report_tokens,
        finding_descriptions=descriptions and read_descriptions(descriptions),
    )


def build_model(settings: ModelArguments, tokenizer) -> T3DForPreTraining:
    """The preset from scratch, or with one or both towers pretrained."""
    vision, text = settings.vision_model_name_or_path, settings.text_model_name_or_path
    overrides = dict(settings.overrides)
    for path, name in ((vision, "vision_config"), (text, "text_config")):
        if path and name in overrides:
            raise ConfigurationError(
                f"model.overrides.{name} describes a tower from scratch, but {path} is loaded as it is: give one of "
                "the two"
            )
    if overrides.get("num_frozen_text_layers") and not text:
        raise ConfigurationError(
            "model.overrides.num_frozen_text_layers would freeze layers that have learnt nothing: set 0, or give "
            "model.text_model_name_or_path"
        )
    text_defaults = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    overrides["text_config"] = text_defaults | overrides.get("text_config", {})
    try:
        config = T3DConfig.from_preset(settings.preset, settings.objective, **overrides)
    except ValueError as error:
        raise ConfigurationError(f"model.overrides: {error}") from None
    if not vision and not text:
        return T3DForPreTraining(config)
    towers = ("vision_config", "text_config")
    return T3DForPreTraining.from_vision_text_pretrained(
        vision or T3DVisionModel(config.vision_config),
        text or AutoModel.from_config(config.text_config),
        **{name: value for name, value in config.to_diff_dict().items() if name not in towers},
    )


def build_trainer(
    settings: PretrainingConfiguration, *, keeps_volumes: bool = True
) -> tuple[T3DTrainer, list[PretrainingDataset]]:
    """
    The trainer that the settings name, and the data sets whose volumes must be prepared before it trains.

    Args:
        settings ([`PretrainingConfiguration`]): see there.
        keeps_volumes (`bool`, defaults to `True`): make the folder of prepared volumes, where it is missing.
    """
    data, training, source = settings.data, settings.training, settings.model
    if data.synthetic and not Path(data.manifest).exists():
        raise ManifestError(
            f"{data.manifest}: no such manifest; phantoms are made by `python examples/make_phantoms.py --output "
            f"{Path(data.manifest).parent}`, those of the quickstart by `make quickstart`"
        )
    manifest = read_manifest(data.manifest, sections=data.sections, min_report_words=data.min_report_words)
    logger.info("%s", manifest.describe())
    rows = manifest.split(data.train_split)
    reports = [row.report for row in rows]
    torch.manual_seed(training.seed)
    processor = build_processor(settings, [row.full_report for row in rows])
    model = build_model(source, processor.tokenizer)
    # Learnt positions bound the length of a report, less what RoBERTa reserves up to the padding token's number.
    positions = model.config.text_config.max_position_embeddings - 1 - (processor.tokenizer.pad_token_id or 0)
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
    num_channels, num_windows = model.config.vision_config.num_channels, processor.image_processor.num_channels
    if num_channels != num_windows:
        raise ConfigurationError(
            f"the vision tower takes {num_channels} channel(s), and image_processor.windows gives {num_windows}: give "
            "as many windows, or set model.overrides.vision_config.num_channels for a tower from scratch"
        )
    try:
        collator = objective_collator(model.config, processor)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    facts = {
        "data_name": data.name or Path(data.manifest).name,
        "data_description": manifest.describe(),
        "data_license": data.license,
        "synthetic": data.synthetic,
        "base_models": [name for name in (source.vision_model_name_or_path, source.text_model_name_or_path) if name],
        "num_reports": len(reports),
        "num_truncated": collator.count_truncated(reports),
        "max_report_tokens": collator.max_report_tokens,
    }
    logger.info("{num_truncated} of {num_reports} reports are cut at {max_report_tokens} tokens".format(**facts))
    model.config.provenance = provenance(facts)
    shared = {
        "image_processor": processor.image_processor,
        "store": data.store,
        "seed": training.seed,
    }
    if keeps_volumes:
        shared["keep_global_views"] = data.keep_global_views
        shared["cache_dir"] = None if data.store else data.cache_dir or Path(data.manifest).parent / "prepared"
    parts = [PretrainingDataset(rows, num_sentence_texts=data.num_sentence_texts, **shared)]
    evaluate = losses = None
    if data.validation_split:
        parts.append(PretrainingDataset(manifest.split(data.validation_split), **shared))
        losses = ValidationLosses(parts[1], collator, training.per_device_train_batch_size)
        evaluate = HeldOutEvaluation(parts[1], losses, processor)
        facts["evaluation_protocol"] = evaluate.describe()
    options = {"evaluate": evaluate, "processor": processor, "card_facts": facts}
    collator, options["batch_transform"] = changing_collator(
        collator,
        augmentation=data.augmentation,
        crop_perturbation=data.crop_perturbation,
        texts=data.texts,
        descriptions=processor.finding_descriptions,
    )
    if training.dataloader_num_workers:
        collator = SharedBatchCollator(collator)
    if data.streaming:
        options["make_stream"] = partial(
            StreamingDataset,
            parts[0],
            collator=collator,
            studies=[row.study_id for row in rows],
            study_sampling=data.study_sampling,
            smallest_share=2,
        )
    trainer = T3DTrainer(model, training, parts[0], collator, **options)
    refuse_scarce_views(trainer, processor.image_processor.num_local_views, losses)
    refuse_lonely_reports(trainer, losses)
    return trainer, parts


def train(settings: PretrainingConfiguration, resume: bool, *, dry_run: bool = False, profile: bool = False) -> int:
    """Train as the settings say and return the exit status; or say what a run would be, or where its time goes."""
    trainer, parts = build_trainer(settings, keeps_volumes=not dry_run)
    if dry_run:
        plan = plan_run(trainer, trainer.collator(parts[0].blank_samples(2)))
        print(plan.describe())
        return 0 if plan.fits else 1
    rank, num_processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    for part in parts:
        part.prepare_all(settings.data.num_preparation_workers, rank=rank, num_processes=num_processes)
    trainer.accelerator.wait_for_everyone()
    if profile:
        print(profile_steps(trainer, trainer.output_dir / "profile"))
        return 0
    result = trainer.train(resume=resume)
    logger.info("%s after %d steps: %s", result.status, result.state.step, result.model_dir or trainer.output_dir)
    return 0 if result.status == "completed" else EXIT_STATUS_INTERRUPTED


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; overrides may stand before, between and after options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, see examples/configs")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in output_dir")
    parser.add_argument("--max-hours", type=float, help="training.max_hours: stop to be resumed after so many hours")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and whether it fits; status 1 if not")
    parser.add_argument("--profile", action="store_true", help="take a few steps; output_dir/profile: table and trace")
    parser.add_argument("overrides", nargs="*", help="section.name=value")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.max_hours is not None:
        parsed.overrides.append(f"training.max_hours={parsed.max_hours}")
    return parsed


if __name__ == "__main__":
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    with errors_in_one_line():
        settings = load_configuration(arguments.config, arguments.overrides)
        # The data-parallel model holds the process group in a cycle: gloo's threads would outlive the interpreter, and
        # now and then abort a process that has completed.
        atexit.register(gc.collect)
        sys.exit(train(settings, arguments.resume, dry_run=arguments.dry_run, profile=arguments.profile))
