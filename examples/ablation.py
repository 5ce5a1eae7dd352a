# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Trains every arm of the ablation on phantoms, one switch at a time around the default, and writes one table.

    python examples/ablation.py --output outputs/ablation --results benchmarks/ablation --table benchmarks/ablation.md
    python examples/ablation.py --output outputs/short --steps-per-arm 200 --seeds 0 --arms default gca-alone

Arms compute equally: as much as so many steps of the default one, counted in floating-point operations. So results of
several machines and sessions can stand in one table.

Calling it again skips finished arms and continues the unfinished one from its checkpoint. Further arguments
(section.name=value) change the configuration of all arms.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_arms import (
    DEFAULT,
    FINDING_NAMES,
    SPLITS,
    ArmFailedError,
    InterruptedArmError,
    hardware,
    make_arms,
    prepare_phantoms,
    read_results,
    result_path,
    run_arm,
    settle,
)
from ablation_compute import steps_of_equal_compute
from ablation_table import make_table

from modeling_t3d.data.phantoms import PHANTOM_VERSION
from modeling_t3d.evaluation.protocol import source_commit
from modeling_t3d.training.arguments import load_configuration
from modeling_t3d.training.checkpoints import write_text_atomically
from modeling_t3d.training.trainer import EXIT_STATUS_INTERRUPTED

logger = logging.getLogger("ablation")

