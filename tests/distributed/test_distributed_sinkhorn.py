# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Assignments to prototypes over the views of several processes: those of one, for one message per iteration and one
more."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from modeling_t3d.clustering_loss_t3d import sinkhorn_codes

BOUNDS = [0, 9, 23]  # uneven shares
NUM_ITERATIONS = 3


def views() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 23 views for 7 prototypes, some views missing."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(BOUNDS[-1], 7, generator=generator, dtype=torch.float64) * 2 - 1
    return scores, torch.rand(BOUNDS[-1], generator=generator) < 0.8


def run_rank(rank: int, folder: str) -> None:
    """This rank's codes, and what was sent for them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(BOUNDS) - 1)
    scores, mask = (values[BOUNDS[rank] : BOUNDS[rank + 1]] for values in views())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        codes = sinkhorn_codes(scores, mask, epsilon=0.05, num_iterations=NUM_ITERATIONS)
    messages = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    torch.save({"codes": codes, "messages": messages, "world_size": dist.get_world_size()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_share_the_prototypes_with_few_messages(tmp_path: Path):
    multiprocessing.get_context("forkserver").set_forkserver_preload(["test_distributed_sinkhorn"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    expected = sinkhorn_codes(*views(), epsilon=0.05, num_iterations=NUM_ITERATIONS)
    torch.testing.assert_close(torch.cat([rank["codes"] for rank in ranks]), expected, rtol=1e-12, atol=1e-14)
    for rank in ranks:
        assert rank["messages"] == ["c10d::allreduce_"] * (1 + NUM_ITERATIONS)
