# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Where a run stands and how it ended."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class TrainerState:
    """
    Where a run stands; all that a checkpoint holds beside tensors and random states.

    Args:
        step (`int`): optimiser steps taken.
        epoch (`int`), next_batch (`int`): the next micro-batch of each process is this one of this epoch.
        elapsed_seconds (`float`): time spent in training steps, over all resumptions.
        num_volumes (`int`): volume-report pairs seen, over all processes.
    """

    step: int = 0
    epoch: int = 0
    next_batch: int = 0
    elapsed_seconds: float = 0.0
    num_volumes: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """
    How a run ended.

    Args:
        status (`str`): `"completed"`, or `"interrupted"` by a signal after writing a checkpoint.
        state ([`TrainerState`]): where it stands.
        model_dir (`Path`, *optional*): the `save_pretrained` folder of a completed run.
        metrics (`dict[str, float]`): of the last validation.
    """

    status: str
    state: TrainerState
    model_dir: Path | None
    metrics: dict[str, float]


__all__ = ["TrainerState", "TrainingResult"]
