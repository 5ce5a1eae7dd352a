# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Retrieval between reports and volumes (recall at K, ranks) and among volumes (mean average precision at K).

Works on embeddings that are already computed; an identical report counts as right, and ties count against the model.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .statistics import Interval, bootstrap_mean, percentile_interval

DEFAULT_KS = (1, 5, 10, 50, 100)
# Queries scored at once: bounds the similarity matrix to this many rows.
QUERY_BLOCK = 512
# Cosines this near are equal: a product of equal rows differs in its last digits from column to column.
TIE = 1e-9


@dataclass(frozen=True)
class RetrievalMetrics:
    """How well one direction of retrieval works.

    Attributes:
        recall: K -> share of queries with a right candidate among the first K, with its patient-level interval.
        chance: K -> the same share for a random order of the candidates.
        median_rank: median over queries of the rank (from 1) of the best right candidate.
        mean_rank: mean over queries of that rank.
        num_queries: number of queries.
        num_candidates: number of candidates that each query is ranked against.
    """

    recall: dict[int, Interval]
    chance: dict[int, float]
    median_rank: float
    mean_rank: float
    num_queries: int
    num_candidates: int


@dataclass(frozen=True)
class RankedQueries:
    """Outcome of ranking: `ranks` (num_queries,) from 1, `num_right` (num_queries,) right candidates per query."""

    ranks: np.ndarray
    num_right: np.ndarray
    num_candidates: int


def normalise_report(report: str) -> str:
    """The form in which two reports are compared: case folded, runs of white space as one space."""
    return " ".join(report.casefold().split())


def _numbered(*columns: Sequence[Hashable]) -> list[np.ndarray]:
    """Each column as integers, equal exactly where the ids are equal (across columns)."""
    numbers: dict[Hashable, int] = {}
    return [np.array([numbers.setdefault(value, len(numbers)) for value in column]) for column in columns]


def first_of_each(study_ids: Sequence[Hashable]) -> np.ndarray:
    """Rows of the first reconstruction of each study, in order of appearance.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.retrieval import first_of_each
    >>> first_of_each(["a", "a", "b", "a", "c"]).tolist()
    [0, 2, 4]

    ```
    """
    rows: dict[Hashable, int] = {}
    for row, study in enumerate(study_ids):
        rows.setdefault(study, row)
    return np.fromiter(rows.values(), dtype=np.int64)


def _unit(embeds: np.ndarray, name: str) -> np.ndarray:
    """Unit-norm float32 rows of (num_rows, dim) embeddings."""
    embeds = np.asarray(embeds, dtype=np.float32)
    if embeds.ndim != 2:
        raise ValueError(f"{name} must have shape (num_rows, dim), got {embeds.shape}")
    if not np.isfinite(embeds).all():
        raise ValueError(f"{name} hold values that are not finite: the model's outputs cannot be ranked")
    return embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)


def rank_candidates(
    query_embeds: np.ndarray,
    candidate_embeds: np.ndarray,
    *,
    query_studies: Sequence[Hashable],
    candidate_studies: Sequence[Hashable],
    query_reports: Sequence[str],
    candidate_reports: Sequence[str],
) -> RankedQueries:
    """Rank of the best right candidate of each query by cosine similarity.

    A candidate is right when it belongs to the query's study or to a study with an identical report. The rank is one
    plus the number of *wrong* candidates that are at least as similar: ties count against the model, so embeddings
    that are all equal get the last rank, not the first.

    Args:
        query_embeds (`np.ndarray` of shape `(num_queries, dim)`): any norm.
        candidate_embeds (`np.ndarray` of shape `(num_candidates, dim)`): any norm.
        query_studies, candidate_studies: study id per row.
        query_reports, candidate_reports: report text per row (for a volume: its study's report).
    """
    queries = _unit(query_embeds, "query_embeds").astype(np.float64)
    candidates = _unit(candidate_embeds, "candidate_embeds").astype(np.float64)
    query_study, candidate_study = _numbered(query_studies, candidate_studies)
    query_text, candidate_text = _numbered(
        [normalise_report(report) for report in query_reports],
        [normalise_report(report) for report in candidate_reports],
    )
    ranks, num_right = np.zeros(len(queries), dtype=np.int64), np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        similarity = queries[block] @ candidates.T
        right = (query_study[block, None] == candidate_study) | (query_text[block, None] == candidate_text)
        best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks[block] = 1 + (~right & (similarity >= best - TIE)).sum(axis=1)
        num_right[block] = right.sum(axis=1)
    if (num_right == 0).any():
        missing = int(np.flatnonzero(num_right == 0)[0])
        raise ValueError(f"query {missing} has no right candidate: each query's study must be among the candidates")
    return RankedQueries(ranks=ranks, num_right=num_right, num_candidates=len(candidates))


