# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The metrics that `evaluate.load` takes from their files: without network, and equal to the package's own numbers."""

import doctest
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

import modeling_t3d
from modeling_t3d.evaluation.statistics import (
    area_under_roc_per_finding,
    bootstrap_replicates,
    mean_over_findings,
    percentile_interval,
)

METRICS = Path(modeling_t3d.__file__).parent / "evaluation" / "metrics"


@pytest.fixture
def macro_auroc(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric on this disk needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the loader lengthens
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
        monkeypatch.setattr(evaluate.config, name, str(tmp_path / name))
    return evaluate.load(str(METRICS / "macro_auroc.py"))


def test_macro_auroc_is_that_of_the_statistics(macro_auroc):
    """Batch by batch, with unknown labels and a finding that nobody has."""
    generator = np.random.default_rng(0)
    scores, labels = generator.random((40, 4)), generator.integers(0, 2, (40, 4)).astype(float)
    labels[generator.random((40, 4)) < 0.2] = np.nan
    labels[:, 3] = 0.0
    for rows in (slice(0, 15), slice(15, 40)):
        macro_auroc.add_batch(predictions=scores[rows], references=labels[rows])
    result = macro_auroc.compute()
    expected = area_under_roc_per_finding(labels, scores)
    assert np.array_equal(result["auroc"], expected, equal_nan=True)
    assert result["macro_auroc"] == np.nanmean(expected)
    assert result["num_findings"] == 3
    assert "confidence_interval" not in result
    patients = [number // 2 for number in range(40)]
    options = {"num_resamples": 50, "seed": 3}
    result = macro_auroc.compute(
        predictions=scores, references=labels, patient_ids=patients, confidence=0.8, **options
    )
    replicates = mean_over_findings(bootstrap_replicates(labels, scores, patients, **options))
    interval = percentile_interval(result["macro_auroc"], replicates, 0.8)
    assert result["confidence_interval"] == (interval.low, interval.high)
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        macro_auroc.compute(predictions=[[0.5]], references=[[2.0]])


def test_the_example_of_a_metric_is_right(macro_auroc):
    example = doctest.DocTestParser().get_doctest(macro_auroc.inputs_description, {}, "macro_auroc", None, None)
    results = doctest.DocTestRunner().run(example)
    assert results.attempted
    assert not results.failed
