# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The per-finding table: thresholds and F1 by hand and against scikit-learn, group means, undefined findings."""

import numpy as np
import pytest

from modeling_t3d.evaluation.findings import (
    choose_threshold,
    choose_thresholds,
    mean_over_studies,
    score_findings,
    sigmoid,
    threshold_metrics,
    to_units,
)
from modeling_t3d.evaluation.statistics import area_under_roc


def test_threshold_metrics_by_hand():
    # Called: 0.9 (hit), 0.6 (false alarm). Missed: 0.2. Rejected: 0.1, 0.3.
    metrics = threshold_metrics([1, 1, 0, 0, 0], [0.9, 0.2, 0.6, 0.1, 0.3], 0.5)
    assert metrics.f1 == pytest.approx(0.5)
    assert metrics.accuracy == pytest.approx(3 / 5)
    assert (metrics.sensitivity, metrics.specificity) == (0.5, pytest.approx(2 / 3))
    # F1 of the negatives: 2 * 2 / (2 * 2 + 1 + 1); weighted by 2 and 3.
    assert metrics.weighted_f1 == pytest.approx((2 * 0.5 + 3 * 2 / 3) / 5)


def test_a_score_at_the_threshold():
    labels, scores = [1, 0], [0.5, 0.4]
    assert threshold_metrics(labels, scores, 0.5).accuracy == 1.0
    assert threshold_metrics(labels, scores, 0.5, strictly_above=True).accuracy == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_f1_agrees_with_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the eval extra")
    generator = np.random.default_rng(seed)
    labels, scores = generator.integers(0, 2, 50), generator.random(50)
    ours = threshold_metrics(labels, scores, 0.4)
    called = scores >= 0.4
    assert ours.f1 == pytest.approx(metrics.f1_score(labels, called))
    assert ours.weighted_f1 == pytest.approx(metrics.f1_score(labels, called, average="weighted"))
    assert ours.accuracy == pytest.approx(metrics.accuracy_score(labels, called))


def corner_distance(labels, called):
    positive = np.asarray(labels) == 1
    return np.hypot(1 - called[positive].mean(), called[~positive].mean())


@pytest.mark.parametrize("seed", range(4))
def test_chosen_threshold_is_nearest_the_corner(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, 40)
    scores = np.round(generator.random(40) * 0.7 + 0.3 * labels, 1)  # ties
    clean = choose_threshold(labels, scores)
    every = [corner_distance(labels, scores >= candidate) for candidate in np.linspace(-0.1, 1.2, 1000)]
    assert corner_distance(labels, scores >= clean) == pytest.approx(min(every))
    # It lies between scores, not on one.
    assert clean <= scores.min() or not np.isclose(scores, clean).any()


def test_published_protocol_tries_100_steps_and_keeps_the_last_of_equals():
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.2, 0.3, 0.6, 0.9])
    steps = np.linspace(0, 1, 100)
    perfect = [step for step in steps if 0.3 <= step < 0.6]
    assert choose_threshold(labels, scores, protocol="ct-clip") == perfect[-1]
    # Scores that all lie between two steps cannot be told apart by it.
    narrow = choose_threshold(labels, 0.5001 + 0.0001 * scores, protocol="ct-clip")
    assert threshold_metrics(labels, 0.5001 + 0.0001 * scores, narrow, strictly_above=True).accuracy == 0.5
    with pytest.raises(ValueError, match="protocol"):
        choose_threshold(labels, scores, protocol="best")


def test_single_class_findings_get_no_threshold():
    labels, scores = np.array([[0, 1], [0, 0], [np.nan, 1]]), np.random.default_rng(0).random((3, 2))
    assert set(choose_thresholds(labels, scores, ["none", "some"])) == {"some"}


