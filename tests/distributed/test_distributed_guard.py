# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What one process alone sees is left out, or ends the run, on all of them, for the same reason."""

from pathlib import Path
from typing import Any

import torch
from process_ranks import run_ranks

from modeling_t3d.training.arguments import T3DTrainingArguments
from modeling_t3d.training.guard import NonFiniteError, NonFiniteGuard
from modeling_t3d.training.processes import ProcessGroup


def samples_of(rank: int) -> list[int]:
    """Of the step."""
    return [10 * rank, 10 * rank + 1]


def judge(rank: int, policy: str, broken_rank: int | None) -> bool | str:
    """What a process makes of a step whose loss is not finite on one of them."""
    guard = NonFiniteGuard(torch.nn.Linear(1, 1), T3DTrainingArguments("unused", non_finite=policy), ProcessGroup())
    loss = torch.tensor(float("nan") if rank == broken_rank else 1.0)
    try:
        return guard.admits({"loss": loss, "grad_norm": torch.tensor(1.0)}, 3, lambda: samples_of(rank), False)
    except NonFiniteError as error:
        return str(error)


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """The judgements of this rank."""
    judged = [judge(rank, *case) for case in (("skip", None), ("skip", 1), ("stop", 1), ("stop", 0))]
    return {"judged": judged, "samples": samples_of(rank)}


def test_all_ranks_judge_alike(tmp_path: Path):
    first, second = run_ranks(run_rank, 2, tmp_path)
    assert first["judged"] == second["judged"]
    admitted, skipped, *stopped = first["judged"]
    assert admitted is True
    assert skipped is False
    assert stopped[0].startswith("step 3: loss became nan on samples 10, 11;"), "those of the process that saw it"
    assert stopped[1].startswith("step 3: loss became nan on samples 0, 1;")
