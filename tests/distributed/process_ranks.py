# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How the ranks of a distributed test start, and what must hold of them whatever they are to show: they are as many as
asked for, data-parallel, and no two see the same sample."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from modeling_t3d.training.parallel import running_strategy

# Of a test's rank: its number, how many there are, a folder for all, and more -> what it found, with its `samples`.
RankFunction = Callable[..., dict[str, Any]]


def join(rank: int, world_size: int, store: str) -> None:
    """Enter a new process group, which meets in the file `store`."""
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    # What a launcher would have set. The address is asked for, but not used.
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in launched.items()}
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)


def run_ranks(function: RankFunction, world_size: int, folder: Path, *more: Any) -> list[dict[str, Any]]:
    """What each of `world_size` processes found, in the order of ranks."""
    # A server that has imported everything forks the ranks: quicker than spawning, and free of this process's threads.
    # It finds what it imports by the environment alone.
    multiprocessing.get_context("forkserver").set_forkserver_preload([function.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.start_processes(
            _run_rank, args=(function, world_size, str(folder), *more), nprocs=world_size, start_method="forkserver"
        )
    ranks = [torch.load(folder / f"rank_{rank}.pt") for rank in range(world_size)]
    assert [rank["world_size"] for rank in ranks] == [world_size] * world_size
    assert [rank["strategy"] for rank in ranks] == ["ddp"] * world_size
    assert all(rank["samples"] for rank in ranks)
    samples = [sample for rank in ranks for sample in rank["samples"]]
    assert len(set(samples)) == len(samples), "ranks share samples"
    return ranks


def _run_rank(rank: int, function: RankFunction, world_size: int, folder: str, *more: Any) -> None:
    torch.set_num_threads(1)
    join(rank, world_size, f"{folder}/store")
    facts = {"world_size": dist.get_world_size(), "strategy": running_strategy(Accelerator(cpu=True))}
    torch.save(function(rank, world_size, folder, *more) | facts, f"{folder}/rank_{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
