# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A run that is killed, whatever dies and whenever, and then resumed ends with the weights of one that was left alone;
nothing of it goes on running."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from training_runs import (
    TrainingRuns,
    assert_same_weights,
    log_of,
    samples_by_step,
)

# Saving takes most of a step here: many kills fall into it.
SETTINGS = {"save_steps": 1, "logging_steps": 1, "seconds": 0.005, "record": True}


@pytest.fixture(scope="module")
def runs():
    with TrainingRuns() as server:
        yield server


def assert_one_line_per_step(run: Path, num_steps: int) -> None:
    steps = [line["step"] for line in log_of(run) if line["kind"] == "train"]
    assert steps == list(range(1, num_steps + 1))


def kill_and_resume(runs: TrainingRuns, folder: Path, num_processes: int, num_kills: int, **settings) -> None:
    """Kill a run at random moments, also while it saves, resume it, and compare with one that was left alone."""
    settings = {**SETTINGS, **settings}
    whole, run = folder / "whole", folder / "killed"
    assert runs.start(whole, num_processes, **settings).wait() == [0] * num_processes
    moments = random.Random(num_processes)
    for number in range(num_kills):
        steps_before = len(log_of(run))
        process = runs.start(run, num_processes, resume=True, **settings)
        process.wait_for(lambda before=steps_before: len(log_of(run)) > before + 1)
        time.sleep(moments.uniform(0, 0.1))
        victim = moments.choice(["rank", "all", "loader"])
        if victim == "loader":
            children = psutil.Process(moments.choice(process.processes)).children()
            assert children, "the run has loader processes"
            children[0].kill()
        else:
            process.signal(signal.SIGKILL, None if victim == "all" else moments.randrange(num_processes))
        assert 0 not in process.wait(), f"kill {number}: it ended before it was killed\n{process.output()}"
    assert runs.start(run, num_processes, resume=True, **settings).wait() == [0] * num_processes
    assert_same_weights(whole, run)
    assert samples_by_step(run) == samples_by_step(whole)
    assert_one_line_per_step(run, settings["max_steps"])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(runs, tmp_path, num_processes):
    kill_and_resume(runs, tmp_path, num_processes, 1, max_steps=40, dataloader_num_workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_ten_kills(runs, tmp_path, num_processes):
    kill_and_resume(runs, tmp_path, num_processes, 10, max_steps=400, dataloader_num_workers=1)
