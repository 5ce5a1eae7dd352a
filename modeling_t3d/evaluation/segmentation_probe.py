# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the frozen feature maps know about where organs are: a linear map from them to organ labels, and its Dice."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..geometry_t3d import Volume
from .encoding import evaluation_mode
from .statistics import Interval, mean_over_findings, patient_weights, percentile_interval


@dataclass(frozen=True)
class LabelledCells:
    """
    Cells of the finest feature map of one volume's views.

    Args:
        features (`torch.Tensor` of shape `(cells, channels)`): all levels of the pyramid at the cell.
        labels (`np.ndarray` of shape `(cells,)`): value of the label map at the cell's centre; 0 outside it.
        patient_id: whose volume it is.
    """

    features: torch.Tensor
    labels: np.ndarray
    patient_id: Hashable


@dataclass(frozen=True)
class SegmentationProbe:
    """
    Dice of the linear probe on patients that it was not fitted on, over all their cells together.

    Attributes:
        dice: organ -> Dice with its interval; an organ that no cell has is undefined.
        mean: over the organs that are defined.
        num_volumes, num_cells: that were scored.
        num_fitted_volumes: that the probe was fitted on.
    """

    dice: dict[str, Interval]
    mean: Interval
    num_volumes: int
    num_cells: int
    num_fitted_volumes: int


