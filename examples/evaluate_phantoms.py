# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Evaluates a pre-trained model on the test phantoms of a manifest: zero-shot classification, retrieval, and controls.

    python examples/evaluate_phantoms.py --model outputs/quickstart/run/model \
        --manifest outputs/quickstart/phantoms/manifest.csv --output outputs/quickstart/evaluation

Prints the table and writes `results.json` and `attention.png`. No sentence of the prompts occurs in a training report.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_t3d import T3DForPreTraining, T3DProcessor, Volume, read_volume
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import ManifestRow, read_manifest
from modeling_t3d.data.phantoms import EVALUATION_PROMPTS, FINDINGS
from modeling_t3d.evaluation.encoding import embed_samples, evaluation_samples
from modeling_t3d.evaluation.figures import plot_attention
from modeling_t3d.evaluation.findings import FindingsTable, score_findings
from modeling_t3d.evaluation.leak import measure_leak
from modeling_t3d.evaluation.localisation import (
    attention_volume,
    evaluate_localisation,
    localisation_case,
    text_attention,
)
from modeling_t3d.evaluation.probes import probe_findings, shortcut_features, study_identity
from modeling_t3d.evaluation.results import Results
from modeling_t3d.evaluation.zero_shot import evaluate_zero_shot

GROUPS = {
    extent: [name for name, spec in FINDINGS.items() if spec.extent == extent] for extent in ("diffuse", "focal")
}


def label_matrix(rows: Sequence[ManifestRow]) -> np.ndarray:
    """Labels (rows, findings) in the order of `FINDINGS`."""
    return np.array([[row.labels[name] for name in FINDINGS] for row in rows], dtype=float)


def shortcut_baseline(train: Sequence[ManifestRow], test: Sequence[ManifestRow], num_resamples: int) -> FindingsTable:
    """A linear model on spacing, size, orientation and the global HU histogram of the files as they are stored."""
    features = []
    for rows in (train, test):
        volumes = (read_volume(row.volume) for row in rows)
        features.append(np.stack([shortcut_features(volume.array, volume.affine) for volume in volumes]))
    patients = [[row.patient_id for row in rows] for rows in (train, test)]
    scores = probe_findings(
        features[0], label_matrix(train), features[1], train_patient_ids=patients[0], test_patient_ids=patients[1]
    )
    return score_findings(
        label_matrix(test), scores, list(FINDINGS), patients[1], groups=GROUPS, num_resamples=num_resamples
    )


def lesion_volumes(row: ManifestRow, names: Sequence[str]) -> dict[str, Volume]:
    """The lesion mask of each finding of a phantom among `names`."""
    label_map = read_volume(row.masks["lesions"])
    masks = {name: (label_map.array == FINDINGS[name].index).astype(np.uint8) for name in names}
    return {name: Volume(mask, label_map.affine) for name, mask in masks.items() if mask.any()}


def localisation_cases(dataset: PretrainingDataset, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` phantoms with focal lesions, tiled whole."""
    for index, row in enumerate(dataset.rows):
        if count and row.masks and any(row.labels[name] for name in GROUPS["focal"]):
            count -= 1
            prepared = dataset.prepared(index)
            views = dataset.image_processor.make_views(prepared, "grid")
            yield localisation_case(prepared, views, lesion_volumes(row, GROUPS["focal"]), row.patient_id)


def draw_attention(model: T3DForPreTraining, processor: T3DProcessor, dataset: PretrainingDataset, path: Path) -> Path:
    """Slices of the phantom with the largest pleural effusion of the first fifty, and where the words look."""
    finding = "pleural effusion"
    candidates = [index for index, row in enumerate(dataset.rows[:50]) if row.labels[finding] and row.masks]
    masks = {index: lesion_volumes(dataset.rows[index], [finding])[finding].to_canonical() for index in candidates}
    index = max(candidates, key=lambda candidate: int(masks[candidate].array.sum()))
    prepared = dataset.prepared(index)
    views = processor.image_processor.make_views(prepared, "grid")
    prompts = [positive for positive, _ in EVALUATION_PROMPTS[finding]]
    attention = text_attention(model, processor.tokenizer, prompts, views.pixel_values)
    boxes = np.array([[*box.start, *box.stop] for box in views.boxes])
    # Attention sums to one in each view; relative to the view's even share, views can stand in one picture.
    painted = attention_volume(attention * attention[0].size, boxes, prepared.array.shape)
    return plot_attention(prepared.array, painted, path, spacing=prepared.spacing, title=f'"{prompts[0]}"')


def evaluate(
    model: T3DForPreTraining,
    processor: T3DProcessor,
    splits: dict[str, PretrainingDataset],
    *,
    num_resamples: int = 1000,
    num_control_volumes: int = 64,
    num_shortcut_volumes: int = 1000,
) -> Results:
    """Everything that is measured of one model; `splits` holds the data sets "train", "validation" and "test"."""
    test = splits["test"]
    views = None if model.config.view_fusion == "global" else "grid"
    validation_samples = evaluation_samples(splits["validation"], views=views)
    results = evaluate_zero_shot(
        model,
        processor,
        evaluation_samples(test, views=views),
        EVALUATION_PROMPTS,
        groups=GROUPS,
        validation_samples=validation_samples,
        num_resamples=num_resamples,
    )
    results.comparisons["shortcut baseline"] = shortcut_baseline(
        splits["train"].rows[:num_shortcut_volumes], test.rows, num_resamples
    )
    control = range(min(num_control_volumes, len(test)))
    num_views = processor.image_processor.num_local_views
    samples = evaluation_samples(test, views=num_views, indices=control)
    embeddings = embed_samples(model, processor, samples, with_reports=False, with_view_features=True)
    results.study_identity = study_identity(embeddings.view_features, embeddings.study_ids, embeddings.view_mask)
    if model.config.lambda_tma:
        batch = PretrainingCollator(processor)([test[index] for index in control])
        results.leak = measure_leak(model, batch, num_shuffles=4)
    results.localisation = evaluate_localisation(
        model,
        processor,
        localisation_cases(test, num_control_volumes),
        EVALUATION_PROMPTS,
        num_resamples=num_resamples,
    )
    return results


def main() -> None:
    """Load the folder, evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that pre-training saved")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest of phantoms with splits and masks")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and attention.png")
    parser.add_argument("--num-resamples", type=int, default=1000, help="bootstrap replicates of the intervals")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    model = T3DForPreTraining.from_pretrained(arguments.model).eval()
    processor = T3DProcessor.from_pretrained(arguments.model)
    manifest = read_manifest(arguments.manifest)
    cache = arguments.manifest.parent / "prepared"
    splits = {
        name: PretrainingDataset(manifest.split(name), processor.image_processor, cache)
        for name in ("train", "validation", "test")
    }
    results = evaluate(model, processor, splits, num_resamples=arguments.num_resamples)
    print(results.to_markdown())
    print(f"results: {results.save(arguments.output)}")
    print(f"picture: {draw_attention(model, processor, splits['test'], arguments.output / 'attention.png')}")


if __name__ == "__main__":
    main()
