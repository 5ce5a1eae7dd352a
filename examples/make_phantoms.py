# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Writes thorax-abdomen CT phantoms with reports, their manifest, and a tokenizer trained on the training reports.

    python examples/make_phantoms.py --output outputs/phantoms --train 2000 --validation 200 --test 400

The manifest is `OUTPUT/manifest.csv`, the tokenizer `OUTPUT/tokenizer`. Calling it again finishes an interrupted run.
"""

import argparse
import csv
import sys
from pathlib import Path

from modeling_t3d.data.phantoms import (
    FINDINGS,
    PHANTOM_VERSION,
    PhantomFolderError,
    phantom_seeds,
    train_phantom_tokenizer,
    write_phantoms,
)


def count(text: str) -> int:
    """A number of studies."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def millimetres(text: str) -> float:
    """A size of voxels."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=count, default=2000, help="studies of the training split")
    parser.add_argument("--validation", type=count, default=200, help="studies of the validation split")
    parser.add_argument("--test", type=count, default=400, help="studies of the test split")
    parser.add_argument("--num-workers", type=int, default=1, help="processes")
    parser.add_argument("--resolution", type=millimetres, default=4.0, help="nominal voxel size in mm")
    parser.add_argument(
        "--masks",
        nargs="*",
        default=[],
        choices=("train", "validation", "test"),
        help="splits whose lesions and organs get label maps too",
    )
    parser.add_argument("--uncompressed", action="store_true", help="write .nii instead of .nii.gz: faster, larger")
    parser.add_argument("--vocab-size", type=int, default=2000, help="largest number of tokens")
    return parser.parse_args()


def main() -> None:
    """Write the phantoms, then the tokenizer."""
    arguments = parse_arguments()
    counts = {split: getattr(arguments, split) for split in ("train", "validation", "test")}
    seeds = [seed for split, count in counts.items() for seed in phantom_seeds(split, count)]
    try:
        manifest = write_phantoms(
            arguments.output,
            seeds,
            arguments.num_workers,
            compress=not arguments.uncompressed,
            masks=arguments.masks,
            resolution=arguments.resolution,
        )
    except (PhantomFolderError, FileExistsError) as error:
        sys.exit(str(error))
    with open(manifest, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reports = [f"{row['findings']}\n{row['impression']}" for row in rows if row["split"] == "train"]
    if reports:
        train_phantom_tokenizer(reports, arguments.vocab_size).save_pretrained(arguments.output / "tokenizer")
    print(f"{manifest}: {len(rows)} studies {counts}, phantom version {PHANTOM_VERSION}")
    for name, spec in FINDINGS.items():
        share = sum(row[f"label:{name}"] == "1" for row in rows) / max(len(rows), 1)
        print(f"  {name:24s} {spec.extent:8s} {share:6.1%}")


if __name__ == "__main__":
    main()
