# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The course of a run as a picture: losses and metrics over its steps, from `log.jsonl`."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import PARTIAL_PREFIX

logger = logging.getLogger(__name__)

# Numbers of a log line that are no losses or metrics.
_PACE = (
    "step",
    "kind",
    "epoch",
    "volumes_per_second",
    "data_wait_share",
    "peak_memory_gib",
    "remaining_minutes",
    "skipped_steps",
    "log_num_candidates",
    "num_valid_anchors",
    "num_skipped_pairs",
)


def curves(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """
    Panels, and in each of them curves: steps and values.

    Example:

    ```python
    >>> from modeling_t3d.training.plots import curves

    >>> lines = [{"step": 10, "kind": "train", "loss": 3.0}, {"step": 10, "kind": "validation", "loss": 3.2}]
    >>> curves(lines)
    {'loss': {'train': ([10], [3.0]), 'validation': ([10], [3.2])}}

    ```"""
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _PACE and isinstance(value, (int, float)):
                steps, values = panels.setdefault(name, {}).setdefault(line["kind"], ([], []))
                steps.append(line["step"])
                values.append(value)
    return panels


def plot_log(log: Path, target: Path) -> bool:
    """
    Draw a log; returns whether matplotlib was there to do it.

    Args:
        log (`Path`): `log.jsonl` of a run.
        target (`Path`): the PNG, replaced as a whole.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture of the run: pip install 'modeling_t3d[eval]', or set training.plot to false")
        return False
    panels = curves(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    if not panels:
        return True
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 2.6 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, panel) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        for kind, (steps, values) in panel.items():
            axes.plot(steps, values, label=kind, marker="." if len(steps) < 30 else None, linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(panel) > 1:
            axes.legend(fontsize=8)
    partial = target.with_name(f"{PARTIAL_PREFIX}{target.name}")
    figure.savefig(partial, dpi=100, format="png")
    partial.replace(target)
    return True


__all__ = ["curves", "plot_log"]
