# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Random changes of intensity, and of side, on whole batches and on their device. What a sample becomes depends on its
own seed alone, never on the batch that it is in."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..counter_noise_t3d import normal_noise
from .datasets import PretrainingSample, stable_id

_DRAWS = 3  # stream of random numbers; those of views and sentences come first
_PARAMETERS = "augmentation_parameters"
_SEEDS = "augmentation_seeds"
# Words of one side only: their organ does not change sides when the words around it do. Abbreviations (any of two to
# four capitals that begin with R or L: RUL, LICA, RV) and words of other languages may name a side, too, and are not
# exchanged.
_ONE_SIDED = re.compile(
    r"lingula|middle[\s_-]+lobe|dextro|levo|situs|\b[rl]t\b"
    r"|\b(?-i:(?!LEFT|LUNG|LOBE|RIBS?\b|LOW\b)[RL][A-Z]{1,3}|LCx|[RL])\b"
    r"|izquierd|derech|\blink(?:s|e[rsnm]?)\b|linksseit|\brecht(?:s|e[rsnm]?)\b|rechtsseit|gauche|\bdroite?s?\b"
    r"|esquerd|direit|sinistr|\bdestr[aeio]\b|\bsol\b|sağ|\bс?(?:лев|прав)|[左右]",
    re.IGNORECASE,
)
_SIDE = re.compile(
    r"(?<![^\W_])(left|right)(?=[\W_]|$|ward|most|sided)(?!\s(?:in place|in situ|unchanged|untreated))", re.IGNORECASE
)
_OTHER_SIDE = {"left": "right", "right": "left"}


def swap_sides(text: str) -> str | None:
    """
    A report with left and right exchanged; `None` if it names what cannot change sides, such as the lingula, or a side
    in another way than by these words: an abbreviation (RUL, LICA, Lt), or another language.

    Example:

    ```python
    >>> from modeling_t3d.data.augmentation import swap_sides

    >>> swap_sides("Left-sided effusion, the right lung is clear.")
    'Right-sided effusion, the left lung is clear.'

    ```"""
    if _ONE_SIDED.search(text):
        return None

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _OTHER_SIDE[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)


