# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Evaluates a pre-trained model on the test phantoms of a manifest: zero-shot classification, retrieval, and controls.

    python examples/evaluate_phantoms.py --model outputs/quickstart/run/model \
        --manifest outputs/quickstart/phantoms/manifest.csv --output outputs/quickstart/evaluation

Prints the table and writes `results.json` and `attention.png`. No sentence of the prompts occurs in a training report.
"""

import argparse
import logging
import sys
from pathlib import Path

from zero_shot_classification import refuse_other_models

from modeling_t3d import T3DForPreTraining, T3DProcessor, Volume
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import ManifestError, read_manifest
from modeling_t3d.data.phantoms import EVALUATION_PROMPTS, FINDINGS, ORGANS, phantom_version
from modeling_t3d.data.sources import read_row
from modeling_t3d.evaluation.pretraining import evaluate_pretrained, plot_case
from modeling_t3d.volume_io_t3d import read_label_map

GROUPS = {
    extent: [name for name, spec in FINDINGS.items() if spec.extent == extent] for extent in ("diffuse", "focal")
}
PICTURED = "pleural effusion"


def load_splits(
    manifest_path: Path, processor: T3DProcessor, num_probe: int, num_workers: int
) -> dict[str, PretrainingDataset]:
    """The data sets of a manifest of phantoms, prepared once beside it; of "train" the first `num_probe` rows."""
    sections, min_words = processor.report_sections, processor.min_report_words
    manifest = read_manifest(manifest_path, sections=sections, min_report_words=min_words)
    cache = manifest_path.parent / "prepared"
    counts = {"train": num_probe, "validation": None, "test": None}
    splits = {
        name: PretrainingDataset(manifest.split(name)[:count], processor.image_processor, cache)
        for name, count in counts.items()
        if count != 0
    }
    for part in splits.values():
        part.prepare_all(num_workers)
    return splits


def draw_case(model: T3DForPreTraining, processor: T3DProcessor, test: PretrainingDataset, path: Path) -> Path | None:
    """Slices of the first test phantom with an effusion, if there is one, and where the words look."""
    index = next((index for index, row in enumerate(test.rows) if row.labels[PICTURED] and row.masks), None)
    if index is None:
        return None
    label_map = read_label_map(test.rows[index].masks["lesions"])
    lesion = Volume(label_map.array == FINDINGS[PICTURED].index, label_map.affine)
    text = EVALUATION_PROMPTS[PICTURED][0][0]
    return plot_case(model, processor, test.prepared(index), text, path, lesion=lesion)


def main() -> None:
    """Load the folder, evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that pre-training saved")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest of phantoms with splits and masks")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and attention.png")
    parser.add_argument(
        "--num-probe", type=int, default=1000, help="training volumes of the linear baselines; 0: none"
    )
    parser.add_argument("--num-workers", type=int, default=0, help="processes that prepare volumes; 0 uses this one")
    parser.add_argument("--num-resamples", type=int, default=1000, help="bootstrap replicates of the intervals")
    arguments = parser.parse_args()
    if arguments.num_probe < 0:
        parser.error(f"--num-probe must be 0 or more, got {arguments.num_probe}")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    refuse_other_models(arguments.model)
    model = T3DForPreTraining.from_pretrained(arguments.model).eval()
    processor = T3DProcessor.from_pretrained(arguments.model)
    try:
        splits = load_splits(arguments.manifest, processor, arguments.num_probe, arguments.num_workers)
    except ManifestError as error:
        sys.exit(str(error))
    if not any(row.masks for row in splits["test"].rows):
        sys.exit(
            f"{arguments.manifest}: its test rows have no masks, on which attention is scored; make the phantoms with "
            "--masks test"
        )
    results = evaluate_pretrained(
        model,
        processor,
        splits["test"],
        EVALUATION_PROMPTS,
        train=splits.get("train"),
        validation=splits["validation"],
        collator=PretrainingCollator(processor),
        batch_size=32,
        read_row=read_row,
        read_label_map=read_label_map,
        lesion_values={name: FINDINGS[name].index for name in GROUPS["focal"]},
        organ_values=ORGANS,
        groups=GROUPS,
        num_resamples=arguments.num_resamples,
    )
    results.extra["phantom_version"] = phantom_version(arguments.manifest.parent)
    print(results.to_markdown())
    print(f"results: {results.save(arguments.output)}")
    picture = draw_case(model, processor, splits["test"], arguments.output / "attention.png")
    print(f"picture: {picture or f'none, no test phantom has a {PICTURED}'}")


if __name__ == "__main__":
    main()