def example_table(**settings):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (60, 4)).astype(float)
    labels[:, 3] = 0
    labels[:10, 1] = np.nan
    scores = 0.4 * np.nan_to_num(labels) + generator.random((60, 4))
    names = ["effusion", "nodule", "stone", "absent"]
    groups = {"diffuse": ["effusion"], "focal": ["nodule", "stone", "absent"]}
    patients = [row // 2 for row in range(60)]
    return labels, scores, score_findings(labels, scores, names, patients, groups=groups, **settings)


def test_rows_and_groups():
    labels, scores, table = example_table(num_resamples=100, thresholds={"nodule": 0.7})
    rows = {row.finding: row for row in table.findings}
    assert rows["nodule"].num_units == 50
    assert rows["nodule"].num_positive == int(np.nansum(labels[:, 1]))
    assert rows["nodule"].prevalence == pytest.approx(np.nanmean(labels[:, 1]))
    assert rows["nodule"].auroc.value == area_under_roc(labels[:, 1], scores[:, 1])
    assert rows["nodule"].auroc.low < rows["nodule"].auroc.value < rows["nodule"].auroc.high
    assert rows["nodule"].at_threshold.threshold == 0.7
    assert rows["stone"].at_threshold is None
    assert np.isnan(rows["absent"].auroc.value)
    assert list(table.groups) == ["diffuse", "focal", "macro"]
    focal, macro = table.groups["focal"], table.groups["macro"]
    assert focal.auroc.value == pytest.approx((rows["nodule"].auroc.value + rows["stone"].auroc.value) / 2)
    assert (focal.num_defined, focal.num_undefined) == (2, 1)
    assert (macro.num_defined, macro.num_undefined) == (3, 1)
    assert table.auroc("stone") == rows["stone"].auroc.value
    assert table.auroc("diffuse") == rows["effusion"].auroc.value
    with pytest.raises(KeyError, match="mass"):
        table.auroc("mass")
    # A mean over findings varies less than its parts.
    width = macro.auroc.high - macro.auroc.low
    assert width < rows["stone"].auroc.high - rows["stone"].auroc.low


def test_without_resamples_there_is_no_interval():
    _, _, table = example_table(num_resamples=0)
    assert np.isnan(table.groups["macro"].auroc.low)
    assert not np.isnan(table.groups["macro"].auroc.value)


def test_studies_are_ranked_by_their_mean_probability_without_ties():
    log_odds = np.random.default_rng(0).normal(0.0, 3.0, (30, 2))
    studies, patients = [f"s{row // 3}" for row in range(30)], [f"p{row // 6}" for row in range(30)]
    labels = np.zeros((30, 2))
    units, known, of_units = to_units(log_odds, labels, studies, patients, "study")
    means, _, first = mean_over_studies(sigmoid(log_odds), labels, studies)
    np.testing.assert_allclose(sigmoid(units), means, rtol=1e-12)
    assert known.shape == (10, 2)
    assert of_units == [patients[row] for row in first]
    # All of these are probabilities of 1, and their means too.
    confident = np.array([[50.0], [60.0], [50.0], [61.0], [180.0], [200.0]])
    units, *_ = to_units(confident, np.ones((6, 1)), ["a", "a", "b", "b", "c", "c"], list("aabbcc"), "study")
    assert (sigmoid(units) == 1.0).all()
    assert (np.diff(units[:, 0]) > 0).all()
    alone, *_ = to_units(confident, np.ones((6, 1)), list("abcdef"), list("abcdef"), "study")
    np.testing.assert_allclose(alone, confident, rtol=1e-12)


def test_thresholds_are_compared_with_probabilities_where_they_are_given():
    labels, log_odds = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([[-1.0], [0.2], [0.1], [2.0]])
    settings = {"thresholds": {"a": 0.54}, "num_resamples": 0}
    table = score_findings(labels, log_odds, ["a"], list("pqrs"), probabilities=sigmoid(log_odds), **settings)
    assert table.auroc("a") == 0.75
    assert table.findings[0].at_threshold == threshold_metrics(labels[:, 0], sigmoid(log_odds)[:, 0], 0.54)
    assert table.findings[0].at_threshold.sensitivity == 0.5


def test_groups_of_unknown_findings_are_refused():
    with pytest.raises(ValueError, match="'mass'"):
        score_findings(np.eye(2), np.eye(2), ["a", "b"], [0, 1], groups={"focal": ["mass"]})
    with pytest.raises(ValueError, match="finding names"):
        score_findings(np.eye(2), np.eye(2), ["a", "a"], [0, 1])
