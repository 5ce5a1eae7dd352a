# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Copies of a run's checkpoints at an fsspec address, for machines whose disks do not outlive them. The manifest,
which makes a checkpoint of files, is written last and removed first; no file is ever written over."""

import json
import re
import shutil
import uuid
from pathlib import Path

import fsspec

from .checkpoints import (
    MANIFEST_FILE,
    CheckpointError,
    checkpoint_folder,
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    read_manifest,
    steps_to_keep,
    verify_checkpoint,
)
from .files import (
    PARTIAL_PREFIX,
    flush_folder,
    make_folder,
    replace_folder,
    write_text,
    write_text_atomically,
)
from .progress import LOG_FILE, TRACKED_FILE

# Of the run's folder, not of a checkpoint: copied in each, so that they go on where the folder never was.
_LOGS = (LOG_FILE, TRACKED_FILE)
_HOLDER_FILE = "holder.json"
# Step, number of the copy, holder; former versions wrote the step alone.
_COPY_NAME = re.compile(r"step-(\d+)(?:-(\d+)-[0-9a-f]+)?")


class CheckpointCopies:
    """
    The checkpoints of one run at an address.

    A run that begins there leaves its name; another one that finds a later name stops before it writes: two machines
    may have resumed the same run. Each copy is a folder of its own, also of a step that is written again, whose former
    copy goes when the new one is complete.

    Args:
        address (`str`): `s3://bucket/run`, a folder of another disk, or whatever fsspec knows. Credentials are where
            the file system looks for them.

    Example:

    ```python
    >>> from modeling_t3d.training.checkpoint_copies import CheckpointCopies

    >>> CheckpointCopies("memory://run").steps()
    []

    ```"""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        # Listings are not kept: other machines write too.
        self.file_system, self.root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        self.holder = uuid.uuid4().hex

    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        return list(self._copies())

    def begin(self) -> None:
        """From here on this run alone writes there."""
        self.file_system.makedirs(self.root, exist_ok=True)
        self.file_system.pipe_file(f"{self.root}/{_HOLDER_FILE}", json.dumps({"holder": self.holder}).encode())

    def add_logs(self, output_dir: str | Path, folder: Path) -> None:
        """Put the run's logs into a checkpoint that is being written."""
        for log in (Path(output_dir) / name for name in _LOGS):
            if log.exists():
                write_text(folder / log.name, log.read_text(encoding="utf-8"))

    def mirror(self, output_dir: str | Path, *, keep: int | None, best_step: int | None) -> None:
        """
        Copy what the folder has and the address lacks; remove there what the rule of the folder does not keep.

        The rule counts what lies there: the folder of a run that has moved lacks what was written before.

        Args:
            output_dir (`str` or `Path`): the run's folder.
            keep (`int`, *optional*), best_step (`int`, *optional*): as in [`steps_to_keep`].
        """
        folders = {checkpoint_step(folder): folder for folder in list_checkpoints(output_dir)}
        newest = max(folders)
        for step, folder in folders.items():
            # The newest may have been written again, with what a later validation found.
            if step == newest or step not in self.steps():
                self._upload(folder)
        copies = self._copies()
        kept_steps = steps_to_keep(copies, keep, best_step)
        stay = {name for step, name in copies.items() if step in kept_steps}
        # Former copies of a step that was written again and what was left half-written go, too.
        for name in self._folders():
            if name not in stay:
                self._remove(f"{self.root}/{name}")

    def fetch_newest(self, output_dir: str | Path) -> None:
        """Bring the newest checkpoint and its logs to the folder, verified, unless that has one as new."""
        copies, latest = self._copies(), latest_checkpoint(output_dir)
        if not copies or (latest is not None and latest.name >= checkpoint_folder(output_dir, max(copies)).name):
            return
        target, name_there = checkpoint_folder(output_dir, max(copies)), copies[max(copies)]
        source, partial = f"{self.root}/{name_there}", target.with_name(f"{PARTIAL_PREFIX}copy-{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        self.file_system.get_file(f"{source}/{MANIFEST_FILE}", str(partial / MANIFEST_FILE))
        for name in read_manifest(partial):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            self.file_system.get_file(f"{source}/{name}", str(partial / name))
        try:
            verify_checkpoint(partial)
        except CheckpointError as error:
            reason = str(error).rpartition(": ")[2]
            raise CheckpointError(f"{self.address}/{name_there}: {reason}; remove it there to resume") from None
        flush_folder(partial)
        # Before the checkpoint: once that is there, nothing is fetched again.
        for log in (partial / name for name in _LOGS):
            if log.exists():
                write_text_atomically(Path(output_dir) / log.name, log.read_text(encoding="utf-8"))
        replace_folder(partial, target)

    def _folders(self, pattern: str = "step-*") -> dict[str, tuple[int, int]]:
        """Folder there, half-written or complete -> its step and the number of the copy."""
        paths = self.file_system.glob(f"{self.root}/{pattern}")
        names = [path.removesuffix(f"/{MANIFEST_FILE}").rpartition("/")[2] for path in paths]
        found = {name: match for name in names if (match := _COPY_NAME.fullmatch(name))}
        return {name: (int(match[1]), int(match[2] or 0)) for name, match in found.items()}

    def _copies(self) -> dict[int, str]:
        """The newest complete copy of each step, in the order of steps."""
        folders = self._folders(f"step-*/{MANIFEST_FILE}")
        return {folders[name][0]: name for name in sorted(folders, key=lambda name: folders[name])}

    def _upload(self, folder: Path) -> None:
        step = checkpoint_step(folder)
        number = 1 + max((number for former, number in self._folders().values() if former == step), default=0)
        # The holder's name in it: what a run that was overtaken still uploads goes nowhere else.
        target = f"{self.root}/{folder.name}-{number:04d}-{self.holder[:8]}"
        for name in read_manifest(folder):
            self.file_system.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
            self.file_system.put_file(str(folder / name), f"{target}/{name}")
        self._check()
        # A file system that writes in parts has it whole under its name, too.
        self.file_system.put_file(str(folder / MANIFEST_FILE), f"{target}/{PARTIAL_PREFIX}{MANIFEST_FILE}")
        self.file_system.mv(f"{target}/{PARTIAL_PREFIX}{MANIFEST_FILE}", f"{target}/{MANIFEST_FILE}")

    def _remove(self, target: str) -> None:
        self._check()
        if self.file_system.exists(f"{target}/{MANIFEST_FILE}"):
            self.file_system.rm_file(f"{target}/{MANIFEST_FILE}")
        if self.file_system.exists(target):
            self.file_system.rm(target, recursive=True)

    def _check(self) -> None:
        found = json.loads(self.file_system.cat_file(f"{self.root}/{_HOLDER_FILE}"))["holder"]
        if found != self.holder:
            raise CheckpointError(
                f"{self.address}: another run has begun to copy its checkpoints there; this one stops, choose another "
                "training.checkpoint_copies"
            )


__all__ = ["CheckpointCopies"]
