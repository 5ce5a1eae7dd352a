# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Trackers that cannot take anything back are told every step of a killed and resumed run once."""

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from modeling_t3d.training.trackers import StepTrackers


class Notebook(GeneralTracker):
    """A tracker of Accelerate's that keeps what it is told, under a name of one that it has."""

    requires_logging_directory = False

    def __init__(self, name: str) -> None:
        super().__init__(_blank=True)
        self.name = name
        self.lines: list[tuple[int, dict[str, float]]] = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values) -> None:
        self.settings = values

    def log(self, values, step=None, **kwargs) -> None:
        self.lines.append((step, values))


def follow(notebook: Notebook, path, start: int, stop: int, name: str = "run") -> None:
    """A run from one step to another, which is killed there, or ends."""
    trackers = StepTrackers(Accelerator(cpu=True, log_with=[notebook]), path, {"rates": [1, 2]}, step=start, name=name)
    for step in range(start + 1, stop + 1):
        trackers.log(step, {"loss": 1.0 / step}, "train")
        if step % 2 == 0:
            trackers.log(step, {"score": 1.0 * step}, "validation")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_cannot_be_taken_back_is_told_once(tmp_path, name):
    notebook, path = Notebook(name), tmp_path / "tracked.jsonl"
    follow(notebook, path, 0, 7)
    with path.open("a") as file:
        file.write('["run", "train", 1')  # killed while it wrote
    follow(notebook, path, 4, 5)  # killed again, sooner
    follow(notebook, path, 4, 10)
    assert [step for step, values in notebook.lines if "train/loss" in values] == list(range(1, 11))
    assert [step for step, values in notebook.lines if "validation/score" in values] == [2, 4, 6, 8, 10]
    assert notebook.settings == {"rates": "[1, 2]"}


def test_another_run_in_the_folder_tells_everything(tmp_path):
    notebook, path = Notebook("wandb"), tmp_path / "tracked.jsonl"
    follow(notebook, path, 0, 3, name="first")
    follow(notebook, path, 0, 3, name="second")
    assert [step for step, values in notebook.lines if "train/loss" in values] == [1, 2, 3, 1, 2, 3]


def test_trackers_that_forget_are_told_again(tmp_path):
    """TensorBoard drops what lies beyond the step at which a run begins."""
    notebook, path = Notebook("tensorboard"), tmp_path / "tracked.jsonl"
    follow(notebook, path, 0, 3)
    follow(notebook, path, 2, 4)
    assert [step for step, values in notebook.lines if "train/loss" in values] == [1, 2, 3, 3, 4]
    assert not path.exists()
