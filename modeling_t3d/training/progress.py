# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a run tells: a progress bar or log lines, `log.jsonl`, and experiment trackers."""

import json
import logging
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .files import write_text_atomically
from .plots import plot_log
from .state import TrainerState
from .trackers import StepTrackers

logger = logging.getLogger(__name__)

# In the folder of a run: what it logged, and what it told trackers that cannot take it back.
LOG_FILE = "log.jsonl"
TRACKED_FILE = "tracked.jsonl"


class StepMeter:
    """
    Means of the steps' scalars and the pace since the last log line. Scalars stay on their device until read.

    Args:
        accelerator (`Accelerator`): the run's.
        state ([`TrainerState`]): the run's; read, never changed.
        num_samples (`int`): size of the training data.
    """

    def __init__(self, accelerator: Accelerator, state: TrainerState, num_samples: int) -> None:
        self.accelerator = accelerator
        self.state = state
        self.num_samples = num_samples
        self._start_anew()

    def _start_anew(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._wait_seconds = 0.0
        self._seconds_before, self._volumes_before = self.state.elapsed_seconds, self.state.num_volumes

    def add(self, terms: dict[str, torch.Tensor], wait_seconds: float) -> None:
        """Count one step: its scalars, and how long it waited for data."""
        self._wait_seconds += wait_seconds
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self, progress: float) -> dict[str, float]:
        """
        Means over steps and processes, pace and memory; starts anew. Steps that were left out have no part in means.

        A value that is not finite raises: this stands before every checkpoint.

        Args:
            progress (`float`): share of the run that is over.
        """
        values: dict[str, float] = {}
        if self._sums:
            means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
            values = dict(zip(self._sums, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} became {value} by step {self.state.step}; the last checkpoint is whole: resume from it "
                    "with a lower learning rate or training.mixed_precision=no"
                )
        seconds = max(self.state.elapsed_seconds - self._seconds_before, 1e-9)
        values["volumes_per_second"] = (self.state.num_volumes - self._volumes_before) / seconds
        values["data_wait_share"] = self._wait_seconds / seconds
        values["peak_memory_gib"] = peak_memory(self.accelerator.device) / 2**30
        values["remaining_minutes"] = self.state.elapsed_seconds / 60 * (1 - progress) / max(progress, 1e-9)
        values["skipped_steps"] = self.state.skipped_steps
        values["epoch"] = self.state.num_volumes / self.num_samples
        self._start_anew()
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes that a run has needed so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024


def describe(values: dict[str, float]) -> str:
    """
    Numbers of a log line for people: the loss and its terms, the pace, what it waits for, memory, and when it ends.

    Example:

    ```python
    >>> from modeling_t3d.training.progress import describe

    >>> describe({"loss": 3.25, "loss_gca": 3.0, "volumes_per_second": 51.2, "data_wait_share": 0.014})
    'loss 3.25 (gca 3) | 51.2 volumes/s | data wait 1.4 %'

    ```"""
    terms = [f"{name[5:]} {value:.4g}" for name, value in values.items() if name.startswith("loss_")]
    parts = {
        "loss": "loss {:.4g}" + (f" ({', '.join(terms)})" if terms else ""),
        "grad_norm": "gradient {:.3g}",
        "learning_rate": "rate {:.2g}",
        "volumes_per_second": "{:.3g} volumes/s",
        "data_wait_share": "data wait {:.1%}",
        "peak_memory_gib": "{:.1f} GiB",
        "remaining_minutes": "{:.0f} min left",
        "epoch": "epoch {:.2f}",
    }
    described = [text.format(values[name]).replace("%", " %") for name, text in parts.items() if name in values]
    if values.get("skipped_steps"):
        described.append(f"{values['skipped_steps']:.0f} steps left out")
    return " | ".join(described)


class ProgressReporter:
    """
    Tells on the main process what the run does.

    Args:
        accelerator (`Accelerator`): the run's.
        output_dir (`Path`): `log.jsonl` is written here, one line per log step.
        settings (`dict`): for the trackers.
        total (`int`, *optional*): optimiser steps, where known beforehand.
        step (`int`): where the run starts; what a killed run logged beyond is dropped.
        name (`str`): of the run, the same when it is resumed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        settings: dict[str, Any],
        *,
        total: int | None,
        step: int,
        name: str,
    ) -> None:
        self.accelerator = accelerator
        self.path = output_dir / LOG_FILE
        self.wants_plot = settings["plot"]
        # Without a terminal the bar is off and log lines take its place.
        self.bar = tqdm(
            total=total,
            initial=step,
            desc="training",
            unit="step",
            disable=None if accelerator.is_main_process else True,
        )
        if accelerator.is_main_process:
            self._rewind(step)
        self.trackers = StepTrackers(accelerator, output_dir / TRACKED_FILE, settings, step=step, name=name)

    def _rewind(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text_atomically(self.path, "".join(kept))

    def advance(self) -> None:
        """One optimiser step is done."""
        self.bar.update()

    def log(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """Write one line of numbers."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self.trackers.log(step, values, kind)
        if kind == "train":
            text = describe(values)
        else:
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if kind == "train" and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            self.bar.clear()
            logger.info("step %d, %s: %s", step, kind, text)

    def draw(self) -> None:
        """Draw `progress.png` beside the log, unless the settings say not to."""
        if self.accelerator.is_main_process and self.wants_plot and self.path.exists():
            self.wants_plot = plot_log(self.path, self.path.with_name("progress.png"))

    def close(self) -> None:
        """Flush trackers and leave the bar as it stands."""
        self.bar.close()
        self.trackers.close()


__all__ = ["LOG_FILE", "TRACKED_FILE", "ProgressReporter", "StepMeter"]
