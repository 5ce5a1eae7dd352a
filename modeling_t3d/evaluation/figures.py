# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Figures of an evaluation: slices of one volume with the text-attention map over them."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# (name, fixed axis, label of the left and right edge): radiological view, the patient's right on the left.
PLANES = (("axial", 0, ("R", "L")), ("coronal", 1, ("R", "L")), ("sagittal", 2, ("A", "P")))


def _slice(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """One slice: rows from the bottom up (anterior or superior on top), columns from left to right of the picture."""
    # Columns grow towards the right or the front, which both belong on the left of the picture.
    return np.take(array, index, axis=axis)[:, ::-1]


def plot_attention(
    array: np.ndarray,
    attention: np.ndarray,
    path: str | os.PathLike,
    *,
    spacing: Sequence[float],
    title: str = "",
    window: tuple[float, float] = (-160.0, 240.0),
    lesion: np.ndarray | None = None,
    center: Sequence[int] | None = None,
) -> Path:
    """Write a PNG: axial, coronal and sagittal slice, plain above, with the attention map over it below.

    Args:
        array (`np.ndarray` of shape `(D, H, W)`): HU in canonical order (z, y, x).
        attention (`np.ndarray` of shape `(D, H, W)`): from [`attention_volume`]; nan where no view looked.
        path: of the PNG; its folder is made.
        spacing: mm per voxel, (z, y, x).
        title: the text that asked, for instance.
        window: HU shown as black and white.
        lesion (`np.ndarray` of shape `(D, H, W)`, *optional*): mask, drawn as a contour.
        center: (z, y, x) voxel that the slices cross; by default the middle of the highest attention.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_attention needs matplotlib: pip install modeling-t3d[eval]") from error
    if array.shape != attention.shape or array.ndim != 3:
        raise ValueError(f"volume {array.shape} and attention {attention.shape} must be one (D, H, W) grid")
    if np.isnan(attention).all():
        raise ValueError("the attention map is empty: no view lies on this volume")
    if center is None:
        center = np.median(np.argwhere(attention == np.nanmax(attention)), axis=0).astype(int)
    low, high = float(np.nanmin(attention)), float(np.nanmax(attention))
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, (name, axis, (left, right)) in enumerate(PLANES):
        rows_axis, columns_axis = (other for other in range(3) if other != axis)
        index = int(center[axis])
        for row in range(2):
            panel = axes[row, column]
            shape = {"origin": "lower", "aspect": spacing[rows_axis] / spacing[columns_axis]}
            panel.imshow(_slice(array, axis, index), cmap="gray", vmin=window[0], vmax=window[1], **shape)
            if row == 1:
                overlay = np.ma.masked_invalid(_slice(attention, axis, index))
                shown = panel.imshow(overlay, cmap="inferno", vmin=low, vmax=high, alpha=0.45, **shape)
            if lesion is not None and _slice(lesion, axis, index).any():
                panel.contour(_slice(lesion, axis, index) != 0, levels=[0.5], colors="cyan", linewidths=1.0)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"{left}{' ' * 30}{right}", fontsize=8)
            panel.set_title(f"{name}, slice {index}" if row == 0 else "with attention", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.5, label="attention")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


__all__ = ["plot_attention"]
