# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Fills the model card of a checkpoint from what the run knows; a fact that is missing raises instead of staying
blank. The template is `model_card.md` in this folder."""

import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from .arguments import T3DTrainingArguments
from .files import hash_file

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
_OBJECTIVE_FIELDS = (
    "contrastive_loss",
    "gca_temperature",
    "learnable_temperature",
    "soft_targets",
    "lambda_gca",
    "gca_views",
    "lambda_tma",
    "lambda_tir",
    "lambda_sentences",
    "lambda_texts",
    "tma_loss",
    "tma_temperature",
    "tma_query",
    "tma_negatives",
    "view_fusion",
    "num_frozen_text_layers",
)
# Paths and process details of the machine that trained say nothing about the model.
_PRIVATE_SETTINGS = (
    "output_dir",
    "checkpoint_copies",
    "trackers",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "use_cpu",
)


def fill_model_card(
    model: PreTrainedModel,
    args: T3DTrainingArguments,
    *,
    processor: Any = None,
    metrics: dict[str, float] | None = None,
    run: dict[str, Any],
    title: str = "T3D",
    data_name: str = "volumes and reports of the user",
    data_description: str = "not described",
    data_license: str | None = None,
    synthetic: bool = False,
    num_reports: int = 0,
    num_truncated: int = 0,
    max_report_tokens: int = 512,
    base_models: tuple[str, ...] = (),
    evaluation_protocol: str = "Metrics of the validation rows, as logged.",
) -> str:
    """
    The card of one checkpoint.

    Args:
        model (`PreTrainedModel`): the trained model; its `config` is described.
        args ([`T3DTrainingArguments`]): the settings.
        processor (*optional*): its image processor's `describe()` states the preprocessing contract.
        metrics (`dict[str, float]`, *optional*): of the last validation.
        run (`dict`): `steps`, `volumes`, `minutes`, `processes`, `device`, `precision`; `evaluated_step`, which the
            metrics belong to.
        title, data_name, data_description, data_license (`str`): what it was trained on. A name of the form
            `owner/name` is that of a data set on the Hub, and enters the metadata, which takes no others.
        synthetic (`bool`): the data are phantoms; the card then says what that means.
        num_reports, num_truncated, max_report_tokens (`int`): texts, and how many were cut at how many tokens.
        base_models (`tuple[str, ...]`): the pretrained parts.
        evaluation_protocol (`str`): how the metrics were computed.
    """
    import jinja2

    config = model.config.to_dict()
    parents = [_parent(name) for name in base_models]
    terms = [data_license or "those of the training data; not stated by whoever trained this checkpoint"]
    bound = [parent for parent in parents if "license" in parent]
    terms += [f"of {parent['name']}, with which it began: {parent['license']}" for parent in bound]
    has_other_terms = any(parent["license"] != data_license for parent in bound)
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        # Weights keep their terms, whatever they are trained on.
        license="other" if has_other_terms or not data_license else data_license,
        language="en",
        datasets=[data_name] if re.fullmatch(r"[\w.-]+/[\w.-]+", data_name) else None,
        # A folder on this machine is no base model that others could follow.
        base_model=[name for name in base_models if not Path(name).exists()] or None,
        tags=["medical", "ct", "3d", "vision-language", "t3d", *(["synthetic-data"] if synthetic else [])],
    )
    parameters = list(model.parameters())
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=f"---\n{header.to_yaml()}\n---",
        title=title,
        data_name=data_name,
        data_description=data_description,
        terms="; ".join(terms),
        synthetic=synthetic,
        num_reports=num_reports,
        num_truncated=num_truncated,
        max_report_tokens=max_report_tokens,
        evaluation_protocol=evaluation_protocol,
        model_class=type(model).__name__,
        num_parameters=f"{sum(parameter.numel() for parameter in parameters):,}",
        num_trainable_parameters=f"{sum(parameter.numel() for parameter in parameters if parameter.requires_grad):,}",
        vision_tower=_describe_tower(config.get("vision_config")),
        text_tower=_describe_tower(config.get("text_config")),
        start=", ".join(parent["name"] for parent in parents) or "from scratch",
        preprocessing=processor.image_processor.describe() if processor is not None else "no processor was saved",
        run=run,
        settings={name: value for name, value in args.to_dict().items() if name not in _PRIVATE_SETTINGS},
        objective={name: config[name] for name in _OBJECTIVE_FIELDS if name in config},
        metrics=metrics or {},
        versions={
            # The package is loaded before its parts; a source tree that is not installed has no metadata.
            "modeling_t3d": sys.modules[__package__.partition(".")[0]].__version__,
            **{name: metadata.version(name) for name in ("transformers", "torch", "accelerate")},
        },
    )
    return card


def provenance(facts: dict[str, Any]) -> dict[str, Any]:
    """What the configuration of a checkpoint keeps of the card's facts: stage, data, licence, parents."""
    return {
        "stage": "pretraining",
        "training_data": [("phantoms: " if facts["synthetic"] else "") + facts["data_name"]],
        "license": facts["data_license"],
        "parents": [_parent(name) for name in facts["base_models"]],
    }


@cache  # asked when a run begins, and again when it ends
def _parent(name: str) -> dict[str, Any]:
    """A pretrained part: its Hub id, or the name of its folder, not where that lay, and its weights; its licence."""
    folder = Path(name)
    parent: dict[str, Any] = {"name": name}
    if folder.exists():
        weights = sorted(folder.glob("*.safetensors"))
        parent = {"name": folder.resolve().name, "sha256": {path.name: hash_file(path) for path in weights}}
    config, _ = PreTrainedConfig.get_config_dict(name)
    stated = (config.get("provenance") or {}).get("license")
    return {**parent, "license": stated} if stated else parent


def _describe_tower(config: dict[str, Any] | None) -> str:
    if not config:
        return "none"
    kind = config.get("encoder_type") or config.get("model_type")
    return f"{kind}, {config.get('num_hidden_layers')} layers or blocks, {config.get('hidden_size')} channels"


__all__ = ["CARD_FILE", "fill_model_card", "provenance"]
