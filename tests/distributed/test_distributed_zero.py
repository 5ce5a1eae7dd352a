# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""DeepSpeed's engine around `T3DForPreTraining`, in a loop of one's own: ZeRO-1, 2 and 3 have the gradients and take
the steps of one process. Skipped without DeepSpeed (`pip install "deepspeed>=0.18,<0.19.8"`)."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from distributed_cases import CASES, NUM_PAIRS, assert_same_gradients, build_batch, build_model, own_pairs, own_share
from torch import nn

from modeling_t3d.training.gradient_caching import accumulated_backward

CASE = "learnt temperature and soft targets"
# Of a first step that is accumulated, and of a second one.
STEPS = ((1, 2), (3, 4))
MAX_GRAD_NORM = 1.0


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as the trainer has; steps are nearly multiples of the gradient, so that rounding stays rounding."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.1, eps=1.0)


def settings_of(stage: int) -> dict[str, Any]:
    """Every parameter is divided, however small; a parameter that no loss uses is an error."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "ignore_unused_parameters": False,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def run_rank(rank: int, stage: int, folder: str) -> None:
    """Two steps of two micro-batches each: the gradients of the first step and the weights after both."""
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "DS_ACCELERATOR": "cpu"}
    os.environ |= {name: str(value) for name, value in environment.items()}
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = build_model(torch.float32, **CASES[CASE])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings_of(stage))
    gradients = {}
    for seeds in STEPS:
        for seed in seeds:
            engine.set_gradient_accumulation_boundary(seed == seeds[-1])
            loss = engine(**own_share(build_batch(seed, torch.float32))).loss
            engine.backward(loss / len(seeds), scale_wrt_gas=False)
        gradients = gradients or {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}
        # Gloo fills views of the flat weights, which autograd would otherwise refuse.
        with torch.no_grad():
            engine.step()
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in trained.items()}
    result = {"stage": engine.zero_optimization_stage(), "world_size": dist.get_world_size()}
    torch.save(result | {"samples": own_pairs(), "gradients": gradients, "weights": weights}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_has_the_gradients_and_takes_the_steps_of_one_process(tmp_path: Path, stage: int):
    pytest.importorskip("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.start_processes(run_rank, args=(stage, str(tmp_path)), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [(rank["stage"], rank["world_size"]) for rank in ranks] == [(stage, 2)] * 2
    assert sorted(ranks[0]["samples"] + ranks[1]["samples"]) == list(range(NUM_PAIRS))

    model = build_model(torch.float32, **CASES[CASE])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(model)
    expected: dict[str, torch.Tensor] = {}
    for seeds in STEPS:
        accumulated_backward(model, [build_batch(seed, torch.float32) for seed in seeds])
        expected = expected or {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    for rank in ranks:
        assert_same_gradients(rank, {"gradients": expected}, limit=1e-5, rounding=1e-6)
        for name, weight in rank["weights"].items():
            moved = (model.get_parameter(name) - before[name]).abs().max()
            assert (weight - model.get_parameter(name)).abs().max() <= 1e-5 * moved.clamp(min=0.1), name
