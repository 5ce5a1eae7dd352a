# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The ablation: arms that differ by one switch, a table that says what result files say, two arms end to end."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_t3d import T3DConfig, T3DForPreTraining, T3DImageProcessor
from modeling_t3d.training.arguments import load_configuration

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CONFIGS = EXAMPLES / "configs"


@pytest.fixture(scope="module")
def scripts():
    """The modules that the script puts together."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import ablation
        import ablation_arms
        import ablation_compute
        import ablation_table
    finally:
        sys.path.remove(str(EXAMPLES))
    return ablation, ablation_arms, ablation_table, ablation_compute


@pytest.fixture(scope="module")
def arms(scripts):
    return scripts[1].make_arms(load_configuration(CONFIGS / "ablation.yaml"))


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one with dotted keys."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(one: dict, other: dict) -> set[str]:
    one, other = flat(one), flat(other)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_configuration_is_the_quickstart_apart_from_paths_views_and_what_the_quickstart_changed_since():
    one, other = (asdict(load_configuration(CONFIGS / name)) for name in ("quickstart.yaml", "ablation.yaml"))
    names = ("output_dir", "max_steps", "max_train_minutes", "save_steps", "dataloader_num_workers")
    paths_and_budget = {"data.manifest", *(f"training.{name}" for name in names)}
    needed = {"data.validation_split", "image_processor.num_local_views"}
    encoder = ("embedding_size", "hidden_sizes", "depths", "stem_kernel_size", "stem_stride")
    since = {"data.num_sentence_texts", *(f"model.overrides.vision_config.{name}" for name in encoder)}
    assert differences(one, other) <= paths_and_budget | needed | since
    assert other["image_processor"]["num_local_views"] == 4


@pytest.mark.parametrize("name", ["ablation", "ablation_gpu"])
def test_every_arm_of_a_shipped_configuration_has_a_model_for_its_views(scripts, name):
    path = CONFIGS / f"{name}.yaml"
    for arm in scripts[1].make_arms(load_configuration(path)):
        settings = load_configuration(path, arm.overrides)
        config = T3DConfig.from_preset(settings.model.preset, **settings.model.overrides)
        with torch.device("meta"):
            model = T3DForPreTraining(config)
        views = T3DImageProcessor(**settings.image_processor)
        assert views.num_channels == config.vision_config.num_channels
        for size in (views.global_size, views.local_size):
            features = model.t3d.vision_model(torch.empty(2, views.num_channels, *size, device="meta"))
            assert features.pooler_output.shape == (2, config.vision_config.hidden_size)


OTHERS = ("tir-shuffled", "tma-loss-barlow-light", "v1", "gtgm", "gtgm-large-crops")


def test_arms_differ_from_the_default_by_one_switch(arms):
    default = asdict(load_configuration(CONFIGS / "ablation.yaml"))
    changes = {}
    for arm in arms:
        changed = asdict(load_configuration(CONFIGS / "ablation.yaml", arm.overrides))
        changes[arm.name] = differences(default, changed)
        expected = 1 if arm.kind == "pretraining" and arm.name not in ("default", *OTHERS) else 0
        assert len(changes[arm.name]) == expected or arm.name in OTHERS, arm.name
    others = {name: {key.rpartition(".")[2] for key in changes.pop(name)} for name in OTHERS}
    assert others["tir-shuffled"] == {"lambda_tir", "tir_report"}
    assert others["tma-loss-barlow-light"] == {"tma_loss", "lambda_tma"}
    assert {"lambda_gca", "lambda_tir", "tma_query", "num_local_views"} <= others["v1"]
    assert {"gca_views", "tma_loss", "manifest", "num_local_views"} <= others["gtgm"]
    assert others["gtgm-large-crops"] - others["gtgm"] == {"spacing", "local_size"}
    switches = [key.rpartition(".")[2] for changed in changes.values() for key in changed]
    counts = {name: switches.count(name) for name in sorted(set(switches))}
    assert counts == {
        "lambda_tir": 1,
        "lambda_tma": 1,
        "tma_loss": 2,
        "tma_negatives": 1,
        "tma_query": 2,
        "view_fusion": 2,
        "view_sampling": 2,
    }
    assert len({arm.overrides for arm in arms if arm.kind == "pretraining"}) == 17


def make_result(scripts, arm: str, seed: int, quality: float) -> dict:
    """A result whose scores know the labels the better the larger `quality` is."""
    findings = scripts[1].FINDING_NAMES
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (40, len(findings)))
    labels[:2] = [[0], [1]]
    scores = generator.normal(size=labels.shape) + quality * labels
    part = {"scores": scores.tolist(), "labels": labels.tolist(), "patients": [str(row // 2) for row in range(40)]}
    facts = {"command": "the command", "hardware": "the machine", "commit": "abc", "steps": 7, "minutes": 1.25}
    return {"arm": arm, "seed": seed, **facts, "validation": part, "test": part}


def test_table_shows_result_files_and_names_the_best_arm(scripts, arms, tmp_path):
    ablation, ablation_arms, ablation_table, _ = scripts
    arguments = ablation.parse_arguments(["--output", str(tmp_path), "--steps-per-arm", "7", "--seeds", "0", "1"])
    settings = ablation.describe_settings(arguments)
    ablation_arms.settle(tmp_path, settings)
    measurements = {
        "retrieval": {"report_to_volume": {"recall": {"5": {"value": 0.25}}, "chance": {"5": 0.125}}},
        "leak": None,
        "localisation": {"all": {"pointing": {"value": 0.5}, "average_precision": {"value": 0.75}, "chance": 0.0625}},
        "study_identity": {"nearest_neighbour_accuracy": 0.375, "chance": 0.03125},
    }
    by_name = {arm.name: arm for arm in arms}
    for name, seed, quality in (
        ("default", 0, 0.5),
        ("default", 1, 0.5),
        ("gca-alone", 0, 2.0),
        ("gca-alone", 1, 2.0),
    ):
        result = make_result(scripts, name, seed, quality) | {"measurements": measurements}
        ablation_arms.result_path(tmp_path, by_name[name], seed).write_text(json.dumps(result))
    for name, quality in (("tma-query-none", 9.0), ("supervised-ceiling", 9.0), ("shortcut-baseline", 0.1)):
        result = make_result(scripts, name, 0, quality)
        ablation_arms.result_path(tmp_path, by_name[name], 0).write_text(json.dumps(result))
    results = ablation_arms.read_results(tmp_path, arms, [0, 1])
    table = ablation_table.make_table(arms, results, [0, 1], settings)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert len(rows) == len(arms) + 2
    aurocs = [ablation_table.group_auroc(results["gca-alone"][seed]["test"], "macro") for seed in (0, 1)]
    assert f"| {np.mean(aurocs):.3f} [{min(aurocs):.3f} to {max(aurocs):.3f}; " in rows["GCA alone"]
    assert "| 0.250 [0.250 to 0.250] (chance 0.125) | – | 0.500 [0.500 to 0.500] (chance 0.062)" in rows["GCA alone"]
    # One seed is missing: it shows, and the arm cannot be the best, however good.
    assert "| 0; not measured: 1 |" in rows["tma_query none"]
    assert "Best arm on validation: **GCA alone**" in table
    # An arm with a missing seed has no say in what the defaults are.
    assert "Better than the default on validation: **GCA alone**. Worse: none. Not told apart: 0 of 1." in table
    assert rows["view_fusion mean"].count("not measured") == len(ablation_table.HEADER) - 1
    assert "| none | – | – |" in rows["shortcut baseline (headers and HU histogram)"]
    facts = (
        "the command",
        "the machine",
        "abc",
        "Seeds: 0, 1",
        "as many operations as 7 steps",
        "3000 train",
        "7 files",
    )
    for fact in facts:
        assert fact in table


def test_confident_scores_are_kept_apart(scripts):
    """What a result file keeps ranks as the model does, where probabilities of 0.99999995 and more are one number."""
    _, ablation_arms, ablation_table, _ = scripts
    names = ablation_arms.FINDING_NAMES
    rows = [
        SimpleNamespace(labels=dict.fromkeys(names, row % 2), study_id=f"s{row}", patient_id=f"p{row}")
        for row in range(4)
    ]
    log_odds = np.array([[40.0], [60.0], [41.0], [42.0]]) + np.zeros((4, len(names)))
    part = json.loads(json.dumps(ablation_arms.scored(log_odds, SimpleNamespace(rows=rows))))
    assert ablation_table.group_auroc(part, "macro") == 1.0


def test_interval_of_the_mean_pairs_patients(scripts):
    """Seeds that are copies of each other have the interval of one."""
    ablation_table = scripts[2]
    result = make_result(scripts, "default", 0, 1.0)
    once = ablation_table.auroc_cell([result], "test", "focal")
    twice = ablation_table.auroc_cell([result, result], "test", "focal")
    assert once.partition("[")[2] == twice.rpartition("; ")[2]


def test_an_arm_is_better_only_beyond_what_patients_and_seeds_explain(scripts):
    """A copy of the default differs from itself by its seeds alone, and one good seed among three is no evidence."""
    ablation_table = scripts[2]
    default = [make_result(scripts, "default", seed, 0.5) for seed in (0, 1, 2)]
    same = ablation_table.difference(default[:1], default[:1])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    spread = ablation_table.difference(default, default)
    assert spread.value == 0.0
    assert spread.low < 0.0 < spread.high
    better = [make_result(scripts, "gca-alone", seed, 2.0) for seed in (0, 1, 2)]
    assert ablation_table.difference(better, default).low > 0
    assert ablation_table.difference(default, better).high < 0
    assert ablation_table.difference([better[0], *default[1:]], default).low < 0


def test_results_of_other_settings_are_not_mixed(scripts, tmp_path):
    ablation, ablation_arms, *_ = scripts
    for command in (["--steps-per-arm", "7"], ["--steps-per-arm", "7", "--seeds", "5"]):
        arguments = ablation.parse_arguments(["--output", str(tmp_path), *command])
        ablation_arms.settle(tmp_path, ablation.describe_settings(arguments))
    arguments = ablation.parse_arguments(["--output", str(tmp_path), "--steps-per-arm", "8"])
    with pytest.raises(SystemExit, match="another budget"):
        ablation_arms.settle(tmp_path, ablation.describe_settings(arguments))


def test_arms_whose_steps_cost_less_take_more_of_them(scripts, tmp_path):
    """Global alignment alone reads no local views; another query of the views costs about the same."""
    _, ablation_arms, _, ablation_compute = scripts
    config = CONFIGS / "ablation.yaml"
    changes = {
        "data.manifest": tmp_path / "phantoms" / "manifest.csv",
        "data.num_preparation_workers": 0,
        "training.output_dir": tmp_path / "run",
        "training.per_device_train_batch_size": 4,
        "training.use_cpu": "true",
    }
    overrides = [f"{name}={value}" for name, value in changes.items()]
    settings = load_configuration(config, overrides)
    by_name = {arm.name: arm for arm in ablation_arms.make_arms(settings)}
    counts = {"train": 8, "validation": 4, "test": 4}
    ablation_arms.prepare_phantoms(settings, [by_name["default"]], counts, 8.0, 1)
    captions = tmp_path / "phantoms" / "captions.csv"
    assert not captions.exists(), "no arm read them"
    ablation_arms.prepare_phantoms(settings, [by_name["gtgm"]], counts, 8.0, 1)
    assert captions.is_file()
    names = ("default", "gca-alone", "tma-negatives-own-query", "supervised-ceiling", "gtgm")
    steps = {
        name: ablation_compute.steps_of_equal_compute(by_name[name], by_name["default"], 1000, config, overrides)
        for name in names
    }
    assert steps["default"] == 1000
    assert steps["gca-alone"] > 1300
    assert steps["tma-negatives-own-query"] == pytest.approx(1000, rel=0.05)
    # One view without a text tower.
    assert steps["supervised-ceiling"] > steps["gca-alone"]
    # Two crops in place of a global and four local views.
    assert steps["gtgm"] > steps["default"]


def test_two_arms_end_to_end_and_again(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "ablation.py"),
        "--output",
        str(tmp_path / "out"),
        "--steps-per-arm",
        "2",
    ]
    command += ["--train", "16", "--validation", "12", "--test", "12", "--resolution", "8", "--num-threads", "1"]
    command += [
        "--table",
        str(tmp_path / "table.md"),
        "--seeds",
        "0",
        "--arms",
        "view-fusion-mean",
        "supervised-ceiling",
    ]
    tail = ["training.per_device_train_batch_size=4", "training.use_cpu=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *tail], check=True, cwd=ROOT, env=environment)
    table = (tmp_path / "table.md").read_text()
    files = sorted((tmp_path / "out" / "results").iterdir())
    assert [path.name for path in files] == ["supervised-ceiling-seed0.json", "view-fusion-mean-seed0.json"]
    ceiling, fusing = (json.loads(path.read_text()) for path in files)
    assert fusing["steps"] == 2 < ceiling["steps"]
    for result in (ceiling, fusing):
        assert np.shape(result["test"]["scores"])[0] == 12
    before = [path.stat().st_mtime_ns for path in files]
    subprocess.run([*command, *tail], check=True, cwd=ROOT, env=environment)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (tmp_path / "table.md").read_text() == table
