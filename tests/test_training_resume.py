# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a resumed run goes on with: the order of samples on any number of processes, trackers without a step twice or
missing, the best checkpoint, hours that end and go on."""

import json
import signal
from pathlib import Path

import pytest
import torch
from training_runs import TrainingRuns, assert_same_weights, log_of, samples_by_step, shared_runs, status
from training_stub import StubModel, build_trainer, validate

from modeling_t3d.training.arguments import ConfigurationError
from modeling_t3d.training.checkpoints import CheckpointError, list_checkpoints, read_state, write_manifest
from modeling_t3d.training.state import TrainerState, refuse_other_run


@pytest.fixture
def runs() -> TrainingRuns:
    return shared_runs()


def test_another_number_of_processes_sees_the_same_samples(runs, tmp_path):
    """Eight pairs a step, of one process, then of two, then of four, then of one again: three epochs."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"record": True, "save_steps": 1}
    assert runs.start(whole, **settings, per_device_train_batch_size=8, max_steps=6).wait() == [0]
    for num_processes, max_steps in ((1, 1), (2, 3), (4, 5), (1, 6)):
        options = {"per_device_train_batch_size": 8 // num_processes, "max_steps": max_steps, "resume": True}
        part = runs.start(run, num_processes, **settings, **options)
        assert part.wait() == [0] * num_processes, part.output()
    samples = samples_by_step(whole)
    assert list(samples) == list(range(6))
    assert all(len(set(samples[step] + samples[step + 1])) == 16 for step in (0, 2, 4)), "two steps an epoch"
    assert samples_by_step(run) == samples
    assert "dropout differs" in part.output()


def test_processes_whose_epochs_have_other_batches_do_not_go_on(runs, tmp_path):
    """Of 23 samples, ten a step, three are left: a batch for one process, too few for two."""
    settings = {"drop_last": False, "max_steps": 4}
    assert runs.start(tmp_path, **{**settings, "max_steps": 1}, per_device_train_batch_size=10).wait() == [0]
    part = runs.start(tmp_path, 2, **settings, per_device_train_batch_size=5, resume=True)
    assert 0 not in part.wait()
    assert "the run had num_batches=3, this one has 2" in part.output()


def test_other_pairs_per_step_are_refused_with_the_settings_that_keep_them(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    message = (
        r"the run had pairs_per_step=4, this one has 6; to keep it on 1 process\(es\) set "
        r"training\.per_device_train_batch_size=4 and training\.gradient_accumulation_steps=1, or"
    )
    with pytest.raises(CheckpointError, match=message):
        build_trainer(tmp_path, max_steps=8, per_device_train_batch_size=3, gradient_accumulation_steps=2).train(
            resume=True
        )


@pytest.mark.parametrize(
    ("num_processes", "remedy"),
    [
        (3, r"to keep it on 3 process\(es\) set training\.per_device_train_batch_size=4 and .*steps=2"),
        (5, r"no training\.per_device_train_batch_size keeps it on 5 processes, .* that divides 12"),
    ],
)
def test_pairs_per_step_on_another_number_of_processes(tmp_path, num_processes, remedy):
    saved = {"pairs_per_step": 24, "gradient_accumulation_steps": 2}
    with pytest.raises(CheckpointError, match=remedy):
        refuse_other_run(tmp_path, saved, {**saved, "pairs_per_step": 12 * num_processes}, num_processes)


def scalars_of(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: tag -> steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(output_dir / "tracker"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_trackers_show_every_step_once(runs, tmp_path):
    """Killed between checkpoints, twice: what was logged beyond them is shown once, as the run took it in the end."""
    settings = {
        "max_steps": 30,
        "save_steps": 4,
        "eval_steps": 2,
        "logging_steps": 1,
        "trackers": ["tensorboard"],
        "validate": True,
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    hold = tmp_path / "hold"
    hold.touch()
    # Checkpoints fall on steps 4, 8, ..., epochs on 5, 10, ...
    for epoch in (2, 5):
        process = runs.start(run, resume=True, hold=str(hold), hold_epoch=epoch, **settings)
        process.wait_for(lambda epoch=epoch: any(line["step"] >= 5 * epoch for line in log_of(run)))
        process.signal(signal.SIGKILL)
        assert process.wait() == [-signal.SIGKILL]
    for folder in (whole, run):
        assert runs.start(folder, resume=True, **settings).wait() == [0]
    expected, shown = scalars_of(whole), scalars_of(run)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 31))
    assert [step for step, _ in shown["validation/score"]] == list(range(2, 31, 2))
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate", "validation/score"):
        assert shown[tag] == expected[tag], tag
    for kind, name in (("train", "loss"), ("validation", "score")):
        logs = [
            [(line["step"], line[name]) for line in log_of(folder) if line["kind"] == kind] for folder in (whole, run)
        ]
        assert logs[0] == logs[1]


def test_validation_leaves_training_alone(runs, tmp_path):
    settings = {"max_steps": 12, "save_steps": None, "dataloader_num_workers": 1}
    assert runs.start(tmp_path / "without", **settings).wait() == [0]
    assert runs.start(tmp_path / "with", validate=True, eval_steps=2, **settings).wait() == [0]
    assert_same_weights(tmp_path / "without", tmp_path / "with")


def test_the_best_checkpoint_stays(tmp_path):
    scores = iter([0.1, 0.7, 0.7, 0.3, 0.5, 0.2])
    trainer = build_trainer(
        tmp_path,
        evaluate=lambda model: {"score": next(scores)},
        eval_steps=2,
        save_steps=6,
        save_total_limit=1,
        metric_for_best_model="score",
    )
    trainer.train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000012"]
    assert (trainer.state.best_step, trainer.state.best_metric) == (4, 0.7)
    assert read_state(list_checkpoints(tmp_path)[0])["metrics"] == {"score": 0.7}
    best = StubModel.from_pretrained(list_checkpoints(tmp_path)[0])
    last = StubModel.from_pretrained(tmp_path / "model")
    assert not torch.equal(best.projection.weight, last.projection.weight)
    resumed = build_trainer(
        tmp_path,
        evaluate=lambda model: {"score": 0.6},
        eval_steps=2,
        max_steps=16,
        save_total_limit=1,
        metric_for_best_model="score",
    )
    resumed.train(resume=True)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000016"]


def test_a_loss_is_best_where_it_is_low(tmp_path):
    losses = iter([0.5, 0.2, 0.3])
    settings = {"metric_for_best_model": "loss", "greater_is_better": False, "save_total_limit": 1, "eval_steps": 4}
    build_trainer(tmp_path, evaluate=lambda model: {"loss": next(losses)}, **settings).train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000008", "step-00000012"]


def train_by(output_dir: Path, metric: str, values: list[float], **settings) -> TrainerState:
    """Go on with a run by a metric that takes these values, at every second step from the beginning of all."""

    def evaluate(model):
        return {metric: values[trainer.state.step // 2 - 1]}

    trainer = build_trainer(output_dir, evaluate=evaluate, eval_steps=2, metric_for_best_model=metric, **settings)
    return trainer.train(resume=True).state


def test_another_metric_looks_for_its_best_anew(tmp_path):
    """Each run below would stop at once, or never find a better value, if it compared with the one before."""
    settings = {"early_stopping_patience": 2, "save_total_limit": 1}
    state = train_by(tmp_path, "score", [0.7, 0.5, 0.4], **settings)
    assert (state.step, state.best_step) == (6, 2)
    state = train_by(tmp_path, "loss", [0.0] * 3 + [2.9, 2.8], max_steps=10, greater_is_better=False, **settings)
    assert (state.step, state.best_step, state.best_metric) == (10, 10, 2.8)
    state = train_by(tmp_path, "loss", [0.0] * 5 + [3.0], max_steps=12, greater_is_better=True, **settings)
    assert (state.step, state.best_step, state.best_metric) == (12, 12, 3.0)
    state = train_by(tmp_path, "loss", [0.0] * 6 + [2.0], max_steps=14, greater_is_better=True, **settings)
    assert (state.step, state.best_step, state.best_metric) == (14, 12, 3.0), "the same metric goes on"


def test_a_state_without_the_metrics_name_is_of_the_same_one(tmp_path):
    """Former versions did not write it."""
    train_by(tmp_path, "score", [0.7, 0.5], max_steps=4)
    folder = list_checkpoints(tmp_path)[-1]
    state = read_state(folder)
    for name in ("metric_for_best_model", "greater_is_better"):
        del state["trainer"][name]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    state = train_by(tmp_path, "score", [0.0] * 2 + [0.6], max_steps=6)
    assert (state.best_step, state.best_metric, state.metric_for_best_model) == (2, 0.7, "score")


def test_a_metric_that_no_validation_has_is_named(tmp_path):
    trainer = build_trainer(tmp_path, evaluate=validate, metric_for_best_model="scores")
    with pytest.raises(ConfigurationError, match="metric_for_best_model='scores' is none of the validation's score"):
        trainer.train()


def test_hours_that_end_go_on_later(tmp_path):
    """Every run has time for one step; six of them come to the same as one that has time enough."""
    build_trainer(tmp_path / "whole", max_steps=6).train()
    run = tmp_path / "run"
    for step in range(1, 7):
        result = build_trainer(run, max_steps=6, max_hours=1e-9).train(resume=True)
        assert (result.status, result.state.step) == ("interrupted", step)
        assert status(run)["cause"] == "max_hours"
    assert build_trainer(run, max_steps=6, max_hours=1e-9).train(resume=True).status == "completed"
    assert_same_weights(tmp_path / "whole", run)
    assert [line["step"] for line in log_of(run) if line["kind"] == "train"] == list(range(1, 7))


def test_a_validation_that_a_signal_pushed_out_is_made_up_for(tmp_path):
    """Early stopping then ends the run where it ends without the signal, with the same best checkpoint."""
    scores = {2: 0.5, 4: 0.9, 6: 0.3, 8: 0.2}

    def train(name, max_hours):
        trainer = build_trainer(
            tmp_path / name,
            evaluate=lambda model: {"score": scores[trainer.state.step]},
            max_steps=20,
            eval_steps=2,
            metric_for_best_model="score",
            early_stopping_patience=2,
            max_hours=max_hours,
        )
        return trainer.train(resume=True)

    results = [train("whole", None), train("stopped", 1e-9)]
    while results[1].status == "interrupted":
        results[1] = train("stopped", 1e-9)
    for state in (result.state for result in results):
        assert (state.step, state.best_step, state.best_metric) == (8, 4, 0.9)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    logs = [
        [(line["step"], line["score"]) for line in log_of(tmp_path / name) if line["kind"] == "validation"]
        for name in ("whole", "stopped")
    ]
    assert logs[0] == logs[1] == list(scores.items())


def test_a_metric_that_is_no_number_is_never_best(tmp_path):
    scores = iter([float("nan"), 0.5, float("nan"), 0.6, 0.1, 0.2])
    trainer = build_trainer(
        tmp_path, evaluate=lambda model: {"score": next(scores)}, eval_steps=2, metric_for_best_model="score"
    )
    trainer.train()
    assert (trainer.state.best_step, trainer.state.best_metric) == (8, 0.6)
    assert trainer.state.num_validations_without_gain == 2


@pytest.mark.parametrize(("precision", "num_warnings"), [("bf16", 1), ("no", 0)])
def test_half_precision_on_a_cpu_does_not_go_on_bit_for_bit(tmp_path, caplog, precision, num_warnings):
    build_trainer(tmp_path, max_steps=4, mixed_precision=precision).train(resume=True)
    remedy = "where they must be, train with training.mixed_precision=no"
    assert remedy not in caplog.text, "nothing was resumed"
    build_trainer(tmp_path, max_steps=8, mixed_precision=precision).train(resume=True)
    assert caplog.text.count(remedy) == num_warnings


def test_a_run_goes_on_with_other_rates(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    lower = {f"{part}_learning_rate": 1e-5 for part in ("vision", "text", "head")}
    resumed = build_trainer(tmp_path, max_steps=8, weight_decay=0.5, adam_beta1=0.5, **lower)
    resumed.train(resume=True)
    groups = resumed.optimizer.param_groups
    assert {group["peak_lr"] for group in groups} == {1e-5}
    assert {group["betas"][0] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert all(state["step"] == 8 for state in resumed.optimizer.state.values()), "the moments were resumed"


def test_another_model_or_other_frozen_parts_are_refused(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(CheckpointError, match=r"the run had model\.dropout=0\.3, this one has 0\.1; resume with"):
        build_trainer(tmp_path, max_steps=8, dropout=0.1).train(resume=True)
    with pytest.raises(CheckpointError, match=r"the run had frozen_parameters=\[\], this one has \['text_model'\]"):
        build_trainer(tmp_path, max_steps=8, frozen_parameters=["text_model"]).train(resume=True)
    assert build_trainer(tmp_path, max_steps=8).train(resume=True).status == "completed"


def test_what_else_a_run_keeps_is_resumed_too(tmp_path):
    class Counter:
        def __init__(self):
            self.count = torch.zeros(())

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    trainer = build_trainer(tmp_path, max_steps=4)
    trainer.extra_state["counter"] = Counter()
    trainer.extra_state["counter"].count += 3
    trainer.extra_state["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.train()
    resumed = build_trainer(tmp_path, max_steps=8)
    resumed.extra_state["counter"] = Counter()
    resumed.extra_state["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0)
    resumed.train(resume=True)
    assert resumed.extra_state["counter"].count == 3
    assert resumed.extra_state["scaler"].get_scale() == 8.0
    other = build_trainer(tmp_path, max_steps=12)
    other.extra_state["average"] = Counter()
    with pytest.raises(CheckpointError, match="step-00000008: holds no average; resume with the configuration"):
        other.train(resume=True)


def test_a_damaged_checkpoint_is_refused_and_an_intact_one_named(tmp_path):
    build_trainer(tmp_path, max_steps=12, save_steps=4, save_total_limit=3).train()
    for step, name in ((12, "optimizer.pt"), (8, "random_state_0.pt")):
        path = tmp_path / "checkpoints" / f"step-{step:08d}" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    message = (
        r"step-00000012: optimizer\.pt is not what was written; remove this folder to resume from step-00000004, the "
        "newest intact checkpoint before it"
    )
    with pytest.raises(CheckpointError, match=message):
        build_trainer(tmp_path, max_steps=16).train(resume=True)
