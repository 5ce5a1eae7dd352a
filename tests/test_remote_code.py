# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A saved folder carries its code: it loads and gives the same outputs in a process without the package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tiny_processor, tiny_scan
from transformers import AutoModelForZeroShotImageClassification, pipeline

from modeling_t3d import (
    T3DConfig,
    T3DForImageClassification,
    T3DForPreTraining,
    T3DModel,
    T3DVisionModel,
    ZeroShotVolumeClassificationPipeline,
)

PACKAGE = Path(__file__).resolve().parents[1] / "modeling_t3d"
TASK = "zero-shot-volume-classification"
LABELS = ["pleural effusion", "lung nodule", "emphysema"]

# Run from an empty folder. The package is found through the environment's `.pth` file, hence the finder in its way;
# what only the extras or training need is kept away too.
CHILD = """
import importlib, json, sys

class Absent:
    names = {"modeling_t3d", "monai", "pydicom", "SimpleITK"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in Absent.names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is importable: this process proves nothing")

import torch
torch.set_num_threads(1)
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

settings = json.loads(sys.argv[1])
trust = {"trust_remote_code": True}
result = {"pipelines": []}
with torch.no_grad():
    for folder, path in settings["folders"].items():
        config = AutoConfig.from_pretrained(path, **trust)
        auto = getattr(transformers, settings["auto_classes"][folder])
        # Some CPUs round products by address: copies lie as new weights do, loaded ones where the file has them.
        model = auto.from_pretrained(path, **trust).eval()._apply(torch.clone)
        result[folder] = {"classes": [type(config).__name__, type(model).__name__, type(model).__module__]}
        if folder in ("vision", "classification"):
            result[folder]["output"] = model(torch.load(settings["inputs"])["pixel_values"])[0]
            continue
        processor = AutoProcessor.from_pretrained(path, **trust)
        image_processor = AutoImageProcessor.from_pretrained(path, **trust)
        result[folder]["classes"] += [type(processor).__name__, type(image_processor).__name__]
        inputs = processor(images=settings["scan"], text=settings["texts"], views="grid")
        result[folder]["inputs"] = dict(inputs)
        dual_encoder = AutoModel.from_pretrained(path, **trust).eval()._apply(torch.clone)
        result[folder]["classes"].append(type(dual_encoder).__name__)
        result[folder]["output"] = dual_encoder(**inputs).logits_per_image
    for folder in settings["pipelines"]:
        classifier = pipeline(settings["task"], model=folder, device="cpu", **trust)
        classifier.model._apply(torch.clone)
        scores = classifier(settings["scan"], settings["labels"])
        result["pipelines"].append([scores, type(classifier).__module__])
assert "modeling_t3d" not in sys.modules
torch.save(result, settings["result"])
"""
AUTO_CLASSES = {
    "vision": "AutoModel",
    "dual_encoder": "AutoModelForZeroShotImageClassification",
    "pretraining": "AutoModelForPreTraining",
    "classification": "AutoModelForImageClassification",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Plain saves of each kind of model, two beside the processor, and of a pipeline."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    config = T3DConfig.from_preset("tiny", view_fusion="attention")
    models = {
        "vision": T3DVisionModel(T3DConfig.from_preset("tiny").vision_config),
        "dual_encoder": T3DModel(config),
        "pretraining": T3DForPreTraining(T3DConfig.from_preset("tiny", view_fusion="attention")),
        "classification": T3DForImageClassification(T3DConfig.from_preset("tiny").vision_config),
    }
    for name, model in models.items():
        model.eval().save_pretrained(root / name)
    for name in ("dual_encoder", "pretraining"):
        tiny_processor().save_pretrained(root / name)
    classifier = pipeline(TASK, model=models["dual_encoder"], processor=tiny_processor(), device="cpu")
    classifier.save_pretrained(root / "pipeline")
    return root, models


@pytest.fixture(scope="module")
def remote(checkpoints, tmp_path_factory):
    """What a process without the package makes of the folders."""
    root, _ = checkpoints
    empty = tmp_path_factory.mktemp("elsewhere")
    scan = tiny_scan(empty)
    torch.save({"pixel_values": torch.linspace(-1, 1, 16**3).view(1, 1, 16, 16, 16)}, empty / "inputs.pt")
    settings = {
        "folders": {name: str(root / name) for name in AUTO_CLASSES},
        "auto_classes": AUTO_CLASSES,
        "inputs": str(empty / "inputs.pt"),
        "scan": str(scan),
        "texts": [f"{label} is present." for label in LABELS],
        "labels": LABELS,
        "task": TASK,
        "pipelines": [str(root / "dual_encoder"), str(root / "pipeline")],
        "result": str(empty / "result.pt"),
    }
    # Its own module cache: code of another run must not answer.
    environment = {**os.environ, "HF_MODULES_CACHE": str(empty / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(settings)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return settings, torch.load(empty / "result.pt", weights_only=False)


def test_folders_hold_the_files_that_travel_and_no_others(checkpoints):
    root, _ = checkpoints
    travelling = {path.name for path in PACKAGE.glob("*_t3d.py")}
    for name in AUTO_CLASSES:
        carried = {path.name for path in (root / name).glob("*.py")}
        assert carried <= travelling
        assert {"modeling_t3d.py", "pipelines_t3d.py"} <= carried
        for path in (root / name).glob("*.py"):
            siblings = {
                f"{node.module}.py"
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.level
            }
            assert siblings <= carried, path.name


def test_classes_come_from_the_folder(remote):
    _, result = remote
    expected = {
        "vision": ("T3DVisionConfig", "T3DVisionModel"),
        "dual_encoder": ("T3DConfig", "T3DModel", "T3DProcessor", "T3DImageProcessor", "T3DModel"),
        "pretraining": ("T3DConfig", "T3DForPreTraining", "T3DProcessor", "T3DImageProcessor", "T3DModel"),
        "classification": ("T3DVisionConfig", "T3DForImageClassification"),
    }
    for name, classes in expected.items():
        config, model, module, *others = result[name]["classes"]
        assert (config, model, *others) == classes
        assert module.startswith("transformers_modules.")


@pytest.mark.parametrize("name", ["vision", "classification"])
def test_vision_outputs_are_the_same(checkpoints, remote, name):
    settings, result = remote
    with torch.no_grad():
        expected = checkpoints[1][name](torch.load(settings["inputs"])["pixel_values"])[0]
    assert torch.equal(result[name]["output"], expected)


@pytest.mark.parametrize("name", ["dual_encoder", "pretraining"])
def test_inputs_and_outputs_are_the_same(checkpoints, remote, name):
    settings, result = remote
    inputs = tiny_processor()(images=settings["scan"], text=settings["texts"], views="grid")
    assert set(result[name]["inputs"]) == set(inputs)
    for key, value in inputs.items():
        assert torch.equal(result[name]["inputs"][key], value), key
    with torch.no_grad():
        expected = checkpoints[1][name].base_model(**inputs).logits_per_image
    assert torch.equal(result[name]["output"], expected)


def test_pipeline_scores_are_the_same(checkpoints, remote):
    settings, result = remote
    classifier = pipeline(TASK, model=checkpoints[1]["dual_encoder"], processor=tiny_processor(), device="cpu")
    expected = classifier(settings["scan"], LABELS)
    for scores, module in result["pipelines"]:
        assert scores == expected
        assert module.startswith("transformers_modules.")


def test_where_the_package_is_installed_its_own_classes_win(checkpoints):
    root, _ = checkpoints
    for trust in (None, True):
        model = AutoModelForZeroShotImageClassification.from_pretrained(root / "pretraining", trust_remote_code=trust)
        assert type(model) is T3DModel
    for folder in ("pretraining", "pipeline"):
        plain = pipeline(TASK, model=str(root / folder), device="cpu")
        assert type(plain) is ZeroShotVolumeClassificationPipeline
        assert type(plain.model) is T3DModel
