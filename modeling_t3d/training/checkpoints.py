# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Checkpoints that are whole or absent: written aside, hashed, flushed to the disk, renamed, and verified when read.
What the state means is the trainer's affair."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn

CHECKPOINT_FORMAT = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
_PARTIAL_PREFIX = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run; the message names it and the remedy."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; what a killed run left half-written has another name."""
    return sorted((Path(output_dir) / "checkpoints").glob("step-*"))


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or `None`."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


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


def write_checkpoint(
    output_dir: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int | None,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """
    Write one checkpoint; every process calls this, rank 0 writes what all share.

    Args:
        output_dir (`str` or `Path`): the run's folder; the checkpoint is `checkpoints/step-<step>` below it.
        step (`int`): optimiser steps taken.
        model (`nn.Module`), optimizer (`Optimizer`): unwrapped.
        state (`dict`): anything JSON holds.
        keep (`int`, *optional*): how many checkpoints stay; `None` keeps all.
        rank (`int`, defaults to 0): of this process.
        barrier (callable): waits for all processes.
    """
    root = Path(output_dir) / "checkpoints"
    target = root / f"step-{step:08d}"
    partial = root / f"{_PARTIAL_PREFIX}{target.name}"
    if rank == 0:
        for leftover in root.glob(f"{_PARTIAL_PREFIX}*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    barrier()
    torch.save(random_state(), partial / f"random_state_{rank}.pt")
    if rank == 0:
        save_model(model, str(partial / MODEL_FILE))
        torch.save(optimizer.state_dict(), partial / OPTIMIZER_FILE)
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    barrier()
    if rank == 0:
        write_manifest(partial)
        replace_folder(partial, target)
        for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            # Renamed first: a removal that is interrupted must not leave a folder that looks complete.
            doomed = root / f"{_PARTIAL_PREFIX}{old.name}"
            os.replace(old, doomed)
            shutil.rmtree(doomed)
    barrier()
    return target


def write_manifest(folder: Path) -> None:
    """Write sizes and hashes of a folder's files into it and flush everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in files}
    text = json.dumps({"format": CHECKPOINT_FORMAT, "files": entries}, indent=2)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Force a folder and all below it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file that is never half there."""
    temporary = path.with_name(f"{_PARTIAL_PREFIX}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a finished folder to its name; a former one is moved aside first and then removed."""
    former = target.with_name(f"{_PARTIAL_PREFIX}former-{target.name}")
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(target, former)
    os.replace(source, target)
    _flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def verify_checkpoint(folder: str | Path) -> None:
    """Compare every file of a checkpoint with the sizes and hashes written when it was complete."""
    folder = Path(folder)
    remedy = "remove this folder to resume from the checkpoint before it"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        entries = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} is missing or unreadable; {remedy}") from None
    if manifest["format"] != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {manifest['format']}, this version reads {CHECKPOINT_FORMAT}; "
            "resume with the version of modeling_t3d that wrote it"
        )
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; {remedy}")
        if path.stat().st_size != entry["bytes"] or _hash(path) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} is not what was written; {remedy}")


def read_state(folder: str | Path) -> dict[str, Any]:
    """The trainer's own state in a checkpoint."""
    return json.loads((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(
    folder: str | Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> dict[str, Any] | None:
    """
    Load weights and optimiser from a verified checkpoint.

    Args:
        folder (`str` or `Path`): the checkpoint.
        model (`nn.Module`), optimizer (`Optimizer`): unwrapped; changed in place.
        rank (`int`, defaults to 0): of this process.

    Returns:
        The random state that this rank had, for [`restore_random_state`] once nothing draws any more; `None` if the
        checkpoint was written by fewer processes.
    """
    folder = Path(folder)
    device = next(model.parameters()).device
    try:
        load_model(model, str(folder / MODEL_FILE), strict=True, device=str(device))
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: holds another model ({str(error).splitlines()[0]}); resume with the configuration it was "
            "written by"
        ) from None
    path = folder / f"random_state_{rank}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "CheckpointError",
    "flush_folder",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "random_state",
    "read_state",
    "replace_folder",
    "restore_random_state",
    "verify_checkpoint",
    "write_checkpoint",
    "write_manifest",
    "write_text_atomically",
]
