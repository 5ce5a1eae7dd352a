# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What every process of the distributed tests runs: one model and one batch per case, and each rank's share of it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.presets_t3d import OBJECTIVES as PRESETS
from modeling_t3d.training.arguments import T3DTrainingArguments
from modeling_t3d.training.batch_norm import training_mode
from modeling_t3d.training.gradient_caching import (
    accumulated_backward,
    cached_backward,
    split_pairs,
    withheld_loss_stage,
)
from modeling_t3d.training.sharding import (
    average_replicated,
    gradient_norm,
    replicated_parameters,
    shard_model,
    unsynchronised,
)

NUM_PAIRS = 7

# How the pairs are spread over ranks; the last batches of an epoch are uneven.
SIZES = {1: [7], 2: [4, 3], 4: [3, 1, 2, 1]}

# Pairs that are encoded at once where gradients are cached: ranks have different numbers of micro-batches.
MICRO_BATCH_SIZES = {1: 3, 2: 3, 4: 2}

BATCH_NORM = {"vision_config": {"norm": "batch"}, "projection_norm": "batch"}
DROPOUT = {"text_config": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}}

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
    "reports and their own sentences": {"lambda_texts": 0.5, "lambda_sentences": 0.0},
    "without multi-view alignment": {"lambda_tma": 0.0, "view_fusion": "attention"},
    "restoration": {"lambda_tir": 2.0, "tir_block_size": 4},
    "restoration and views that ask": {**PRESETS["v1"], "tir_block_size": 4},
    "views aligned one by one": {"gca_views": "local", "tma_query": "mean", "lambda_sentences": 0.0},
    "prototypes": {"tma_loss": "swav", "num_prototypes": 8, "num_frozen_prototype_batches": 0},
    "decorrelation": {"tma_loss": "barlow", "barlow_off_diagonal_weight": 0.3},
    "decorrelation of views aligned one by one": PRESETS["gtgm"],
}


