# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Retrieval ranks by hand: right candidates, ties, identical reports, reconstructions."""

import numpy as np
import pytest

from modeling_t3d.evaluation import retrieval
from modeling_t3d.evaluation.retrieval import (
    average_precision_at,
    chance_recall,
    first_of_each,
    rank_candidates,
    report_volume_retrieval,
    volume_volume_retrieval,
)


def rank(queries, candidates, studies, reports, candidate_studies=None, candidate_reports=None):
    return rank_candidates(
        np.array(queries, dtype=float),
        np.array(candidates, dtype=float),
        query_studies=studies,
        candidate_studies=candidate_studies or studies,
        query_reports=reports,
        candidate_reports=candidate_reports or reports,
    )


def angle(*degrees):
    return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1)


def test_ranks_by_hand():
    # Query 0 at 0 degrees: its own volume at 20 is beaten by the one at 10. Query 1 at 40: nearest is its own at 45.
    ranked = rank(angle(0, 40, 90), angle(20, 45, 10), ["a", "b", "c"], ["x", "y", "z"])
    np.testing.assert_array_equal(ranked.ranks, [2, 1, 3])
    np.testing.assert_array_equal(ranked.num_right, 1)


def test_norms_do_not_matter():
    queries, candidates = angle(0, 40, 90), angle(20, 45, 10)
    scaled = rank(queries * 7, candidates * [[1], [100], [0.01]], ["a", "b", "c"], ["x", "y", "z"])
    np.testing.assert_array_equal(scaled.ranks, [2, 1, 3])


def test_an_identical_report_counts_as_right():
    # The nearest candidate to query 0 is study c, whose report differs in case and white space only.
    ranked = rank(angle(0, 40, 90), angle(20, 45, 10), ["a", "b", "c"], ["No  nodule.", "y", "no nodule.\n"])
    assert ranked.ranks[0] == 1
    np.testing.assert_array_equal(ranked.num_right, [2, 1, 2])


def test_ties_count_against_the_model():
    ranked = rank(np.ones((5, 3)), np.ones((5, 3)), list("abcde"), list("vwxyz"))
    np.testing.assert_array_equal(ranked.ranks, 5)
    # Products of equal rows differ in their last digits from column to column.
    for count, width in ((33, 7), (1001, 64)):
        equal = np.tile(np.random.default_rng(0).standard_normal(width), (count, 1))
        names = [str(number) for number in range(count)]
        np.testing.assert_array_equal(rank(equal, equal, names, names).ranks, count)


def test_blocks_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    embeds = generator.normal(size=(30, 8)), generator.normal(size=(30, 8))
    studies, reports = [row // 2 for row in range(30)], [str(row % 7) for row in range(30)]
    whole = rank(*embeds, studies, reports)
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 7)
    np.testing.assert_array_equal(rank(*embeds, studies, reports).ranks, whole.ranks)


def test_refusals():
    with pytest.raises(ValueError, match="not finite"):
        rank([[np.nan, 1.0]], [[1.0, 0.0]], ["a"], ["x"])
    with pytest.raises(ValueError, match="query 1 has no right candidate"):
        rank(angle(0, 1), angle(0, 1), ["a", "b"], ["x", "y"], ["a", "c"], ["x", "z"])
    with pytest.raises(ValueError, match="reconstruction"):
        report_volume_retrieval(angle(0), angle(0), study_ids=["a"], reports=["x"], patient_ids=["p"], unit="scan")


def test_chance_recall_agrees_with_random_orders():
    generator = np.random.default_rng(0)
    hits = [generator.permutation(20)[:4].min() < 3 for _ in range(4000)]  # 3 right ones of 20, K = 4
    assert chance_recall(np.array([3]), 20, 4) == pytest.approx(np.mean(hits), abs=0.03)
    assert chance_recall(np.array([3]), 20, 20) == 1.0


def test_one_reconstruction_per_study_by_default():
    assert first_of_each(["s2", "s2", "s1", "s2"]).tolist() == [0, 2]
    images = angle(0, 80, 90, 5)
    texts = angle(0, 0, 90, 90)
    case = {"study_ids": ["a", "a", "b", "b"], "reports": ["x", "x", "y", "y"], "patient_ids": ["p", "p", "q", "q"]}
    by_study = report_volume_retrieval(images, texts, **case, ks=(1,), num_resamples=50)
    assert by_study["report_to_volume"].num_candidates == 2
    assert by_study["report_to_volume"].recall[1].value == 1.0
    every = report_volume_retrieval(images, texts, **case, unit="reconstruction", ks=(1,), num_resamples=50)
    # Any reconstruction of the right study counts; as queries, volumes 1 and 3 find the wrong report.
    assert every["report_to_volume"].num_candidates == 4
    assert every["report_to_volume"].recall[1].value == 1.0
    assert every["volume_to_report"].recall[1].value == 0.5
    assert every["volume_to_report"].mean_rank == 1.5
    assert every["volume_to_report"].num_queries == 4


def test_recalls_and_chance_of_random_embeddings():
    generator = np.random.default_rng(1)
    ids = list(range(200))
    metrics = report_volume_retrieval(
        generator.normal(size=(200, 16)),
        generator.normal(size=(200, 16)),
        study_ids=ids,
        reports=[f"report {number}" for number in ids],
        patient_ids=ids,
        num_resamples=200,
    )["report_to_volume"]
    assert set(metrics.recall) == {1, 5, 10, 50, 100}
    assert metrics.chance[10] == pytest.approx(10 / 200)
    assert metrics.recall[100].low < 0.5 < metrics.recall[100].high
    assert metrics.median_rank == pytest.approx(100, abs=25)


def test_average_precision_at_k_by_hand():
    # Right at ranks 1 and 3 of 3 right ones: K = 3 -> (1 + 2/3) / 3; K = 1 -> 1.
    order = [True, False, True, False, True]
    assert average_precision_at(order, 3, 3) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision_at(order, 3, 1) == 1.0
    assert average_precision_at([False, True], 1, 1) == 0.0


def test_volume_retrieval_excludes_the_query_and_its_study():
    # Volumes 0 and 1 are one study; the nearest other volume to 0 is 2 (different finding), then 3 (same finding).
    embeds = angle(0, 1, 10, 20)
    labels = np.array([[1, 0], [1, 0], [0, 1], [1, 0]])
    metrics = volume_volume_retrieval(
        embeds, labels, study_ids=list("aabc"), patient_ids=list("pppq"), ks=(1, 2), num_resamples=20
    )
    # Queries 0 and 1: wrong, right -> AP@1 0, AP@2 1/2. Query 3: nearest 2 wrong, then 1, 0 -> AP@1 0, AP@2 (1/2)/2.
    assert metrics.mean_average_precision[1].value == 0.0
    assert metrics.mean_average_precision[2].value == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert (metrics.num_queries, metrics.num_left_out) == (3, 1)
    assert metrics.chance == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)


def test_volume_retrieval_without_any_right_candidate():
    metrics = volume_volume_retrieval(angle(0, 1), np.eye(2), study_ids=list("ab"), patient_ids=list("pq"))
    assert metrics.mean_average_precision == {}
    assert metrics.num_left_out == 2
