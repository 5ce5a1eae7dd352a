# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Does the text-attention map point at the lesion: pointing accuracy and average precision over local-view tokens.

Boxes of views are in voxels of the lesion mask's own grid, order (z, y, x).
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..geometry_t3d import Volume, crop_affine
from .encoding import TEXT_INPUTS, evaluation_mode, token_limit
from .statistics import Interval, average_precision, bootstrap_mean, percentile_interval

# A cell that overlaps a voxel by less than this share of a voxel, by rounding of affines, does not touch it.
EDGE_TOLERANCE = 1e-3


def boxes_from_affines(
    view_affines: Sequence[np.ndarray], view_size: Sequence[int], mask_affine: np.ndarray
) -> np.ndarray:
    """Boxes of local views in voxel edges of the mask grid.

    Args:
        view_affines: per view a (4, 4) affine from the view's (z, y, x) voxel indices to RAS world mm.
        view_size: (depth, height, width) of a view in its own voxels.
        mask_affine (`np.ndarray` of shape `(4, 4)`): from the mask's (z, y, x) indices to RAS world mm.

    Returns:
        `np.ndarray` of shape `(S, 6)`: z0, y0, x0, z1, y1, x1; voxel i of the mask spans [i, i + 1).

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.localisation import boxes_from_affines
    >>> mask = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # (z, y, x) -> x, y, z, 1 mm
    >>> boxes_from_affines([mask @ np.diag([2, 2, 2, 1.0])], (4, 4, 4), mask).tolist()  # 2 mm, same first centre
    [[-0.5, -0.5, -0.5, 7.5, 7.5, 7.5]]

    ```
    """
    boxes = []
    for affine in view_affines:
        to_mask = np.linalg.inv(np.asarray(mask_affine, dtype=np.float64)) @ np.asarray(affine, dtype=np.float64)
        linear = to_mask[:3, :3]
        scale = np.diag(linear)
        if (scale <= 0).any() or np.abs(linear - np.diag(scale)).max() > 1e-3 * scale.max():
            raise ValueError(
                "a view and the lesion mask must share their axes: bring the mask to canonical orientation "
                "(Volume.to_canonical) before mapping boxes"
            )
        # Outer faces lie half a voxel outside the first and last centres; centres i sit at i + 1/2 in voxel edges.
        start = to_mask[:3, 3] - 0.5 * scale + 0.5
        boxes.append(np.concatenate([start, start + scale * np.asarray(view_size)]))
    return np.stack(boxes)


