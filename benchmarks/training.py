# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures what the trainer costs beside a loop written by hand, how long steps wait for data, and memory formats.

    python benchmarks/training.py --output benchmarks/training.md

Loop and trainer take turns in one process on the same stub, and their weights must come out equal. The data wait is
that of the quickstart's configuration on phantoms that are made for it, and of its network on large views that a
store gives, in processes of their own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from measuring import add_output_argument, publish
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from modeling_t3d import T3DVisionConfig, T3DVisionModel
from modeling_t3d.evaluation.protocol import processor_name
from modeling_t3d.training.arguments import T3DTrainingArguments
from modeling_t3d.training.optimization import learning_rate, parameter_groups
from modeling_t3d.training.sampling import SampleKey, ShardedBatchSampler
from modeling_t3d.training.trainer import T3DTrainer

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "configs" / "quickstart.yaml"
# Every view is cut while the run goes on, and none is kept.
LARGE_VIEWS = (
    "training.per_device_train_batch_size=8",
    "data.keep_global_views=false",
    "image_processor.global_size=[96, 64, 88]",
    "image_processor.local_size=[64, 64, 64]",
)
WIDTH, BATCH, NUM_SAMPLES = 768, 256, 1024


class StubConfig(PreTrainedConfig):
    """Of the stub; nothing to set."""

    model_type = "training_benchmark"
    max_logit_scale: float = 100.0


@dataclass
class StubOutput(ModelOutput):
    """The stub's loss."""

    loss: torch.Tensor | None = None


class Stub(PreTrainedModel):
    """A few wide layers: a step of some ten milliseconds on one core."""

    config: StubConfig

    def __init__(self, config: StubConfig) -> None:
        super().__init__(config)
        self.vision_model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(4)))
        self.post_init()

    def forward(self, inputs: torch.Tensor) -> StubOutput:
        """The mean square of what comes out."""
        return StubOutput(loss=self.vision_model(inputs).square().mean())


class Rows:
    """Samples that are there at once: no step waits for data."""

    def __init__(self) -> None:
        self.values = torch.randn(NUM_SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        return self.values[key.sample]


def collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch."""
    return {"inputs": torch.stack(samples)}


class TimedTrainer(T3DTrainer):
    """Notes when each step begins; all that a run does between two of them is in their distance."""

    begun: list[float]

    def _step(self, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.begun.append(time.perf_counter())
        return super()._step(micro_batches)


def arguments(folder: str, num_steps: int) -> T3DTrainingArguments:
    """Defaults, but for saving, whose time is the disk's."""
    return T3DTrainingArguments(
        folder,
        max_steps=num_steps,
        per_device_train_batch_size=BATCH,
        save_steps=None,
        mixed_precision="no",
        use_cpu=True,
        trackers=[],
        plot=False,
    )


def new_stub() -> Stub:
    """The same weights every time."""
    torch.manual_seed(0)
    return Stub(StubConfig())


def trainer_steps(folder: str, num_steps: int) -> tuple[list[float], Stub]:
    """Seconds of each step of the trainer but the first, and the trained stub."""
    model = new_stub()
    trainer = TimedTrainer(model, arguments(folder, num_steps), Rows(), collate)
    trainer.begun = []
    trainer.train()
    return [after - before for before, after in pairwise(trainer.begun)], model


def loop_steps(folder: str, num_steps: int) -> tuple[list[float], Stub]:
    """The same of a loop with nothing but loading, step, schedule, clipping, and a line every ten steps."""
    model, args = new_stub(), arguments(folder, num_steps)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=(args.adam_beta1, args.adam_beta2))
    begun, losses = [], []
    model.train()
    for step, batch in enumerate(islice(hand_batches(args, num_steps), num_steps), start=1):
        begun.append(time.perf_counter())
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                group["peak_lr"],
                step / num_steps,
                minimum=args.min_learning_rate,
                warmup_ratio=args.warmup_ratio,
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % args.logging_steps == 0:
            print(f"step {step}: loss {torch.stack(losses).mean().item():.4f}", file=sys.stderr)
            losses = []
    return [after - before for before, after in pairwise(begun)], model


