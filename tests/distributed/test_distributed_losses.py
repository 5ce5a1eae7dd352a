# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""W processes compute what one computes: values, counts and the gradient of every parameter, on uneven batches, in
one pass, accumulated and cached."""

import itertools

import pytest
import torch
from distributed_cases import (
    BATCH_NORM,
    CASES,
    DROPOUT,
    NUM_PAIRS,
    SIZES,
    assert_same_gradients,
    build_model,
    run_plain,
    run_with_graph,
)
from process_ranks import run_ranks
from rank_process import run_rank
from safetensors.torch import load_file
from trainer_cases import GLOBAL_BATCH_SIZE, train

from modeling_t3d import T3DForPreTraining

WORLD_SIZES = sorted(SIZES)


@pytest.fixture(scope="module", params=WORLD_SIZES)
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each rank found, for one world size; the processes run all cases."""
    folder = tmp_path_factory.mktemp(f"world_size_{request.param}")
    return [rank | {"folder": folder} for rank in run_ranks(run_rank, request.param, folder)]


def test_ranks_hold_all_pairs(ranks):
    pairs = [pair for rank in ranks for pair in rank["samples"]]
    assert sorted(pairs) == list(range(NUM_PAIRS))


@pytest.mark.parametrize("run", ["plain", "cached"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_one_loss_in_a_single_process(ranks, single_process, case, run):
    expected = single_process[case]
    assert any(name.startswith("t3d.vision_model") for name in expected["gradients"])
    for rank in ranks:
        result = rank["runs"][run][case]
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-12)
        assert_same_gradients(result, expected)


@pytest.mark.parametrize("case", CASES)
def test_accumulated_gradients_are_of_the_mean_loss_of_the_global_micro_batches(ranks, mean_of_two_batches, case):
    expected = mean_of_two_batches[case]
    for rank in ranks:
        result = rank["runs"]["accumulated"][case]
        assert result["terms"]["loss"] == pytest.approx(expected["terms"]["loss"], rel=1e-12)
        assert_same_gradients(result, expected)


@pytest.fixture(scope="module")
def single_process_float32() -> dict[str, dict]:
    return {case: run_plain(torch.float32, **overrides) for case, overrides in CASES.items()}


@pytest.mark.parametrize("run", ["plain, float32", "cached, float32"])
@pytest.mark.parametrize("case", CASES)
def test_single_precision(ranks, single_process_float32, case, run):
    """Sums round with the order of ranks."""
    expected = single_process_float32[case]
    for rank in ranks:
        result = rank["runs"][run][case]
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-5)
        assert_same_gradients(result, expected, limit=1e-5, rounding=1e-6)


def test_wrapper_reduces_once_a_step_and_nothing_of_the_loss_stage(ranks, single_process):
    for rank in ranks:
        result = rank["runs"]["second step"]["cached"]
        assert_same_gradients(result, single_process["text, same query"])
        assert "multi_view_alignment.query_projection.weight" in result["of_loss_stage"]
        of_towers = result["gradients"].keys() - result["of_loss_stage"]
        assert sorted(result["by_wrapper"]) == sorted([*of_towers, *of_towers])


def test_dropout_is_the_same_in_both_passes_of_cached_gradients(ranks):
    expected = run_with_graph(len(ranks), **DROPOUT)
    without_dropout = run_plain()
    assert expected["terms"]["loss"] != pytest.approx(without_dropout["terms"]["loss"], rel=1e-3)
    for rank in ranks:
        result = rank["runs"]["dropout"]["cached"]
        assert result["terms"]["loss"] == pytest.approx(expected["terms"]["loss"], rel=1e-12)
        assert_same_gradients(result, expected)


def test_frozen_batch_norm_allows_caching(ranks):
    expected = run_plain(**BATCH_NORM)
    for rank in ranks:
        result = rank["runs"]["frozen batch norm"]["cached"]
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-12)
        assert_same_gradients(result, expected)


def test_trainer_refuses_batch_norm_over_parts_of_a_batch(ranks):
    for rank in ranks:
        refused = rank["refused"]
        assert "training.gradient_caching cuts batches into parts" in refused["cached batch norm"]
        assert "training.view_chunk_size cuts batches into parts" in refused["chunked batch norm"]
        assert "training.batch_norm=frozen" in refused["cached batch norm"]
        assert not refused["frozen batch norm"]
        assert not refused["cached frozen batch norm"]
        if len(ranks) == 1:
            assert not refused["batch norm"]
        else:
            assert f"over {len(ranks)} processes needs synchronised statistics" in refused["batch norm"]


def test_trainer_refuses_what_was_not_asked_for(ranks):
    for rank in ranks:
        refused = rank["refused"]
        assert f"training.num_processes=3, but {len(ranks)} were started" in refused["number of processes"]
        assert f"training.strategy=zero1, but {rank['strategy']} was started" in refused["strategy"]
        assert not refused["right number and strategy"]
        assert "training.view_chunk_size lets processes make different numbers" in refused["chunked views, sharded"]
        assert "training.caching_micro_batch_size lets" in refused["uneven micro-batches, sharded"]
        assert not refused["own samples"]
        if len(ranks) > 1:
            assert "samples twice" in refused["shared samples"]
            assert "different training data" in refused["different data"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_trainer_that_caches_ends_where_one_batch_in_one_process_ends(ranks, tmp_path, strategy):
    if strategy not in ranks[0]["trained"]:
        assert len(ranks) != 2
        return
    seen = train(tmp_path, 1)
    assert len(seen) == 2 * GLOBAL_BATCH_SIZE
    seen_by_ranks = [rank["trained"][strategy] for rank in ranks]
    assert sorted(sample for samples in seen_by_ranks for sample in samples) == sorted(seen)
    for samples, others in itertools.permutations(seen_by_ranks, 2):
        half = len(samples) // 2  # one step, one epoch
        assert not set(samples[:half]) & set(others[:half])
        assert not set(samples[half:]) & set(others[half:])
    if strategy == "fsdp2":  # its weights are those of a run that was resumed after the first step
        assert all(rank["resumed"] == rank["trained"][strategy][len(rank["resumed"]) :] for rank in ranks)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    reloaded = T3DForPreTraining.from_pretrained(ranks[0]["folder"] / strategy / "model", dtype=torch.float64)
    initial = build_model(learnable_temperature=True).state_dict()
    for name, value in reloaded.state_dict().items():
        assert (value - expected[name]).abs().max() <= 1e-10 * value.abs().max().clamp(min=1), name
    for name in ("t3d.logit_scale", "t3d.vision_model.encoder.conv1.weight"):
        assert (expected[name] - initial[name]).abs().max() > 1e-4, name


def test_single_process_counts_are_those_of_the_batch(single_process):
    terms = single_process["text, same query"]["terms"]
    assert (terms["num_valid_anchors"], terms["num_skipped_pairs"]) == (3 + 2 + 3 + 2 + 3, 2)
