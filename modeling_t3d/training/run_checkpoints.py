# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The checkpoints of one run, on its disk and at the address of its copies: what all processes save and resume
together."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import ConfigurationError, T3DTrainingArguments
from .checkpoint_copies import CheckpointCopies
from .checkpoints import (
    Stateful,
    checkpoint_to_resume,
    list_checkpoints,
    load_checkpoint,
    read_state,
    write_checkpoint,
)
from .processes import ProcessGroup
from .session import RunSession
from .state import refuse_other_run

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """
    What [`T3DTrainer`] saves and resumes. Every method is called by all processes.

    Args:
        args ([`T3DTrainingArguments`]): where, how many.
        processes ([`ProcessGroup`]): of the run.
        session ([`RunSession`]): says whether the folder is still this run's.
    """

    def __init__(self, args: T3DTrainingArguments, processes: ProcessGroup, session: RunSession) -> None:
        self.output_dir = Path(args.output_dir)
        self.keep = args.save_total_limit
        self.processes = processes
        self.session = session
        self.copies = CheckpointCopies(args.checkpoint_copies) if args.checkpoint_copies else None

    def save(
        self,
        *,
        step: int,
        best_step: int | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Stateful],
        state: dict[str, Any],
        add_files: Callable[[Path], Any],
    ) -> Path:
        """Write a checkpoint, then its copy; see [`write_checkpoint`] for the arguments."""

        def add_all_files(folder: Path) -> None:
            add_files(folder)
            if self.copies is not None:
                self.copies.add_logs(self.output_dir, folder)

        folder = write_checkpoint(
            self.output_dir,
            step=step,
            model=model,
            optimizer=optimizer,
            state={**state, "num_processes": self.processes.size},
            keep=self.keep,
            best_step=best_step,
            extra=extra,
            processes=self.processes,
            add_files=add_all_files,
            fence=self.session.fence,
            before_rename=self.session.check,
        )
        if self.copies is not None:
            with self.processes.together():
                if self.processes.is_main:
                    self.copies.mirror(self.output_dir, keep=self.keep, best_step=best_step)
        return folder

    def resume(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Stateful],
        identity: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """
        Load the newest checkpoint.

        Args:
            model, optimizer, extra: changed in place; see [`load_checkpoint`].
            identity (`dict`): what must be the same as in the run that wrote it.

        Returns:
            What [`RunCheckpoints.save`] was given as `state`, and the random state of this process, `None` on another
            number of processes; `None` if there is no checkpoint.
        """
        folder = None
        with self.processes.together():
            if self.processes.is_main:
                if self.copies is not None:
                    self.copies.fetch_newest(self.output_dir)
                folder = checkpoint_to_resume(self.output_dir)
        folder = self.processes.from_main(folder)
        if folder is None:
            logger.warning("%s holds no checkpoint; the run starts anew", self.output_dir)
            self._claim_copies()
            return None
        saved = read_state(folder)
        refuse_other_run(folder, saved["run"], identity, self.processes.size)
        random_state = load_checkpoint(folder, model=model, optimizer=optimizer, extra=extra, rank=self.processes.rank)
        self._claim_copies()
        if saved["num_processes"] == self.processes.size:
            logger.info("resumed from %s", folder)
            return saved, random_state
        logger.warning(
            "resumed on %d processes instead of %d: the order of samples continues, dropout differs",
            self.processes.size,
            saved["num_processes"],
        )
        return saved, None

    def refuse_former_run(self) -> None:
        """Raise if the folder or the address of copies holds the checkpoints of a run."""
        place: Path | str | None = None
        name = ""
        with self.processes.together():
            if self.processes.is_main:
                if list_checkpoints(self.output_dir):
                    place, name = self.output_dir, "output_dir"
                elif self.copies is not None and self.copies.steps():
                    place, name = self.copies.address, "checkpoint_copies"
        place, name = self.processes.from_main((place, name))
        if place:
            raise ConfigurationError(
                f"{place} holds the checkpoints of a run; resume it or choose another training.{name}"
            )
        self._claim_copies()

    def _claim_copies(self) -> None:
        if self.copies is not None and self.processes.is_main:
            self.copies.begin()


__all__ = ["RunCheckpoints"]
