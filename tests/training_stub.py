# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A model, data and a run small enough to be killed often; `python training_stub.py OUTPUT_DIR [name=value ...]`.

The model has dropout and a learnt temperature, so that a run that loses its random state ends elsewhere.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from modeling_t3d.training.arguments import T3DTrainingArguments, from_mapping
from modeling_t3d.training.session import errors_in_one_line
from modeling_t3d.training.trainer import EXIT_STATUS_INTERRUPTED, T3DTrainer

NUM_SAMPLES = 23


class StubConfig(PreTrainedConfig):
    model_type = "training_stub"
    max_logit_scale: float = 20.0
    dropout: float = 0.3


@dataclass
class StubOutput(ModelOutput):
    loss: torch.Tensor | None = None
    loss_part: torch.Tensor | None = None
    embeds: torch.Tensor | None = None


class StubModel(PreTrainedModel):
    config: StubConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(config.dropout))
        self.text_model = nn.Linear(4, 8)
        self.projection = nn.Linear(8, 1)
        self.logit_scale = nn.Parameter(torch.tensor(2.99))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)

    def forward(self, inputs, targets, indices=None):
        hidden_states = self.vision_model(inputs) * self.text_model(inputs)
        # The scale is pushed up, against its clamp.
        loss = (self.projection(hidden_states).squeeze(-1) - targets).square().mean() - 0.1 * self.logit_scale
        return StubOutput(loss=loss, loss_part=loss * 2, embeds=hidden_states)


class StubDataset(Dataset):
    """
    Samples that depend on their key; `seen` holds the indices in the order in which they were asked for.

    With a `folder`, a sample is also added what its file there says. From epoch `hold_epoch` on, samples wait as long
    as there is a file `hold`: nothing that a test does to such a run comes too late.
    """

    def __init__(self, seconds: float = 0.0, folder: str | None = None, hold: str | None = None, hold_epoch: int = 0):
        self.seconds = seconds
        self.folder = folder
        self.hold = hold
        self.hold_epoch = hold_epoch
        self.seen: list[int] = []

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, key):
        self.seen.append(key.sample)
        time.sleep(self.seconds)
        while self.hold and key.epoch >= self.hold_epoch and Path(self.hold).exists():
            time.sleep(0.01)
        generator = torch.Generator().manual_seed(key.epoch * 1000 + key.sample)
        offset = float((Path(self.folder) / f"{key.sample}.txt").read_text()) if self.folder else 0.0
        return torch.randn(4, generator=generator) + offset, torch.tensor(float(key.sample % 3)), key.sample


def collate(samples):
    inputs, targets, indices = zip(*samples, strict=True)
    return {"inputs": torch.stack(inputs), "targets": torch.stack(targets), "indices": torch.tensor(indices)}


def validate(model) -> dict[str, float]:
    """A metric that draws random numbers and that no training should feel."""
    torch.rand(7)
    return {"score": model.projection.weight.sum().item()}


def build_trainer(output_dir, *, dropout: float = 0.3, evaluate=None, record: bool = False, **settings) -> T3DTrainer:
    """
    A trainer on the stub; `settings` are those of [`StubDataset`] and training arguments. `record` notes which samples
    each step had.
    """
    dataset = StubDataset(
        **{name: settings.pop(name) for name in ("seconds", "folder", "hold", "hold_epoch") if name in settings}
    )
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "vision_learning_rate": 1e-2,
        "text_learning_rate": 1e-2,
        "head_learning_rate": 1e-2,
        "logging_steps": 3,
        "save_steps": 4,
        "trackers": [],
        "plot": False,
        "use_cpu": True,
        "mixed_precision": "no",  # in which runs are reproducible bit by bit
    }
    args = from_mapping(T3DTrainingArguments, {"output_dir": str(output_dir), **defaults, **settings})
    torch.manual_seed(0)
    model = StubModel(StubConfig(dropout=dropout))

    def note(batch):
        line = json.dumps([trainer.session.fence, trainer.state.step, batch["indices"].tolist()])
        with (Path(output_dir) / f"samples_{trainer.accelerator.process_index}.jsonl").open("a") as file:
            file.write(line + "\n")
        return batch

    trainer = T3DTrainer(model, args, dataset, collate, evaluate=evaluate, batch_transform=note if record else None)
    return trainer


def kill_at_file_event(trainer: T3DTrainer, number: int) -> None:
    """Die when a checkpoint's file or folder is opened, made, renamed or removed for the `number`-th time."""
    first_step = trainer.state.step
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

    def hook(event, arguments):
        nonlocal number
        if event in events and "/checkpoints/" in str(arguments[0]) and trainer.state.step > first_step:
            number -= 1
            if number == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(output_dir: str, settings: dict) -> int:
    """Train and return the exit status."""
    torch.set_num_threads(1)
    resume = settings.pop("resume", False)
    evaluate = validate if settings.pop("validate", False) else None
    file_event = settings.pop("kill_at_file_event", None)
    trainer = build_trainer(output_dir, evaluate=evaluate, **settings)
    if file_event is not None:
        kill_at_file_event(trainer, file_event)
    with errors_in_one_line():
        result = trainer.train(resume=resume)
    seen = Path(output_dir) / f"seen_{trainer.accelerator.process_index}.json"
    seen.write_text(json.dumps(trainer.train_dataset.seen))
    return 0 if result.status == "completed" else EXIT_STATUS_INTERRUPTED


if __name__ == "__main__":
    words = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in sys.argv[2:])}
    sys.exit(main(sys.argv[1], words))
