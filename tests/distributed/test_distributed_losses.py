# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""W processes compute what one computes: values, counts and the gradient of every parameter, on uneven batches."""

import os
import sys

import pytest
import torch
import torch.multiprocessing as multiprocessing
from distributed_cases import CASES, NUM_PAIRS, SIZES, build_batch, run_case, run_rank

WORLD_SIZES = sorted(SIZES)


@pytest.fixture(scope="module", params=WORLD_SIZES)
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each rank wrote, for one world size; the processes run all cases."""
    folder = tmp_path_factory.mktemp(f"world_size_{request.param}")
    # A server that has imported everything forks the ranks: quicker than spawning, and free of this process's threads.
    # It finds what it imports by the environment alone.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["distributed_cases"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.start_processes(
            run_rank, args=(request.param, str(folder)), nprocs=request.param, start_method="forkserver"
        )
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def single_process() -> dict[str, dict]:
    return {case: run_case(case, build_batch()) for case in CASES}


def test_ranks_are_as_many_as_asked_and_hold_disjoint_pairs(ranks):
    assert all(rank["world_size"] == len(ranks) for rank in ranks)
    pairs = [pair for rank in ranks for pair in rank["pairs"]]
    assert sorted(pairs) == list(range(NUM_PAIRS))


@pytest.mark.parametrize("case", CASES)
def test_values_and_counts_equal_the_single_process(ranks, single_process, case):
    for rank in ranks:
        assert rank["results"][case]["terms"] == pytest.approx(single_process[case]["terms"], rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_the_single_process(ranks, single_process, case):
    expected = single_process[case]["gradients"]
    assert any(name.startswith("t3d.vision_model") for name in expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for rank in ranks:
        gradients = rank["results"][case]["gradients"]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert (gradient - expected[name]).abs().max() <= 1e-10 * largest, name


def test_single_process_counts_are_those_of_the_batch(single_process):
    terms = single_process["text, same query"]["terms"]
    assert (terms["num_valid_anchors"], terms["num_skipped_pairs"]) == (3 + 2 + 3 + 2 + 3, 2)
