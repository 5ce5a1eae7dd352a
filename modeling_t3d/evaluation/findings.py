# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The per-finding table: AUROC with patient-level interval, prevalence, F1 at given thresholds, means over groups.

Serves zero-shot scores, linear probes, the shortcut baseline and supervised classifiers alike.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .statistics import (
    Interval,
    area_under_roc_per_finding,
    average_precision,
    bootstrap_replicates,
    macro_mean,
    mean_over_findings,
    percentile_interval,
)

# Thresholds that the published protocol of CT-CLIP tries, evenly from 0 to 1.
NUM_CT_CLIP_STEPS = 100
UNITS = ("study", "reconstruction")


@dataclass(frozen=True)
class ThresholdMetrics:
    """Metrics of one finding at one threshold.

    Attributes:
        threshold: a unit is called positive when its score is at least this ("clean") or above it ("ct-clip").
        f1: F1 of the positive class.
        weighted_f1: F1 of both classes, weighted by their support.
        accuracy: share of units called right.
        sensitivity, specificity: share of positives, of negatives called right.
    """

    threshold: float
    f1: float
    weighted_f1: float
    accuracy: float
    sensitivity: float
    specificity: float


@dataclass(frozen=True)
class FindingResult:
    """One row of the table.

    Attributes:
        finding: its name.
        auroc: with its patient-level interval; nan when only one class is present.
        average_precision: nan when only one class is present; chance level is the prevalence.
        num_units: units (studies or volumes) with a known label.
        num_positive: positives among them.
        prevalence: their ratio.
        at_threshold: metrics at a threshold, where one was given.
    """

    finding: str
    auroc: Interval
    average_precision: float
    num_units: int
    num_positive: int
    prevalence: float
    at_threshold: ThresholdMetrics | None = None


@dataclass(frozen=True)
class GroupResult:
    """Mean over a group of findings.

    Attributes:
        auroc: mean over the defined findings, with its patient-level interval.
        num_defined, num_undefined: findings with both classes, and those left out for want of one.
        f1, weighted_f1, accuracy: means over the findings with a threshold, or None.
    """

    auroc: Interval
    num_defined: int
    num_undefined: int
    f1: float | None = None
    weighted_f1: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class FindingsTable:
    """Per-finding results and group means; the group "macro" holds every finding."""

    findings: tuple[FindingResult, ...]
    groups: dict[str, GroupResult]

    def auroc(self, name: str) -> float:
        """AUROC of one finding or the mean of one group."""
        if name in self.groups:
            return self.groups[name].auroc.value
        for row in self.findings:
            if row.finding == name:
                return row.auroc.value
        raise KeyError(f"no finding or group {name!r}; the groups are {', '.join(self.groups)}")


