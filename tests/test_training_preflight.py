# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What could only fail later, or would be ignored, is refused before the first step."""

import pytest
from training_stub import build_trainer, validate

from modeling_t3d.training.arguments import ConfigurationError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "training.metric_for_best_model=score needs a validation, and there is none; set data.validation_split"),
        ({"early_stopping_patience": 2, "eval_steps": 2}, "=score and training.early_stopping_patience need a valid"),
    ],
)
def test_a_metric_that_no_validation_measures(tmp_path, settings, message):
    settings = {"metric_for_best_model": "score", **settings}
    with pytest.raises(ConfigurationError, match=message):
        build_trainer(tmp_path, **settings)
    build_trainer(tmp_path, evaluate=validate, **settings)
