# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Typed settings of a pre-training run and the YAML files that hold them; an unknown key or a value of the wrong type
raises with the nearest name. Of the environment nothing is read but the home folder."""

import difflib
import os
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigurationError(ValueError):
    """A setting that does not exist or cannot be what it is; the message names it and the remedy."""


@dataclass
class T3DTrainingArguments:
    """
    How [`T3DTrainer`] trains. The publications give none of these numbers: each is a choice of this implementation.

    Args:
        output_dir (`str`): everything that a run writes lies below it.
        max_steps (`int`, *optional*): optimiser steps; the schedule follows them, and on CPUs in float32 the run
            is reproducible bit by bit (in bfloat16 rounding may differ from run to run).
        max_train_minutes (`float`, *optional*):
            Minutes of training, validation and checkpoints not counted. The schedule follows the share of the time
            that has passed, so two runs take different steps: **not** reproducible bit by bit. With `max_steps` too,
            the one that is reached first ends the run.
        num_train_epochs (`float`, defaults to 20): the length of a run that sets neither of the two.
        per_device_train_batch_size (`int`, defaults to 32): volume-report pairs per process and forward pass.
        gradient_accumulation_steps (`int`, defaults to 1):
            Forward passes per optimiser step, whose losses are averaged. It does not enlarge the contrastive batch,
            unless gradients are cached.
        gradient_caching (`bool`, defaults to `False`):
            Make all pairs of an optimiser step one contrastive batch, in the memory of one forward pass and for the
            time of a second one. Exact; refuses batch norm in training mode.
        caching_micro_batch_size (`int`, *optional*): with it, pairs that are encoded at once; by default what
            `per_device_train_batch_size` says, which this divides into parts.
        view_chunk_size (`int`, *optional*):
            Encode this many local views at once and recompute them in the backward pass, so that memory holds the
            activations of one chunk. Exact; refuses batch norm in training mode.
        batch_norm (`"synchronised"` or `"frozen"`, defaults to `"synchronised"`): of models that have one: statistics
            over the processes (CUDA devices alone), or those that were loaded, which then do not change.
        drop_last (`bool`, defaults to `True`):
            Leave out the pairs of an epoch that do not fill a step (others in every epoch). Otherwise the last step
            is smaller; no pair is ever repeated to fill it.
        dataloader_num_workers (`int`, defaults to 0): processes that cut views; with 0 a thread cuts them while
            the step before runs.
        vision_learning_rate, head_learning_rate (`float`, default to 1e-4), text_learning_rate (`float`, 2e-5):
            Peak rates of the parameters below `vision_model`, below `text_model`, and of all others.
        min_learning_rate (`float`, defaults to 1e-6): where the cosine ends.
        warmup_ratio (`float`, defaults to 0.05): share of the run in which the rates rise linearly.
        weight_decay (`float`, defaults to 0.05): not on biases, norms, temperature, learnt positions and prototypes.
        place_soft_threshold (`float`, defaults to 0.0):
            After each step, weights of single places (those of `encoder_type="local_contrast"`) move towards 0 by this
            share of their learning rate and stop there, as under an L1 penalty: most places say nothing of a finding.
        adam_beta1, adam_beta2, adam_epsilon (`float`): AdamW's 0.9, 0.999, 1e-8.
        max_grad_norm (`float`, *optional*, defaults to 1.0): gradients are clipped to this norm; `None` clips nothing.
        mixed_precision (`"auto"`, `"bf16"`, `"fp16"` or `"no"`, defaults to `"auto"`):
            `"auto"` is bf16 on CUDA devices and CPUs that compute in it, and full precision elsewhere. fp16 scales
            gradients, leaves out and counts the steps that overflow, and needs a CUDA device.
        activation_checkpointing (`bool`, defaults to `False`): recompute the blocks in the backward pass.
        activation_checkpointing_stages (`list[str]`):
            Only below these modules, such as `["layer1", "layer2"]`, whose maps are large; all blocks by default.
        compile_encoder (`bool`, defaults to `False`): `torch.compile` the vision encoder, once for every size of view.
        memory_format (`"contiguous"` or `"channels_last"`, defaults to `"contiguous"`):
            How 3D weights and feature maps lie in memory; which is faster, benchmarks/training.md tells.
        frozen_vision_layers (`int`, defaults to 0): stages of the vision encoder, from the views on, that stay as
            loaded; the text tower's are `num_frozen_text_layers` of the model's configuration.
        frozen_parameters (`list[str]`): beginnings of names of further parameters that stay as loaded.
        ema_decay (`float`, *optional*):
            Keep an exponential moving average of the weights, such as 0.999. It is validated, and is what the saved
            model consists of; checkpoints hold the weights, with which a run goes on, and the average in `averaged/`,
            which `from_pretrained` reads.
        non_finite (`"stop"` or `"skip"`, defaults to `"stop"`): what a loss or gradient that is not finite does: stop
            the run, or leave the step out.
        max_skipped_steps (`int`, defaults to 10): so many steps left out in a row, and the run stops all the same.
        num_processes (`int`, *optional*):
            How many processes the run must have; another count is refused before the first step. Some launchers
            start one process where several were asked for.
        strategy (`"single"`, `"ddp"`, `"fsdp2"`, `"zero1"`, `"zero2"` or `"zero3"`, *optional*):
            How the processes must share the model; whatever else was started is refused before the first step.
        use_cpu (`bool`, defaults to `False`): train on the CPU though there is an accelerator.
        find_unused_parameters (`bool`, defaults to `True`):
            Several processes: let a step leave some parameters without gradient (a term of weight 0, no local views).
        logging_steps (`int`, defaults to 10), eval_steps, save_steps (`int`, *optional*, default to none and 200):
            Optimiser steps between log lines, validations and checkpoints. Both also happen at the end of the run.
        save_total_limit (`int`, *optional*, defaults to 2): newest checkpoints that are kept; `None` keeps all.
        checkpoint_copies (`str`, *optional*):
            Address (`s3://...` or whatever fsspec knows) to which the same checkpoints are copied after each is
            written, and from which a run without them, on another machine, resumes with the newest, its log with it.
            What `save_total_limit` and the best metric keep, is kept there, too. One run has one address.
        metric_for_best_model (`str`, *optional*):
            A metric of the validation; the checkpoint where it was best is kept besides, and written if none was due.
            A resumed run with another metric, or the same the other way round, looks for its best anew.
        greater_is_better (`bool`, defaults to `True`): whether a greater one is better; `false` for losses.
        early_stopping_patience (`int`, *optional*):
            End the run after so many validations in a row in which that metric was never better.
        max_hours (`float`, *optional*):
            Hours from the start of the process after which it writes a checkpoint and exits with status 75, to be
            resumed: less than a scheduler grants, by the time of a step, a validation and a checkpoint. The schedule
            of learning rates does not know it.
        trackers (`list[str]`, defaults to `["tensorboard"]`): Accelerate's names of experiment trackers.
        plot (`bool`, defaults to `True`): draw losses and metrics beside the checkpoints when one is written.
        seed (`int`, defaults to 42): order of the pairs, views and dropout.
    """

    output_dir: str
    max_steps: int | None = None
    max_train_minutes: float | None = None
    num_train_epochs: float = 20.0
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    gradient_caching: bool = False
    caching_micro_batch_size: int | None = None
    view_chunk_size: int | None = None
    batch_norm: Literal["synchronised", "frozen"] = "synchronised"
    drop_last: bool = True
    dataloader_num_workers: int = 0
    vision_learning_rate: float = 1e-4
    head_learning_rate: float = 1e-4
    text_learning_rate: float = 2e-5
    min_learning_rate: float = 1e-6
    warmup_ratio: float = 0.05
    weight_decay: float = 0.05
    place_soft_threshold: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    activation_checkpointing: bool = False
    activation_checkpointing_stages: list[str] = field(default_factory=list)
    compile_encoder: bool = False
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    frozen_vision_layers: int = 0
    frozen_parameters: list[str] = field(default_factory=list)
    ema_decay: float | None = None
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10
    num_processes: int | None = None
    strategy: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] | None = None
    use_cpu: bool = False
    find_unused_parameters: bool = True
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = 200
    save_total_limit: int | None = 2
    checkpoint_copies: str | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool = True
    early_stopping_patience: int | None = None
    max_hours: float | None = None
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    plot: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "max_train_minutes",
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "caching_micro_batch_size",
            "view_chunk_size",
            "max_grad_norm",
            "num_processes",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "early_stopping_patience",
            "max_hours",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"training.{name} must be positive, got {value}")
        if self.caching_micro_batch_size is not None and not self.gradient_caching:
            raise ConfigurationError("training.caching_micro_batch_size needs training.gradient_caching=true")
        if self.gradient_caching and self.gradient_accumulation_steps == 1 and self.caching_micro_batch_size is None:
            raise ConfigurationError(
                "training.gradient_caching has one part to cache; set training.gradient_accumulation_steps or "
                "training.caching_micro_batch_size"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigurationError(f"training.warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        for name in ("dataloader_num_workers", "frozen_vision_layers", "place_soft_threshold"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"training.{name} must be 0 or more, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigurationError(f"training.ema_decay must lie between 0 and 1, got {self.ema_decay}")
        if self.activation_checkpointing_stages and not self.activation_checkpointing:
            raise ConfigurationError(
                "training.activation_checkpointing_stages needs training.activation_checkpointing=true"
            )
        if self.early_stopping_patience is not None and (self.metric_for_best_model is None or not self.eval_steps):
            raise ConfigurationError(
                "training.early_stopping_patience needs training.metric_for_best_model and training.eval_steps"
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings, for trackers, checkpoints and the model card."""
        return asdict(self)


