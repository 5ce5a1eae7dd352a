# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Accelerate accepts the configurations of `examples/accelerate`, each setting is one that its launcher knows, and the
trainer refuses those strategies that it cannot follow."""

import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from modeling_t3d.training.arguments import ConfigurationError, T3DTrainingArguments
from modeling_t3d.training.parallel import running_strategy, wrap_model
from modeling_t3d.training.preflight import refuse_before_training

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero1": DistributedType.DEEPSPEED,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_there_is_one_file_per_strategy():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(KINDS)


@pytest.mark.parametrize("strategy", KINDS)
def test_accelerate_accepts_the_file(strategy):
    settings = load_config_from_file(str(FOLDER / f"{strategy}.yaml"))
    assert settings.distributed_type == KINDS[strategy]
    assert settings.num_processes > 1
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for name in (*settings.fsdp_config, *settings.deepspeed_config):
        assert name in known, name
    if strategy == "fsdp2":
        assert settings.fsdp_config["fsdp_version"] == 2
    if strategy.startswith("zero"):
        assert settings.deepspeed_config["zero_stage"] == int(strategy[-1])


class StartedAs:
    """What `refuse_before_training` asks of an accelerator whose hardware is not here."""

    def __init__(self, kind: DistributedType, stage: int = 0, is_fsdp2: bool = False):
        self.distributed_type, self.num_processes, self.is_fsdp2 = kind, 8, is_fsdp2
        self.state = self
        self.deepspeed_plugin = self
        self.zero_stage = stage


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize("caches", [True, False])
def test_trainer_refuses_zero(stage, asked_for, caches):
    accelerator = StartedAs(DistributedType.DEEPSPEED, stage)
    settings = {"gradient_caching": True, "gradient_accumulation_steps": 2} if caches else {}
    args = T3DTrainingArguments("unused", strategy=f"zero{stage}" if asked_for else None, **settings)
    with pytest.raises(ConfigurationError, match=rf"not as zero{stage}; .* examples/accelerate/fsdp2.yaml"):
        refuse_before_training(accelerator, args, 100, 1)


def test_trainer_refuses_the_former_sharding_and_accepts_the_present_one():
    args = T3DTrainingArguments("unused")
    with pytest.raises(ConfigurationError, match="not as fsdp1"):
        refuse_before_training(StartedAs(DistributedType.FSDP), args, 100, 1)
    refuse_before_training(StartedAs(DistributedType.FSDP, is_fsdp2=True), args, 100, 1)


@pytest.mark.parametrize(
    "accelerator", [StartedAs(DistributedType.FSDP, is_fsdp2=True), StartedAs(DistributedType.MULTI_GPU)]
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ema_decay": 0.9},
            "training.ema_decay averages whole weights, .*; leave it out or train as ddp",
        ),
        ({"mixed_precision": "fp16"}, "training.mixed_precision=fp16 scales whole gradients, .*; set it to bf16"),
    ],
)
def test_trainer_refuses_what_needs_whole_weights_of_a_sharded_model(accelerator, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        refuse_before_training(accelerator, T3DTrainingArguments("unused", strategy="fsdp2", **settings), 100, 1)
    if accelerator.distributed_type == DistributedType.MULTI_GPU:
        refuse_before_training(accelerator, T3DTrainingArguments("unused", strategy="ddp", **settings), 100, 1)


def test_trainer_refuses_parameters_off_the_device():
    accelerator = StartedAs(DistributedType.FSDP, is_fsdp2=True)
    accelerator.device = torch.device("cpu")
    accelerator.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True)
    with pytest.raises(ConfigurationError, match="fsdp_offload_params=true keeps"):
        wrap_model(accelerator, nn.Linear(2, 2), T3DTrainingArguments("unused"))


def test_a_single_process_is_not_what_a_strategy_asks_for():
    accelerator = Accelerator(cpu=True)
    assert running_strategy(accelerator) == "single"
    for strategy in ("ddp", "fsdp2"):
        args = T3DTrainingArguments("unused", strategy=strategy)
        with pytest.raises(ConfigurationError, match=f"training.strategy={strategy}, but single was started"):
            refuse_before_training(accelerator, args, 100, 1)
    refuse_before_training(accelerator, T3DTrainingArguments("unused", strategy="single"), 100, 1)


def test_slurm_script_is_a_script():
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True, timeout=120)
