# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Assignments to prototypes over the views of several processes: those of one, for one message per iteration and one
more."""

from pathlib import Path
from typing import Any

import torch
from process_ranks import run_ranks

from modeling_t3d.clustering_loss_t3d import sinkhorn_codes

BOUNDS = [0, 9, 23]  # uneven shares
NUM_ITERATIONS = 3


def views() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 23 views for 7 prototypes, some views missing."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(BOUNDS[-1], 7, generator=generator, dtype=torch.float64) * 2 - 1
    return scores, torch.rand(BOUNDS[-1], generator=generator) < 0.8


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """This rank's codes, and what was sent for them."""
    own = range(BOUNDS[rank], BOUNDS[rank + 1])
    scores, mask = (values[own.start : own.stop] for values in views())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        codes = sinkhorn_codes(scores, mask, epsilon=0.05, num_iterations=NUM_ITERATIONS)
    messages = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    return {"codes": codes, "messages": messages, "samples": list(own)}


def test_ranks_share_the_prototypes_with_few_messages(tmp_path: Path):
    ranks = run_ranks(run_rank, len(BOUNDS) - 1, tmp_path)
    expected = sinkhorn_codes(*views(), epsilon=0.05, num_iterations=NUM_ITERATIONS)
    torch.testing.assert_close(torch.cat([rank["codes"] for rank in ranks]), expected, rtol=1e-12, atol=1e-14)
    for rank in ranks:
        assert rank["messages"] == ["c10d::allreduce_"] * (1 + NUM_ITERATIONS)
