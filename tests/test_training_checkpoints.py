# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A checkpoint is whole or absent, and says so when it is damaged."""

import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

from modeling_t3d.training import checkpoints
from modeling_t3d.training.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_partial,
    restore_random_state,
    verify_checkpoint,
    write_checkpoint,
)
from modeling_t3d.training.processes import describe_error


def build(width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def write(folder, step=1, keep=None, **parts):
    model, optimizer = build()
    arguments = {"model": model, "optimizer": optimizer, "state": {"step": step}, **parts}
    return write_checkpoint(folder, step=step, keep=keep, **arguments)


def test_round_trip(tmp_path):
    model, optimizer = build()
    folder = write(tmp_path, model=model, optimizer=optimizer)
    verify_checkpoint(folder)
    drawn = (torch.rand(3), np.random.rand(3), random.random())
    other, other_optimizer = build()
    restore_random_state(load_checkpoint(folder, model=other, optimizer=other_optimizer))
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]
    assert read_state(folder) == {"step": 1}
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    loaded = [state["exp_avg"] for state in other_optimizer.state_dict()["state"].values()]
    assert all(torch.equal(one, two) for one, two in zip(moments, loaded, strict=True))
    assert load_checkpoint(folder, model=other, optimizer=other_optimizer, rank=1) is None


def test_the_newest_are_kept(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        write(tmp_path, step, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path).name == "step-00000100"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    write(tmp_path, 101, keep=None)
    assert len(list_checkpoints(tmp_path)) == 3


@pytest.mark.parametrize("stage", ["write_manifest", "replace_folder"])
def test_what_is_interrupted_does_not_count(tmp_path, monkeypatch, stage):
    write(tmp_path, 1)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]
    write(tmp_path, 3)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000001", "step-00000003"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "random_state_0.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found(tmp_path, name, damage):
    folder = write(tmp_path)
    path = folder / name
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is (missing|not what was written)$"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "random_state_0.pt", "state.json", "manifest.json"]
)
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    """Of the manifest, too, in its white space as in its hashes."""
    path = write(tmp_path) / name
    content = path.read_bytes()
    for position in range(0, len(content), 1 + len(content) // 200):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path.parent)
    path.write_bytes(content)
    verify_checkpoint(path.parent)


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    """Killed between the two renames of a checkpoint that is written again: the former one counts."""
    folder = write(tmp_path)
    folder.rename(folder.with_name(f".partial-former-{folder.name}"))
    (folder.parent / ".partial-1-step-00000001").mkdir()
    assert list_checkpoints(tmp_path) == []
    remove_partial(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    verify_checkpoint(folder)


def test_what_a_former_run_left_is_removed_at_the_start_alone(tmp_path):
    """A run removes what it left itself; another's may be a run's that took over."""
    write(tmp_path, fence=2)
    for name in (".partial-1-step-00000002", ".partial-2-step-00000002"):
        (tmp_path / "checkpoints" / name).mkdir()
    write(tmp_path, 2, fence=2)
    assert {path.name for path in (tmp_path / "checkpoints").glob(".*")} == {".partial-1-step-00000002"}
    remove_partial(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_shared_parameters_and_memory_formats(tmp_path):
    """A parameter with two names is written once; one that lies in another order comes back as it lay."""

    def build_shared() -> nn.Module:
        model = nn.ModuleDict({"first": nn.Linear(3, 3), "conv": nn.Conv3d(2, 2, 3), "last": nn.Linear(3, 3)})
        model["last"].weight = model["first"].weight
        return model.to(memory_format=torch.channels_last_3d)

    model, other = build_shared(), build_shared()
    folder = write(tmp_path, model=model, optimizer=AdamW(model.parameters()))
    load_checkpoint(folder, model=other, optimizer=AdamW(other.parameters()))
    assert "last.weight" not in load_file(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other["last"].weight is other["first"].weight
    assert other["conv"].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "a.pt"), "OSError: [Errno 28] No space left on device: 'a.pt'"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (
            OSError(
                "Caught OSError in worker 0.\nOriginal Traceback (most recent call last):\n  line\nOSError: gone\n"
            ),
            "OSError: gone",
        ),
    ],
)
def test_an_error_in_one_line(error, text):
    assert describe_error(error) == text


def test_a_manifest_that_is_missing_or_of_another_format(tmp_path):
    folder = write(tmp_path)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(CheckpointError, match=r"checkpoint format 99, this version reads 2; resume with the version"):
        verify_checkpoint(folder)
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or unreadable$"):
        verify_checkpoint(folder)


def test_another_model_is_refused(tmp_path):
    folder = write(tmp_path)
    model, optimizer = build(width=5)
    with pytest.raises(CheckpointError, match=r"holds another model .*; resume with the configuration") as caught:
        load_checkpoint(folder, model=model, optimizer=optimizer)
    assert "\n" not in str(caught.value)
