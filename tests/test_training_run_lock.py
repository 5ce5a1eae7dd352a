# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""One run per folder: who lives keeps it, who is dead loses it, and who was taken for dead writes nothing any more."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch import nn
from torch.optim import AdamW

from modeling_t3d.training import run_lock
from modeling_t3d.training.checkpoints import list_checkpoints, remove_partial, write_checkpoint
from modeling_t3d.training.run_lock import RunLock, RunLockError


def acquire_in_a_process_that_dies(folder: Path) -> None:
    # The file alone: the package would import torch.
    code = (
        "import os, runpy, signal, sys\n"
        "runpy.run_path(sys.argv[1])['RunLock'](sys.argv[2]).acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, run_lock.__file__, str(folder)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def record(folder: Path) -> dict:
    (path,) = (folder / "lock").glob("*.json")
    return json.loads(path.read_text())


def test_numbers_grow_and_a_released_folder_is_free(tmp_path):
    for number in (1, 2, 3):
        lock = RunLock(tmp_path / "run")
        assert lock.acquire() == number
        lock.check()
        lock.release()
    assert [path.name for path in (tmp_path / "run" / "lock").iterdir()] == ["00000003.json"]


def test_a_run_that_lives_keeps_the_folder(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(RunLockError, match=rf"a run lives in it, process {os.getpid()} on .*; wait for it to end"):
        RunLock(tmp_path).acquire()
    lock.check()


def test_a_run_that_was_killed_loses_it_at_once(tmp_path):
    acquire_in_a_process_that_dies(tmp_path)
    # Hours would pass if its process were not looked for.
    assert RunLock(tmp_path, stale_seconds=10_000).acquire() == 2


def test_a_number_that_another_process_has_by_now_does_not_count(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    (path,) = (tmp_path / "lock").iterdir()
    path.write_text(json.dumps({**record(tmp_path), "started": 1}))
    assert RunLock(tmp_path, stale_seconds=10_000).acquire() == 2
    with pytest.raises(RunLockError, match="was taken for dead"):
        lock.check()


def test_a_former_holder_notices_a_higher_number_by_itself(tmp_path):
    lost: queue.SimpleQueue[RunLockError] = queue.SimpleQueue()
    former = RunLock(tmp_path, heartbeat_seconds=0.02, on_loss=lost.put)
    former.acquire()
    (path,) = (tmp_path / "lock").iterdir()
    content = json.dumps({**record(tmp_path), "started": 1})
    # A file system that is away shows no number at all.
    (tmp_path / "lock").rename(tmp_path / "away")
    time.sleep(0.2)
    (tmp_path / "away").rename(tmp_path / "lock")
    assert lost.empty()
    path.write_text(content)
    assert RunLock(tmp_path, stale_seconds=10_000).acquire() == 2
    assert "was taken for dead" in str(lost.get(timeout=30))
    time.sleep(0.2)
    assert lost.empty(), "it is told once"


def test_on_another_machine_a_heartbeat_counts(tmp_path):
    lock = RunLock(tmp_path, machine="another", heartbeat_seconds=0.05)
    lock.acquire()
    with pytest.raises(RunLockError, match="a run lives in it"):
        RunLock(tmp_path, stale_seconds=10_000).acquire()
    lock.release()
    assert RunLock(tmp_path, stale_seconds=10_000).acquire() == 2


def test_on_another_machine_silence_counts(tmp_path, caplog):
    RunLock(tmp_path, machine="another", heartbeat_seconds=10_000).acquire()
    assert RunLock(tmp_path, stale_seconds=0.2).acquire() == 2
    assert "no sign of life for 0.2 s, taken over" in caplog.text


def test_a_claim_that_was_cut_short_is_watched(tmp_path):
    RunLock(tmp_path).acquire()
    (path,) = (tmp_path / "lock").iterdir()
    path.write_text("")
    assert RunLock(tmp_path, stale_seconds=0.2).acquire() == 2


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    acquire_in_a_process_that_dies(tmp_path)
    outcomes: list[int | None] = []

    def try_to_acquire() -> None:
        try:
            outcomes.append(RunLock(tmp_path).acquire())
        except RunLockError:
            outcomes.append(None)

    threads = [threading.Thread(target=try_to_acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome for outcome in outcomes if outcome) == [2]
    assert len(outcomes) == 8


@pytest.mark.parametrize("moment", ["before it checks", "after it has checked"])
def test_a_former_holder_that_wakes_up_writes_no_checkpoint(tmp_path, moment):
    former = RunLock(tmp_path, machine="another", heartbeat_seconds=10_000)
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())

    def save(fence: int, before_rename) -> None:
        write_checkpoint(
            tmp_path,
            step=1,
            model=model,
            optimizer=optimizer,
            state={"fence": fence},
            keep=1,
            fence=fence,
            before_rename=before_rename,
        )

    def sleep_too_long() -> None:
        if moment == "after it has checked":
            former.check()
        successor = RunLock(tmp_path, stale_seconds=0.2)
        assert successor.acquire() == 2
        remove_partial(tmp_path)
        if moment == "before it checks":
            former.check()

    with pytest.raises((RunLockError, FileNotFoundError)):
        save(former.acquire(), sleep_too_long)
    assert list_checkpoints(tmp_path) == []
    save(2, lambda: None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
