# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Checkpoints at an address: complete only with their manifest, resumed on another machine, written by one run."""

import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_training_trackers import Notebook
from training_runs import assert_same_weights, log_of
from training_stub import build_trainer

from modeling_t3d.training.arguments import ConfigurationError
from modeling_t3d.training.checkpoint_copies import CheckpointCopies
from modeling_t3d.training.checkpoints import CheckpointError, checkpoint_step, checkpoint_to_resume, list_checkpoints

ADDRESS = "memory://copies/run"


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "folder", "s3"])
def address(request, tmp_path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/run"
    return ADDRESS if request.param == "memory" else str(tmp_path / "other disk" / "run")


def stop_after(trainer, step: int, resume: bool = True) -> None:
    """Train to a checkpoint, and no further: the machine is gone."""

    class Gone(Exception):
        pass

    take = trainer._step

    def take_or_go(micro_batches):
        if trainer.state.step == step:
            raise Gone
        return take(micro_batches)

    trainer._step = take_or_go
    with pytest.raises(Gone):
        trainer.train(resume=resume)


def stop_by_hours_before_a_validation(output_dir, **settings) -> None:
    """Write a checkpoint of the first step, whose validation the resumed run makes up for and writes it again."""
    assert build_trainer(output_dir, max_hours=1e-9, **settings).train().status == "interrupted"


def test_a_run_goes_on_where_its_folder_never_was(tmp_path, address):
    build_trainer(tmp_path / "whole").train()
    settings = {"checkpoint_copies": address, "save_total_limit": 1}
    stop_after(build_trainer(tmp_path / "first machine", **settings), 9, resume=False)
    assert CheckpointCopies(address).steps() == [8]
    resumed = build_trainer(tmp_path / "second machine", **settings)
    assert resumed.train(resume=True).state.step == 12
    assert_same_weights(tmp_path / "whole", tmp_path / "second machine")
    assert CheckpointCopies(address).steps() == [12]
    with pytest.raises(
        ConfigurationError, match=r"holds the checkpoints of a run; .* another training.checkpoint_copies"
    ):
        build_trainer(tmp_path / "third machine", **settings).train()


def test_logs_go_on_where_their_folder_never_was_and_where_it_is_old(tmp_path):
    """What trackers were told until the last checkpoint is known on every machine."""

    def build(name, **settings):
        trainer = build_trainer(tmp_path / name, checkpoint_copies=ADDRESS, logging_steps=1, **settings)
        trainer.accelerator.log_with = [Notebook("wandb")]
        return trainer

    stop_after(build("first machine"), 10, resume=False)
    build("second machine").train(resume=True)
    assert [line["step"] for line in log_of(tmp_path / "second machine")] == list(range(1, 13))
    build("first machine", max_steps=16).train(resume=True)
    logs = [log_of(tmp_path / name) for name in ("first machine", "second machine")]
    assert [line["step"] for line in logs[0]] == list(range(1, 17))
    assert logs[0][:12] == logs[1]
    told = (tmp_path / "first machine" / "tracked.jsonl").read_text().splitlines()
    assert [json.loads(line)[1:] for line in told] == [["train", step] for step in range(1, 17)]


def test_without_its_manifest_a_copy_does_not_count(tmp_path, address):
    run = tmp_path / "run"
    build_trainer(run, save_total_limit=None, checkpoint_copies=address).train()
    copies = CheckpointCopies(address)
    assert copies.steps() == [4, 8, 12]
    copies.file_system.rm_file(*copies.file_system.glob(f"{copies.root}/step-00000012-*/manifest.json"))
    copies.fetch_newest(tmp_path / "other")
    assert [folder.name for folder in list_checkpoints(tmp_path / "other")] == ["step-00000008"]
    assert checkpoint_to_resume(tmp_path / "other").name == "step-00000008"
    copies.fetch_newest(run)
    assert len(list_checkpoints(run)) == 3, "what is there and newer stays"


def test_a_step_that_is_written_again_is_never_missing(tmp_path, address, monkeypatch):
    """The machine that resumes a run dies while it uploads: the next one finds the former copy and clears the rest."""
    settings = {"checkpoint_copies": address, "evaluate": lambda model: {}, "eval_steps": 1, "max_steps": 6}
    stop_by_hours_before_a_validation(tmp_path / "first machine", **settings)
    dying = build_trainer(tmp_path / "second machine", **settings)
    copies = dying.checkpoints.copies
    upload = copies.file_system.put_file

    class Died(Exception):
        pass

    def die(local, remote):
        if remote.endswith("state.json"):
            raise Died
        upload(local, remote)

    with monkeypatch.context() as patch:
        patch.setattr(copies.file_system, "put_file", die)
        with pytest.raises(Died):
            dying.train(resume=True)
    assert len(copies.file_system.glob(f"{copies.root}/step-*")) == 2
    assert copies.steps() == [1]
    third = build_trainer(tmp_path / "third machine", **settings)
    assert third.train(resume=True).state.step == 6
    assert len(third.train_dataset.seen) == 5 * 4, "the first step is not taken again"
    assert copies.steps() == [4, 6]
    assert len(copies.file_system.glob(f"{copies.root}/step-*")) == 2


@pytest.mark.parametrize(("save_total_limit", "expected"), [(1, [2, 12]), (2, [2, 8, 12]), (None, [2, 4, 8, 12])])
def test_what_is_kept_at_the_address_of_a_run_that_moves(tmp_path, save_total_limit, expected):
    """The best checkpoint and the others that stay, of which the second machine's folder has the newest alone."""
    scores = {2: 0.9}
    settings = {
        "checkpoint_copies": ADDRESS,
        "save_total_limit": save_total_limit,
        "eval_steps": 2,
        "metric_for_best_model": "score",
    }

    def build(name):
        trainer = build_trainer(
            tmp_path / name, evaluate=lambda model: {"score": scores.get(trainer.state.step, 0.1)}, **settings
        )
        return trainer

    stop_after(build("first machine"), 9, resume=False)
    moved = build("second machine")
    assert moved.train(resume=True).state.best_step == 2
    assert 2 not in [checkpoint_step(folder) for folder in list_checkpoints(tmp_path / "second machine")]
    assert CheckpointCopies(ADDRESS).steps() == expected


def test_what_is_fetched_is_on_the_disk_before_it_counts(tmp_path, flushes):
    build_trainer(tmp_path / "run", max_steps=4, checkpoint_copies=ADDRESS).train()
    flushes.clear()
    CheckpointCopies(ADDRESS).fetch_newest(tmp_path / "other")
    (folder,) = list_checkpoints(tmp_path / "other")
    partial = folder.with_name(f".partial-copy-{folder.name}")
    is_complete = flushes.index(folder)
    assert {partial / path.name for path in folder.iterdir()} <= {*flushes[:is_complete]}
    assert {folder.parent, folder.parent.parent} <= {*flushes[:is_complete]}


def test_the_copy_of_a_former_version_is_fetched_and_replaced(tmp_path):
    """Its folder had the name of the checkpoint alone."""
    settings = {"checkpoint_copies": ADDRESS, "evaluate": lambda model: {}, "eval_steps": 1}
    stop_by_hours_before_a_validation(tmp_path / "first machine", **settings)
    copies = CheckpointCopies(ADDRESS)
    (name,) = copies.file_system.glob(f"{copies.root}/step-*")
    copies.file_system.mv(name, f"{copies.root}/step-00000001", recursive=True)
    stop_after(build_trainer(tmp_path / "second machine", **settings), 1)
    (name,) = copies.file_system.glob(f"{copies.root}/step-*")
    assert name.rpartition("/")[2].startswith("step-00000001-0001-")


def test_the_manifest_comes_last_and_goes_first(tmp_path):
    order = []

    class Recording(MemoryFileSystem):
        def put_file(self, lpath, rpath, **options):
            order.append(("put", *rpath.split("/")[-2:]))
            return super().put_file(lpath, rpath, **options)

        def mv(self, path1, path2, **options):
            order.append(("name", *path2.split("/")[-2:]))
            return super().mv(path1, path2, **options)

        def rm_file(self, path):
            order.append(("remove", *path.split("/")[-2:]))
            return super().rm_file(path)

    run = tmp_path / "run"
    build_trainer(run, max_steps=4).train()
    copies = CheckpointCopies(ADDRESS)
    copies.file_system = Recording(skip_instance_cache=True)
    copies.begin()
    former = f"step-00000004-0001-{copies.holder[:8]}"
    copies.mirror(run, keep=1, best_step=None)
    order[:] = [entry for entry in order if not entry[2].startswith(".partial-")]
    assert order[-1] == ("name", former, "manifest.json")
    assert ("put", former, "model.safetensors") in order
    order.clear()
    copies.mirror(run, keep=1, best_step=None)
    order[:] = [entry for entry in order if not entry[2].startswith(".partial-")]
    latter = f"step-00000004-0002-{copies.holder[:8]}"
    complete = order.index(("name", latter, "manifest.json"))
    assert {entry[:2] for entry in order[:complete]} == {("put", latter)}
    assert order[complete + 1] == ("remove", former, "manifest.json")
    assert {entry[:2] for entry in order[complete + 1 :]} == {("remove", former)}


def test_a_flipped_byte_at_the_address_is_refused(tmp_path):
    build_trainer(tmp_path / "run", max_steps=4, checkpoint_copies=ADDRESS).train()
    copies = CheckpointCopies(ADDRESS)
    (path,) = copies.file_system.glob(f"{copies.root}/step-00000004-*/optimizer.pt")
    content = bytearray(copies.file_system.cat_file(path))
    content[len(content) // 2] ^= 1
    copies.file_system.pipe_file(path, bytes(content))
    message = rf"{ADDRESS}/step-00000004-0001-\w+: optimizer\.pt is not what was written; remove it there"
    with pytest.raises(CheckpointError, match=message):
        build_trainer(tmp_path / "other", max_steps=8, checkpoint_copies=ADDRESS).train(resume=True)
    assert list_checkpoints(tmp_path / "other") == []


def test_of_two_machines_that_resume_one_run_the_later_goes_on(tmp_path):
    settings = {"checkpoint_copies": ADDRESS}
    first = build_trainer(tmp_path / "first", **settings)
    take = first._step

    def overtaken(micro_batches):
        if first.state.step == 6:
            assert build_trainer(tmp_path / "second", **settings).train(resume=True).state.step == 12
        return take(micro_batches)

    first._step = overtaken
    with pytest.raises(CheckpointError, match="another run has begun to copy its checkpoints there"):
        first.train()
    assert CheckpointCopies(ADDRESS).steps() == [8, 12]
    build_trainer(tmp_path / "whole").train()
    assert_same_weights(tmp_path / "whole", tmp_path / "second")