def cell_features(feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    A pyramid of feature maps at the cells of its finest level.

    Args:
        feature_maps (sequence of `torch.Tensor` of shape `(views, channels, d, h, w)`): finest first.

    Returns:
        `torch.Tensor` of shape `(views, d, h, w, channels of all levels)`; coarser levels are interpolated linearly.
    """
    grid = feature_maps[0].shape[2:]
    levels = [feature_maps[0]]
    levels += [torch.nn.functional.interpolate(level, grid, mode="trilinear") for level in feature_maps[1:]]
    return torch.cat(levels, dim=1).movedim(1, -1)


def labels_at_cells(label_map: Volume, affine: np.ndarray, boxes: Iterable[Any], grid: Sequence[int]) -> np.ndarray:
    """
    Values of a label map at the centres of the cells of views.

    Args:
        label_map (`Volume`): in any orientation.
        affine (`np.ndarray` of shape `(4, 4)`): of the grid that the boxes are on, (z, y, x) indices to RAS world mm.
        boxes: of the views, each with `start` and `stop` in voxels of that grid.
        grid: (d, h, w) cells of a view.

    Returns:
        `np.ndarray` of shape `(views, d, h, w)`; 0 outside the label map.
    """
    to_labels = np.linalg.inv(label_map.affine) @ np.asarray(affine, dtype=np.float64)
    labels = []
    for box in boxes:
        axes = [
            start + (np.arange(count) + 0.5) * (stop - start) / count - 0.5
            for start, stop, count in zip(box.start, box.stop, grid, strict=True)
        ]
        centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        voxels = np.rint(centres @ to_labels[:3, :3].T + to_labels[:3, 3]).astype(np.int64)
        inside = ((voxels >= 0) & (voxels < label_map.array.shape)).all(axis=-1)
        values = np.zeros(inside.shape, dtype=np.int64)
        values[inside] = label_map.array[tuple(voxels[inside].T)]
        labels.append(values)
    return np.stack(labels)


def labelled_cells(
    model: Any,
    dataset: Any,
    read_label_map: Callable[[Any], Volume],
    *,
    patient_ids: Collection[Hashable] | None = None,
    num_views: int = 4,
    mask_name: str = "organs",
    seed: int = 0,
) -> Iterator[LabelledCells]:
    """
    Cells of random local views of every volume that has a label map, one volume at a time.

    Args:
        model: with a `vision_model` of the encoder contract, itself or inside its `t3d`.
        dataset: has `rows` with `masks`, `prepared(index)` and `image_processor`.
        read_label_map: path -> `Volume` of integers, such as [`~modeling_t3d.volume_io_t3d.read_label_map`].
        patient_ids: of these patients only; all by default.
        num_views, mask_name, seed: views per volume, key of the label map in a row's masks, places of the views.
    """
    vision_model = getattr(model, "t3d", model).vision_model
    device = next(vision_model.parameters()).device
    for index, row in enumerate(dataset.rows):
        if mask_name not in row.masks or (patient_ids is not None and row.patient_id not in patient_ids):
            continue
        prepared = dataset.prepared(index)
        views = dataset.image_processor.make_views(prepared, num_views, np.random.default_rng((seed, index)))
        with evaluation_mode(model):
            maps = vision_model(views.pixel_values.to(device)).feature_maps
        features = cell_features([level.cpu().double() for level in maps])
        label_map = read_label_map(row.masks[mask_name])
        labels = labels_at_cells(label_map, prepared.affine, views.boxes, features.shape[1:4])
        yield LabelledCells(features.flatten(0, 3), labels.ravel(), row.patient_id)


def _with_constant(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def fit_cells(cells: Iterable[LabelledCells], values: Sequence[int], penalty: float) -> torch.Tensor:
    """
    Ridge regression of membership in each organ, and in none, on the features: one pass, a few small sums.

    Args:
        cells: of the volumes to fit on.
        values: of the organs in the label map.
        penalty: ridge, relative to the mean square of a feature.

    Returns:
        `torch.Tensor` of shape `(channels + 1, organs + 1)`, float64; the last row is the constant.
    """
    squares: Any = 0.0
    products: Any = 0.0
    known = torch.tensor(list(values))
    for part in cells:
        features, labels = _with_constant(part.features), torch.from_numpy(part.labels)
        members = (labels[:, None] == known).double()
        targets = torch.cat([1.0 - members.sum(dim=1, keepdim=True), members], dim=1)
        squares = squares + features.T @ features
        products = products + features.T @ targets
    if isinstance(squares, float):
        raise ValueError("a segmentation probe needs volumes with label maps to fit on; name their column in `masks`")
    ridge = penalty * squares.diagonal()[:-1].mean() * torch.ones(len(squares), dtype=torch.float64)
    ridge[-1] = 0.0  # the constant is not penalised
    return torch.linalg.solve(squares + torch.diag(ridge), products)


def probe_segmentation(
    fitted: Iterable[LabelledCells],
    scored: Iterable[LabelledCells],
    organs: Mapping[str, int],
    *,
    penalty: float = 1e-4,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> SegmentationProbe:
    """
    Fit on some patients, score on others.

    Args:
        fitted, scored: cells of volumes of different patients; see [`labelled_cells`].
        organs: name -> value in the label map.
        penalty: as in [`fit_cells`] [choice].
        num_resamples, confidence, seed: of the intervals, whose unit is the patient.
    """
    known: set[Hashable] = set()
    num_fitted = 0

    def noted() -> Iterator[LabelledCells]:
        nonlocal num_fitted
        for part in fitted:
            known.add(part.patient_id)
            num_fitted += 1
            yield part

    weights = fit_cells(noted(), list(organs.values()), penalty)
    patients, overlaps, sizes, num_cells = [], [], [], 0
    for part in scored:
        if part.patient_id in known:
            raise ValueError("a patient is among those that the probe was fitted on and those that score it")
        called = (_with_constant(part.features) @ weights).argmax(dim=1).numpy()
        pairs = [(called == place, part.labels == value) for place, value in enumerate(organs.values(), start=1)]
        overlaps.append([float((one & other).sum()) for one, other in pairs])
        sizes.append([float(one.sum() + other.sum()) for one, other in pairs])
        patients.append(part.patient_id)
        num_cells += len(part.labels)
    if not patients:
        raise ValueError("a segmentation probe needs volumes with label maps to score; name their column in `masks`")
    overlap, size = np.array(overlaps), np.array(sizes)

    def dice(counts: np.ndarray) -> np.ndarray:
        total = counts @ size
        return np.divide(2.0 * (counts @ overlap), total, out=np.full(total.shape, np.nan), where=total > 0)

    values = dice(np.ones((1, len(patients))))
    replicates = np.concatenate([dice(counts) for counts in patient_weights(patients, num_resamples, seed)])
    return SegmentationProbe(
        dice={
            name: percentile_interval(float(values[0, column]), replicates[:, column], confidence)
            for column, name in enumerate(organs)
        },
        mean=percentile_interval(float(mean_over_findings(values)[0]), mean_over_findings(replicates), confidence),
        num_volumes=len(patients),
        num_cells=num_cells,
        num_fitted_volumes=num_fitted,
    )


def halves_of_patients(rows: Iterable[Any], mask_name: str = "organs") -> tuple[list[Hashable], list[Hashable]]:
    """Every other patient with a label map, and the others, in the order of the rows."""
    patients = list(dict.fromkeys(row.patient_id for row in rows if mask_name in row.masks))
    return patients[::2], patients[1::2]


__all__ = [
    "LabelledCells",
    "SegmentationProbe",
    "cell_features",
    "fit_cells",
    "halves_of_patients",
    "labelled_cells",
    "labels_at_cells",
    "probe_segmentation",
]
