# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Probes: logistic regression against scikit-learn, shortcut features by hand, study identity on known embeddings."""

import numpy as np
import pytest

from modeling_t3d.evaluation.probes import (
    HISTOGRAM_EDGES,
    choose_inverse_penalty,
    fit_linear_probe,
    probe_findings,
    shortcut_feature_names,
    shortcut_features,
    study_identity,
)
from modeling_t3d.evaluation.statistics import area_under_roc, area_under_roc_per_finding, macro_mean


def linear_case(seed=0, num_rows=120, num_features=6, num_findings=3):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_rows, num_features)) * generator.uniform(0.1, 50, num_features) + 3
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    logits = standard @ generator.normal(size=(num_features, num_findings))
    return features, (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)


@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 10.0])
def test_agrees_with_scikit_learn(inverse_penalty):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is in the eval extra")
    features, labels = linear_case()
    probe = fit_linear_probe(features, labels, inverse_penalty=inverse_penalty)
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    for column in range(labels.shape[1]):
        reference = linear_model.LogisticRegression(C=inverse_penalty, tol=1e-10, max_iter=10000)
        reference.fit(standard, labels[:, column])
        np.testing.assert_allclose(probe.weight[:, column], reference.coef_[0], atol=1e-4)
        np.testing.assert_allclose(
            probe.log_odds(features)[:, column], reference.decision_function(standard), atol=4e-4
        )


def test_constant_features_and_single_class_findings_do_no_harm():
    features, labels = linear_case()
    extended = np.concatenate([features, np.full((len(features), 1), 0.1)], axis=1)
    unknown = np.full((len(labels), 1), np.nan)
    one_class = np.concatenate([labels, np.zeros((len(labels), 1)), unknown], axis=1)
    probe = fit_linear_probe(extended, one_class)
    np.testing.assert_allclose(probe.weight[-1], 0.0, atol=1e-12)
    np.testing.assert_allclose(
        probe.log_odds(extended)[:, :3], fit_linear_probe(features, labels).log_odds(features), atol=4e-4
    )
    assert (probe.log_odds(extended)[:, 3] < -14).all()
    np.testing.assert_array_equal(probe.log_odds(extended)[:, 4], 0.0)


def test_unknown_labels_are_left_out_of_the_fit():
    features, labels = linear_case()
    labels[60:, 0] = np.nan
    probe = fit_linear_probe(features, labels)
    # The same standardisation, half the rows: reproduce by weighting, through a fit on the known half alone.
    known = fit_linear_probe(features[:60], labels[:60, :1], inverse_penalty=1.0)
    ranked = area_under_roc(labels[:60, 0], probe.log_odds(features[:60])[:, 0])
    assert ranked == pytest.approx(area_under_roc(labels[:60, 0], known.log_odds(features[:60])[:, 0]), abs=0.02)
    assert np.isfinite(probe.log_odds(features)).all()


def test_confident_scores_of_a_probe_do_not_tie():
    """A finding that a feature separates wide: probabilities round to 1, log-odds rank."""
    features, labels = np.repeat([[-1.0], [1.0]], 20, axis=0), np.repeat([[0.0], [1.0]], 20, axis=0)
    ids = list(range(42))
    scores = probe_findings(
        features,
        labels,
        np.array([[60.0], [80.0]]),
        train_patient_ids=ids[:40],
        test_patient_ids=ids[40:],
        inverse_penalty=1.0,
    )
    assert scores.min() > 37
    assert area_under_roc([0, 1], scores) == 1.0


def test_probe_refuses_shared_patients_and_bad_shapes():
    features, labels = linear_case()
    ids = list(range(120))
    with pytest.raises(ValueError, match="split by patient"):
        probe_findings(features, labels, features, train_patient_ids=ids, test_patient_ids=ids)
    with pytest.raises(ValueError, match="num_rows"):
        fit_linear_probe(features, labels[:, 0])


