# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Checkpoints that are whole or absent: written aside, hashed, flushed to the disk, renamed, and verified when read.
What the state means is the trainer's affair."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .files import (
    PARTIAL_PREFIX,
    flush_folder,
    hash_file,
    make_folder,
    replace_folder,
    restore_replaced,
    write_text,
    write_text_atomically,
    write_with,
)
from .processes import ProcessGroup
from .sharded_state import load_model_tensors, load_optimizer_state, model_tensors, optimizer_state, write_tensors

CHECKPOINT_FORMAT = 2
MODEL_FILE = "model.safetensors"
AVERAGED_FOLDER = "averaged"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run; the message names it and the remedy."""


class Stateful(Protocol):
    """What else a run keeps beside model and optimiser: a gradient scaler, averaged weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as `torch.load(weights_only=True)` reads them."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Undo [`state_dict`]."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; what a killed run left half-written has another name."""
    return sorted((Path(output_dir) / "checkpoints").glob("step-*"))


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or `None`."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / "checkpoints" / f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def steps_to_keep(steps: Iterable[int], keep: int | None, best_step: int | None) -> set[int]:
    """Of the checkpoints of these steps, those that stay: the newest, all if `keep` is `None`, and the best."""
    newest = sorted(steps)[-keep if keep else None :]
    return {*newest, *(() if best_step is None else (best_step,))}


def random_state() -> dict[str, Any]:
    """State of every global random generator of this process, loadable with `torch.load(weights_only=True)`."""
    numpy_state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo whatever has drawn from the global generators since `state` was taken."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    output_dir: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int | None,
    best_step: int | None = None,
    extra: Mapping[str, Stateful] | None = None,
    processes: ProcessGroup | None = None,
    add_files: Callable[[Path], Any] | None = None,
    fence: int = 0,
    before_rename: Callable[[], Any] = lambda: None,
) -> Path:
    """
    Write one checkpoint; every process calls this, the main one writes what all share.

    Nobody returns before all have written, and if one fails, all raise and no checkpoint appears.

    Args:
        output_dir (`str` or `Path`): the run's folder; the checkpoint is `checkpoints/step-<step>` below it.
        step (`int`): optimiser steps taken.
        model (`nn.Module`), optimizer (`Optimizer`): unwrapped; sharded ones (`fully_shard`) are gathered.
        state (`dict`): anything JSON holds.
        keep (`int`, *optional*): how many of the newest checkpoints stay; `None` keeps all.
        best_step (`int`, *optional*): the checkpoint of this step stays besides.
        extra (`Mapping`, *optional*): name -> [`Stateful`]; equal on all processes, `<name>.pt` in the checkpoint.
        processes ([`ProcessGroup`], *optional*): of the run.
        add_files (callable, *optional*): called on the main process with the folder, to add what else belongs there.
        fence (`int`, defaults to 0): the number of the run's lock; what two runs write aside never shares a name.
        before_rename (callable): called on the main process as the last thing; what it raises leaves no checkpoint.
    """
    processes = processes or ProcessGroup()
    target = checkpoint_folder(output_dir, step)
    partial = target.with_name(f"{PARTIAL_PREFIX}{fence}-{target.name}")
    # Collective where the model is sharded, so on all processes and before anything can fail on one.
    is_main = processes.is_main
    shared = {
        MODEL_FILE: model_tensors(model, keep=is_main),
        OPTIMIZER_FILE: optimizer_state(optimizer, keep=is_main),
    }
    try:
        with processes.together():
            if processes.is_main:
                remove_partial(output_dir, fence)
                make_folder(partial)
        with processes.together():
            _save(random_state(), partial / _random_state_file(processes.rank))
            if processes.is_main:
                write_tensors(shared[MODEL_FILE], partial / MODEL_FILE)
                _save(shared[OPTIMIZER_FILE], partial / OPTIMIZER_FILE)
                for name, part in (extra or {}).items():
                    _save(part.state_dict(), partial / f"{name}.pt")
                write_text(partial / STATE_FILE, json.dumps(state, indent=2))
                if add_files is not None:
                    add_files(partial)
        with processes.together():
            if processes.is_main:
                write_manifest(partial)
                before_rename()
                replace_folder(partial, target)
                _forget(output_dir, keep, best_step, fence)
    except BaseException:
        if processes.is_main:
            # On a full disk the next run needs the room.
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def remove_partial(output_dir: str | Path, fence: int | None = None) -> None:
    """Remove what was left half-written, by all runs or by the one of a fencing number; put back what was replaced."""
    restore_replaced(Path(output_dir) / "checkpoints")
    for leftover in (Path(output_dir) / "checkpoints").glob(
        f"{PARTIAL_PREFIX}{'' if fence is None else f'{fence}-'}*"
    ):
        shutil.rmtree(leftover)


def _forget(output_dir: str | Path, keep: int | None, best_step: int | None, fence: int) -> None:
    """Remove all but the newest checkpoints and the best."""
    checkpoints = {checkpoint_step(folder): folder for folder in list_checkpoints(output_dir)}
    stay = steps_to_keep(checkpoints, keep, best_step)
    for step, old in checkpoints.items():
        if step not in stay:
            # Renamed first: a removal that is interrupted must not leave a folder that looks complete.
            doomed = old.with_name(f"{PARTIAL_PREFIX}{fence}-{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def write_manifest(folder: Path) -> None:
    """Write sizes and hashes of a folder's files into it and flush everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files
    }
    write_text(folder / MANIFEST_FILE, _manifest_text(entries))
    flush_folder(folder)