@dataclass
class DataArguments:
    """
    What a run trains on.

    Args:
        manifest (`str`): the `.csv` or `.jsonl` file; see [`~modeling_t3d.data.manifest`].
        train_split, validation_split (`str`): which rows train and which are scored during training; the second may
            be `None`.
        sections (`"both"`, `"findings"` or `"impression"`): which sections make the text.
        min_report_words (`int`, defaults to 5): rows with a shorter report are dropped, counted and printed.
        max_report_tokens (`int`, defaults to 512): longer reports are cut, counted and printed.
        num_sentence_texts (`int`, defaults to 0): further texts per volume and epoch, each one to three sentences of
            its whole report [choice].
        cache_dir (`str`, *optional*): where prepared volumes are kept; `prepared` beside the manifest by default.
        store (`str`, *optional*): address of a volume store in place of `cache_dir`: a folder, `s3://...` or whatever
            fsspec knows. Rows with a key need no source file. An endpoint or keys come from fsspec's own configuration
            (`FSSPEC_S3_ENDPOINT_URL=...`) or the environment: this one is saved and logged.
        streaming (`bool`, defaults to `False`): batches come from a stream whose loader processes follow the order by
            themselves, see [`~modeling_t3d.data.streaming.StreamingDataset`]; for very large data sets.
        study_sampling (`"independent"`, `"together"` or `"one"`): how a stream treats the reconstructions of a study:
            wherever the order puts them, in one batch, or one of them in each epoch.
        keep_global_views (`bool`, defaults to `False`): keep global views there too, in whole HU; a step then cuts
            local views alone [choice].
        num_preparation_workers (`int`, defaults to 1): processes that prepare volumes before the first step.
        augmentation (`dict`):
            Arguments of [`~modeling_t3d.data.augmentation.BatchAugmentation`], which checks them; none by default.
        crop_perturbation (`dict`, *optional*):
            Arguments of [`~modeling_t3d.data.perturbation.CropPerturbation`], which checks them; `{}` for the
            published ones, none by default.
        texts (`dict`):
            Arguments of [`~modeling_t3d.data.report_texts.ReportTexts`], which checks them: sampled sentences, and the
            share of texts whose findings are described; none by default.
        finding_descriptions (`str`, *optional*): JSON file, finding -> what it is; prompts carry it, and texts by
            their own setting.
        name, license (`str`, *optional*): for the model card and the provenance in the configuration; a data set of
            the Hub goes by its id, `owner/name`.
        synthetic (`bool`, defaults to `False`): the volumes are no patients but phantoms; said in the card, and once
            by whatever uses the model.
    """

    manifest: str
    train_split: str = "train"
    validation_split: str | None = "validation"
    sections: Literal["both", "findings", "impression"] = "both"
    min_report_words: int = 5
    max_report_tokens: int = 512
    num_sentence_texts: int = 0
    cache_dir: str | None = None
    store: str | None = None
    streaming: bool = False
    study_sampling: Literal["independent", "together", "one"] = "independent"
    keep_global_views: bool = False
    num_preparation_workers: int = 1
    augmentation: dict[str, Any] = field(default_factory=dict)
    crop_perturbation: dict[str, Any] | None = None
    texts: dict[str, Any] = field(default_factory=dict)
    finding_descriptions: str | None = None
    name: str | None = None
    license: str | None = None
    synthetic: bool = False

    def __post_init__(self) -> None:
        if self.store is not None and self.cache_dir is not None:
            raise ConfigurationError("data.store and data.cache_dir are two places for the same volumes; set one")
        if self.augmentation and self.crop_perturbation is not None:
            raise ConfigurationError(
                "data.augmentation and data.crop_perturbation both change and flip the views; set one"
            )
        if self.texts.get("description_probability") and self.finding_descriptions is None:
            raise ConfigurationError(
                "data.texts.description_probability describes findings; name a file in data.finding_descriptions"
            )
        if self.study_sampling != "independent" and not self.streaming:
            raise ConfigurationError(
                f"data.study_sampling={self.study_sampling} is a setting of streams; set data.streaming: true"
            )


