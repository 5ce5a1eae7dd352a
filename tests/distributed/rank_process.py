# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The entry of each process of the distributed tests, which are spawned once per world size, and what it writes."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import (
    ACCUMULATED,
    BATCH_NORM,
    CASES,
    DROPOUT,
    NUM_PAIRS,
    own_share,
    run_accumulated,
    run_cached,
    run_plain,
)
from trainer_cases import refusals, train


def run_all() -> dict[str, dict[str, Any]]:
    """Everything that a single process and several must agree on."""
    return {
        "plain": {case: run_plain(**overrides) for case, overrides in CASES.items()},
        "cached": {case: run_cached(**overrides) for case, overrides in CASES.items()},
        "accumulated": {case: run_accumulated(**CASES[case]) for case in ACCUMULATED},
        "float32": {"plain": run_plain(torch.float32), "cached": run_cached(torch.float32)},
        # A wrapper that had waited for the loss stage's parameters would not begin a second step.
        "second step": {"cached": run_cached(steps=2)},
        "dropout": {"cached": run_cached(**DROPOUT)},
        "frozen batch norm": {"cached": run_cached(**BATCH_NORM)},
    }


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """All runs on this rank's pairs, its results in a file."""
    torch.set_num_threads(1)
    # What a launcher would have set. The address is asked for, but the group meets in a file.
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in launched.items()}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    strategy, refused = refusals()
    own_pairs = own_share({"pairs": torch.arange(NUM_PAIRS), "attention_mask": torch.ones(NUM_PAIRS, 9)})["pairs"]
    results = {
        "world_size": dist.get_world_size(),
        "strategy": strategy,
        "pairs": own_pairs,
        "refused": refused,
        "runs": run_all(),
        # The trainer ends the process group.
        "trained": train(f"{folder}/cached", world_size, gradient_caching=True, caching_micro_batch_size=3),
    }
    torch.save(results, Path(folder) / f"rank_{rank}.pt")
