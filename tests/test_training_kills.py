# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A run that is killed, whatever dies and whenever, and then resumed ends with the weights of one that was left alone;
nothing of it goes on running."""

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from training_runs import (
    TrainingRuns,
    assert_same_run,
    launch,
    log_of,
    shared_runs,
    status,
    wait_until,
)
from training_stub import NUM_SAMPLES

from modeling_t3d.training.checkpoints import list_checkpoints, verify_checkpoint
from modeling_t3d.training.stopping import EXIT_STATUS_INTERRUPTED

# Saving takes most of a step here: many kills fall into it.
SETTINGS = {"save_steps": 1, "logging_steps": 1, "seconds": 0.005, "record": True}

# What still runs when its launcher, its main process or its right to the folder is gone ends within this time.
END_SECONDS = 30.0
VICTIMS = ("rank", "all", "loader", "launcher")


@pytest.fixture
def runs() -> TrainingRuns:
    return shared_runs()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_one_line_per_step(run: Path, num_steps: int) -> None:
    steps = [line["step"] for line in log_of(run) if line["kind"] == "train"]
    assert steps == list(range(1, num_steps + 1))


def kill_launcher(run: Path, num_processes: int, num_lines: int, delay: float = 0.0, **settings) -> None:
    """Start a run under a launcher, kill that `delay` seconds after so many lines of the log, and nothing goes on."""
    launcher = launch(run, num_processes, **settings)
    try:
        wait_until(lambda: len(log_of(run)) >= num_lines or launcher.poll() is not None, describe=lambda: "no steps")
        time.sleep(delay)
        orphans = psutil.Process(launcher.pid).children(recursive=True)
        assert len(orphans) >= 2 * num_processes, "ranks, each with a loader process"
    finally:
        launcher.kill()
    killed = time.monotonic()
    wait_until(lambda: not any(is_alive(orphan) for orphan in orphans), describe=lambda: f"{orphans} live on")
    assert time.monotonic() - killed < END_SECONDS
    assert "the launcher died" in launcher.communicate()[0]
    assert status(run)["status"] in ("failed", "running")


def kill_and_resume(runs: TrainingRuns, folder: Path, num_processes: int, victims: Sequence[str], **settings) -> None:
    """Kill parts of a run at random moments, also while it saves, resume it, and compare with one left alone."""
    settings = {**SETTINGS, **settings}
    whole, run = folder / "whole", folder / "killed"
    assert runs.start(whole, num_processes, **settings).wait() == [0] * num_processes
    moments = random.Random(num_processes)
    hold = folder / "hold"
    hold.touch()
    for number, victim in enumerate(victims):
        num_lines = len(log_of(run)) + 2
        epoch = (num_lines - 2) // (NUM_SAMPLES // (4 * num_processes))
        options = {"resume": True, "hold": str(hold), "hold_epoch": epoch + moments.randint(2, 4), **settings}
        delay = moments.uniform(0, 0.1)
        if victim == "launcher":
            kill_launcher(run, num_processes, num_lines, delay, **options)
            continue
        process = runs.start(run, num_processes, **options)
        process.wait_for(lambda num_lines=num_lines: len(log_of(run)) >= num_lines)
        time.sleep(delay)
        if victim == "loader":
            process.loaders(moments.randrange(num_processes))[0].kill()
        else:
            process.signal(signal.SIGKILL, None if victim == "all" else moments.randrange(num_processes))
        assert not {0, None} & {*process.wait()}, f"kill {number}: {process.output()}"
    assert runs.start(run, num_processes, resume=True, **settings).wait() == [0] * num_processes
    assert_same_run(whole, run)
    assert_one_line_per_step(run, settings["max_steps"])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(runs, tmp_path, num_processes):
    kill_and_resume(runs, tmp_path, num_processes, ["rank"], max_steps=40, dataloader_num_workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_ten_kills(runs, tmp_path, num_processes):
    """Of a rank, all ranks, a loader process and the launcher, each two or three times."""
    victims = random.Random(num_processes).sample(VICTIMS, counts=[3, 3, 2, 2], k=10)
    kill_and_resume(runs, tmp_path, num_processes, victims, max_steps=400, dataloader_num_workers=1)


def kill_in_saves(runs: TrainingRuns, folder: Path, num_processes: int, file_events: Sequence[int]) -> None:
    """Kill a run at certain events of its saves: every checkpoint that is left is whole, and nothing is lost."""
    # No run gets further than six steps before it is killed.
    max_steps = 10 + 6 * len(file_events)
    settings = {**SETTINGS, "max_steps": max_steps, "save_total_limit": 1, "save_steps": 2, "seconds": 0.0}
    whole, run = folder / "whole", folder / "killed"
    assert runs.start(whole, num_processes, **settings).wait() == [0] * num_processes
    for event in file_events:
        process = runs.start(run, num_processes, resume=True, kill_at_file_event=event, **settings)
        # Whichever rank is the first to come to it; another may hear of that before it comes to its own.
        assert -signal.SIGKILL in process.wait(), process.output()
        assert not {0, None} & {*process.statuses}, process.output()
        for checkpoint in list_checkpoints(run):
            verify_checkpoint(checkpoint)
    assert runs.start(run, num_processes, resume=True, **settings).wait() == [0] * num_processes
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{max_steps:08d}"}
    assert_same_run(whole, run)
    assert_one_line_per_step(run, max_steps)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_while_it_saves(runs, tmp_path, num_processes):
    kill_in_saves(runs, tmp_path, num_processes, random.Random(0).sample(range(1, 40), 3))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_every_event_of_a_save(runs, tmp_path, num_processes):
    kill_in_saves(runs, tmp_path, num_processes, range(1, 60))


@pytest.mark.parametrize("num_processes", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_launcher_that_is_killed_leaves_nothing_running(runs, tmp_path, num_processes):
    settings = {**SETTINGS, "max_steps": 40, "save_steps": 3, "dataloader_num_workers": 1}
    whole, run, hold = tmp_path / "whole", tmp_path / "killed", tmp_path / "hold"
    hold.touch()
    kill_launcher(run, num_processes, 7, hold=str(hold), hold_epoch=4, **settings)
    for folder in (whole, run):
        assert runs.start(folder, num_processes, resume=True, **settings).wait() == [0] * num_processes
    assert_same_run(whole, run)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_other_while_it_waits_for_data(runs, tmp_path, victim):
    """No collective fails here: the step would take an hour."""
    run = runs.start(tmp_path / "run", 2, seconds=1000.0, dataloader_num_workers=1)
    run.wait_for(lambda: (tmp_path / "run" / "status.json").exists())
    run.wait_for(lambda: run.loaders(0) and run.loaders(1))
    loaders = [*run.loaders(0), *run.loaders(1)]
    run.signal(signal.SIGKILL, victim)
    killed = time.monotonic()
    assert sorted(run.wait()) == [-signal.SIGKILL, 1]
    assert time.monotonic() - killed < END_SECONDS
    cause = ("the main process died", "rank 1 died")[victim]
    assert f"rank {1 - victim} stopped at step 0: {cause}; there is no checkpoint yet" in run.output()
    assert "Traceback" not in run.output()
    if victim == 1:
        assert status(tmp_path / "run")["status"] == "failed"
        assert status(tmp_path / "run")["cause"] == cause
    wait_until(lambda: not any(is_alive(loader) for loader in loaders), describe=lambda: f"{loaders} live on")


def test_a_second_run_refuses_and_the_first_goes_on(runs, tmp_path):
    whole, run, hold = tmp_path / "whole", tmp_path / "run", tmp_path / "hold"
    settings = {**SETTINGS, "max_steps": 12}
    hold.touch()
    first = runs.start(run, hold=str(hold), **settings)
    first.wait_for(lambda: (run / "status.json").exists())
    second = runs.start(run, resume=True, **settings)
    assert second.wait() == [1]
    assert f"{run}: a run lives in it, process {first.processes[0]} on" in second.output()
    assert "Traceback" not in second.output()
    hold.unlink()
    assert first.wait() == [0], first.output()
    assert runs.start(whole, **settings).wait() == [0]
    assert_same_run(whole, run)


def test_a_run_that_was_taken_for_dead_writes_nothing_any_more(runs, tmp_path):
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    process = runs.start(run, hold=str(hold), hold_epoch=1, **{**SETTINGS, "max_steps": 12})
    newest = ["step-00000004", "step-00000005"]
    process.wait_for(lambda: [folder.name for folder in list_checkpoints(run)] == newest)
    left = {path: path.read_bytes() for name in ("log.jsonl", "status.json") for path in [run / name]}
    (run / "lock" / "00000002.json").write_text("{}")
    hold.unlink()
    assert process.wait() == [1]
    assert "this run was taken for dead and another has taken over" in process.output()
    assert "Traceback" not in process.output()
    assert {path: path.read_bytes() for path in left} == left
    assert [folder.name for folder in list_checkpoints(run)] == newest
    assert not (run / "model").exists()


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_taken_for_dead_ends_while_it_waits_for_data(runs, tmp_path, num_processes):
    """Nothing is logged or saved that would tell."""
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    process = runs.start(run, num_processes, hold=str(hold), hold_epoch=1, **{**SETTINGS, "max_steps": 12})
    process.wait_for(lambda: len(log_of(run)) == 5 // num_processes)
    (run / "lock" / "00000002.json").write_text("{}")
    taken = time.monotonic()
    assert process.wait() == [1] * num_processes
    assert time.monotonic() - taken < END_SECONDS
    lines = [line for line in process.output().splitlines() if "stopped at step" in line]
    assert len(lines) == num_processes, process.output()
    assert all("this run was taken for dead and another has taken over; it stops without" in line for line in lines)
    assert "Traceback" not in process.output()
    assert status(run)["status"] == "running", "the file is the other run's"


def test_signals_write_a_checkpoint_and_an_exit_status(runs, tmp_path):
    """To the whole group and twice, as launchers and schedulers send them: loader processes stay until it is saved."""
    settings = {**SETTINGS, "max_steps": 30, "save_steps": None, "dataloader_num_workers": 1}
    whole, run, hold = tmp_path / "whole", tmp_path / "stopped", tmp_path / "hold"
    for epoch, number in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
        hold.touch()
        process = runs.start(run, resume=True, hold=str(hold), hold_epoch=2 * epoch, **settings)
        # Ten steps in two epochs; the next one waits for its data.
        process.wait_for(lambda epoch=epoch: len(log_of(run)) >= 10 * epoch)
        for loader in process.loaders(0):
            loader.send_signal(number)
        process.signal(number)
        process.wait_for(lambda process=process, number=number: number.name in process.output())
        if number == signal.SIGTERM:
            process.signal(number)
        hold.unlink()
        assert process.wait() == [EXIT_STATUS_INTERRUPTED], process.output()
        assert status(run)["status"] == "interrupted"
        assert status(run)["cause"] == number.name
        assert [folder.name for folder in list_checkpoints(run)][-1] == f"step-{status(run)['step']:08d}"
        assert not (run / "model").exists()
    for folder in (whole, run):
        assert runs.start(folder, resume=True, **settings).wait() == [0]
    assert_same_run(whole, run)
    assert_one_line_per_step(run, 30)


def test_a_signal_to_one_rank_stops_both(runs, tmp_path):
    settings = {**SETTINGS, "max_steps": 12}
    whole, run, hold = tmp_path / "whole", tmp_path / "stopped", tmp_path / "hold"
    hold.touch()
    process = runs.start(run, 2, hold=str(hold), hold_epoch=2, **settings)
    process.wait_for(lambda: len(log_of(run)) >= 4)
    process.signal(signal.SIGTERM, 1)
    process.wait_for(lambda: "SIGTERM" in process.output())
    hold.unlink()
    assert process.wait() == [EXIT_STATUS_INTERRUPTED] * 2, process.output()
    for folder in (whole, run):
        assert runs.start(folder, 2, resume=True, **settings).wait() == [0, 0]
    assert_same_run(whole, run)


def test_a_launcher_passes_a_signal_on_and_the_status_file_tells(runs, tmp_path):
    """torchrun signals whole groups, loader processes included, and exits with a status of its own."""
    settings = {**SETTINGS, "max_steps": 40, "save_steps": None, "dataloader_num_workers": 1}
    whole, run, hold = tmp_path / "whole", tmp_path / "stopped", tmp_path / "hold"
    hold.touch()
    launcher = launch(run, 2, hold=str(hold), hold_epoch=4, **settings)
    wait_until(lambda: len(log_of(run)) >= 8 or launcher.poll() is not None, describe=lambda: "no steps")
    launcher.terminate()
    heard = (line for line in launcher.stdout if "a checkpoint is written after this step" in line)
    assert next(heard, None), "the ranks hear it"
    hold.unlink()
    output, _ = launcher.communicate()
    assert launcher.returncode not in (0, EXIT_STATUS_INTERRUPTED)
    assert status(run)["status"] == "interrupted", output
    for folder in (whole, run):
        assert runs.start(folder, 2, resume=True, **settings).wait() == [0, 0]
    assert_same_run(whole, run)
