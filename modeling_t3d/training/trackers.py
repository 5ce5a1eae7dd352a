# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What experiment trackers are told: every step once, also where a killed run had told them more than was saved."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .files import write_text_atomically

# They cannot take back what a killed run told them; TensorBoard can.
_APPEND_ONLY = ("trackio", "wandb")


class StepTrackers:
    """
    The trackers of a run; the main process alone logs. A resumed run goes on in the same curves.

    Those that cannot take anything back are told at least once: again after a kill between telling and noting it, and
    on a machine to which the note was not copied, so that no step is ever missing.

    Args:
        accelerator (`Accelerator`): knows which trackers there are.
        path (`Path`): a file that remembers what trackers were told that cannot take it back.
        settings (`dict`): shown with the run.
        step (`int`): where the run starts.
        name (`str`): of the run, the same when it is resumed.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, settings: dict[str, Any], *, step: int, name: str
    ) -> None:
        self.accelerator = accelerator
        self.path = path
        self.name = name
        self.told = self._read() if accelerator.is_main_process else set()
        plain = {
            setting: value if isinstance(value, (int, float, str, bool)) else str(value)
            for setting, value in settings.items()
        }
        continued = {
            "tensorboard": {"purge_step": step + 1},
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"id": name, "resume": "allow"},
        }
        accelerator.init_trackers("tracker", plain, continued)

    def _read(self) -> set[tuple[str, int]]:
        """Kind and step of what this run had told before it was stopped."""
        if not self.path.exists():
            return set()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed run may have left half a line; another run may have been in this folder before.
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)[0] == self.name]
        write_text_atomically(self.path, "".join(whole))
        return {(kind, step) for _, kind, step in map(json.loads, whole)}

    def log(self, step: int, values: dict[str, float], kind: str) -> None:
        """Tell all trackers the values of a step, under names that begin with their kind."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        is_told = (kind, step) in self.told
        for tracker in self.accelerator.trackers:
            if not (is_told and tracker.name in _APPEND_ONLY):
                tracker.log(named, step=step)
        if not is_told and any(tracker.name in _APPEND_ONLY for tracker in self.accelerator.trackers):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([self.name, kind, step]) + "\n")

    def close(self) -> None:
        """Flush them."""
        self.accelerator.end_training()


__all__ = ["StepTrackers"]