def hand_batches(args: T3DTrainingArguments, num_steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in the trainer's order."""
    sampler = ShardedBatchSampler(NUM_SAMPLES, BATCH, seed=args.seed)
    for epoch in range(-(-num_steps // sampler.num_batches)):
        sampler.seek(epoch)
        yield from DataLoader(Rows(), batch_sampler=sampler, collate_fn=collate, generator=torch.Generator())


def overhead_rows(num_steps: int, num_turns: int) -> list[str]:
    """Loop and trainer in turns; their weights are equal at the end."""
    seconds: dict[str, list[float]] = {"loop written by hand": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(num_turns):
            by_hand, loop_model = loop_steps(folder, num_steps)
            by_trainer, trained = trainer_steps(f"{folder}/{turn}", num_steps)
            for name, value in loop_model.state_dict().items():
                assert torch.equal(value, trained.state_dict()[name]), name
            seconds["loop written by hand"] += by_hand
            seconds["trainer"] += by_trainer
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["loop written by hand"] / medians["trainer"]
    return [
        f"Torch threads: {torch.get_num_threads()}. The trainer makes batches ahead in a thread of its own, the loop "
        "does not.",
        "",
        "| stub | ms per step, median |",
        "| --- | ---: |",
        *(f"| {name} | {1000 * value:.2f} |" for name, value in medians.items()),
        f"| steps/s of the trainer over the loop's (target >= 0.97) | {ratio:.3f} |",
    ]


def data_wait_rows(num_steps: int, num_phantoms: int) -> list[str]:
    """Share of the steps' time that a run waits for data: the quickstart, and its network on views of a store."""
    lines = ["| quickstart's network | data wait, median | volumes/s, median |", "| --- | ---: | ---: |"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, store = folder / "phantoms" / "manifest.csv", folder / "store"
        sizes = ["--train", str(num_phantoms), "--validation", "0", "--test", "0", "--resolution", "4"]
        run("make_phantoms.py", "--output", str(folder / "phantoms"), *sizes)
        places = ["--manifest", str(manifest), "--output", str(folder / "dataset"), "--store", str(store)]
        run("prepare_dataset.py", *places, "--config", str(QUICKSTART), "--quality-volumes", "1")
        loads = {
            "64 pairs of the quickstart": [f"data.manifest={manifest}"],
            "8 pairs, views of 96 x 64 x 88 and 64^3 from `data.store`": [
                f"data.manifest={folder / 'dataset' / 'stored.csv'}",
                f"data.store={store}",
                *LARGE_VIEWS,
            ],
        }
        for load, overrides in loads.items():
            for num_workers in (0, 1):
                output = folder / f"run{len(lines)}"
                run(
                    "pretrain.py",
                    "--config",
                    str(QUICKSTART),
                    *overrides,
                    f"training.output_dir={output}",
                    f"training.max_steps={num_steps}",
                    f"training.dataloader_num_workers={num_workers}",
                    "data.validation_split=null",
                    "training.logging_steps=5",
                    "training.trackers=[]",
                )
                log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
                steady = [line for line in log if line["kind"] == "train"][2:]
                wait = statistics.median(line["data_wait_share"] for line in steady)
                pace = statistics.median(line["volumes_per_second"] for line in steady)
                worker = "a thread" if num_workers == 0 else "1 process"
                lines.append(f"| {load}, made by {worker} | {wait:.2%} | {pace:.0f} |")
    return [*lines, "", f"Of {num_phantoms} volumes, all prepared. The target is at most 5 %."]


def run(script: str, *arguments: str) -> None:
    """One of the examples, which must succeed, with the package of this folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def format_rows(repetitions: int) -> list[str]:
    """Training steps of a small residual network in both memory formats and precisions, in turns."""
    config = T3DVisionConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic"
    )
    views = torch.randn(4, 1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    seconds: dict[tuple[str, str], list[float]] = {}
    models = {}
    for memory_format in ("contiguous", "channels_last"):
        torch.manual_seed(0)
        models[memory_format] = T3DVisionModel(config)
        if memory_format == "channels_last":
            models[memory_format].to(memory_format=torch.channels_last_3d)
    for turn in range(repetitions + 1):
        for memory_format, model in models.items():
            for precision in ("float32", "bfloat16"):
                begun = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                    loss = model(views).pooler_output.float().square().mean()
                loss.backward()
                model.zero_grad(set_to_none=True)
                if turn:
                    seconds.setdefault((memory_format, precision), []).append(time.perf_counter() - begun)
    return [
        "| ResNet-18 of half width, 4 views of 48^3, forward and backward | ms, median |",
        "| --- | ---: |",
        *(
            f"| {memory_format}, {precision} | {1000 * statistics.median(values):.0f} |"
            for (memory_format, precision), values in seconds.items()
        ),
    ]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of the stub, per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=7, help="of the memory formats")
    parser.add_argument("--phantoms", type=int, default=320)
    parser.add_argument("--wait-steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="of the stub")
    add_output_argument(parser)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    rows = overhead_rows(arguments.steps, arguments.turns)
    torch.set_num_threads(threads)
    lines = [
        "# Training: the trainer's own cost, data wait, memory formats",
        "",
        f"`python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`; {threads} threads of "
        f"{processor_name()}; Python {platform.python_version()}, torch {torch.__version__}; seed 0.",
        "",
        *rows,
        "",
        *format_rows(arguments.repetitions),
        "",
        *data_wait_rows(arguments.wait_steps, arguments.phantoms),
    ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