def build_model(dtype: torch.dtype = torch.float64, *, seed: int = 0, **overrides: Any) -> T3DForPreTraining:
    """The same small model in every process, without dropout unless asked for."""
    torch.manual_seed(seed)
    vision = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "stem_stride": 2}
    text = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    sizes = {"projection_dim": 16, "projection_hidden_size": 16, "num_tma_heads": 2, "num_fusion_heads": 2}
    config = T3DConfig.from_preset(
        "tiny",
        vision_config=vision | overrides.pop("vision_config", {}),
        text_config=text | overrides.pop("text_config", {}),
        **(sizes | overrides),
    )
    model = T3DForPreTraining(config).to(dtype).train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d)):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def build_batch(seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Pairs with uneven texts and views; some share a study or a report across ranks, and the last has no view."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 5, 7, 3, 9, 4, 6])
    attention_mask = (torch.arange(9) < lengths[:, None]).long()
    local_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    sentence_mask = (torch.arange(9) < torch.stack([lengths.flip(0), lengths], dim=1)[..., None]).long()
    batch = {
        "input_ids": torch.randint(4, 1000, (NUM_PAIRS, 9), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(NUM_PAIRS, 1, 8, 8, 8, generator=generator, dtype=torch.float64),
        "local_pixel_values": torch.randn(NUM_PAIRS, 3, 1, 8, 8, 4, generator=generator, dtype=torch.float64),
        "local_mask": local_mask,
        "local_positions": torch.rand(NUM_PAIRS, 3, 6, generator=generator, dtype=torch.float64),
        "corruption_seeds": torch.randint(1 << 62, (NUM_PAIRS,), generator=generator),
        "study_ids": torch.tensor([3, -1, 4, 5, 3, -1, 8]),
        "report_ids": torch.tensor([0, 1, 2, 3, 4, 1, 6]),
        "sentence_input_ids": torch.randint(4, 1000, (NUM_PAIRS, 2, 9), generator=generator) * sentence_mask,
        "sentence_attention_mask": sentence_mask,
        "sentence_ids": torch.tensor([[0, 1], [2, 1], [3, 4], [0, 5], [6, 7], [8, 9], [10, 11]]),
    }
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def share(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """Pairs `start` to `stop`, their texts padded no longer than they need."""
    part = {name: value[start:stop] for name, value in batch.items()}
    longest = int(part["attention_mask"].sum(dim=1).max())
    return {name: value[:, :longest] if value.shape[1:] == (9,) else value for name, value in part.items()}


def own_share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's pairs; all of them without a process group."""
    if not dist.is_initialized():
        return batch
    sizes, rank = SIZES[dist.get_world_size()], dist.get_rank()
    return share(batch, sum(sizes[:rank]), sum(sizes[: rank + 1]))


def own_pairs() -> list[int]:
    """The numbers of this rank's pairs."""
    batch = {"pairs": torch.arange(NUM_PAIRS), "attention_mask": torch.ones(NUM_PAIRS, 9)}
    return own_share(batch)["pairs"].tolist()


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrapped where there is a process group. The wrapper waits for the gradient of every parameter that it knows."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def no_sync_of(wrapped: nn.Module) -> Callable[[], Any]:
    """Context in which a backward pass averages nothing."""
    return wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext


def seed_draws() -> None:
    """Only rank 0 draws candidate pairs: the other ranks' generators must not matter."""
    torch.manual_seed(5 + (dist.get_rank() if dist.is_initialized() else 0))


def results_of(model: nn.Module, terms: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Scalars of the output and every trainable parameter's gradient."""
    return {
        "terms": {name: value.item() for name, value in terms.items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad},
    }


def run_plain(dtype: torch.dtype = torch.float64, **overrides: Any) -> dict[str, Any]:
    """One forward and backward pass over all pairs; data parallel where there is a group."""
    model = build_model(dtype, **overrides)
    if "batch" in overrides.values():
        freeze_batch_norm(model)
    wrapped = data_parallel(model)
    seed_draws()
    return results_of(model, accumulated_backward(wrapped, [own_share(build_batch(dtype=dtype))]))


def run_accumulated(**overrides: Any) -> dict[str, Any]:
    """Two global micro-batches whose losses are averaged."""
    model = build_model(**overrides)
    wrapped = data_parallel(model)
    seed_draws()
    micro_batches = [own_share(build_batch(seed)) for seed in (1, 2)]
    return results_of(model, accumulated_backward(wrapped, micro_batches, no_sync=no_sync_of(wrapped)))


def run_cached(dtype: torch.dtype = torch.float64, *, steps: int = 1, **overrides: Any) -> dict[str, Any]:
    """All pairs as one contrastive batch, encoded a few at a time; the results are those of the last step."""
    model = build_model(dtype, **overrides)
    if "batch" in overrides.values():
        freeze_batch_norm(model)
    with withheld_loss_stage(model):
        wrapped = data_parallel(model)
    micro_batches = split_pairs(own_share(build_batch(dtype=dtype)), micro_batch_size())
    reduced: list[int] = []
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(reduced, note_and_reduce)
    for _ in range(steps):
        model.zero_grad()
        seed_draws()
        terms = cached_backward(wrapped, model, micro_batches, no_sync=no_sync_of(wrapped))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_loss_stage = {names[id(parameter)] for parameter in model.loss_stage_parameters()}
    by_wrapper = [names[identity] for identity in reduced]
    return results_of(model, terms) | {"of_loss_stage": of_loss_stage, "by_wrapper": by_wrapper}


def note_and_reduce(reduced: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What data parallelism does with a bucket of gradients, and a note of whose they are."""
    reduced += [id(parameter) for parameter in bucket.parameters()]
    return allreduce_hook(dist.group.WORLD, bucket)


def run_sharded(*, caches: bool = False, seeds: tuple[int, ...] = (1,), **overrides: Any) -> dict[str, Any]:
    """Fully sharded parameters: the mean loss of some batches, or all pairs of one cached as one contrastive batch."""
    model = build_model(**overrides)
    if "batch" in overrides.values():
        freeze_batch_norm(model)
    whole = replicated_parameters(model)
    sharded = shard_model(model, torch.device("cpu"))
    parts = [parameter for parameter in sharded.parameters() if not any(parameter is other for other in whole)]
    assert all(isinstance(parameter, DTensor) for parameter in parts)
    assert all(parameter.device_mesh.size() == dist.get_world_size() for parameter in parts)
    assert len(parts) > len(whole)
    seed_draws()
    batches = [own_share(build_batch(seed)) for seed in seeds]
    if caches:
        # Every process makes as many forward passes.
        micro_batches = split_pairs(batches[0], (len(batches[0]["input_ids"]) + 1) // 2)
        terms = cached_backward(sharded, sharded, micro_batches, no_sync=lambda: unsynchronised(sharded))
    else:
        terms = accumulated_backward(sharded, batches, no_sync=lambda: unsynchronised(sharded))
        average_replicated(sharded)
    results = results_of(sharded, terms)
    gradients = results["gradients"]
    results["sharded"] = [name for name, gradient in gradients.items() if isinstance(gradient, DTensor)]
    results["norm"] = gradient_norm(list(gradients.values())).item()
    # Evaluation calls parts of the model by themselves.
    with torch.no_grad():
        results["features"] = part_features(sharded)
    results["gradients"] = {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients.items()
    }
    return results


def part_features(model: T3DForPreTraining) -> torch.Tensor:
    """Embeddings of a report and of two views, by methods other than `forward`."""
    batch = build_batch()
    text = model.t3d.get_text_features(batch["input_ids"][:1], batch["attention_mask"][:1]).pooler_output
    views, _ = model.t3d.encode_local_views(batch["local_pixel_values"][:1, :2])
    return torch.cat([text.flatten(), views.flatten()])


def freeze_batch_norm(model: nn.Module) -> None:
    """As the trainer does."""
    training_mode(model, T3DTrainingArguments("unused", batch_norm="frozen"))


def micro_batch_size() -> int:
    """Pairs that this rank encodes at once."""
    return MICRO_BATCH_SIZES[dist.get_world_size() if dist.is_initialized() else 1]


def run_mean_of_two_batches(**overrides: Any) -> dict[str, Any]:
    """The oracle of accumulation, in one process."""
    model = build_model(**overrides)
    seed_draws()
    loss = torch.stack([model(**build_batch(seed)).loss for seed in (1, 2)]).mean()
    loss.backward()
    return results_of(model, {"loss": loss})


def run_with_graph(world_size: int, **overrides: Any) -> dict[str, Any]:
    """The oracle with dropout, in one process: every rank's micro-batches, its random numbers, one graph, one loss."""
    model = build_model(**overrides)
    parts = []
    for rank, size in enumerate(SIZES[world_size]):
        torch.manual_seed(5 + rank)
        start = sum(SIZES[world_size][:rank])
        own = share(build_batch(), start, start + size)
        parts += [model.encode_pairs(**batch) for batch in split_pairs(own, MICRO_BATCH_SIZES[world_size])]
    output = model.align(type(parts[0]).concatenate(parts))
    output.loss.backward()
    return results_of(model, {"loss": output.loss})


def assert_same_gradients(
    result: dict[str, Any], expected: dict[str, Any], limit: float = 1e-10, rounding: float = 1e-10
) -> None:
    """Error of each tensor in units of its own largest entry; where the true gradient is zero, of the model's."""
    assert result["gradients"].keys() == expected["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        assert result["gradients"][name] is not None, name
        # Rounding leaves 1e-13 of the largest entry in a zero (1e-7 in float32); a gradient that is not zero has more.
        scale = gradient.abs().max() if gradient.abs().max() > rounding * largest else largest
        assert (result["gradients"][name] - gradient).abs().max() <= limit * scale, name