# Settings that say where files lie, which changes no result.
PLACES = (("data", "manifest"), ("data", "cache_dir"), ("data", "num_preparation_workers"), ("training", "output_dir"))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of phantoms, runs, results and table")
    parser.add_argument("--results", type=Path, help="folder of results, to share or to commit; OUTPUT by default")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "ablation.yaml")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--steps-per-arm",
        type=int,
        help="each arm computes as much as so many steps of the default one; 510 without either option",
    )
    budget.add_argument("--minutes-per-arm", type=float, help="of training, for arms of one machine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training; the phantoms stay")
    parser.add_argument("--train", type=int, default=3000, help="phantoms of the training split")
    parser.add_argument("--validation", type=int, default=200, help="phantoms that choose between arms")
    parser.add_argument("--test", type=int, default=400, help="phantoms that are reported")
    parser.add_argument("--resolution", type=float, default=4.0, help="nominal voxel size of the phantoms in mm")
    parser.add_argument("--phantoms", type=Path, help="folder of the phantoms, to share; OUTPUT/phantoms by default")
    parser.add_argument("--arms", nargs="+", help="names of the arms to run; all by default")
    parser.add_argument("--views", type=lambda text: text if text == "grid" else int(text), help="views of evaluation")
    parser.add_argument(
        "--table", type=Path, help="also write the table to this file; it is always OUTPUT/ablation.md"
    )
    parser.add_argument("--table-only", action="store_true", help="write the table from the results there are")
    parser.add_argument("--num-threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("overrides", nargs="*", default=[], help="section.name=value, for all arms")
    # Overrides may follow options that take several values.
    parsed, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unknown argument {unknown[0]}")
    parsed.overrides += rest + [name for name in parsed.arms or () if "=" in name]
    parsed.arms = [name for name in parsed.arms or () if "=" not in name]
    parsed.results = parsed.results or parsed.output
    if parsed.steps_per_arm is None and parsed.minutes_per_arm is None:
        parsed.steps_per_arm = 510
    return parsed


def common_overrides(arguments: argparse.Namespace) -> list[str]:
    """What all arms share beyond the configuration file."""
    phantoms = arguments.phantoms or arguments.output / "phantoms"
    limits = {"max_steps": arguments.steps_per_arm, "max_train_minutes": arguments.minutes_per_arm}
    budget = [f"training.{name}={'null' if limit is None else limit}" for name, limit in limits.items()]
    return [f"data.manifest={phantoms / 'manifest.csv'}", *budget, *arguments.overrides]


def stated(section: Any) -> Any:
    """What a section of the configuration changes: results outlive settings that are added later."""
    if not is_dataclass(section):
        return section
    values = {}
    for entry in fields(section):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if getattr(section, entry.name) != default:
            values[entry.name] = getattr(section, entry.name)
    return values


def describe_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for results to stand in one table."""
    settings = load_configuration(arguments.config, common_overrides(arguments))
    configuration = {section.name: stated(getattr(settings, section.name)) for section in fields(settings)}
    for section, name in PLACES:
        configuration[section].pop(name, None)
    by_steps = arguments.steps_per_arm is not None
    return {
        "phantom_version": PHANTOM_VERSION,
        "counts": {split: getattr(arguments, split) for split in SPLITS},
        "resolution": arguments.resolution,
        "budget": {"steps": arguments.steps_per_arm} if by_steps else {"minutes": arguments.minutes_per_arm},
        "views": arguments.views,
        "findings": FINDING_NAMES,
        "configuration": configuration,
    }


def main(command_line: list[str] | None = None) -> int:
    """Run what has no result yet; the table is rewritten after every arm."""
    arguments = parse_arguments(command_line)
    shared_overrides = common_overrides(arguments)
    shared = load_configuration(arguments.config, shared_overrides)
    arms = make_arms(shared)
    names = [arm.name for arm in arms]
    default = arms[names.index(DEFAULT)]
    if unknown := set(arguments.arms) - set(names):
        sys.exit(f"unknown arm {sorted(unknown)[0]!r}; there are {', '.join(names)}")
    settings = describe_settings(arguments)
    settle(arguments.results, settings)

    def write_table() -> str:
        table = make_table(arms, read_results(arguments.results, arms, arguments.seeds), arguments.seeds, settings)
        for path in filter(None, (arguments.output / "ablation.md", arguments.table)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, table)
        return table

    # Seed by seed: a comparison of all arms stands as early as possible.
    chosen = [arm for arm in arms if not arguments.arms or arm.name in arguments.arms]
    plan = [(arm, seed) for seed in arguments.seeds for arm in chosen]
    pending = [(arm, seed) for arm, seed in plan if not result_path(arguments.results, arm, seed).is_file()]
    failures = []
    if pending and not arguments.table_only:
        torch.set_num_threads(arguments.num_threads)
        waiting = [arm for arm, _ in pending]
        prepare_phantoms(shared, waiting, settings["counts"], arguments.resolution, arguments.num_threads)
        for arm, seed in pending:
            path = result_path(arguments.results, arm, seed)
            if path.is_file():  # the baseline without a seed
                continue
            logger.info("arm %s, seed %d", arm.name, seed)
            run = arguments.output / "runs" / arm.run_name(seed)
            overrides = [*shared_overrides, *arm.overrides, f"training.seed={seed}", f"training.output_dir={run}"]
            if arguments.steps_per_arm and arm.kind != "shortcut":
                steps = steps_of_equal_compute(
                    arm, default, arguments.steps_per_arm, arguments.config, shared_overrides
                )
                overrides.append(f"training.max_steps={steps}")
            try:
                result = run_arm(
                    arm, arguments.config, overrides, num_threads=arguments.num_threads, views=arguments.views
                )
            except InterruptedArmError as error:
                logger.warning("%s", error)
                return EXIT_STATUS_INTERRUPTED
            except ArmFailedError as error:
                logger.error("%s", error)
                failures.append(arm.run_name(seed))
                continue
            command = "python " + shlex.join([Path(__file__).parent.name + "/" + Path(__file__).name, *sys.argv[1:]])
            facts = {"command": command, "hardware": hardware(arguments.num_threads), "commit": source_commit()}
            write_text_atomically(path, json.dumps({"arm": arm.name, "seed": seed, **facts, **result}))
            write_table()
    print(write_table())
    if failures:
        logger.error("without a result: %s", ", ".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    # A scheduler's signal ends the arm's process too, which then writes a checkpoint.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STATUS_INTERRUPTED))
    sys.exit(main())