@dataclass
class ModelArguments:
    """
    Which model, from what weights.

    Args:
        preset (`str`, defaults to `"base"`): a preset of [`T3DConfig`].
        objective (`str`, *optional*): `"v3"`, `"v1"` or `"gtgm"`: what is trained, see `modeling_t3d.presets_t3d`.
        overrides (`dict`): fields of [`T3DConfig`] to change; a `dict` in it changes fields of a tower.
        vision_model_name_or_path, text_model_name_or_path (`str`, *optional*):
            Folders or Hub names of pretrained towers; a tower without one starts from scratch.
        tokenizer_name_or_path (`str`, *optional*):
            The text tower's by default; without a pretrained text tower one is trained on the training reports.
        tokenizer_vocab_size (`int`, defaults to 1024): of a tokenizer that is trained.
    """

    preset: str = "base"
    objective: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    vision_model_name_or_path: str | None = None
    text_model_name_or_path: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_vocab_size: int = 1024


@dataclass
class PretrainingConfiguration:
    """
    A YAML file of `examples/configs`: its sections are the fields.

    Args:
        data ([`DataArguments`]), model ([`ModelArguments`]), training ([`T3DTrainingArguments`]): see there.
        image_processor (`dict`): arguments of [`T3DImageProcessor`], which checks them.
    """

    data: DataArguments
    training: T3DTrainingArguments
    model: ModelArguments = field(default_factory=ModelArguments)
    image_processor: dict[str, Any] = field(default_factory=dict)