def test_the_penalty_is_chosen_by_the_training_rows():
    """Many noise features ask for more regularisation than a few good ones, and the choice pays on unseen rows."""
    features, labels = linear_case(seed=1, num_rows=800)
    noise = np.random.default_rng(2).normal(size=(800, 60))
    wide = np.concatenate([(features - features.mean(axis=0)) / features.std(axis=0), noise], axis=1)
    train, test, ids = slice(0, 100), slice(100, 800), list(range(800))
    scores = probe_findings(
        wide[train], labels[train], wide[test], train_patient_ids=ids[train], test_patient_ids=ids[test]
    )
    loose = fit_linear_probe(wide[train], labels[train], inverse_penalty=1e4).log_odds(wide[test])
    regular = macro_mean(area_under_roc_per_finding(labels[test], scores)).mean
    assert regular > macro_mean(area_under_roc_per_finding(labels[test], loose)).mean + 0.03
    assert choose_inverse_penalty(wide[train], labels[train], ids[train]) < 1.0
    assert choose_inverse_penalty(wide[train], labels[train], ["one patient"] * 100, candidates=(1, 2, 3)) == 2


def test_shortcut_features_follow_the_header_not_the_storage_order():
    names = shortcut_feature_names()
    array = np.random.default_rng(0).normal(0, 300, (10, 12, 14))
    affine = np.array([[0, 0, 0.7, 5], [0, -0.8, 0, 6], [2.5, 0, 0, 7], [0, 0, 0, 1.0]])  # stored z, -y, x
    features = dict(zip(names, shortcut_features(array, affine), strict=True))
    assert np.exp([features[f"spacing_{axis}"] for axis in "zyx"]) == pytest.approx([2.5, 0.8, 0.7])
    assert np.exp([features[f"size_{axis}"] for axis in "zyx"]) == pytest.approx([10, 12, 14])
    assert np.exp(features["extent_z"]) == pytest.approx(25.0)
    assert features["array_axis_1_along_y"] == -1.0
    assert features["array_axis_0_along_z"] == 1.0
    # The same volume stored the other way round: orientation differs, everything else is equal.
    other = dict(zip(names, shortcut_features(array[:, ::-1], affine @ np.diag([1, -1, 1, 1.0])), strict=True))
    changed = {name for name in names if not np.isclose(other[name], features[name])}
    assert changed == {"array_axis_1_along_y"}


def test_histogram_counts_every_voxel_once():
    array = np.array([-2000.0, -1000.0, 0.0, 24.9, 25.0, 5000.0]).reshape(1, 2, 3)
    histogram = shortcut_features(array, np.eye(4))[-(len(HISTOGRAM_EDGES) + 1) :]
    assert histogram.sum() == pytest.approx(1.0)
    assert histogram[0] == histogram[-1] == pytest.approx(1 / 6)
    assert histogram[HISTOGRAM_EDGES.index(0) + 1] == pytest.approx(2 / 6)


def test_study_identity_of_known_embeddings():
    generator = np.random.default_rng(0)
    identity = generator.normal(size=(20, 1, 16))
    strong = study_identity(identity + 0.1 * generator.normal(size=(20, 4, 16)), list(range(20)))
    assert strong.nearest_neighbour_accuracy == 1.0
    assert strong.area_under_roc > 0.99
    none = study_identity(generator.normal(size=(60, 4, 16)), list(range(60)))
    assert none.chance == pytest.approx(3 / 239)
    assert none.nearest_neighbour_accuracy < 0.06
    assert none.area_under_roc == pytest.approx(0.5, abs=0.05)


def test_study_identity_of_equal_embeddings_is_chance():
    same = study_identity(np.ones((5, 4, 3)), list(range(5)))
    assert same.nearest_neighbour_accuracy == pytest.approx(same.chance)
    assert same.area_under_roc == 0.5


def test_study_identity_leaves_out_masked_views_and_joins_reconstructions():
    embeds = np.zeros((3, 2, 2))
    embeds[0] = embeds[1] = [[1, 0], [1, 0.1]]
    embeds[2] = [[0, 1], [1, 0]]  # the second view is padding that looks like study a
    mask = np.array([[True, True], [True, True], [True, False]])
    probe = study_identity(embeds, ["a", "a", "b"], mask)
    assert (probe.num_views, probe.num_studies) == (5, 1)
    assert probe.nearest_neighbour_accuracy == 1.0
    assert probe.chance == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="at least two studies"):
        study_identity(embeds[:2], ["a", "a"])
