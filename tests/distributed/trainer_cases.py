# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the distributed tests ask of the trainer: one run over a few pairs, and what it must refuse."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from distributed_cases import BATCH_NORM, build_batch, build_model
from torch.utils.data import Dataset

from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments
from modeling_t3d.training.parallel import refuse_shared_samples, wrap_model
from modeling_t3d.training.preflight import refuse_before_training
from modeling_t3d.training.sampling import ShardedBatchSampler
from modeling_t3d.training.trainer import T3DTrainer

# Pairs of a step over all processes.
GLOBAL_BATCH_SIZE = 8


class PairDataset(Dataset):
    """Two batches of pairs, one pair at a time."""

    def __init__(self) -> None:
        batches = [build_batch(seed) for seed in (1, 2)]
        self.pairs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        # Pairs of the second batch are not those of the first.
        self.pairs["report_ids"] = torch.arange(len(self))
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.pairs["input_ids"])

    def __getitem__(self, key: Any) -> dict[str, torch.Tensor]:
        self.seen.append(key.sample)
        return {name: values[key.sample] for name, values in self.pairs.items()}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples to a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def arguments(output_dir: str | Path = "unused", **settings: Any) -> T3DTrainingArguments:
    """Two steps of an optimiser whose step is nearly a multiple of the gradient: rounding stays rounding."""
    defaults = {
        "max_steps": 2,
        "adam_epsilon": 1.0,
        "vision_learning_rate": 1.0,
        "text_learning_rate": 1.0,
        "head_learning_rate": 1.0,
        "max_grad_norm": 0.5,
        "save_steps": None,
        "trackers": [],
        "use_cpu": True,
        "mixed_precision": "no",
    }
    return T3DTrainingArguments(str(output_dir), **(defaults | settings))


def train(output_dir: str | Path, num_processes: int, *, resume: bool = False, **settings: Any) -> list[int]:
    """Train this process's share; returns the samples that it took. The weights lie in `output_dir`."""
    size = GLOBAL_BATCH_SIZE // num_processes
    args = arguments(output_dir, per_device_train_batch_size=size, num_processes=num_processes, **settings)
    dataset = PairDataset()
    T3DTrainer(build_model(learnable_temperature=True), args, dataset, collate).train(resume=resume)
    return dataset.seen


def refusal(function: Any, *arguments: Any) -> str:
    """What a call is refused with; empty if it is not."""
    try:
        function(*arguments)
    except ConfigurationError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """What the trainer says to what it cannot do right."""
    accelerator = Accelerator(cpu=True)
    world_size, rank = accelerator.num_processes, accelerator.process_index

    def wrap(**settings: Any) -> str:
        return refusal(wrap_model, accelerator, build_model(**BATCH_NORM), arguments(**settings))

    def start(**settings: Any) -> str:
        return refusal(refuse_before_training, accelerator, arguments(**settings), 100, 1)

    def sampler(index: int, size: int = 100) -> ShardedBatchSampler:
        return ShardedBatchSampler(size, 4, num_processes=world_size, process_index=index)

    return {
        "batch norm": wrap(),
        "frozen batch norm": wrap(batch_norm="frozen"),
        "cached batch norm": wrap(gradient_caching=True, caching_micro_batch_size=2),
        "cached frozen batch norm": wrap(gradient_caching=True, caching_micro_batch_size=2, batch_norm="frozen"),
        "chunked batch norm": wrap(view_chunk_size=2),
        "number of processes": start(num_processes=3),
        "strategy": start(strategy="zero1"),
        "right number and strategy": start(num_processes=world_size, strategy="ddp"),
        "chunked views, sharded": wrap(view_chunk_size=2, strategy="fsdp2", batch_norm="frozen"),
        "uneven micro-batches, sharded": wrap(
            gradient_caching=True, caching_micro_batch_size=2, strategy="fsdp2", batch_norm="frozen", drop_last=False
        ),
        "shared samples": refusal(refuse_shared_samples, accelerator, sampler(0)),
        "different data": refusal(refuse_shared_samples, accelerator, sampler(rank), rank),
        "own samples": refusal(refuse_shared_samples, accelerator, sampler(rank)),
    }