def _cell_edges(starts: np.ndarray, stops: np.ndarray, num_cells: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last mask voxel that each cell of each view overlaps along one axis, clipped to the mask's
    size; two arrays of shape `(views, num_cells)`."""
    edges = np.linspace(starts, stops, num_cells + 1, axis=1)
    first = np.floor(edges[:, :-1] + EDGE_TOLERANCE)
    last = np.ceil(edges[:, 1:] - EDGE_TOLERANCE)
    return np.clip(first, 0, size).astype(np.int64), np.clip(last, 0, size).astype(np.int64)


def tokens_touching(mask: np.ndarray, boxes: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Which tokens of each view overlap the lesion.

    Args:
        mask (`np.ndarray` of shape `(D, H, W)`): lesion voxels (non-zero), order (z, y, x).
        boxes (`np.ndarray` of shape `(S, 6)`): views in voxel edges of the mask grid, possibly fractional or outside.
        grid: (d, h, w) tokens per view.

    Returns:
        `np.ndarray` of shape `(S, d, h, w)`, bool.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.localisation import tokens_touching
    >>> mask = np.zeros((4, 4, 4)); mask[3, 0, 0] = 1
    >>> tokens_touching(mask, np.array([[0, 0, 0, 4, 4, 4]]), (2, 2, 2)).nonzero()[1:]
    (array([1]), array([0]), array([0]))

    ```
    """
    # Sums over any box of voxels are eight look-ups in the padded cumulative sum.
    total = np.pad(np.asarray(mask) != 0, ((1, 0),) * 3).astype(np.int64)
    for axis in range(3):
        total = total.cumsum(axis=axis)
    boxes = np.asarray(boxes, dtype=np.float64)
    (z0, z1), (y0, y1), (x0, x1) = (
        _cell_edges(boxes[:, axis], boxes[:, axis + 3], grid[axis], mask.shape[axis]) for axis in range(3)
    )
    count = np.zeros((len(boxes), *grid), dtype=np.int64)
    for z, z_sign in ((z1, 1), (np.minimum(z0, z1), -1)):
        for y, y_sign in ((y1, 1), (np.minimum(y0, y1), -1)):
            for x, x_sign in ((x1, 1), (np.minimum(x0, x1), -1)):
                corner = total[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]
                count += z_sign * y_sign * x_sign * corner
    return count > 0


@dataclass(frozen=True)
class LocalisationScore:
    """One lesion in one volume.

    Attributes:
        pointing: 1 when the maximum over all valid views touches the lesion, else 0 (a share where maxima tie).
        average_precision: of the tokens that touch the lesion, ranked by attention over all valid views.
        chance: share of tokens that touch the lesion: the expected value of both for a random map.
        pointing_within_view: mean of the same over the views that contain the lesion, each with its own maximum.
        chance_within_view: its chance level.
    """

    pointing: float
    average_precision: float
    chance: float
    pointing_within_view: float
    chance_within_view: float


def _share_of_maxima_inside(attention: np.ndarray, touched: np.ndarray) -> float:
    """Expected hit of a maximum drawn among equal ones: a constant map scores chance, not what stands first."""
    return float(touched[attention == attention.max()].mean())


def score_attention(
    attention: np.ndarray,
    touched: np.ndarray,
    view_mask: np.ndarray | None = None,
    view_weights: np.ndarray | None = None,
) -> LocalisationScore | None:
    """Score one attention map against the tokens that touch the lesion.

    Args:
        attention (`np.ndarray` of shape `(S, d, h, w)`): sums to one within each view.
        touched (`np.ndarray` of shape `(S, d, h, w)`): from [`tokens_touching`].
        view_mask (`np.ndarray` of shape `(S,)`, *optional*): valid views.
        view_weights (`np.ndarray` of shape `(S,)`, *optional*): non-negative weight of each view when views are
            compared with each other, for instance the softmax of their similarity to the prompt: attention is
            normalised per view and does not itself say which view matters.

    Returns:
        `LocalisationScore`, or None when no valid view contains the lesion or the lesion fills all of them.
    """
    attention, touched = np.asarray(attention, dtype=np.float64), np.asarray(touched, dtype=bool)
    if attention.shape != touched.shape or attention.ndim != 4:
        raise ValueError(f"attention {attention.shape} and lesion tokens {touched.shape} must both be (S, d, h, w)")
    if not np.isfinite(attention).all():
        raise ValueError("the attention map holds values that are not finite")
    if view_mask is not None:
        keep = np.asarray(view_mask, dtype=bool)
        attention, touched = attention[keep], touched[keep]
        view_weights = None if view_weights is None else np.asarray(view_weights)[keep]
    if not touched.any() or touched.all():
        return None
    weighted = attention if view_weights is None else attention * np.reshape(view_weights, (-1, 1, 1, 1))
    inside = [view for view in range(len(touched)) if touched[view].any()]
    return LocalisationScore(
        pointing=_share_of_maxima_inside(weighted, touched),
        average_precision=average_precision(touched.ravel(), weighted.ravel()),
        chance=float(touched.mean()),
        pointing_within_view=float(np.mean([_share_of_maxima_inside(attention[v], touched[v]) for v in inside])),
        chance_within_view=float(np.mean([touched[view].mean() for view in inside])),
    )


@dataclass(frozen=True)
class LocalisationSummary:
    """Means over the scored lesions with patient-level intervals; the chance levels stand beside them.

    Attributes:
        pointing: accuracy of the maximum over all views.
        pointing_within_view: accuracy of each view's own maximum, over views that contain the lesion.
        average_precision: mean area under the precision-recall curve.
        chance: chance level of `pointing` and `average_precision`.
        chance_within_view: chance level of `pointing_within_view`.
        num_scored: lesions scored.
        num_left_out: lesions outside every view (or filling them all), which cannot be scored.
    """

    pointing: Interval
    pointing_within_view: Interval
    average_precision: Interval
    chance: float
    chance_within_view: float
    num_scored: int
    num_left_out: int


def summarise_localisation(
    scores: Sequence[LocalisationScore | None],
    patient_ids: Sequence[Hashable],
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LocalisationSummary:
    """Means over lesions, one score (or None) and one patient id per lesion."""
    scored = [(score, patient) for score, patient in zip(scores, patient_ids, strict=True) if score is not None]
    patients = [patient for _, patient in scored]
    nothing = Interval(value=float("nan"), low=float("nan"), high=float("nan"))

    def interval(name: str) -> Interval:
        if not scored:
            return nothing
        values = np.array([getattr(score, name) for score, _ in scored])
        replicates = bootstrap_mean(values, patients, num_resamples=num_resamples, seed=seed)
        return percentile_interval(values.mean(), replicates, confidence)

    return LocalisationSummary(
        pointing=interval("pointing"),
        pointing_within_view=interval("pointing_within_view"),
        average_precision=interval("average_precision"),
        chance=float(np.mean([score.chance for score, _ in scored])) if scored else float("nan"),
        chance_within_view=float(np.mean([score.chance_within_view for score, _ in scored]))
        if scored
        else float("nan"),
        num_scored=len(scored),
        num_left_out=len(scores) - len(scored),
    )


def localisation_case(
    prepared: Any, local_views: Any, lesions: Mapping[str, Volume], patient_id: Hashable
) -> dict[str, Any]:
    """One volume for [`evaluate_localisation`].

    Args:
        prepared: the `PreparedVolume` that the views were cut from.
        local_views: the `LocalViews` of it (values and boxes).
        lesions: finding -> `Volume` whose non-zero voxels are the lesion, in any orientation and on any grid that
            shares the scan's axes.
        patient_id: for the bootstrap.
    """
    affines = [crop_affine(prepared.affine, box.start) for box in local_views.boxes]
    size = local_views.pixel_values.shape[-3:]
    masks = {finding: lesion.to_canonical() for finding, lesion in lesions.items()}
    return {
        "local_pixel_values": local_views.pixel_values,
        "lesions": {finding: mask.array != 0 for finding, mask in masks.items()},
        "boxes": {finding: boxes_from_affines(affines, size, mask.affine) for finding, mask in masks.items()},
        "patient_id": patient_id,
    }


def attention_of_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], local_pixel_values: torch.Tensor, view_batch_size: int = 32
) -> np.ndarray:
    """Attention of one volume's views to each of several texts; every view is encoded once.

    Args:
        model: a `T3DForPreTraining`.
        tokenizer: the processor's.
        texts: prompts or reports.
        local_pixel_values (`torch.Tensor` of shape `(S, C, d, h, w)`): the views.
        view_batch_size: views that pass through the tower at once.

    Returns:
        `np.ndarray` of shape `(num_texts, S, d', h', w')`, summing to one within each view.
    """
    limit = token_limit(model, tokenizer)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    inputs = {name: tokens[name].to(model.device) for name in TEXT_INPUTS if name in tokens}
    with evaluation_mode(model):
        chunks = (chunk.to(model.device) for chunk in local_pixel_values.split(view_batch_size))
        maps = torch.cat([model.base_model.encode_local_views(chunk[None])[0] for chunk in chunks], dim=1)
        attention = model.get_text_attention(**inputs, local_hidden_state=maps)
    return attention.float().cpu().numpy()


