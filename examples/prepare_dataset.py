# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""From a folder of scans and reports, or a manifest, to a quality page and a store of prepared volumes.

    python examples/prepare_dataset.py --layout folder --folder scans --output outputs/mine --store outputs/mine/store
    python examples/prepare_dataset.py --layout ct-rate --folder CT-RATE --output outputs/ct-rate --quality-only
    python examples/prepare_dataset.py --manifest outputs/ct-rate/manifest.csv --output outputs/ct-rate \
        --store s3://bucket/ct-rate --scheduler tcp://head:8786

Writes `manifest.csv` (all rows), `quality.html`, `quarantine.csv` (volumes that cannot be read) and `stored.csv` (the
rows whose volumes are in the store, without masks: what training reads) to OUTPUT. Calling it again finishes an
interrupted run.
"""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

import yaml

from modeling_t3d import T3DImageProcessor
from modeling_t3d.data.build import BuildError, addresses_below, build_store, write_stored_manifest
from modeling_t3d.data.builders import BUILDERS, LayoutError, assign_splits, build_records
from modeling_t3d.data.manifest import ManifestError, read_manifest
from modeling_t3d.data.manifest_files import write_records
from modeling_t3d.data.quality import examine_manifest
from modeling_t3d.data.quality_page import write_quality_page
from modeling_t3d.data.store import StoreError
from modeling_t3d.training.arguments import ConfigurationError, load_configuration

logger = logging.getLogger("prepare_dataset")
SPLITS = ["train=0.8", "validation=0.1", "test=0.1"]  # shares of the patients
PAGE = "quality.html"
CONFIG = Path(__file__).parent / "configs" / "base.yaml"


def number_or_share(text: str) -> int | float:
    """A whole number of volumes, or a share of them."""
    value = int(text) if text.isdigit() else float(text)
    if not 0 <= value <= (math.inf if text.isdigit() else 1):
        raise ValueError
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the manifest, the page and the lists")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--layout", choices=list(BUILDERS), help="how FOLDER is laid out")
    source.add_argument("--manifest", type=Path, help="a manifest instead of a layout")
    parser.add_argument("--folder", type=Path, help="where the release, or one's own scans, lie")
    parser.add_argument("--option", nargs="+", default=[], metavar="NAME=VALUE", help="of the layout")
    parser.add_argument(
        "--splits", nargs="+", metavar="NAME=SHARE", help=f"where a layout has none; {' '.join(SPLITS)} by default"
    )
    parser.add_argument("--format", choices=("csv", "jsonl", "parquet"), default="csv", help="of the manifests")
    parser.add_argument("--quality-volumes", type=int, default=500, help="how many volumes the quality page opens")
    parser.add_argument("--quality-only", action="store_true", help="stop before the store")
    parser.add_argument("--store", help="where prepared volumes go: a folder, or an address such as s3://bucket/store")
    parser.add_argument(
        "--storage-option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what fsspec needs for --store, and for --sources of the same kind, such as "
        "endpoint_url=http://host:9000; others see a command line: leave secrets to the environment",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the training: its image processor counts")
    parser.add_argument("--codec", choices=("none", "zstd"), default="none", help="zstd: smaller, slower to read")
    parser.add_argument("--scheduler", help="running Dask cluster, tcp://host:port; without it, this machine")
    parser.add_argument("--num-workers", type=int, help="processes on this machine; 0 for none but this one")
    parser.add_argument("--sources", help="address of a copy of the manifest's folder that workers fetch volumes from")
    parser.add_argument(
        "--max-unreadable",
        type=number_or_share,
        default=0.01,
        help="volumes to quarantine before the build stops: a whole number, or a share such as 0.01, but at least one",
    )
    parsed = parser.parse_args(arguments)
    if parsed.layout and not parsed.folder:
        parser.error("--layout needs --folder")
    if parsed.manifest and (parsed.folder or parsed.option or parsed.splits):
        parser.error("--folder, --option and --splits go with --layout; a manifest says itself what they would")
    if not parsed.store and not parsed.quality_only:
        parser.error("give --store, or --quality-only to look the data over first")
    return parsed


def pairs(texts: list[str], *, are_secret: bool = False) -> dict:
    """NAME=VALUE arguments; values are read as YAML. What may be secret is not repeated in a message."""
    if wrong := [text for text in texts if "=" not in text]:
        sys.exit(f"{'--storage-option' if are_secret else repr(wrong[0])}: write NAME=VALUE")
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in texts)}


def make_manifest(arguments: argparse.Namespace) -> Path:
    """The manifest that was given, or one of the rows that the folder's layout gives."""
    if arguments.manifest:
        return arguments.manifest
    release = build_records(arguments.layout, arguments.folder, **pairs(arguments.option))
    for note in release.notes:
        logger.warning("%s", note)
    shares = pairs(arguments.splits or SPLITS)
    if wrong := [name for name, share in shares.items() if not isinstance(share, int | float) or share < 0]:
        sys.exit(f"--splits: {wrong[0]}={shares[wrong[0]]!r} is no share; write a number such as 0.8")
    assign_splits(release.records, shares)
    for split in sorted(shares.keys() - {record["split"] for record in release.records}):
        logger.warning("the split %s has no volume: too few patients for its share", split)
    manifest = arguments.output / f"manifest.{arguments.format}"
    if manifest.exists() and not (arguments.output / PAGE).exists():
        # Of a call that was cut off, which wrote the same; or not this script's at all.
        fresh = write_records(release.records, manifest.with_name(f"fresh-{manifest.name}"))
        is_ours = fresh.read_bytes() == manifest.read_bytes()
        fresh.unlink()
        if not is_ours:
            sys.exit(f"{manifest}: was not written by this script; choose another --output")
    return write_records(release.records, manifest)


