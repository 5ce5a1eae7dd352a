# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Ranking metrics against hand counts and scikit-learn; bootstrap against a resample-and-recompute twin."""

import numpy as np
import pytest

from modeling_t3d.evaluation import statistics
from modeling_t3d.evaluation.statistics import (
    area_under_roc,
    area_under_roc_per_finding,
    average_precision,
    bootstrap_mean,
    bootstrap_replicates,
    macro_mean,
    mean_over_findings,
    patient_weights,
    percentile_interval,
)


def random_case(
    seed: int, num_rows: int = 60, num_findings: int = 4, levels: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and coarse scores: few levels give many ties."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (num_rows, num_findings))
    return labels, generator.integers(0, levels, (num_rows, num_findings)) / levels + 0.1 * labels.round()


def test_auroc_by_hand():
    # Pairs (positive, negative): 0.35 beats 0.1, loses to 0.4; 0.8 beats both: 3 of 4.
    assert area_under_roc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert area_under_roc([0, 1], [0.0, 1.0]) == 1.0
    assert area_under_roc([1, 0], [0.0, 1.0]) == 0.0
    # One win, one tie (1/2), of two pairs.
    assert area_under_roc([1, 0, 0], [0.5, 0.5, 0.2]) == 0.75
    assert area_under_roc([1, 0, 1, 0], np.zeros(4)) == 0.5


def test_average_precision_by_hand():
    # Descending: 1, 0, 1, 0 -> (1/1 + 2/3) / 2.
    assert average_precision([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]) == pytest.approx((1 + 2 / 3) / 2)
    # All tied: the prevalence.
    assert average_precision([1, 0, 0, 0], np.ones(4)) == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the eval extra")
    labels, scores = random_case(seed)
    ours = area_under_roc_per_finding(labels, scores)
    for column in range(labels.shape[1]):
        y, s = labels[:, column], scores[:, column]
        assert ours[column] == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)
        assert average_precision(y, s) == pytest.approx(sklearn_metrics.average_precision_score(y, s), abs=1e-12)


def test_one_class_is_undefined_and_counted():
    labels = np.array([[0, 1, 0], [1, 1, 0], [0, 1, 1]])
    scores = np.array([[0.1, 0.2, 0.3], [0.9, 0.2, 0.1], [0.2, 0.4, 0.5]])
    values = area_under_roc_per_finding(labels, scores)
    assert np.isnan(values[1])
    assert np.isnan(average_precision(labels[:, 1], scores[:, 1]))
    mean = macro_mean(values)
    assert (mean.mean, mean.num_defined, mean.num_undefined) == (1.0, 2, 1)
    assert np.isnan(macro_mean([np.nan]).mean)


def test_unknown_labels_are_left_out():
    labels = np.array([0, 0, 1, 1, np.nan, np.nan])
    scores = np.array([0.1, 0.4, 0.35, 0.8, 0.9, 0.0])
    assert area_under_roc(labels, scores) == 0.75
    assert np.isnan(area_under_roc([np.nan, np.nan], [0.1, 0.2]))


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 2], [0.1, 0.2], "0 or 1"),
        ([0, 1], [0.1, np.nan], "not finite"),
        ([[0, 1]], [[0.1], [0.2]], "one shape"),
    ],
)
def test_bad_input_is_refused(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        area_under_roc_per_finding(labels, scores)


def test_unknown_metric_is_refused():
    labels, scores = random_case(0)
    with pytest.raises(ValueError, match="average_precision"):
        bootstrap_replicates(labels, scores, list(range(len(labels))), metric="f1")


@pytest.mark.parametrize("metric", ["auroc", "average_precision"])
def test_bootstrap_equals_resampling_the_rows(metric):
    """The weighted form is exact: the same draw, with a patient's rows repeated, gives the same value."""
    labels, scores = random_case(3, num_rows=30, num_findings=3)
    patient_ids = [f"patient {row // 2}" for row in range(30)]
    replicates = bootstrap_replicates(labels, scores, patient_ids, metric=metric, num_resamples=20, seed=5)
    weights = np.concatenate(list(patient_weights(patient_ids, 20, 5)))
    single = area_under_roc if metric == "auroc" else average_precision
    for replicate, counts in zip(replicates, weights, strict=True):
        rows = np.repeat(np.arange(30), counts.astype(int))
        expected = [single(labels[rows, column], scores[rows, column]) for column in range(3)]
        np.testing.assert_allclose(replicate, expected, atol=1e-12)


def test_rows_of_a_patient_are_drawn_together():
    patient_ids = ["a", "b", "a", "c", "b"]
    weights = np.concatenate(list(patient_weights(patient_ids, 50, 0)))
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)


def test_bootstrap_does_not_depend_on_blocks_but_on_the_seed(monkeypatch):
    labels, scores = random_case(1)
    patient_ids = list(range(len(labels)))
    whole = bootstrap_replicates(labels, scores, patient_ids, num_resamples=37, seed=2)
    monkeypatch.setattr(statistics, "MAX_BLOCK_ELEMENTS", 300)
    np.testing.assert_array_equal(bootstrap_replicates(labels, scores, patient_ids, num_resamples=37, seed=2), whole)
    assert not np.array_equal(bootstrap_replicates(labels, scores, patient_ids, num_resamples=37, seed=3), whole)


def test_intervals_have_about_the_right_width():
    """The standard error of the replicates is near the analytical one (Hanley-McNeil form at AUROC 1/2)."""
    generator = np.random.default_rng(0)
    labels = (np.arange(400) < 200).astype(int)[:, None]
    replicates = bootstrap_replicates(labels, generator.normal(size=(400, 1)), list(range(400)), num_resamples=400)
    expected = np.sqrt((400 + 1) / (12 * 200 * 200))
    assert replicates.std() == pytest.approx(expected, rel=0.15)
    # Two rows per patient with the same score carry half the information.
    doubled = np.repeat(generator.normal(size=(200, 1)), 2, axis=0)
    paired = bootstrap_replicates(labels, doubled, list(np.arange(400) // 2), num_resamples=400)
    assert paired.std() == pytest.approx(expected * np.sqrt(2), rel=0.15)


def test_undefined_replicates_are_counted():
    labels = np.array([[1], [0], [0], [0]])
    replicates = bootstrap_replicates(labels, labels.astype(float), [0, 1, 2, 3], num_resamples=200)
    interval = percentile_interval(1.0, replicates[:, 0])
    # The only positive is absent from a replicate with probability (3/4)^4 = 0.32.
    assert 40 < interval.num_undefined_replicates < 90
    assert (interval.low, interval.high) == (1.0, 1.0)
    assert np.isnan(percentile_interval(0.5, np.full(3, np.nan)).low)


def test_mean_over_findings_skips_undefined_ones():
    means = mean_over_findings(np.array([[0.5, np.nan], [1.0, 0.0], [np.nan, np.nan]]))
    np.testing.assert_array_equal(means[:2], [0.5, 0.5])
    assert np.isnan(means[2])


def test_bootstrap_mean():
    replicates = bootstrap_mean(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"], num_resamples=300, seed=1)
    # Two patients: both a, both b, or one of each.
    assert set(np.unique(replicates)) == {0.0, 0.5, 1.0}
    assert replicates.mean() == pytest.approx(0.5, abs=0.08)
