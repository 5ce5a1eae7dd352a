# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What each process of the distributed tests does, which are started once per world size."""

import shutil
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import (
    BATCH_NORM,
    CASES,
    DROPOUT,
    own_pairs,
    run_accumulated,
    run_cached,
    run_plain,
)
from process_ranks import join
from trainer_cases import refusals, train


def run_all() -> dict[str, dict[str, Any]]:
    """Everything that a single process and several must agree on."""
    return {
        "plain": {case: run_plain(**overrides) for case, overrides in CASES.items()},
        "cached": {case: run_cached(**overrides) for case, overrides in CASES.items()},
        "accumulated": {case: run_accumulated(**overrides) for case, overrides in CASES.items()},
        "plain, float32": {case: run_plain(torch.float32, **overrides) for case, overrides in CASES.items()},
        "cached, float32": {case: run_cached(torch.float32, **overrides) for case, overrides in CASES.items()},
        # A wrapper that had waited for the loss stage's parameters would not begin a second step.
        "second step": {"cached": run_cached(steps=2)},
        "dropout": {"cached": run_cached(**DROPOUT)},
        "frozen batch norm": {"cached": run_cached(**BATCH_NORM)},
    }


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """All runs on this rank's pairs."""
    results: dict[str, Any] = {"samples": own_pairs(), "refused": refusals(), "runs": run_all()}
    # The trainer ends the process group.
    caching = {"gradient_caching": True, "caching_micro_batch_size": 3}
    results["trained"] = {"ddp": train(f"{folder}/ddp", world_size, strategy="ddp", **caching)}
    if world_size == 2:
        join(rank, world_size, f"{folder}/store_of_sharded")
        sharded = {"output_dir": f"{folder}/fsdp2", "strategy": "fsdp2", "save_steps": 1, "save_total_limit": None}
        results["trained"]["fsdp2"] = train(num_processes=world_size, **sharded, **caching)
        # The second step once more, from the checkpoint of the first: what the tests look at is what came of this.
        join(rank, world_size, f"{folder}/store_of_resumed")
        if rank == 0:
            shutil.rmtree(f"{folder}/fsdp2/model")
            shutil.rmtree(f"{folder}/fsdp2/checkpoints/step-00000002")
        dist.barrier()
        results["resumed"] = train(num_processes=world_size, resume=True, **sharded, **caching)
    return results
