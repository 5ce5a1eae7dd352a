# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""An exponential moving average of the weights, which can take their place for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """
    Averages of the parameters that train; running statistics stay those of the model.

    The first steps count more, as (1 + n) / (10 + n) after n of them, or the initial weights would be remembered for
    the 1 / (1 - decay) steps that an average spans.

    Args:
        model (`nn.Module`): not wrapped and not sharded.
        decay (`float`): what is left of the former average after a step.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.training.averaging import WeightAverage

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(layer, decay=0.9)
    >>> before = layer.weight.item()
    >>> layer.weight.data += 1.0
    >>> average.update()
    >>> with average.applied():
    ...     round(layer.weight.item() - before, 3)
    0.9

    ```"""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self._averages = {name: value.detach().clone() for name, value in self._parameters().items()}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights into account, after a step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        parameters = self._parameters()
        torch._foreach_lerp_([self._averages[name] for name in parameters], list(parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averages for weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters().items():
            weights = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """Averages by name, and how many steps they have seen."""
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Undo `state_dict`; averages of other parameters raise."""
        saved = state_dict["averages"]
        if saved.keys() != self._averages.keys():
            name = sorted(saved.keys() ^ self._averages.keys())[0]
            raise ValueError(f"{name} is averaged in one of the two only")
        self.num_updates = state_dict["num_updates"]
        for name, average in self._averages.items():
            average.copy_(saved[name])


__all__ = ["WeightAverage"]
