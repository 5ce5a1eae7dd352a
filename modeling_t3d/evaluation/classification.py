# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tables that stand beside zero-shot scores: linear probes, the shortcut baseline, a supervised classifier (ceiling).

All are scored on the same units, with the same bootstrap, as the zero-shot table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..geometry_t3d import Volume
from .encoding import batches_of, evaluation_mode, label_row, stack_samples
from .findings import FindingsTable, score_findings, to_units
from .probes import probe_findings, shortcut_features


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of volumes with what is known about them.

    Attributes:
        features (`np.ndarray` of shape `(N, F)`): one row per volume.
        labels (`np.ndarray` of shape `(N, K)`): 0, 1 or nan (unknown).
        patient_ids, study_ids: per volume.
    """

    features: np.ndarray
    labels: np.ndarray
    patient_ids: tuple[str, ...]
    study_ids: tuple[str, ...]


def labelled_shortcuts(
    rows: Iterable[Any], findings: Sequence[str], read_row: Callable[[Any], Volume]
) -> LabelledFeatures:
    """Shortcut features of manifest rows, read one file at a time.

    Args:
        rows: with `labels`, `patient_id` and `study_id`, as `ManifestRow`.
        findings: columns of the labels.
        read_row: row -> `Volume` in HU, before any reorientation (orientation is one of the features), such as
            [`~modeling_t3d.data.sources.read_row`].
    """
    rows = list(rows)
    volumes = (read_row(row) for row in rows)
    return LabelledFeatures(
        features=np.stack([shortcut_features(volume.array, volume.affine) for volume in volumes]),
        labels=np.array([label_row(row.labels, findings) for row in rows]),
        patient_ids=tuple(row.patient_id for row in rows),
        study_ids=tuple(row.study_id for row in rows),
    )


def evaluate_probe(
    train: LabelledFeatures,
    test: LabelledFeatures,
    findings: Sequence[str],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    unit: str = "study",
    inverse_penalty: float | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FindingsTable:
    """Fit a linear probe on the training volumes and score it on the test volumes.

    With shortcut features this is the shortcut baseline, with frozen embeddings the linear probe. The penalty is
    chosen on held-out training patients unless it is given.
    """
    scores = probe_findings(
        train.features,
        train.labels,
        test.features,
        train_patient_ids=train.patient_ids,
        test_patient_ids=test.patient_ids,
        inverse_penalty=inverse_penalty,
        seed=seed,
    )
    scores, labels, patient_ids = to_units(scores, test.labels, test.study_ids, test.patient_ids, unit)
    bootstrap: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    return score_findings(labels, scores, findings, patient_ids, groups=groups, **bootstrap)


def evaluate_classifier(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    findings: Sequence[str],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    unit: str = "study",
    batch_size: int = 4,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FindingsTable:
    """Score a multi-label classifier (`T3DForImageClassification`), for instance the supervised ceiling.

    Args:
        model: takes `pixel_values` and returns `logits` `(B, K)`, columns in the order of `findings`.
        samples: see [`~modeling_t3d.evaluation.encoding.embed_samples`].
        findings: the model's labels, in order.
    """
    logits, rows = [], []
    with evaluation_mode(model):
        for batch in batches_of(samples, batch_size):
            output = model(pixel_values=stack_samples(batch)["pixel_values"].to(model.device))
            logits.append(output.logits.cpu().double())
            rows += [
                (label_row(sample["labels"], findings), str(sample["study_id"]), str(sample["patient_id"]))
                for sample in batch
            ]
    if not rows:
        raise ValueError("there is nothing to evaluate: the samples are empty")
    known, study_ids, patient_ids = zip(*rows, strict=True)
    scores, labels, patients = to_units(torch.cat(logits).numpy(), np.array(known), study_ids, patient_ids, unit)
    bootstrap: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    return score_findings(labels, scores, findings, patients, groups=groups, **bootstrap)


__all__ = ["LabelledFeatures", "evaluate_classifier", "evaluate_probe", "labelled_shortcuts"]
