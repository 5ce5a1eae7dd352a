# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Area under the ROC curve per finding and its mean, for `evaluate.load`. The arithmetic is that of
[`~modeling_t3d.evaluation.statistics`]."""

from collections.abc import Hashable, Sequence
from typing import Any

# At the top, unlike elsewhere: the metric is a subclass, and who loads it has imported evaluate.
import datasets
import evaluate
import numpy as np

# By the package's name: the loader runs a copy of this file in a folder of its own.
from modeling_t3d.evaluation.statistics import (
    area_under_roc_per_finding,
    bootstrap_replicates,
    macro_mean,
    mean_over_findings,
    percentile_interval,
)

_DESCRIPTION = """
Area under the ROC curve of every finding, and their mean. A pair of a positive and a negative row with equal scores
counts one half; rows whose label is unknown are left out of their finding, and findings with one class only out of the
mean.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (rows of `num_findings` floats): scores, higher means more likely present.
    references (rows of `num_findings` floats): 1 for present, 0 for absent, NaN or None for unknown.
    patient_ids (`Sequence`, *optional*): one per row, in the order of the rows: adds the interval.
    num_resamples (`int`, defaults to 1000): bootstrap replicates, each of as many patients, drawn with replacement.
    confidence (`float`, defaults to 0.95): of the percentile interval.
    seed (`int`, defaults to 0): of the draw.

Returns:
    `dict`: `macro_auroc` (`float`, NaN where no finding has both classes), `auroc` (`list[float]`, NaN where a finding
    has one class only), `num_findings` (`int`, of those in the mean) and, with `patient_ids`, `confidence_interval`
    (`tuple[float, float]`, of the mean).

Example:

```python
>>> from pathlib import Path
>>> import evaluate
>>> import modeling_t3d

>>> metrics = Path(modeling_t3d.__file__).parent / "evaluation" / "metrics"
>>> metric = evaluate.load(str(metrics / "macro_auroc.py"))
>>> metric.compute(predictions=[[0.9, 0.1], [0.2, 0.3], [0.1, 0.2]], references=[[1, 0], [0, 1], [1, None]])
{'macro_auroc': 0.75, 'auroc': [0.5, 1.0], 'num_findings': 2}

```
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class MacroAuroc(evaluate.Metric):
    """See `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {name: datasets.Sequence(datasets.Value("float64")) for name in ("predictions", "references")}
            ),
            license="Apache-2.0",
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[float | None]],
        patient_ids: Sequence[Hashable] | None = None,
        num_resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        labels, scores = (np.array(rows, dtype=np.float64) for rows in (references, predictions))
        values = area_under_roc_per_finding(labels, scores)
        mean = macro_mean(values)
        result = {"macro_auroc": mean.mean, "auroc": values.tolist(), "num_findings": mean.num_defined}
        if patient_ids is not None:
            replicates = bootstrap_replicates(labels, scores, patient_ids, num_resamples=num_resamples, seed=seed)
            interval = percentile_interval(mean.mean, mean_over_findings(replicates), confidence)
            result["confidence_interval"] = (interval.low, interval.high)
        return result
