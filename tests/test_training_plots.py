# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A run draws its losses and metrics, and tells of its steps in words."""

import json

from training_stub import build_trainer

from modeling_t3d.training.checkpoints import checkpoint_step, latest_checkpoint
from modeling_t3d.training.plots import curves, plot_log
from modeling_t3d.training.progress import describe


def test_a_run_draws_what_it_logged(tmp_path):
    scores = iter(range(10))
    trainer = build_trainer(
        tmp_path, plot=True, max_steps=4, eval_steps=2, evaluate=lambda model: {"score": float(next(scores))}
    )
    trainer.train()
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    panels = curves(lines)
    assert panels["score"] == {"validation": ([2, 4], [0.0, 1.0])}
    assert panels["loss"]["train"][0] == [2, 3, 4]
    assert {"grad_norm", "learning_rate", "loss_part"} <= panels.keys()
    assert "volumes_per_second" not in panels
    for line in lines:
        if line["kind"] == "train":
            assert line["peak_memory_gib"] > 0
            assert line["remaining_minutes"] >= 0
    assert lines[-2]["remaining_minutes"] == 0.0


def test_nothing_to_draw(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    assert plot_log(tmp_path / "log.jsonl", tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_early_stopping(tmp_path):
    scores = iter([1.0, 3.0, 2.0, 3.0, 9.0])
    settings = {
        "eval_steps": 2,
        "metric_for_best_model": "score",
        "early_stopping_patience": 2,
        "max_steps": 12,
        "save_steps": 5,
    }
    trainer = build_trainer(tmp_path, evaluate=lambda model: {"score": next(scores)}, **settings)
    result = trainer.train()
    assert result.status == "completed"
    assert (result.state.step, result.state.best_step, result.state.best_metric) == (8, 4, 3.0)
    assert (result.model_dir / "model.safetensors").exists()
    assert checkpoint_step(latest_checkpoint(tmp_path)) == 8, "no save was due"
    again = build_trainer(tmp_path, evaluate=lambda model: {"score": 9.0}, **settings).train(resume=True)
    assert (again.state.step, again.state.best_step) == (8, 4), "a run that stopped early stays so"


def test_early_stopping_by_a_loss(tmp_path):
    scores = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.2])
    settings = {"metric_for_best_model": "score", "greater_is_better": False, "early_stopping_patience": 2}
    trainer = build_trainer(tmp_path, evaluate=lambda model: {"score": next(scores)}, eval_steps=2, **settings)
    assert trainer.train().state.best_step == 8
    assert trainer.state.step == 12


def test_words():
    values = {
        "loss": 8.787,
        "loss_gca": 3.9426,
        "grad_norm": 0.98,
        "volumes_per_second": 122.7,
        "data_wait_share": 0.0306,
        "peak_memory_gib": 1.26,
        "learning_rate": 2.18e-6,
        "remaining_minutes": 12.4,
        "epoch": 1.25,
        "skipped_steps": 2,
    }
    assert describe(values) == (
        "loss 8.787 (gca 3.943) | gradient 0.98 | rate 2.2e-06 | 123 volumes/s | data wait 3.1 % | 1.3 GiB | "
        "12 min left | epoch 1.25 | 2 steps left out"
    )
