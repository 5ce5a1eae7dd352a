# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Pre-trains T3D on the volumes and reports of a manifest.

    accelerate launch examples/pretrain.py --config examples/configs/quickstart.yaml
    accelerate launch examples/pretrain.py --config my.yaml --resume training.max_steps=2000 model.preset=base

Settings are documented in `modeling_t3d/training/arguments.py`, manifests in `modeling_t3d/data/manifest.py`. A run
that a signal stops writes a checkpoint and exits with status 75 (under a launcher, see `status.json` in its folder).
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DImageProcessor, T3DProcessor, T3DVisionModel
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import Manifest, read_manifest
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.evaluation.encoding import evaluation_samples
from modeling_t3d.evaluation.zero_shot import evaluate_zero_shot, make_prompts
from modeling_t3d.training.arguments import ModelArguments, PretrainingConfiguration, load_configuration
from modeling_t3d.training.trainer import EXIT_STATUS_INTERRUPTED, T3DTrainer
from modeling_t3d.training.validation import ValidationLosses

logger = logging.getLogger("pretrain")


def build_processor(settings: PretrainingConfiguration, reports: list[str]) -> T3DProcessor:
    """Image processor from the settings; tokenizer of the text tower, or one trained on the reports."""
    source = settings.model.tokenizer_name_or_path or settings.model.text_model_name_or_path
    if source:
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        tokenizer = train_phantom_tokenizer(reports, settings.model.tokenizer_vocab_size)
    return T3DProcessor(
        T3DImageProcessor(**settings.image_processor),
        tokenizer,
        report_sections=settings.data.sections,
        min_report_words=settings.data.min_report_words,
        max_report_tokens=settings.data.max_report_tokens,
    )


def build_model(settings: ModelArguments, processor: T3DProcessor) -> T3DForPreTraining:
    """The preset from scratch, or with one or both towers pretrained."""
    tokenizer, overrides = processor.tokenizer, dict(settings.overrides)
    overrides["text_config"] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **overrides.get("text_config", {}),
    }
    config = T3DConfig.from_preset(settings.preset, **overrides)
    if not settings.vision_model_name_or_path and not settings.text_model_name_or_path:
        return T3DForPreTraining(config)
    joint = {
        name: value for name, value in config.to_diff_dict().items() if name not in ("vision_config", "text_config")
    }
    return T3DForPreTraining.from_vision_text_pretrained(
        settings.vision_model_name_or_path or T3DVisionModel(config.vision_config),
        settings.text_model_name_or_path or AutoModel.from_config(config.text_config),
        **joint,
    )


def build_evaluation(settings, dataset: PretrainingDataset, collator: PretrainingCollator, processor: T3DProcessor):
    """Losses on held-out pairs and, where the manifest has labels, zero-shot AUROC and retrieval."""
    losses = ValidationLosses(dataset, collator, settings.training.per_device_train_batch_size)
    findings = list(dict.fromkeys(name for row in dataset.rows for name in row.labels))

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        metrics = losses(model)
        if findings:
            views = None if model.config.view_fusion == "global" else processor.image_processor.num_local_views
            results = evaluate_zero_shot(
                model, processor, evaluation_samples(dataset, views=views), make_prompts(findings), num_resamples=0
            )
            metrics["macro_auroc"] = results.zero_shot.auroc("macro")
        return metrics

    return evaluate


def card_facts(settings: PretrainingConfiguration, manifest: Manifest, collator: PretrainingCollator) -> dict:
    """What the model card says about data and start."""
    reports = [row.report for row in manifest.split(settings.data.train_split)]
    models = (settings.model.vision_model_name_or_path, settings.model.text_model_name_or_path)
    facts = {
        "data_name": settings.data.name or Path(settings.data.manifest).name,
        "data_description": manifest.describe(),
        "data_license": settings.data.license,
        "synthetic": settings.data.synthetic,
        "num_reports": len(reports),
        "num_truncated": collator.count_truncated(reports),
        "max_report_tokens": collator.max_report_tokens,
        "base_models": tuple(model for model in models if model),
    }
    logger.info("%s", facts["data_description"])
    logger.info(
        "%d of %d reports are cut at %d tokens", facts["num_truncated"], len(reports), facts["max_report_tokens"]
    )
    return facts


def main() -> int:
    """Run, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, see examples/configs")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in output_dir")
    parser.add_argument("overrides", nargs="*", help="section.name=value")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    settings = load_configuration(arguments.config, arguments.overrides)
    data, training = settings.data, settings.training
    manifest = read_manifest(data.manifest, sections=data.sections, min_report_words=data.min_report_words)
    rows = manifest.split(data.train_split)
    torch.manual_seed(training.seed)
    processor = build_processor(settings, [row.report for row in rows])
    model = build_model(settings.model, processor)
    # Learnt positions bound the length of a report, less what RoBERTa reserves for padding.
    positions = model.config.text_config.max_position_embeddings - 2
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
    collator = PretrainingCollator(processor, num_local_views=None if model.config.lambda_tma else 0)
    facts = card_facts(settings, manifest, collator)
    model.config.provenance = {
        "stage": "pretraining",
        "training_data": [("phantoms: " if data.synthetic else "") + facts["data_name"]],
        "license": data.license,
        "parents": list(facts["base_models"]),
    }
    cache_dir = data.cache_dir or Path(data.manifest).parent / "prepared"

    def dataset(rows: list, text_sampling: str) -> PretrainingDataset:
        return PretrainingDataset(
            rows, processor.image_processor, cache_dir, seed=training.seed, text_sampling=text_sampling
        )

    train_dataset, evaluate = dataset(rows, data.text_sampling), None
    held_out = dataset(manifest.split(data.validation_split), "report") if data.validation_split else None
    if held_out is not None:
        evaluate = build_evaluation(settings, held_out, collator, processor)
    trainer = T3DTrainer(
        model, training, train_dataset, collator, evaluate=evaluate, processor=processor, card_facts=facts
    )
    for part in filter(None, (train_dataset, held_out)):
        part.prepare_all(
            data.num_preparation_workers,
            rank=trainer.accelerator.process_index,
            num_processes=trainer.accelerator.num_processes,
        )
    trainer.accelerator.wait_for_everyone()
    result = trainer.train(resume=arguments.resume)
    logger.info("%s after %d steps: %s", result.status, result.state.step, result.model_dir or training.output_dir)
    return 0 if result.status == "completed" else EXIT_STATUS_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
