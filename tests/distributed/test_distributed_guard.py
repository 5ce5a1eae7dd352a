# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What one process alone sees is left out, or ends the run, on all of them, for the same reason."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from modeling_t3d.training.arguments import T3DTrainingArguments
from modeling_t3d.training.guard import NonFiniteError, NonFiniteGuard
from modeling_t3d.training.processes import ProcessGroup


def judge(rank: int, policy: str, broken_rank: int | None) -> bool | str:
    """What a process makes of a step whose loss is not finite on one of them."""
    guard = NonFiniteGuard(torch.nn.Linear(1, 1), T3DTrainingArguments("unused", non_finite=policy), ProcessGroup())
    loss = torch.tensor(float("nan") if rank == broken_rank else 1.0)
    try:
        return guard.admits(
            {"loss": loss, "grad_norm": torch.tensor(1.0)}, 3, lambda: [10 * rank, 10 * rank + 1], False
        )
    except NonFiniteError as error:
        return str(error)


def run_rank(rank: int, folder: str) -> None:
    """The judgements of this rank, in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    judged = [judge(rank, *case) for case in (("skip", None), ("skip", 1), ("stop", 1), ("stop", 0))]
    torch.save({"judged": judged, "world_size": dist.get_world_size()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_judge_alike(tmp_path: Path):
    multiprocessing.get_context("forkserver").set_forkserver_preload(["test_distributed_guard"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["world_size"] == second["world_size"] == 2
    assert first["judged"] == second["judged"]
    admitted, skipped, *stopped = first["judged"]
    assert admitted is True
    assert skipped is False
    assert stopped[0].startswith("step 3: loss became nan on samples 10, 11;"), "those of the process that saw it"
    assert stopped[1].startswith("step 3: loss became nan on samples 0, 1;")
