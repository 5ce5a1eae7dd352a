# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The commands of the quickstart, one after the other as a user calls them, on a few phantoms."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from modeling_t3d.data.phantoms import EVALUATION_PROMPTS, PHANTOM_VERSION

ROOT = Path(__file__).resolve().parents[1]


def call(script: str, *arguments: str | Path, status: int = 0) -> str:
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout if status == 0 else done.stderr


def test_phantoms_pretraining_evaluation_and_the_embedding_of_a_scan(tmp_path):
    phantoms, run = tmp_path / "phantoms", tmp_path / "run"
    counts = ("--train", "8", "--validation", "4", "--test", "12")
    assert "24 studies" in call("make_phantoms.py", "--output", phantoms, *counts, "--masks", "test", "--uncompressed")
    call(
        "pretrain.py",
        *("--config", ROOT / "examples" / "configs" / "quickstart.yaml", f"data.manifest={phantoms / 'manifest.csv'}"),
        *("data.sections=findings", "data.num_preparation_workers=0", "model.tokenizer_vocab_size=300"),
        *(f"training.output_dir={run}", "training.max_steps=2", "training.per_device_train_batch_size=4"),
        *("training.use_cpu=true", "training.trackers=[]"),
    )
    manifest = phantoms / "manifest.csv"
    for name, wrong, message in (
        ("no-masks", re.sub(r',"{.*?}"', ",", manifest.read_text()), "its test rows have no masks"),
        ("no-test", manifest.read_text().replace(",test,", ",train,"), "no row of split 'test'"),
    ):
        other = phantoms / f"{name}.csv"
        other.write_text(wrong)
        said = call(
            "evaluate_phantoms.py", "--model", run / "model", "--manifest", other, "--output", tmp_path, status=1
        )
        assert message in said.splitlines()[-1]
    evaluate = ("evaluate_phantoms.py", "--model", run / "model", "--manifest", manifest, "--num-resamples", "20")
    said = call(*evaluate, "--output", tmp_path / "evaluation", "--num-probe", "8")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert all(finding in said for finding in EVALUATION_PROMPTS)
    assert Image.open(tmp_path / "evaluation" / "attention.png").size[0] > 100
    assert results["protocol"]["num_studies"] == 12
    assert results["extra"] == {"phantom_version": PHANTOM_VERSION}
    assert {"diffuse", "focal", "macro"} <= results["zero_shot"]["groups"].keys()
    assert {"shortcut baseline", "linear probe"} <= results["comparisons"].keys()
    untrained = phantoms / "no-train.csv"
    untrained.write_text(manifest.read_text().replace(",train,", ",other,"))
    evaluate = (*evaluate[:4], untrained, *evaluate[5:])
    call(*evaluate, "--output", tmp_path / "no-baselines", "--num-probe", "0")
    assert json.loads((tmp_path / "no-baselines" / "results.json").read_text())["comparisons"] == {}

    # What was chosen for training is what the folder says and evaluation reads; the README's lines embed a scan.
    model, processor = AutoModel.from_pretrained(run / "model"), AutoProcessor.from_pretrained(run / "model")
    assert processor.report_sections == "findings"
    scan = next((phantoms / "volumes").iterdir())
    embedding = model.get_image_features(**processor(images=str(scan), return_tensors="pt")).pooler_output
    assert embedding.shape == (1, model.config.projection_dim)
    assert torch.isfinite(embedding).all()


def test_evaluation_of_what_is_no_checkpoint_ends_with_one_line(tmp_path, monkeypatch):
    script = ROOT / "examples" / "evaluate_phantoms.py"
    monkeypatch.syspath_prepend(script.parent)
    model = tmp_path / "none"
    given = ["--model", model, "--manifest", tmp_path / "manifest.csv", "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, given)])
    with pytest.raises(
        SystemExit, match=f"{model}: neither a folder with a checkpoint nor a model that the Hub gives"
    ):
        runpy.run_path(str(script), run_name="__main__")
