# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Ranking metrics (area under the ROC curve, average precision) and patient-level bootstrap intervals on numpy arrays.

What a score means, and which findings form a group, is left to the callers.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Replicates x rows of one block of bootstrap weights: bounds the memory of a bootstrap to a few such float64 arrays.
MAX_BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True)
class MacroMean:
    """Mean over the defined values, with the count of what was left out.

    Attributes:
        mean: mean over the defined values; nan when none is defined.
        num_defined: number of values in the mean.
        num_undefined: number of values left out because they are undefined (nan).
    """

    mean: float
    num_defined: int
    num_undefined: int


@dataclass(frozen=True)
class Interval:
    """A point estimate with its bootstrap percentile interval.

    Attributes:
        value: the metric on the whole sample; nan when undefined.
        low: lower percentile over the defined replicates.
        high: upper percentile over the defined replicates.
        num_undefined_replicates: replicates in which the metric was undefined (one class only) and which are left out.
    """

    value: float
    low: float
    high: float
    num_undefined_replicates: int = 0


def _checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (0, 1 or nan = unknown) and scores (never nan) as float64 arrays (num_rows, num_findings)."""
    labels = np.asarray(labels, dtype=np.float64)
    scores = np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim not in (1, 2):
        raise ValueError(
            f"labels {labels.shape} and scores {scores.shape} must have one shape: "
            "(num_rows,) or (num_rows, num_findings)"
        )
    if not np.isin(labels[~np.isnan(labels)], (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1, or nan where the label is unknown")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are nan: the model's outputs are not finite")
    if labels.ndim == 1:
        labels, scores = labels[:, None], scores[:, None]
    return labels, scores


@dataclass(frozen=True)
class _RankedFinding:
    """Rows of one finding in ascending order of score, with the starts of the runs of equal scores."""

    rows: np.ndarray  # (num_known,) row numbers, ascending score
    positive: np.ndarray  # (num_known,) 1.0 for positives
    starts: np.ndarray  # (num_runs,) first position of each run of equal scores


def _rank(labels: np.ndarray, scores: np.ndarray) -> _RankedFinding:
    """Sort one finding's rows (labels and scores (num_rows,)) once, for every replicate of its bootstrap."""
    known = np.flatnonzero(~np.isnan(labels))
    rows = known[np.argsort(scores[known], kind="stable")]
    ascending = scores[rows]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]]) if len(rows) else np.zeros(0, dtype=np.int64)
    return _RankedFinding(rows=rows, positive=labels[rows], starts=starts)


def _run_counts(ranked: _RankedFinding, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives in each run of equal scores: weights (R, num_rows) -> two (R, num_runs)."""
    known = weights[:, ranked.rows]
    positives = np.add.reduceat(known * ranked.positive, ranked.starts, axis=1)
    negatives = np.add.reduceat(known * (1.0 - ranked.positive), ranked.starts, axis=1)
    return positives, negatives


def _weighted_auroc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each replicate; a tied pair counts one half, which is the mid-rank convention."""
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + 0.5 * negatives)).sum(axis=1)
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return np.divide(wins, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0)