def chance_recall(num_right: np.ndarray, num_candidates: int, k: int) -> float:
    """Mean probability that a random order has one of the `num_right` (num_queries,) right candidates in the first K.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.retrieval import chance_recall
    >>> round(chance_recall(np.array([1, 1]), num_candidates=50, k=5), 6)
    0.1

    ```
    """
    # Hypergeometric: all of the first K are wrong with probability prod_{i<K} (M - r - i) / (M - i).
    drawn = np.arange(min(k, num_candidates))
    wrong_left = np.maximum(num_candidates - np.asarray(num_right)[:, None] - drawn, 0)
    return float(np.mean(1.0 - (wrong_left / (num_candidates - drawn)).prod(axis=1)))


def summarise_ranks(
    ranked: RankedQueries,
    patient_ids: Sequence[Hashable],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RetrievalMetrics:
    """Recall at each K (those below the number of candidates), ranks and chance levels; `patient_ids` per query."""
    recall, chance = {}, {}
    for k in ks:
        if k >= ranked.num_candidates:
            continue
        hits = ranked.ranks <= k
        replicates = bootstrap_mean(hits, patient_ids, num_resamples=num_resamples, seed=seed)
        recall[k] = percentile_interval(float(hits.mean()), replicates, confidence)
        chance[k] = chance_recall(ranked.num_right, ranked.num_candidates, k)
    return RetrievalMetrics(
        recall=recall,
        chance=chance,
        median_rank=float(np.median(ranked.ranks)),
        mean_rank=float(ranked.ranks.mean()),
        num_queries=len(ranked.ranks),
        num_candidates=ranked.num_candidates,
    )


def report_volume_retrieval(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    *,
    study_ids: Sequence[Hashable],
    reports: Sequence[str],
    patient_ids: Sequence[Hashable],
    unit: str = "study",
    ks: Sequence[int] = DEFAULT_KS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, RetrievalMetrics]:
    """Report-to-volume and volume-to-report retrieval over one set of volumes.

    Args:
        image_embeds (`np.ndarray` of shape `(num_volumes, dim)`): one row per volume (reconstruction).
        text_embeds (`np.ndarray` of shape `(num_volumes, dim)`): the report of each volume, repeated within a study.
        study_ids, reports, patient_ids: per volume.
        unit: "study" keeps the first reconstruction of each study; "reconstruction" keeps all volumes as candidates
            and queries, and any reconstruction of the right study counts. Reports are always one per study.
        ks: ranks at which recall is read; those not below the number of candidates are dropped.

    Returns:
        `dict` with "report_to_volume" and "volume_to_report".
    """
    if unit not in ("study", "reconstruction"):
        raise ValueError(f'unit must be "study" or "reconstruction", got {unit!r}')
    report_rows = first_of_each(study_ids).tolist()
    volume_rows = report_rows if unit == "study" else list(range(len(image_embeds)))
    sides = {
        "volume": (np.asarray(image_embeds)[volume_rows], volume_rows),
        "report": (np.asarray(text_embeds)[report_rows], report_rows),
    }
    metrics = {}
    for query, candidate in (("report", "volume"), ("volume", "report")):
        (query_embeds, query_rows), (candidate_embeds, candidate_rows) = sides[query], sides[candidate]
        ranked = rank_candidates(
            query_embeds,
            candidate_embeds,
            query_studies=[study_ids[row] for row in query_rows],
            candidate_studies=[study_ids[row] for row in candidate_rows],
            query_reports=[reports[row] for row in query_rows],
            candidate_reports=[reports[row] for row in candidate_rows],
        )
        metrics[f"{query}_to_{candidate}"] = summarise_ranks(
            ranked,
            [patient_ids[row] for row in query_rows],
            ks=ks,
            num_resamples=num_resamples,
            confidence=confidence,
            seed=seed,
        )
    return metrics


@dataclass(frozen=True)
class VolumeRetrievalMetrics:
    """Retrieval of volumes that share findings with a query volume.

    Attributes:
        mean_average_precision: K -> mean over queries of the average precision of the first K, query excluded.
        chance: mean share of right candidates, the expected precision of a random order.
        num_queries: queries with at least one right candidate.
        num_left_out: volumes without a finding or without a right candidate.
    """

    mean_average_precision: dict[int, Interval]
    chance: float
    num_queries: int
    num_left_out: int


def average_precision_at(right: np.ndarray, num_right: int, k: int) -> float:
    """Average precision of the first K of one ranking: `right` (num_ranked,) bool in rank order, most similar first.

    The sum of the precisions at each right rank within K, divided by the most right ones that K ranks can hold.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.retrieval import average_precision_at
    >>> average_precision_at([True, False, True, False], num_right=2, k=2)
    0.5

    ```
    """
    first = np.asarray(right, dtype=np.float64)[:k]
    precision = np.cumsum(first) / np.arange(1, len(first) + 1)
    return float((precision * first).sum() / min(k, num_right))


def volume_volume_retrieval(
    image_embeds: np.ndarray,
    labels: np.ndarray,
    *,
    study_ids: Sequence[Hashable],
    patient_ids: Sequence[Hashable],
    ks: Sequence[int] = (1, 5, 10),
    minimum_overlap: float = 0.5,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> VolumeRetrievalMetrics:
    """Mean average precision at K of volumes ranked by similarity to a query volume.

    A candidate is right when its findings overlap the query's by at least `minimum_overlap` (intersection over union).
    The query itself and every other reconstruction of its study are excluded.

    Args:
        image_embeds (`np.ndarray` of shape `(num_volumes, dim)`): any norm.
        labels (`np.ndarray` of shape `(num_volumes, num_findings)`): 0 or 1; unknown (nan) counts as 0.
        study_ids, patient_ids: per volume.
        minimum_overlap: in (0, 1]; 1 asks for the identical set of findings.
    """
    embeds = _unit(image_embeds, "image_embeds")
    present = (np.nan_to_num(np.asarray(labels, dtype=np.float64)) > 0).astype(np.float64)
    (study,) = _numbered(study_ids)
    values: dict[int, list[float]] = {k: [] for k in ks}
    patients, shares = [], []
    for row in range(len(embeds)):
        others = np.flatnonzero(study != study[row])
        shared = present[others] @ present[row]
        union = present[others].sum(axis=1) + present[row].sum() - shared
        right = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0) >= minimum_overlap
        if not right.any():
            continue
        # Wrong candidates first among equals: ties count against the model.
        order = np.lexsort((right, -(embeds[others] @ embeds[row])))
        for k in ks:
            values[k].append(average_precision_at(right[order], int(right.sum()), k))
        patients.append(patient_ids[row])
        shares.append(right.mean())
    intervals = {}
    for k in ks if patients else ():
        replicates = bootstrap_mean(np.array(values[k]), patients, num_resamples=num_resamples, seed=seed)
        intervals[k] = percentile_interval(float(np.mean(values[k])), replicates, confidence)
    return VolumeRetrievalMetrics(
        mean_average_precision=intervals,
        chance=float(np.mean(shares)) if shares else float("nan"),
        num_queries=len(patients),
        num_left_out=len(embeds) - len(patients),
    )


__all__ = [
    "RankedQueries",
    "RetrievalMetrics",
    "VolumeRetrievalMetrics",
    "average_precision_at",
    "chance_recall",
    "first_of_each",
    "normalise_report",
    "rank_candidates",
    "report_volume_retrieval",
    "summarise_ranks",
    "volume_volume_retrieval",
]
