# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How much memory a training step will need, found by taking the step on tensors without content: nothing is computed
and nothing allocated, whatever the size of the model."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What kernels take for themselves; measured in steps on CPUs, where the allocator hands out 1.04 to 1.13 times what
# the meter sees.
_WORKSPACES = 1.07


class AllocationMeter(TorchDispatchMode):
    """
    Within it, counts the bytes of all tensors that operations make, and the most that were alive at once.

    What a kernel takes for itself while it runs is not seen.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.training.memory_forecast import AllocationMeter

    >>> with AllocationMeter() as meter:
    ...     total = torch.zeros(1000).exp().sum()
    >>> meter.peak_bytes, meter.live_bytes
    (8000, 4)

    ```"""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.live_bytes -= self._sizes.pop(address)


def forecast_peak(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    step: Callable[[list[dict[str, torch.Tensor]]], Any],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    num_pairs: int,
    num_micro_batches: int = 1,
) -> int:
    """
    Most bytes allocated at once in the second step of a run, in which the optimiser has its state.

    Args:
        model (`nn.Module`): not wrapped; as it was again afterwards.
        batch (`dict[str, torch.Tensor]`): of any number of pairs; only shapes and types count.
        step (callable): micro-batches -> their gradients, of this model.
        make_optimizer (callable): model -> its optimiser.
        num_pairs (`int`): per micro-batch.
        num_micro_batches (`int`, defaults to 1): per step.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, AllocationMeter() as meter, _without_content(model, mode):
        optimizer = make_optimizer(model)
        for _ in range(2):
            micro_batches = [
                {name: torch.zeros((num_pairs, *value.shape[1:]), dtype=value.dtype) for name, value in batch.items()}
                for _ in range(num_micro_batches)
            ]
            step(micro_batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return round(_WORKSPACES * meter.peak_bytes)


@contextmanager
def like_parts_encoded_twice(model: nn.Module) -> Iterator[None]:
    """
    Within it, of the parts of one shape that a pass encodes, all but the first two get features without being encoded:
    the second meets the gradients of the first, no later one needs more memory, and hundreds would take minutes.

    Args:
        model (`nn.Module`): in two stages; see [`~modeling_t3d.training.gradient_caching.cached_backward`].
    """
    forward, is_replaced = model.forward, "forward" in vars(model)
    is_second_pass = False
    counts: Counter[Any] = Counter()
    features: dict[Any, Any] = {}

    def encode(*args: Any, stage: str | None = None, **inputs: torch.Tensor) -> Any:
        nonlocal is_second_pass
        if stage != "encode":
            return forward(*args, stage=stage, **inputs)
        if is_second_pass != torch.is_grad_enabled():
            counts.clear()
            is_second_pass = torch.is_grad_enabled()
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        counts[shapes] += 1
        if counts[shapes] > 2:
            kind, fields = features[shapes, is_second_pass]
            return kind(**{name: torch.empty(shape, **options) for name, (shape, options) in fields.items()})
        output = forward(*args, stage=stage, **inputs)
        attributes = ("dtype", "device", "requires_grad")
        features[shapes, is_second_pass] = (
            type(output),
            {
                name: (value.shape, {attribute: getattr(value, attribute) for attribute in attributes})
                for name, value in output.items()
            },
        )
        return output

    model.forward = encode
    try:
        yield
    finally:
        if is_replaced:
            model.forward = forward
        else:
            del model.forward


@contextmanager
def _without_content(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Within it, parameters and buffers are tensors without content; shared ones stay shared."""
    real: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                if id(value) not in fakes:
                    fake = torch.empty_like(mode.from_tensor(value.detach()))
                    is_parameter = isinstance(value, nn.Parameter)
                    fakes[id(value)] = nn.Parameter(fake, value.requires_grad) if is_parameter else fake
                real.append((tensors, name, value))
                tensors[name] = fakes[id(value)]
    try:
        yield
    finally:
        for tensors, name, value in real:
            tensors[name] = value


__all__ = ["AllocationMeter", "forecast_peak"]