def run(arguments: argparse.Namespace) -> None:
    """Manifest, quality page, store."""
    storage_options = pairs(arguments.storage_option, are_secret=True)
    manifest = make_manifest(arguments)
    logger.info("manifest: %s", manifest)
    processes = os.cpu_count() or 1 if arguments.num_workers is None else arguments.num_workers
    quality = examine_manifest(manifest, max_volumes=arguments.quality_volumes, num_workers=processes)
    for check in quality.checks:
        if check.level != "good":
            logger.warning("%s: %s", check.name, check.text)
    logger.info("quality page: %s", write_quality_page(quality, arguments.output / PAGE))
    if arguments.quality_only:
        return
    settings = load_configuration(arguments.config, [f"data.manifest={manifest}"])
    # A store holds volumes: training, and not the store, leaves out reports that are short.
    listed = read_manifest(manifest, min_report_words=0, require_report=False, check_files=False)
    rows = listed.rows
    logger.info("%s", listed.describe())
    report = build_store(
        rows,
        arguments.store,
        T3DImageProcessor(**settings.image_processor),
        scheduler=arguments.scheduler,
        num_workers=arguments.num_workers,
        addresses=addresses_below(manifest, rows, arguments.sources) if arguments.sources else None,
        codec=arguments.codec,
        storage_options=storage_options,
        max_unreadable=arguments.max_unreadable,
        quarantine=arguments.output / "quarantine.csv",
    )
    stored = arguments.output / f"stored.{arguments.format}"
    if repeated := write_stored_manifest(manifest, report, stored):
        logger.warning("%d rows hold the very volume of an earlier row and are not in %s", repeated, stored)
    logger.info("train on %s with the store %s", stored, arguments.store)
    if without := sum(not row.report for row in rows):
        logger.warning(
            "%d rows have no report, and training refuses them: write captions with examples/generate_captions.py, or "
            "take the rows out",
            without,
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("distributed").setLevel(logging.ERROR)
    try:
        run(parse_arguments())
    except (BuildError, ConfigurationError, LayoutError, ManifestError, StoreError) as error:
        sys.exit(str(error))