def _manifest_text(entries: dict[str, Any], version: int = CHECKPOINT_FORMAT) -> str:
    return json.dumps({"format": version, "files": entries}, indent=2)


def _save(value: Any, path: Path) -> None:
    write_with(path, lambda file: torch.save(value, file))


def _random_state_file(rank: int) -> str:
    return f"random_state_{rank}.pt"


# ---------------------------------------------------------------------------------------------- reading


def checkpoint_to_resume(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint of a run, verified; `None` if there is none.

    A damaged one raises, by the name of its file, and names the newest intact one before it. That one is never taken
    unasked: it would train some steps again, and whoever finds a disk that loses bytes should know.
    """
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return None
    try:
        verify_checkpoint(checkpoints[-1])
    except CheckpointError as error:
        intact = next((folder for folder in reversed(checkpoints[:-1]) if _is_intact(folder)), None)
        remedy = (
            f"remove this folder to resume from {intact.name}, the newest intact checkpoint before it"
            if intact
            else "no older checkpoint is intact, so start again in another training.output_dir"
        )
        raise CheckpointError(f"{error}; {remedy}") from None
    return checkpoints[-1]


def _is_intact(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def verify_checkpoint(folder: str | Path) -> None:
    """Compare every file of a checkpoint with the sizes and hashes written when it was complete."""
    folder = Path(folder)
    for name, entry in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != entry.get("bytes") or hash_file(path) != entry.get("sha256"):
            raise CheckpointError(f"{folder}: {name} is not what was written")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes by file name, from a checkpoint's manifest, which must be what was written to the last byte."""
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, entries = manifest["format"], manifest["files"]
        is_as_written = text == _manifest_text(entries, version)
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} is missing or unreadable") from None
    if version != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {version}, this version reads {CHECKPOINT_FORMAT}; "
            "resume with the version of modeling_t3d that wrote it"
        )
    if not is_as_written:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} is not what was written")
    return entries


def read_state(folder: str | Path) -> dict[str, Any]:
    """The trainer's own state in a checkpoint."""
    return json.loads((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Stateful] | None = None,
    rank: int = 0,
) -> dict[str, Any] | None:
    """
    Load weights, optimiser and the rest from a verified checkpoint.

    Args:
        folder (`str` or `Path`): the checkpoint.
        model (`nn.Module`), optimizer (`Optimizer`): unwrapped; changed in place.
        extra (`Mapping`, *optional*): name -> [`Stateful`], changed in place; the names that were written.
        rank (`int`, defaults to 0): of this process.

    Returns:
        The random state that this rank had, for [`restore_random_state`] once nothing draws any more; `None` if the
        checkpoint was written by fewer processes.
    """
    folder = Path(folder)
    for name in extra or {}:
        if not (folder / f"{name}.pt").is_file():
            raise CheckpointError(f"{folder}: holds no {name}; resume with the configuration that it was written by")
    try:
        load_model_tensors(model, folder / MODEL_FILE)
        load_optimizer_state(optimizer, _load(folder / OPTIMIZER_FILE))
        for name, part in (extra or {}).items():
            part.load_state_dict(_load(folder / f"{name}.pt"))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: holds another model ({str(error).splitlines()[0]}); resume with the configuration that it "
            "was written by"
        ) from None
    path = folder / _random_state_file(rank)
    return _load(path) if path.is_file() else None


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


__all__ = [
    "CheckpointError",
    "Stateful",
    "checkpoint_folder",
    "checkpoint_step",
    "checkpoint_to_resume",
    "flush_folder",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "random_state",
    "read_manifest",
    "read_state",
    "remove_partial",
    "replace_folder",
    "restore_random_state",
    "steps_to_keep",
    "verify_checkpoint",
    "write_checkpoint",
    "write_manifest",
    "write_text_atomically",
]