def text_attention(
    model: Any, tokenizer: Any, prompts: Sequence[str], local_pixel_values: torch.Tensor, view_batch_size: int = 32
) -> np.ndarray:
    """Attention of one volume's views to a finding: the mean map over wordings, (S, d', h', w').

    Arguments as in [`attention_of_texts`].
    """
    return attention_of_texts(model, tokenizer, prompts, local_pixel_values, view_batch_size).mean(axis=0)


def evaluate_localisation(
    model: Any,
    processor: Any,
    cases: Iterable[Mapping[str, Any]],
    prompts: Mapping[str, Sequence[tuple[str, str]]],
    *,
    view_batch_size: int = 32,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, LocalisationSummary]:
    """Score the attention map of each finding's positive prompts against its lesions, one volume at a time.

    Args:
        model: a `T3DForPreTraining`.
        processor: its `T3DProcessor`.
        cases: mappings as [`localisation_case`] makes them; any iterable. A finding without prompts is an error.
        prompts: finding -> (positive, negative) pairs.
        view_batch_size: views that pass through the tower at once.
        num_resamples, confidence, seed: of the patient-level bootstrap.

    Returns:
        `dict` with "all" lesions, then each finding that occurs.
    """
    scores: dict[str, list[LocalisationScore | None]] = {"all": []}
    patients: dict[str, list[Hashable]] = {"all": []}
    for case in cases:
        missing = [finding for finding in case["lesions"] if finding not in prompts]
        if missing:
            raise ValueError(f"no prompts for the lesion {missing[0]!r}; add them or leave the lesion out")
        wordings = {finding: [positive for positive, _ in prompts[finding]] for finding in case["lesions"]}
        texts = [text for texts in wordings.values() for text in texts]
        attention = attention_of_texts(model, processor.tokenizer, texts, case["local_pixel_values"], view_batch_size)
        # Several wordings of a finding: their mean map.
        ends = np.cumsum([len(texts) for texts in wordings.values()])
        for (finding, mask), maps in zip(case["lesions"].items(), np.split(attention, ends[:-1]), strict=True):
            touched = tokens_touching(mask, case["boxes"][finding], maps.shape[2:])
            score = score_attention(maps.mean(axis=0), touched)
            for name in ("all", finding):
                scores.setdefault(name, []).append(score)
                patients.setdefault(name, []).append(case["patient_id"])
    settings: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    return {name: summarise_localisation(scores[name], patients[name], **settings) for name in scores}


