# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Fully sharded processes compute what one computes, of every objective: in one pass, accumulated and cached."""

from typing import Any

import pytest
import torch
from distributed_cases import (
    BATCH_NORM,
    CASES,
    assert_same_gradients,
    build_model,
    own_pairs,
    part_features,
    run_plain,
    run_sharded,
)
from process_ranks import run_ranks

FIRST_CASE = next(iter(CASES))


def run_rank(rank: int, world_size: int, folder: str, cases: list[str]) -> dict[str, Any]:
    """Of four processes some have a single pair, and cannot cut it into as many micro-batches as the others."""
    runs = {
        "plain": {case: run_sharded(**CASES[case]) for case in cases},
        "accumulated": {case: run_sharded(seeds=(1, 2), **CASES[case]) for case in cases},
    }
    if world_size == 2:
        runs["cached"] = {case: run_sharded(caches=True, **CASES[case]) for case in cases}
        runs["frozen batch norm"] = {"cached": run_sharded(caches=True, **BATCH_NORM)}
    return {"samples": own_pairs(), "runs": runs}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, list(CASES)), id="2"),
        pytest.param((4, [FIRST_CASE]), id="4, one case"),
        pytest.param((4, list(CASES)), id="4", marks=pytest.mark.slow),
    ],
)
def ranks(request, tmp_path_factory) -> list[dict]:
    world_size, cases = request.param
    return run_ranks(run_rank, world_size, tmp_path_factory.mktemp("sharded"), cases)


def test_gradients_and_features_equal_the_single_process(ranks, single_process):
    for rank in ranks:
        for run in ("plain", "cached") if len(ranks) == 2 else ("plain",):
            for case, result in rank["runs"][run].items():
                expected = single_process[case]
                assert "t3d.vision_model.encoder.conv1.weight" in result["sharded"]
                assert result["terms"] == pytest.approx(expected["terms"], rel=1e-12), (run, case)
                assert_same_gradients(result, expected)
                assert torch.allclose(result["features"], part_features(build_model(**CASES[case])), rtol=1e-10)
                norm = torch.nn.utils.get_total_norm(expected["gradients"].values()).item()
                assert result["norm"] == pytest.approx(norm, rel=1e-12), (run, case)


def test_accumulated_gradients_are_of_the_mean_loss_of_the_global_micro_batches(ranks, mean_of_two_batches):
    for rank in ranks:
        for case, result in rank["runs"]["accumulated"].items():
            assert_same_gradients(result, mean_of_two_batches[case])


def test_frozen_batch_norm_allows_caching(ranks):
    if len(ranks) == 4:
        pytest.skip("some of four processes have a single pair, which they cannot cut into micro-batches")
    expected = run_plain(**BATCH_NORM)
    for rank in ranks:
        result = rank["runs"]["frozen batch norm"]["cached"]
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-12)
        assert_same_gradients(result, expected)