def mean_over_studies(
    values: np.ndarray, labels: np.ndarray, study_ids: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scan level: mean score over the reconstructions of each study.

    Args:
        values (`np.ndarray` of shape `(N, K)`): scores per volume.
        labels (`np.ndarray` of shape `(N, K)`): 0, 1 or nan; known labels of one study must agree.
        study_ids: per volume.

    Returns:
        scores and labels of shape `(num_studies, K)`, and the row of each study's first volume `(num_studies,)`.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.findings import mean_over_studies
    >>> scores, labels, first = mean_over_studies(np.array([[0.25], [0.75], [1.0]]), np.ones((3, 1)), ["a", "a", "b"])
    >>> scores.ravel().tolist(), first.tolist()
    ([0.5, 1.0], [0, 2])

    ```
    """
    numbers: dict[str, int] = {}
    owner = np.array([numbers.setdefault(study, len(numbers)) for study in study_ids])
    _, first = np.unique(owner, return_index=True)
    sums = np.zeros((len(numbers), values.shape[1]))
    np.add.at(sums, owner, values)
    highest, lowest = np.full(sums.shape, -np.inf), np.full(sums.shape, np.inf)
    np.maximum.at(highest, owner, np.where(np.isnan(labels), -np.inf, labels))
    np.minimum.at(lowest, owner, np.where(np.isnan(labels), np.inf, labels))
    if (highest > lowest).any():
        row, column = np.argwhere(highest > lowest)[0]
        raise ValueError(
            f"reconstructions of study number {row + 1} disagree about finding number {column + 1}: labels belong to "
            'studies; correct them or evaluate with unit="reconstruction"'
        )
    return sums / np.bincount(owner)[:, None], np.where(np.isinf(highest), np.nan, highest), first


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds, any shape, in float64; exactly 1 above 36.7, so that they cannot rank."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(log_odds, dtype=np.float64)))


def to_units(
    log_odds: np.ndarray, labels: np.ndarray, study_ids: Sequence[str], patient_ids: Sequence[Hashable], unit: str
) -> tuple[np.ndarray, np.ndarray, list[Hashable]]:
    """Scores, labels and patient ids per study (mean probability of its reconstructions) or, unchanged, per
    reconstruction.

    Args:
        log_odds (`np.ndarray` of shape `(N, K)`): logits per volume. Scores stay log-odds, of the mean probability
            too: confident probabilities round to 1, and ties would enter the ranking.
        labels (`np.ndarray` of shape `(N, K)`): 0, 1 or nan.
        study_ids, patient_ids: per volume.
        unit: "study" or "reconstruction".

    Returns:
        log-odds and labels of shape `(num_units, K)`, patient ids per unit; [`sigmoid`] gives the probabilities.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.findings import sigmoid, to_units
    >>> logits, labels = np.array([[0.0], [50.0]]), np.ones((2, 1))
    >>> log_odds, labels, patients = to_units(logits, labels, ["a", "a"], ["p", "p"], "study")
    >>> sigmoid(log_odds).round(6).tolist(), patients
    ([[0.75]], ['p'])

    ```
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
    if unit == "reconstruction":
        return log_odds, labels, list(patient_ids)
    present, known, first = mean_over_studies(sigmoid(log_odds), labels, study_ids)
    # Its own mean, and not 1 less the other: so it keeps its digits where it is tiny.
    absent, _, _ = mean_over_studies(sigmoid(-log_odds), labels, study_ids)
    return np.log(present) - np.log(absent), known, [patient_ids[row] for row in first]


def _ratio(numerator: float, denominator: float) -> float:
    """Quotient, 0 where nothing was called or present."""
    return float(numerator / denominator) if denominator else 0.0


def threshold_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, *, strictly_above: bool = False
) -> ThresholdMetrics:
    """Metrics of one finding at a threshold; labels (num_units,) with nan = unknown, left out.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.findings import threshold_metrics
    >>> threshold_metrics([1, 1, 0, 0], [0.9, 0.2, 0.6, 0.1], 0.5).accuracy
    0.5

    ```
    """
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(labels)
    positive, scores = labels[known] == 1, scores[known]
    called = scores > threshold if strictly_above else scores >= threshold
    hits, false_alarms = (called & positive).sum(), (called & ~positive).sum()
    misses, rejections = (~called & positive).sum(), (~called & ~positive).sum()
    f1 = _ratio(2 * hits, 2 * hits + false_alarms + misses)
    f1_negative = _ratio(2 * rejections, 2 * rejections + false_alarms + misses)
    return ThresholdMetrics(
        threshold=float(threshold),
        f1=f1,
        weighted_f1=_ratio(f1 * positive.sum() + f1_negative * (~positive).sum(), len(positive)),
        accuracy=_ratio(hits + rejections, len(positive)),
        sensitivity=_ratio(hits, hits + misses),
        specificity=_ratio(rejections, rejections + false_alarms),
    )


def _corner_distance(positive: np.ndarray, called: np.ndarray) -> np.ndarray:
    """Distance of each threshold's operating point to the ROC corner; called (num_thresholds, num_units)."""
    misses = 1.0 - (called & positive).sum(axis=1) / positive.sum()
    false_alarms = (called & ~positive).sum(axis=1) / (~positive).sum()
    return np.hypot(misses, false_alarms)


def choose_threshold(labels: np.ndarray, scores: np.ndarray, *, protocol: str = "clean") -> float:
    """Threshold of one finding whose operating point lies nearest the corner (0, 1) of the ROC plane.

    Args:
        labels, scores (`np.ndarray` of shape `(num_units,)`): of the *validation* split for "clean".
        protocol: "clean" tries the midpoints between neighbouring scores (a unit at or above is positive); "ct-clip"
            tries 100 steps from 0 to 1 (a unit above is positive, the last of equal ones wins), as the field does.

    Returns:
        `float`: nan when only one class is present.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.findings import choose_threshold
    >>> round(choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]), 6)
    0.4

    ```
    """
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(labels)
    positive, scores = labels[known] == 1, scores[known]
    if positive.all() or not positive.any():
        return float("nan")
    if protocol == "ct-clip":
        candidates = np.linspace(0.0, 1.0, NUM_CT_CLIP_STEPS)
        distance = _corner_distance(positive, scores > candidates[:, None])
        return float(candidates[len(candidates) - 1 - int(np.argmin(distance[::-1]))])
    if protocol != "clean":
        raise ValueError(f'protocol must be "clean" or "ct-clip", got {protocol!r}')
    # One pass over the sorted scores: calling everything from the k-th distinct score on.
    distinct, where = np.unique(scores, return_inverse=True)
    positives = np.bincount(where, weights=positive, minlength=len(distinct))
    negatives = np.bincount(where, weights=~positive, minlength=len(distinct))
    misses = (np.cumsum(positives) - positives) / positives.sum()
    false_alarms = 1.0 - (np.cumsum(negatives) - negatives) / negatives.sum()
    best = int(np.argmin(np.hypot(misses, false_alarms)))
    return float(distinct[0] if best == 0 else (distinct[best - 1] + distinct[best]) / 2)