def load_configuration(path: str | Path, overrides: Sequence[str] = ()) -> PretrainingConfiguration:
    """
    Read a YAML file and apply dotted overrides.

    Args:
        path (`str` or `Path`): the file.
        overrides (sequence of `str`): for example `"training.max_steps=100"`; the value is read as YAML. `~/` is the
            home folder there and in the file, which no shell puts in its place behind an equals sign.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such configuration; examples/configs holds some")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise ConfigurationError(f"override {override!r}: write section.name=value")
            _set_dotted(values, key.lstrip("-").split("."), yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    return from_mapping(PretrainingConfiguration, _with_home(values))


def _with_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_home(entry) for name, entry in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _set_dotted(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigurationError(f"override {'.'.join(keys)}: {key!r} holds a value, not a section")
    values[keys[-1]] = value


def from_mapping(cls: type, values: Any, section: str = "") -> Any:
    """
    An instance of a dataclass from nested dictionaries, strict about names and types.

    Args:
        cls (`type`): the dataclass.
        values (`dict`): its fields.
        section (`str`): where they come from, for messages.
    """
    if not isinstance(values, dict):
        raise ConfigurationError(f"section {section!r} must hold settings, got {values!r}")
    annotations = get_type_hints(cls)
    names = [entry.name for entry in fields(cls)]
    prefix = f"{section}." if section else ""
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are {', '.join(names)}"
            raise ConfigurationError(f"unknown setting {prefix}{name}; {hint}")
    for entry in fields(cls):
        if entry.name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigurationError(f"setting {prefix}{entry.name} is missing; add it")
    return cls(**{name: _typed(prefix + name, value, annotations[name]) for name, value in values.items()})


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """`value` checked against a field's annotation; YAML reads `1e-4` as text, so numbers in text are accepted."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return from_mapping(annotation, value, name)
    origin, choices = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in choices else value
        if value not in choices:
            raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _typed(name, value, next(choice for choice in choices if choice is not type(None)))
    if annotation is float:
        try:
            return float(value) if not isinstance(value, bool) else _wrong_type(name, value, annotation)
        except (TypeError, ValueError):
            _wrong_type(name, value, annotation)
    container = origin or annotation
    if not isinstance(value, container) or (annotation is int and isinstance(value, bool)):
        _wrong_type(name, value, annotation)
    return value


def _wrong_type(name: str, value: Any, annotation: Any) -> None:
    expected = getattr(annotation, "__name__", str(annotation))
    raise ConfigurationError(f"{name} must be of type {expected}, got {value!r}")


__all__ = [
    "ConfigurationError",
    "DataArguments",
    "ModelArguments",
    "PretrainingConfiguration",
    "T3DTrainingArguments",
    "from_mapping",
    "load_configuration",
]
