# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What every process of the distributed tests runs: one model and one batch per case, and each rank's share of it."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining

NUM_PAIRS = 7

# How the pairs are spread over ranks; the last batches of an epoch are uneven.
SIZES = {1: [7], 2: [4, 3], 4: [3, 1, 2, 1]}

CASES: dict[str, dict[str, Any]] = {
    "text, same query": {},
    "text, own query": {"tma_negatives": "own_query"},
    "text, two negative pairs": {"tma_negative_pairs": 2},
    "none": {"tma_query": "none"},
    "none, own query, two negative pairs": {
        "tma_query": "none",
        "tma_negatives": "own_query",
        "tma_negative_pairs": 2,
    },
    "vision, same query": {"tma_query": "vision"},
    "vision, own query": {"tma_query": "vision", "tma_negatives": "own_query"},
    "vision, two negative pairs": {"tma_query": "vision", "tma_negative_pairs": 2},
    "sigmoid": {"contrastive_loss": "sigmoid"},
    "learnt temperature and soft targets": {
        "learnable_temperature": True,
        "soft_targets": True,
        "soft_target_rate": 2.0,
        "gca_temperature": 0.5,
    },
    "attention over views": {"view_fusion": "attention"},
    "mean over views": {"view_fusion": "mean"},
    "mean over tokens, sentences weigh more": {"text_pooling": "mean", "lambda_sentences": 2.0},
    "without multi-view alignment": {"lambda_tma": 0.0, "view_fusion": "attention"},
}


def build_model(case: str) -> nn.Module:
    """The same small float64 model in every process, without dropout."""
    torch.manual_seed(0)
    config = T3DConfig.from_preset(
        "tiny",
        vision_config={"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "stem_stride": 2},
        text_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        projection_dim=16,
        projection_hidden_size=16,
        num_tma_heads=2,
        num_fusion_heads=2,
        **CASES[case],
    )
    return T3DForPreTraining(config).double().train()


def build_batch() -> dict[str, torch.Tensor]:
    """Pairs with uneven texts and views; some share a study or a report across ranks, and the last has no view."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 5, 7, 3, 9, 4, 6])
    attention_mask = (torch.arange(9) < lengths[:, None]).long()
    local_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    sentence_mask = (torch.arange(9) < torch.stack([lengths.flip(0), lengths], dim=1)[..., None]).long()
    return {
        "input_ids": torch.randint(4, 1000, (NUM_PAIRS, 9), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(NUM_PAIRS, 1, 8, 8, 8, generator=generator, dtype=torch.float64),
        "local_pixel_values": torch.randn(NUM_PAIRS, 3, 1, 8, 8, 4, generator=generator, dtype=torch.float64),
        "local_mask": local_mask,
        "local_positions": torch.rand(NUM_PAIRS, 3, 6, generator=generator, dtype=torch.float64),
        "study_ids": torch.tensor([3, -1, 4, 5, 3, -1, 8]),
        "report_ids": torch.tensor([0, 1, 2, 3, 4, 1, 6]),
        "sentence_input_ids": torch.randint(4, 1000, (NUM_PAIRS, 2, 9), generator=generator) * sentence_mask,
        "sentence_attention_mask": sentence_mask,
        "sentence_ids": torch.tensor([[0, 1], [2, 1], [3, 4], [0, 5], [6, 7], [8, 9], [10, 11]]),
    }


def share(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """Pairs `start` to `stop`, their texts padded no longer than they need."""
    part = {name: value[start:stop] for name, value in batch.items()}
    longest = int(part["attention_mask"].sum(dim=1).max())
    return {name: value[:, :longest] if value.shape[1:] == (9,) else value for name, value in part.items()}


def run_case(case: str, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Losses, counts and every parameter's gradient after one backward pass; data parallel where there is a group."""
    model = build_model(case)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    # Only rank 0 draws candidate pairs: the other ranks' generators must not matter.
    torch.manual_seed(5 + (dist.get_rank() if dist.is_initialized() else 0))
    output = wrapped(**batch)
    output.loss.backward()
    losses = ("loss", "loss_gca", "loss_sentences", "loss_tma")
    terms = (*losses, "log_num_candidates", "num_valid_anchors", "num_skipped_pairs")
    return {
        "terms": {term: getattr(output, term).item() for term in terms if getattr(output, term) is not None},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad},
    }


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """Entry of a process: all cases on this rank's pairs, its results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    start = sum(SIZES[world_size][:rank])
    stop = start + SIZES[world_size][rank]
    part = share(build_batch(), start, stop)
    results = {case: run_case(case, part) for case in CASES}
    torch.save(
        {"results": results, "world_size": dist.get_world_size(), "pairs": list(range(start, stop))},
        Path(folder) / f"rank_{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()