def attention_volume(attention: np.ndarray, boxes: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Paint the attention of the views into a volume: the mean where views overlap, nan where no view looks.

    Args:
        attention (`np.ndarray` of shape `(S, d, h, w)`): one value per token; a token paints the voxels whose centre
            lies in its cell.
        boxes (`np.ndarray` of shape `(S, 6)`): views in voxel edges of the volume's grid.
        shape: (D, H, W) of the volume.

    Returns:
        `np.ndarray` of shape `(D, H, W)`, float32.
    """
    painted, views = np.zeros(tuple(shape), dtype=np.float32), np.zeros(tuple(shape), dtype=np.int32)
    for view, box in enumerate(np.asarray(boxes, dtype=np.float64)):
        rows, cells = [], []
        for axis in range(3):
            start, stop = box[axis], box[axis + 3]
            centres = np.arange(shape[axis]) + 0.5
            inside = np.flatnonzero((centres >= start) & (centres < stop))
            cell = (centres[inside] - start) / (stop - start) * attention.shape[axis + 1]
            rows.append(inside)
            cells.append(np.minimum(cell.astype(np.int64), attention.shape[axis + 1] - 1))
        painted[np.ix_(*rows)] += attention[view][np.ix_(*cells)]
        views[np.ix_(*rows)] += 1
    return np.divide(painted, views, out=np.full(painted.shape, np.nan, dtype=np.float32), where=views > 0)


def mask_on_grid(mask: Volume, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A mask in any orientation, read at the voxel centres of another grid that shares its axes.

    Args:
        mask: `Volume` whose non-zero voxels count.
        affine (`np.ndarray` of shape `(4, 4)`): of the wanted grid, (z, y, x) indices to RAS world mm.
        shape: (D, H, W) of the wanted grid.

    Returns:
        `np.ndarray` of shape `(D, H, W)`, bool; false outside the mask's own grid.
    """
    mask = mask.to_canonical()
    box = boxes_from_affines([affine], shape, mask.affine)[0]
    result, inside = np.zeros(tuple(shape), dtype=bool), []
    for axis in range(3):
        centres = box[axis] + (np.arange(shape[axis]) + 0.5) * (box[axis + 3] - box[axis]) / shape[axis]
        voxels = np.floor(centres).astype(np.int64)
        inside.append((np.flatnonzero((voxels >= 0) & (voxels < mask.array.shape[axis])), voxels))
    rows = [where for where, _ in inside]
    result[np.ix_(*rows)] = mask.array[np.ix_(*(voxels[where] for where, voxels in inside))] != 0
    return result


__all__ = [
    "LocalisationScore",
    "LocalisationSummary",
    "attention_of_texts",
    "attention_volume",
    "boxes_from_affines",
    "evaluate_localisation",
    "localisation_case",
    "mask_on_grid",
    "score_attention",
    "summarise_localisation",
    "text_attention",
    "tokens_touching",
]
