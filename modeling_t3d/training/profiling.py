# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Where the time of a step goes: a table of its parts, and a trace of every operation for chrome://tracing; and how
much a step computes, on whatever machine."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .arguments import ConfigurationError
from .batch_norm import training_mode
from .gradient_caching import TwoStageModel
from .parallel import step_gradients

if TYPE_CHECKING:
    from .trainer import T3DTrainer

PARTS = ("data", "transfer", "vision", "text", "objectives", "backward", "optimiser")


class StepClock:
    """
    Seconds of a step's parts. Parts nest: what a part holds of others is theirs.

    Args:
        device (`torch.device`): is waited for at every boundary, so that work is counted where it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[tuple[str, Any]] = []
        self._since = 0.0

    def _turn(self) -> None:
        """What has passed since the last boundary belongs to the innermost part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1][0]] += now - self._since
        self._since = now

    def credit(self, part: str) -> None:
        """What has passed since the last boundary belongs to this part instead."""
        before = dict(self.seconds)
        self._turn()
        inner = self._open[-1][0]
        self.seconds[part] += self.seconds[inner] - before[inner]
        self.seconds[inner] = before[inner]

    def begin(self, part: str) -> None:
        """Enter a part."""
        self._turn()
        span = record_function(part)
        span.__enter__()
        self._open.append((part, span))

    def end(self) -> None:
        """Leave the innermost part."""
        self._turn()
        self._open.pop()[1].__exit__(None, None, None)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, time is that part's."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is a part's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def profile_steps(trainer: "T3DTrainer", folder: str | Path, *, num_steps: int = 5, warmup_steps: int = 2) -> str:
    """
    Take steps as a run would, which change the model, and write `table.md` and `trace.json`.

    Args:
        trainer ([`T3DTrainer`]): is not to be used for training afterwards.
        folder (`str` or `Path`): to write to.
        num_steps (`int`, defaults to 5): that are measured.
        warmup_steps (`int`, defaults to 2): before them, which compile and allocate.

    Returns:
        `str`: the table.
    """
    total, needed = trainer.total_steps, warmup_steps + num_steps
    if total is not None and total < needed:
        raise ConfigurationError(
            f"a profile takes {needed} steps, {warmup_steps} of them to warm up, and the run has {total}; raise "
            "training.max_steps"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clock = StepClock(trainer.accelerator.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    training_mode(trainer.model, trainer.args)
    with _watched(trainer, clock), closing(trainer._steps()) as steps:
        _take(trainer, steps, clock, warmup_steps)
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        with profile(activities=activities) as profiler:
            start = time.perf_counter()
            _take(trainer, steps, clock, num_steps)
            seconds = time.perf_counter() - start
    table = describe_parts(clock.seconds, seconds, num_steps, trainer.pairs_per_step)
    if trainer.accelerator.is_main_process:
        (folder / "table.md").write_text(table + "\n", encoding="utf-8")
        profiler.export_chrome_trace(str(folder / "trace.json"))
    return table


def _take(trainer: "T3DTrainer", steps: Iterator[list[Any]], clock: StepClock, count: int) -> None:
    for _ in range(count):
        with clock.part("data"):
            micro_batches = next(steps)
        # What is in no other part is the optimiser's: norms, clipping, the schedule.
        with clock.part("optimiser"):
            trainer._step(micro_batches)


def describe_parts(parts: dict[str, float], seconds: float, num_steps: int, pairs_per_step: int) -> str:
    """
    A table of milliseconds and shares.

    Example:

    ```python
    >>> from modeling_t3d.training.profiling import describe_parts

    >>> print(describe_parts({"data": 0.1, "vision": 0.8}, 1.0, num_steps=2, pairs_per_step=16))
    | part | ms per step | share |
    | --- | ---: | ---: |
    | data | 50.0 | 10.0 % |
    | vision | 400.0 | 80.0 % |
    | other | 50.0 | 10.0 % |
    | step | 500.0 | 32.0 volumes/s |

    ```"""
    rows = [*parts.items(), ("other", seconds - sum(parts.values()))]
    lines = ["| part | ms per step | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {1000 * value / num_steps:.1f} | {100 * value / seconds:.1f} % |" for name, value in rows]
    pace = f"{pairs_per_step * num_steps / seconds:.1f} volumes/s"
    return "\n".join([*lines, f"| step | {1000 * seconds / num_steps:.1f} | {pace} |"])


class OperationMeter(TorchDispatchMode):
    """Within it, counts floating-point operations by torch's own formulas; torch's counter fails where a module is
    given a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        formula = flop_registry.get(operation._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_operations(trainer: "T3DTrainer") -> int:
    """
    Floating-point operations of a run's first optimiser step, in this process: what its convolutions and matrix
    products multiply and add, forward and backward. It says the same on every machine, where seconds do not.

    Attention counts where it consists of matrix products (`attn_implementation="eager"`) or is a kernel of CUDA's;
    torch does not count its fused kernel for CPUs.

    Args:
        trainer ([`T3DTrainer`]): of prepared volumes; it is not to be used for training afterwards.
    """
    training_mode(trainer.model, trainer.args)
    with closing(trainer._steps()) as steps:
        micro_batches = next(steps)
    with OperationMeter() as meter:
        step_gradients(trainer.accelerator, trainer.model, micro_batches, trainer.args, trainer.batch_transform)
    return meter.count


@contextmanager
def _watched(trainer: "T3DTrainer", clock: StepClock) -> Iterator[None]:
    """Within it, the clock hears of the parts of the trainer's steps."""
    model, transform_batch = trainer.unwrapped_model, trainer.batch_transform
    # Every backward pass goes through these two, that of a loss and those of cached gradients.
    backward, gradients = torch.autograd.backward, torch.autograd.grad
    handles = []
    towers = {"vision_model": "vision", "text_model": "text"}
    # A part also ends by an exception, with which recomputation stops where it has what backward needs.
    for name, module in model.named_modules():
        part = towers.get(name.split(".")[-1])
        if part is not None:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: clock.begin(part)))
            handles.append(module.register_forward_hook(lambda *_: clock.end(), always_call=True))

    def transform(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The copy to the device was asked for just before, and is waited for here.
        clock.credit("transfer")
        with clock.part("transfer"):
            return transform_batch(batch)

    handles.append(model.register_forward_pre_hook(lambda *_: clock.begin("objectives")))
    handles.append(model.register_forward_hook(lambda *_: clock.end(), always_call=True))
    if isinstance(model, TwoStageModel):
        # Cached gradients align outside of `forward`.
        model.align = clock.around("objectives", model.align)  # type: ignore[method-assign]
    torch.autograd.backward = clock.around("backward", backward)
    torch.autograd.grad = clock.around("backward", gradients)
    trainer.batch_transform = transform
    try:
        yield
    finally:
        torch.autograd.backward, torch.autograd.grad = backward, gradients
        trainer.batch_transform = transform_batch
        vars(model).pop("align", None)
        for handle in handles:
            handle.remove()


__all__ = ["PARTS", "StepClock", "count_operations", "describe_parts", "profile_steps"]
