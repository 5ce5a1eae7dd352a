# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Settings are typed, and a misspelt one is refused with the nearest name."""

from pathlib import Path

import pytest

from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments, load_configuration

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
MINIMAL = "data: {manifest: m.csv}\ntraining: {output_dir: out}\n"


def load(folder: Path, text: str, *overrides: str):
    path = folder / "settings.yaml"
    path.write_text(text)
    return load_configuration(path, overrides)


def test_the_home_folder_stands_behind_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = load(tmp_path, MINIMAL.replace("m.csv", "~/m.csv"), "training.output_dir=~/x")
    assert (settings.data.manifest, settings.training.output_dir) == ("/home/somebody/m.csv", "/home/somebody/x")


def test_defaults_and_overrides(tmp_path):
    settings = load(
        tmp_path,
        MINIMAL,
        "training.vision_learning_rate=1e-3",
        "training.max_steps=7",
        "training.mixed_precision=no",
        "training.trackers=[]",
        "training.save_steps=null",
        "--model.overrides.view_fusion=mean",
        "model.overrides.vision_config.depths=[1, 1]",
        "image_processor.spacing=[4, 4, 4]",
        "training.max_train_minutes=2",
    )
    assert settings.training.vision_learning_rate == 1e-3
    assert settings.training.max_steps == 7
    assert settings.training.mixed_precision == "no"
    assert settings.training.trackers == []
    assert settings.training.save_steps is None
    assert settings.training.max_train_minutes == 2.0
    assert settings.training.text_learning_rate == 2e-5
    assert settings.model.preset == "base"
    assert settings.model.overrides == {"view_fusion": "mean", "vision_config": {"depths": [1, 1]}}
    assert settings.image_processor == {"spacing": [4, 4, 4]}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load_configuration(path).data.manifest.endswith(".csv")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=1", r"unknown setting training\.max_step; did you mean training\.max_steps\?"),
        ("trainin.max_steps=1", r"unknown setting trainin; did you mean training\?"),
        ("model.xyz=1", r"unknown setting model\.xyz; there are preset, "),
        ("training.max_steps=1.5", r"training\.max_steps must be of type int, got 1\.5"),
        ("training.max_steps=true", r"training\.max_steps must be of type int, got True"),
        ("training.seed=null", r"training\.seed must be of type int, got None"),
        ("training.weight_decay=little", r"training\.weight_decay must be of type float, got 'little'"),
        ("training.weight_decay=true", r"training\.weight_decay must be of type float, got True"),
        ("training.drop_last=1", r"training\.drop_last must be of type bool, got 1"),
        ("training.trackers=tensorboard", r"training\.trackers must be of type list"),
        (
            "training.mixed_precision=fp8",
            r"training\.mixed_precision must be one of 'auto', 'bf16', 'fp16', 'no', got ",
        ),
        ("data.sections=words", r"data\.sections must be one of 'both', 'findings', 'impression'"),
        ("training.logging_steps=0", r"training\.logging_steps must be positive, got 0"),
        ("training.warmup_ratio=1", r"training\.warmup_ratio must lie in \[0, 1\), got 1"),
        ("training.ema_decay=1", r"training\.ema_decay must lie between 0 and 1, got 1"),
        ("training.place_soft_threshold=-0.1", r"training\.place_soft_threshold must be 0 or more, got -0\.1"),
        ("training.frozen_vision_layers=-1", r"training\.frozen_vision_layers must be 0 or more, got -1"),
        ("training.activation_checkpointing_stages=[layer1]", r"needs training\.activation_checkpointing=true"),
        ("training.early_stopping_patience=2", r"needs training\.metric_for_best_model and training\.eval_steps"),
        ("training=5", r"section 'training' must hold settings, got 5"),
        ("training.seed.value=5", r"override training\.seed\.value: 'seed' holds a value, not a section"),
        ("training.max_steps", r"override 'training\.max_steps': write section\.name=value"),
        ("training.seed=[", r"not YAML"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, override, message):
    text = MINIMAL.replace("output_dir: out", "output_dir: out, seed: 1")
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, text, override)


def test_missing_settings_and_files(tmp_path):
    with pytest.raises(ConfigurationError, match=r"setting data\.manifest is missing; add it"):
        load(tmp_path, "data: {}\ntraining: {output_dir: out}\n")
    with pytest.raises(ConfigurationError, match=r"gone\.yaml: no such configuration"):
        load_configuration(tmp_path / "gone.yaml")


def test_arguments_in_python_are_checked_too():
    with pytest.raises(ConfigurationError, match=r"training\.max_grad_norm must be positive, got -1"):
        T3DTrainingArguments("out", max_grad_norm=-1)
    assert T3DTrainingArguments("out").to_dict()["output_dir"] == "out"
