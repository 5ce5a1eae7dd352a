# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What was written outlives a machine that loses its power: files and the names of all folders on their way."""

import errno
import os

import pytest
from torch import nn
from torch.optim import AdamW
from training_stub import build_trainer

from modeling_t3d.training.checkpoints import write_checkpoint
from modeling_t3d.training.files import flush, make_folder, write_text_atomically
from modeling_t3d.training.processes import ProcessGroup


def test_a_file_that_was_replaced_is_flushed_with_its_name(tmp_path, flushes):
    path = tmp_path / "status.json"
    write_text_atomically(path, "{}")
    assert flushes == [tmp_path / ".partial-status.json", path]


def test_folders_that_are_made_are_flushed_into_those_above(tmp_path, flushes):
    folder = tmp_path / "deep" / "run" / "checkpoints"
    for _ in range(2):
        make_folder(folder)
    assert flushes == [tmp_path / "deep", tmp_path / "deep" / "run", folder, folder]


def test_a_run_flushes_every_folder_on_the_way_to_its_checkpoints(tmp_path, flushes):
    run = tmp_path / "deep" / "run"
    build_trainer(run, max_steps=4).train()
    checkpoint = run / "checkpoints" / "step-00000004"
    assert {run.parent, run, checkpoint.parent, checkpoint, run / "model", run / "status.json"} <= {*flushes}
    order = [flushes.index(path) for path in (run.parent, run, checkpoint.parent, checkpoint)]
    assert order == sorted(order), "a checkpoint is not said to be there before its way is"


def test_every_rank_flushes_what_it_adds_to_a_checkpoint(tmp_path, flushes):
    """The main process may be on another machine, whose disk cache holds nothing of it."""

    class Second(ProcessGroup):
        rank = 1

    model = nn.Linear(2, 2)
    partial = tmp_path / "checkpoints" / ".partial-0-step-00000001"
    partial.mkdir(parents=True)
    write_checkpoint(
        tmp_path, step=1, model=model, optimizer=AdamW(model.parameters()), state={}, keep=None, processes=Second()
    )
    assert flushes == [*partial.iterdir()] == [partial / "random_state_1.pt"]


@pytest.mark.parametrize(("function", "number"), [("open", errno.EACCES), ("fsync", errno.EINVAL)])
def test_systems_that_flush_no_folders(tmp_path, monkeypatch, function, number):
    """Windows opens none; a file that cannot be flushed is an error everywhere."""
    path = tmp_path / "file"
    original = getattr(os, function)
    refused = tmp_path

    def refuse(target, *arguments):
        target_path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if os.path.samefile(target_path, refused):
            raise OSError(number, os.strerror(number))
        return original(target, *arguments)

    path.touch()
    monkeypatch.setattr(os, function, refuse)
    flush(tmp_path)
    refused = path
    with pytest.raises(OSError, match=os.strerror(number)):
        flush(path)


def test_a_folder_that_the_disk_refuses_is_an_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        flush(tmp_path)