@dataclass(frozen=True)
class BatchAugmentation:
    """
    Changes of intensity on views that are scaled to [-1, 1]: gamma, then scale and shift, then noise, then clipping.

    All views of a sample get the same gamma, scale and shift. Called with a batch on its device, which carries what
    [`AugmentingCollator`] drew; nothing is copied back to the host. All numbers are choices of this implementation.

    Args:
        probability (`float`, defaults to 0.5): with which each of the changes is made to a sample.
        gamma (`float`, defaults to 0.2): the exponent of values in [0, 1] lies between 1 / (1 + gamma) and 1 + gamma.
        scale (`float`, defaults to 0.1): values are multiplied by 1 - scale to 1 + scale.
        shift (`float`, defaults to 0.1): what is added lies between -shift and shift; 0.1 of [-1, 1] is 100 HU under
            the default window.
        noise (`float`, defaults to 0.05): largest standard deviation of Gaussian noise.
        flip (`float`, defaults to 0):
            Probability of exchanging left and right in views, positions **and text**. Off, because a body is not
            symmetric: the liver comes to lie on the other side, which no report says.
    """

    probability: float = 0.5
    gamma: float = 0.2
    scale: float = 0.1
    shift: float = 0.1
    noise: float = 0.05
    flip: float = 0.0

    def __post_init__(self) -> None:
        for name in ("probability", "flip", "scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("gamma", "shift", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"augmentation.{name} must be 0 or more, got {getattr(self, name)}")

    def draw(self, seed: tuple[int, ...]) -> tuple[list[float], int]:
        """Gamma, scale, shift, noise and flip (0 or 1) of a sample, and the seed of its noise."""
        generator = np.random.default_rng((_DRAWS, *seed))
        chances, values = generator.random(5), generator.uniform(-1, 1, 4)
        made = chances[:4] < self.probability
        parameters = [
            math.exp(values[0] * math.log1p(self.gamma)) if made[0] else 1.0,
            1 + values[1] * self.scale if made[1] else 1.0,
            values[2] * self.shift if made[2] else 0.0,
            abs(values[3]) * self.noise if made[3] else 0.0,
            float(chances[4] < self.flip),
        ]
        return parameters, int(generator.integers(1 << 31))

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with changed views and without what was drawn; a batch that carries no draws stays as it is."""
        if _PARAMETERS not in batch:
            return batch
        batch = dict(batch)
        parameters, seeds = batch.pop(_PARAMETERS), batch.pop(_SEEDS)
        for stream, name in enumerate(("pixel_values", "local_pixel_values")):
            if name in batch:
                batch[name] = self._change(batch[name], parameters, seeds + (stream << 31))
        if "local_pixel_values" in batch:
            # What fills up the views of a volume with fewer is zero and stays so.
            mask = batch["local_mask"]
            batch["local_pixel_values"] = batch["local_pixel_values"] * mask[..., None, None, None, None]
            side = torch.ones_like(batch["local_positions"])
            side[..., 2] = 1 - 2 * parameters[:, 4, None]  # the centre's x; body box = [-1, 1]
            batch["local_positions"] = batch["local_positions"] * side
        return batch

    def _change(self, values: torch.Tensor, parameters: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """Views (batch, ..., depth, height, width) in [-1, 1] after the changes."""
        gamma, scale, shift, noise, flip = (
            column.reshape(-1, *[1] * (values.ndim - 1)) for column in parameters.to(values.dtype).unbind(1)
        )
        values = ((values + 1) / 2).clamp(0, 1) ** gamma * 2 - 1
        values = values * scale + shift
        if self.noise:
            # One sample after another: the integers behind the noise take four times the space of the views.
            drawn = [normal_noise(seed, values[0].numel(), values.device).view(values[0].shape) for seed in seeds]
            values = values + noise * torch.stack(drawn).to(values.dtype)
        if self.flip:
            values = torch.where(flip > 0, values.flip(-1), values)
        return values.clamp(-1, 1)


class AugmentingCollator:
    """
    A collator whose batches carry what an augmentation drew, and texts whose sides agree with the views.

    The views are changed when the batch is on its device, by calling the augmentation; see `T3DTrainer`.

    Args:
        collator (callable): samples -> batch; see [`PretrainingCollator`].
        augmentation ([`BatchAugmentation`]): draws from the samples' seeds.
    """

    def __init__(
        self,
        collator: Callable[[list[PretrainingSample]], dict[str, torch.Tensor]],
        augmentation: BatchAugmentation,
    ) -> None:
        self.collator = collator
        self.augmentation = augmentation

    @property
    def identity(self) -> dict[str, Any]:
        """As that of [`PretrainingCollator`]."""
        return {**getattr(self.collator, "identity", {}), "augmentation": asdict(self.augmentation)}

    def __call__(self, samples: Sequence[PretrainingSample]) -> dict[str, torch.Tensor]:
        """One batch; draws depend on each sample's own seed."""
        drawn = [self.augmentation.draw(sample.view_seed) for sample in samples]
        changed = []
        for sample, (parameters, _) in zip(samples, drawn, strict=True):
            mirrored = mirrored_sample(sample) if parameters[4] else None
            parameters[4] = float(mirrored is not None)
            changed.append(mirrored or sample)
        batch = self.collator(changed)
        batch[_PARAMETERS] = torch.tensor([parameters for parameters, _ in drawn], dtype=torch.float32)
        batch[_SEEDS] = torch.tensor([seed for _, seed in drawn])
        return batch


def mirrored_sample(sample: PretrainingSample) -> PretrainingSample | None:
    """A sample whose texts have their sides exchanged; `None` if one of them cannot."""
    texts = [swap_sides(entry) for entry in (sample.text, *sample.sentences)]
    swapped = [entry for entry in texts if entry is not None]
    if len(swapped) < len(texts):
        return None
    return replace(sample, text=swapped[0], sentences=tuple(swapped[1:]), report_id=stable_id(swapped[0]))


__all__ = ["AugmentingCollator", "BatchAugmentation", "mirrored_sample", "swap_sides"]
