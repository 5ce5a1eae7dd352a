# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What data, disks and other processes do to a run: it stops with the cause in one line, and the last checkpoint is
whole and goes on where it stood."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ROOT, STUB, Run, TrainingRuns, assert_same_run, log_of, shared_runs, status
from training_stub import NUM_SAMPLES

from modeling_t3d.training.checkpoints import list_checkpoints, verify_checkpoint
from modeling_t3d.training.sampling import ShardedBatchSampler

SETTINGS = {"max_steps": 12, "save_steps": 4, "logging_steps": 4, "record": True}


@pytest.fixture
def runs() -> TrainingRuns:
    return shared_runs()


def hold(folder: Path) -> str:
    """A file for which a run waits: see `StubDataset`."""
    path = folder / "hold"
    path.touch()
    return str(path)


def assert_stopped(run: Run, folder: Path, cause: str, *, step: int) -> None:
    """All processes ended, one line names the cause, and the newest checkpoint is whole and that of `step`."""
    assert not {0, None} & {*run.wait()}, run.output()
    assert "Traceback" not in run.output()
    lines = [line for line in run.output().splitlines() if re.search(rf"rank \d stopped at step \d+: .*{cause}", line)]
    assert lines, run.output()
    newest = list_checkpoints(folder)[-1]
    assert newest.name == f"step-{step:08d}"
    assert f"{newest} is whole, resume from it" in lines[0]
    verify_checkpoint(newest)
    if len(run.processes) == 1:
        # Of several, the main one may be ended before it has tidied up; the next run does.
        left = {path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")}
        assert not left, "nothing half-written is left"
    assert status(folder)["status"] == "failed"
    assert re.search(cause, status(folder)["cause"])


def assert_resumes(runs: TrainingRuns, run: Path, num_processes: int = 1, **settings) -> None:
    """Resumed where it is well again, it ends as a run to which nothing happened."""
    whole = run.with_name("whole")
    for place in (whole, run):
        assert runs.start(place, num_processes, resume=True, **settings).wait() == [0] * num_processes
    assert_same_run(whole, run)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_file_that_the_system_refuses_to_write(runs, tmp_path, num_processes):
    """Of two processes, the second alone has no room."""
    folder = tmp_path / "run"
    first = runs.start(folder, num_processes, hold=hold(tmp_path), hold_epoch=num_processes, **SETTINGS)
    first.wait_for(lambda: list_checkpoints(folder))
    first.signal(signal.SIGKILL)
    first.wait()
    sizes = {path.name: path.stat().st_size for path in list_checkpoints(folder)[0].iterdir()}
    limits = {"RLIMIT_FSIZE": sizes[f"random_state_{num_processes - 1}.pt"] - 1}
    run = runs.start(folder, num_processes, limits=limits, resume=True, **SETTINGS)
    assert_stopped(run, folder, r"File too large.*random_state_\d\.pt", step=4)
    assert "make room" in run.output()
    assert_resumes(runs, folder, num_processes, **SETTINGS)


def test_a_disk_that_is_full(runs, tmp_path):
    """A small disk of its own, filled by checkpoints that are all kept; copied, since it vanishes with its process."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "mount -t tmpfs none /mnt"], check=False).returncode:
        pytest.skip("this machine lets no process mount a disk of its own")
    script = (
        'disk=$1 python=$2 stub=$3 copy=$4; shift 4; mount -t tmpfs -o size=600k none "$disk" && '
        '"$python" "$stub" "$disk/run" "$@"; code=$?; cp -r "$disk/run" "$copy"; exit $code'
    )
    disk, copy = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    words = ["max_steps=1000", "save_steps=1", "logging_steps=1", "save_total_limit=null"]
    command = [*mount, script, "sh", str(disk), sys.executable, str(STUB), str(copy), *words]
    process = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1, process.stderr
    assert re.search(
        r"rank 0 stopped at step \d+: .*No space left on device.*; make room; .* is whole", process.stderr
    )
    assert "Traceback" not in process.stderr
    for checkpoint in list_checkpoints(copy):
        verify_checkpoint(checkpoint)
    settings = {"save_steps": 50, "logging_steps": 1}
    assert_resumes(runs, copy, max_steps=1000, **settings)


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 1)])
def test_a_data_file_that_vanished(runs, tmp_path, num_processes, num_workers):
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for sample in range(NUM_SAMPLES):
        (data / f"{sample}.txt").write_text("0.5")
    batches = list(ShardedBatchSampler(NUM_SAMPLES, 4 // num_processes * num_processes, seed=42))
    vanished = data / f"{batches[4][-1].sample}.txt"
    vanished.rename(tmp_path / "away")
    settings = {
        **SETTINGS,
        "folder": str(data),
        "dataloader_num_workers": num_workers,
        "per_device_train_batch_size": 4 // num_processes,
    }
    run = runs.start(folder, num_processes, **settings)
    assert_stopped(run, folder, rf"FileNotFoundError: .*No such file or directory: '{vanished}'", step=4)
    (tmp_path / "away").rename(vanished)
    assert_resumes(runs, folder, num_processes, **settings)


def test_a_loader_process_that_dies(runs, tmp_path):
    folder = tmp_path / "run"
    settings = {**SETTINGS, "logging_steps": 1, "dataloader_num_workers": 1}
    run = runs.start(folder, hold=hold(tmp_path), hold_epoch=1, **settings)
    run.wait_for(lambda: len(log_of(folder)) >= 5)
    (loader,) = run.loaders(0)
    loader.kill()
    assert_stopped(run, folder, r"DataLoader worker .*(is killed by signal: Killed|exited unexpectedly)", step=4)
    assert "lower training.dataloader_num_workers" in run.output()
    assert_resumes(runs, folder, **settings)


def test_a_rank_that_dies(runs, tmp_path):
    folder = tmp_path / "run"
    settings = {**SETTINGS, "logging_steps": 1}
    run = runs.start(folder, 2, hold=hold(tmp_path), hold_epoch=3, **settings)
    run.wait_for(lambda: len(log_of(folder)) >= 6)
    run.signal(signal.SIGKILL, 1)
    assert_stopped(run, folder, "rank 1 died", step=4)
    assert_resumes(runs, folder, 2, **settings)
