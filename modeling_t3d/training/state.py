# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Where a run stands, what must be the same for a resumed run to be the same run, and the folder that it leaves."""

import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from .arguments import ConfigurationError
from .checkpoints import CheckpointError
from .files import PARTIAL_PREFIX, flush_folder, replace_folder, write_text
from .model_card import CARD_FILE
from .processes import ProcessGroup
from .sharded_state import model_tensors

if TYPE_CHECKING:
    from .trainer import T3DTrainer

logger = logging.getLogger(__name__)

# Fields of a configuration that tell where a model comes from or how it is stored, which saving changes.
_PROVENANCE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "provenance",
    "transformers_version",
)


@dataclass
class TrainerState:
    """
    Where a run stands; all that a checkpoint holds beside tensors and random states.

    Args:
        step (`int`): optimiser steps taken.
        epoch (`int`), next_batch (`int`): the next micro-batch of each process is this one of this epoch.
        elapsed_seconds (`float`): time spent in training steps, over all resumptions.
        num_volumes (`int`): volume-report pairs seen, over all processes.
        run (`str`): its name in trackers, kept over all resumptions.
        evaluated_step (`int`, *optional*): when the model was last validated.
        best_step (`int`, *optional*), best_metric (`float`, *optional*): when the metric that chooses the best
            checkpoint was best, and what it was.
        num_validations_without_gain (`int`): how many there were since.
        metric_for_best_model (`str`, *optional*), greater_is_better (`bool`, *optional*): which metric that is, and
            what is better; `None` where none was ever chosen, and in what former versions wrote.
        skipped_steps (`int`): steps that were left out because a loss or gradient was not finite.
    """

    step: int = 0
    epoch: int = 0
    next_batch: int = 0
    elapsed_seconds: float = 0.0
    num_volumes: int = 0
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    evaluated_step: int | None = None
    best_step: int | None = None
    best_metric: float | None = None
    num_validations_without_gain: int = 0
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    skipped_steps: int = 0

    def choose_metric(self, name: str | None, greater_is_better: bool) -> None:
        """
        Say which metric chooses the best checkpoint, before a run trains or goes on.

        Values of two metrics do not compare: with another one than before, best step and patience start anew.

        Args:
            name (`str`, *optional*): of the metric; with `None` what is known of a former one stays.
            greater_is_better (`bool`): whether a greater one is better.
        """
        if name is None:
            return
        former, chosen = (self.metric_for_best_model, self.greater_is_better), (name, greater_is_better)
        if former[0] is not None and former != chosen:
            logger.warning(
                "the best checkpoint was chosen by %s (greater is better: %s), from now on by %s (%s): the best step "
                "and the patience start anew",
                *former,
                *chosen,
            )
            self.best_step, self.best_metric, self.num_validations_without_gain = None, None, 0
        self.metric_for_best_model, self.greater_is_better = chosen

    def note_metrics(self, metrics: dict[str, float], name: str | None, greater_is_better: bool) -> bool:
        """
        Remember whether this step is the best so far.

        Args:
            metrics (`dict[str, float]`): of a validation.
            name (`str`, *optional*): the one that counts; `None` if none does.
            greater_is_better (`bool`): whether a greater one is better.
        """
        if name is None:
            return False
        if name not in metrics:
            raise ConfigurationError(
                f"training.metric_for_best_model={name!r} is none of the validation's {', '.join(sorted(metrics))}"
            )
        value, best = metrics[name], self.best_metric
        is_better = best is None or (value > best if greater_is_better else value < best)
        if not is_better or math.isnan(value):
            self.num_validations_without_gain += 1
            return False
        self.num_validations_without_gain = 0
        self.best_step, self.best_metric = self.step, value
        return True


@dataclass(frozen=True)
class TrainingResult:
    """
    How a run ended.

    Args:
        status (`str`): `"completed"`, or `"interrupted"` by a signal or `max_hours` after writing a checkpoint.
        state ([`TrainerState`]): where it stands.
        model_dir (`Path`, *optional*): the `save_pretrained` folder of a completed run.
        metrics (`dict[str, float]`): of the last validation.
    """

    status: str
    state: TrainerState
    model_dir: Path | None
    metrics: dict[str, float]