def choose_thresholds(
    labels: np.ndarray, scores: np.ndarray, findings: Sequence[str], *, protocol: str = "clean"
) -> dict[str, float]:
    """Threshold per finding from (num_units, num_findings) arrays; findings with one class only are left out."""
    chosen = {
        finding: choose_threshold(labels[:, column], scores[:, column], protocol=protocol)
        for column, finding in enumerate(findings)
    }
    return {finding: threshold for finding, threshold in chosen.items() if not np.isnan(threshold)}


def _group(rows: Sequence[FindingResult], replicates: np.ndarray, confidence: float) -> GroupResult:
    """Mean of a group's rows; `replicates` (num_resamples, num_rows) are theirs."""
    mean = macro_mean([row.auroc.value for row in rows])
    thresholds = [row.at_threshold for row in rows if row.at_threshold is not None]
    at_threshold = {
        name: float(np.mean([getattr(metrics, name) for metrics in thresholds])) if thresholds else None
        for name in ("f1", "weighted_f1", "accuracy")
    }
    return GroupResult(
        auroc=percentile_interval(mean.mean, mean_over_findings(replicates), confidence),
        num_defined=mean.num_defined,
        num_undefined=mean.num_undefined,
        **at_threshold,
    )


def score_findings(
    labels: np.ndarray,
    scores: np.ndarray,
    findings: Sequence[str],
    patient_ids: Sequence[Hashable],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    probabilities: np.ndarray | None = None,
    thresholds: Mapping[str, float] | None = None,
    protocol: str = "clean",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FindingsTable:
    """Score every finding and every group of findings on one set of units.

    Args:
        labels (`np.ndarray` of shape `(num_units, num_findings)`): 0, 1 or nan (unknown).
        scores (`np.ndarray` of shape `(num_units, num_findings)`): higher means more likely present.
        findings: column names.
        patient_ids: per unit; the bootstrap draws patients.
        groups: group name -> findings, for instance `{"diffuse": [...], "focal": [...]}`; "macro" is always added.
        probabilities (`np.ndarray` of shape `(num_units, num_findings)`, *optional*): what thresholds are compared
            with; the scores by default.
        thresholds: per finding; findings without one get no metrics at a threshold.
        protocol: "clean" or "ct-clip": how a score equal to its threshold is read.
        num_resamples, confidence, seed: of the bootstrap.
    """
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    probabilities = scores if probabilities is None else probabilities
    column_of = {finding: column for column, finding in enumerate(findings)}
    if len(column_of) != labels.shape[1]:
        raise ValueError(f"{len(column_of)} distinct finding names for {labels.shape[1]} columns")
    for group, members in (groups or {}).items():
        unknown = [member for member in members if member not in column_of]
        if unknown:
            raise ValueError(f"group {group!r} names {unknown[0]!r}, which is not among the findings")
    aurocs = area_under_roc_per_finding(labels, scores)
    replicates = bootstrap_replicates(labels, scores, patient_ids, num_resamples=num_resamples, seed=seed)
    rows = []
    for finding, column in column_of.items():
        known = labels[~np.isnan(labels[:, column]), column]
        threshold = (thresholds or {}).get(finding)
        rows.append(
            FindingResult(
                finding=finding,
                auroc=percentile_interval(aurocs[column], replicates[:, column], confidence),
                average_precision=average_precision(labels[:, column], scores[:, column]),
                num_units=len(known),
                num_positive=int(known.sum()),
                prevalence=float(known.mean()) if len(known) else float("nan"),
                at_threshold=None
                if threshold is None
                else threshold_metrics(
                    labels[:, column], probabilities[:, column], threshold, strictly_above=protocol == "ct-clip"
                ),
            )
        )
    results = {}
    for group, members in {**(groups or {}), "macro": list(findings)}.items():
        columns = [column_of[member] for member in members]
        results[group] = _group([rows[column] for column in columns], replicates[:, columns], confidence)
    return FindingsTable(findings=tuple(rows), groups=results)


__all__ = [
    "FindingResult",
    "FindingsTable",
    "GroupResult",
    "ThresholdMetrics",
    "choose_threshold",
    "choose_thresholds",
    "mean_over_studies",
    "score_findings",
    "sigmoid",
    "threshold_metrics",
    "to_units",
]