def _weighted_average_precision(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Average precision of each replicate: precision at each distinct score, weighted by the recall gained there."""
    found = np.cumsum(positives[:, ::-1], axis=1)
    called = found + np.cumsum(negatives[:, ::-1], axis=1)
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    total = positives.sum(axis=1)
    gained = (precision * positives[:, ::-1]).sum(axis=1)
    # Without a negative every ranking is perfect: undefined, as for the area under the ROC curve.
    defined = (total > 0) & (negatives.sum(axis=1) > 0)
    return np.divide(gained, total, out=np.full_like(total, np.nan), where=defined)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "auroc": _weighted_auroc,
    "average_precision": _weighted_average_precision,
}


def _metric_function(metric: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {sorted(METRICS)}")
    return METRICS[metric]


def _per_finding(labels: np.ndarray, scores: np.ndarray, metric: str) -> np.ndarray:
    """The metric of each column, (num_findings,), nan where undefined."""
    labels, scores = _checked(labels, scores)
    function = _metric_function(metric)
    weights = np.ones((1, len(labels)))
    values = np.full(labels.shape[1], np.nan)
    for column in range(labels.shape[1]):
        ranked = _rank(labels[:, column], scores[:, column])
        if len(ranked.rows):
            values[column] = function(*_run_counts(ranked, weights))[0]
    return values


def area_under_roc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of one finding: the share of (positive, negative) pairs ranked right, ties count 1/2.

    Args:
        labels (`np.ndarray` of shape `(num_rows,)`): 0, 1 or nan (unknown: the row is left out).
        scores (`np.ndarray` of shape `(num_rows,)`): any monotone score, higher means more likely present.

    Returns:
        `float`: in [0, 1]; nan when only one class is present.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.statistics import area_under_roc
    >>> area_under_roc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75

    ```
    """
    return float(area_under_roc_per_finding(np.ravel(labels), np.ravel(scores))[0])


def area_under_roc_per_finding(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column of (num_rows, num_findings) arrays: (num_findings,), nan = undefined."""
    return _per_finding(labels, scores, "auroc")


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision (area under the stepwise precision-recall curve) of one finding; nan with one class only.

    Args:
        labels (`np.ndarray` of shape `(num_rows,)`): 0, 1 or nan (unknown: the row is left out).
        scores (`np.ndarray` of shape `(num_rows,)`): any monotone score, higher means more likely present.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.statistics import average_precision
    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333

    ```
    """
    return float(_per_finding(np.ravel(labels), np.ravel(scores), "average_precision")[0])


def macro_mean(values: Sequence[float] | np.ndarray) -> MacroMean:
    """Mean over the defined values (findings with both classes), with the number of undefined ones beside it.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.statistics import macro_mean
    >>> macro_mean([0.5, float("nan"), 1.0])
    MacroMean(mean=0.75, num_defined=2, num_undefined=1)

    ```
    """
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    mean = float(defined.mean()) if len(defined) else float("nan")
    return MacroMean(mean=mean, num_defined=len(defined), num_undefined=len(values) - len(defined))


def patient_weights(
    patient_ids: Sequence[Hashable], num_resamples: int, seed: int, block_size: int | None = None
) -> Iterator[np.ndarray]:
    """Blocks of bootstrap weights: patients are drawn with replacement, and all rows of a patient share its count.

    Args:
        patient_ids: one id per row.
        num_resamples: number of replicates over all blocks.
        seed: of the draw; the same seed gives the same patients to every metric, so replicates of two metrics or two
            models on the same rows can be paired.
        block_size: replicates per block; by default as many as `MAX_BLOCK_ELEMENTS` allows. The weights do not
            depend on it.

    Yields:
        `np.ndarray` of shape `(block, num_rows)`, float64 counts.
    """
    patients: dict[Hashable, int] = {}
    numbers = np.array([patients.setdefault(patient, len(patients)) for patient in patient_ids], dtype=np.int64)
    if not len(numbers):
        raise ValueError("a bootstrap needs at least one row")
    generator = np.random.default_rng(seed)
    probabilities = np.full(len(patients), 1.0 / len(patients))
    block_size = block_size or max(1, MAX_BLOCK_ELEMENTS // len(numbers))
    for start in range(0, num_resamples, block_size):
        size = min(block_size, num_resamples - start)
        counts = generator.multinomial(len(patients), probabilities, size=size)
        yield counts[:, numbers].astype(np.float64)


def bootstrap_replicates(
    labels: np.ndarray,
    scores: np.ndarray,
    patient_ids: Sequence[Hashable],
    *,
    metric: str = "auroc",
    num_resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Patient-level bootstrap of a ranking metric for every finding at once.

    Each replicate draws as many patients as there are, with replacement; every finding is scored on the same draw, so
    means over findings are bootstrapped by averaging the columns of one replicate.

    Args:
        labels (`np.ndarray` of shape `(num_rows, num_findings)`): 0, 1 or nan (unknown).
        scores (`np.ndarray` of shape `(num_rows, num_findings)`): higher means more likely present.
        patient_ids: one id per row.
        metric: "auroc" or "average_precision".
        num_resamples: number of replicates.
        seed: of the draw.

    Returns:
        `np.ndarray` of shape `(num_resamples, num_findings)`; nan where a replicate holds one class only.
    """
    labels, scores = _checked(labels, scores)
    if len(patient_ids) != len(labels):
        raise ValueError(f"{len(patient_ids)} patient ids for {len(labels)} rows")
    function = _metric_function(metric)
    ranked = [_rank(labels[:, column], scores[:, column]) for column in range(labels.shape[1])]
    blocks = []
    for weights in patient_weights(patient_ids, num_resamples, seed):
        block = np.full((len(weights), len(ranked)), np.nan)
        for column, finding in enumerate(ranked):
            if len(finding.rows):
                block[:, column] = function(*_run_counts(finding, weights))
        blocks.append(block)
    return np.concatenate(blocks) if blocks else np.zeros((0, len(ranked)))


def mean_over_findings(replicates: np.ndarray) -> np.ndarray:
    """Macro mean of each replicate (num_resamples, num_findings) -> (num_resamples,), over its defined findings."""
    defined = ~np.isnan(replicates)
    counts = defined.sum(axis=1)
    sums = np.where(defined, replicates, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(replicates), np.nan), where=counts > 0)


def bootstrap_mean(
    values: np.ndarray, patient_ids: Sequence[Hashable], *, num_resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Patient-level bootstrap of the mean of one value per row (a recall hit, a precision): (num_resamples,)."""
    values = np.asarray(values, dtype=np.float64)
    if len(patient_ids) != len(values):
        raise ValueError(f"{len(patient_ids)} patient ids for {len(values)} rows")
    blocks = [weights @ values / weights.sum(axis=1) for weights in patient_weights(patient_ids, num_resamples, seed)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def percentile_interval(value: float, replicates: np.ndarray, confidence: float = 0.95) -> Interval:
    """Percentile interval of one metric from its bootstrap replicates (num_resamples,), undefined ones left out.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.statistics import percentile_interval
    >>> interval = percentile_interval(0.5, np.linspace(0.0, 1.0, 101), confidence=0.9)
    >>> round(interval.low, 6), round(interval.high, 6)
    (0.05, 0.95)

    ```
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    defined = replicates[~np.isnan(replicates)]
    undefined = len(replicates) - len(defined)
    if not len(defined):
        return Interval(value=float(value), low=float("nan"), high=float("nan"), num_undefined_replicates=undefined)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Interval(value=float(value), low=float(low), high=float(high), num_undefined_replicates=undefined)


__all__ = [
    "METRICS",
    "Interval",
    "MacroMean",
    "area_under_roc",
    "area_under_roc_per_finding",
    "average_precision",
    "bootstrap_mean",
    "bootstrap_replicates",
    "macro_mean",
    "mean_over_findings",
    "patient_weights",
    "percentile_interval",
]