def refuse_other_run(folder: Path, saved: dict[str, Any], current: dict[str, Any], num_processes: int) -> None:
    """
    Raise if a checkpoint belongs to a run of other data or settings.

    Args:
        folder (`Path`): the checkpoint, which the message names.
        saved (`dict`), current (`dict`): what must be the same, also inside dictionaries; what the version that wrote
            the checkpoint did not know yet cannot differ.
        num_processes (`int`): that resume it.
    """
    for name, value in current.items():
        former = saved.get(name, value)
        if isinstance(former, dict) and isinstance(value, dict):
            before, now = ({f"{name}.{key}": entry for key, entry in entries.items()} for entries in (former, value))
            refuse_other_run(folder, before, now, num_processes)
        elif former != value:
            remedy = "resume with the same configuration and data"
            if name == "pairs_per_step":
                remedy = _how_to_keep(former, {**current, **saved}["gradient_accumulation_steps"], num_processes)
            raise CheckpointError(
                f"{folder}: the run had {name}={former!r}, this one has {value!r}; {remedy}, or choose another "
                "training.output_dir"
            )


def _how_to_keep(pairs_per_step: int, accumulation_steps: int, num_processes: int) -> str:
    """Which settings give as many pairs per step, if any do."""
    batch_size, rest = divmod(pairs_per_step, accumulation_steps * num_processes)
    if rest:
        return (
            f"no training.per_device_train_batch_size keeps it on {num_processes} processes, resume with a number of "
            f"processes that divides {pairs_per_step // accumulation_steps}"
        )
    return (
        f"to keep it on {num_processes} process(es) set training.per_device_train_batch_size={batch_size} and "
        f"training.gradient_accumulation_steps={accumulation_steps}"
    )


def run_identity(trainer: "T3DTrainer") -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run; of data and batches what they say themselves."""
    return {
        "seed": trainer.args.seed,
        "drop_last": trainer.args.drop_last,
        "pairs_per_step": trainer.pairs_per_step,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "gradient_caching": trainer.args.gradient_caching,
        "num_pairs": len(trainer.train_dataset),
        "order": trainer.sampler.identity,
        "data": getattr(trainer.train_dataset, "fingerprint", None),
        "num_batches": trainer.sampler.num_batches,
        # As the checkpoint's JSON has it: lists, not tuples.
        "batches": json.loads(json.dumps(getattr(trainer.collator, "identity", None))),
        "batch_norm": trainer.args.batch_norm,
        "ema_decay": trainer.args.ema_decay,
        "frozen_vision_layers": trainer.args.frozen_vision_layers,
        "frozen_parameters": trainer.args.frozen_parameters,
        "model": _model_identity(trainer.unwrapped_model.config),
    }


def _model_identity(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's configuration as JSON has it, without what says nothing of how the model computes."""

    def computed(entries: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in entries.items() if name not in _PROVENANCE}
        return {name: computed(value) if isinstance(value, dict) else value for name, value in kept.items()}

    return computed(json.loads(config.to_json_string(use_diff=False)))


def save_model_folder(
    target: Path,
    model: PreTrainedModel,
    processor: Any,
    card: str,
    processes: ProcessGroup,
    before_rename: Callable[[], Any],
) -> Path:
    """
    Write a `save_pretrained` folder that is whole or absent; every process calls this.

    Args:
        target (`Path`): the folder.
        model (`PreTrainedModel`), processor (*optional*), card (`str`): what it holds.
        processes ([`ProcessGroup`]): of the run.
        before_rename (callable): called on the main process; what it raises leaves the former folder.
    """
    tensors = model_tensors(model, keep=processes.is_main)
    # Of this process alone: a former run that wakes up may be writing, too.
    partial = target.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{target.name}")
    with processes.together():
        if processes.is_main:
            before_rename()
            for leftover in target.parent.glob(f"{PARTIAL_PREFIX}*-{target.name}"):
                shutil.rmtree(leftover)
            model.save_pretrained(partial, state_dict=tensors)
            if processor is not None:
                processor.save_pretrained(partial)
            write_text(partial / CARD_FILE, card)
            flush_folder(partial)
            before_rename()
            replace_folder(partial, target)
    return target


__all__ = ["TrainerState", "TrainingResult", "refuse_other_run", "run_identity", "save_model_folder"]
