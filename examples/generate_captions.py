# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Writes a manifest whose volumes all have text: their reports, or captions made from the volumes themselves (GTGM).

    python examples/generate_captions.py --manifest scans.csv --output captions.csv --source masks \
        --label-names examples/label_names/phantoms.json --described lesions
    python examples/generate_captions.py --manifest scans.csv --output captions.csv --source slices --captioner FOLDER
    python examples/generate_captions.py --manifest scans.csv --output captions.csv --source metadata --modality CT

Captions go into the column `report`. Those made so far lie in `OUTPUT.captions.jsonl`: calling it again finishes an
interrupted run. The first source reads the masks of the manifest, the second shows axial slices to any image-to-text
model of the Hub or of a folder, the third tells how the volume was acquired and names nobody.
"""

import argparse
import logging
import sys
from pathlib import Path

from modeling_t3d.data.caption_masks import MaskCaptioner, read_label_names
from modeling_t3d.data.caption_metadata import MODALITIES, MetadataCaptioner
from modeling_t3d.data.caption_slices import SliceCaptioner
from modeling_t3d.data.captions import CaptionError, CaptionSource, write_captions
from modeling_t3d.data.manifest_files import ManifestError

logger = logging.getLogger("generate_captions")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="CSV, JSONL or Parquet")
    parser.add_argument("--output", type=Path, required=True, help="manifest to write")
    parser.add_argument("--source", choices=("masks", "slices", "metadata"), required=True, help="of the captions")
    parser.add_argument("--overwrite", action="store_true", help="caption volumes that have a report, too")
    masks = parser.add_argument_group("masks")
    masks.add_argument("--label-names", type=Path, help="JSON {mask: {value: name}}, or CSV with label and name")
    masks.add_argument("--described", nargs="+", metavar="MASK", help="masks that are told; others are places alone")
    slices = parser.add_argument_group("slices")
    slices.add_argument("--captioner", help="folder or Hub id of an image-to-text model")
    slices.add_argument("--num-slices", type=int, default=3, help="per volume")
    slices.add_argument("--window", nargs=2, type=float, default=(-160.0, 240.0), help="HU of black and of white")
    slices.add_argument("--no-window", action="store_true", help="volumes that are no CT: black and white are theirs")
    slices.add_argument("--prompt", help="what the text begins with")
    slices.add_argument("--device", default="cpu", help="such as cuda")
    metadata = parser.add_argument_group("metadata")
    metadata.add_argument("--modality", choices=list(MODALITIES), help="where nothing else names it")
    metadata.add_argument(
        "--with-labels", action="store_true", help="tell labels too: no score on them is honest then"
    )
    parsed = parser.parse_args(arguments)
    if parsed.source == "slices" and not parsed.captioner:
        parser.error("--source slices needs --captioner")
    return parsed


def build_source(arguments: argparse.Namespace) -> CaptionSource:
    """The source that the command line names."""
    if arguments.source == "masks":
        names = read_label_names(arguments.label_names) if arguments.label_names else None
        return MaskCaptioner(names, described=arguments.described)
    if arguments.source == "metadata":
        return MetadataCaptioner(modality=arguments.modality, with_labels=arguments.with_labels)
    return SliceCaptioner.from_pretrained(
        arguments.captioner,
        device=arguments.device,
        num_slices=arguments.num_slices,
        window=None if arguments.no_window else arguments.window,
        prompt=arguments.prompt,
    )


def run(arguments: argparse.Namespace) -> None:
    """Caption and report."""
    source = build_source(arguments)
    report = write_captions(arguments.manifest, arguments.output, source, overwrite=arguments.overwrite)
    logger.info(
        "%s: %d captions (%d from an earlier call), %d rows kept their text",
        report.path,
        report.num_written,
        report.num_resumed,
        report.num_kept,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(parse_arguments())
    except (CaptionError, ManifestError) as error:
        sys.exit(str(error))
