# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The perturbed crops of GTGM: each local view of a sample is changed in one way, which its own seed chooses."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .augmentation import mirrored_sample
from .datasets import PretrainingSample

_PERTURBATIONS = 4  # stream of random numbers; those of views, sentences and augmentation come first
KINDS = ("rescale", "flip", "intensity", "noise", "blur")


@dataclass(frozen=True)
class CropPerturbation:
    """
    One perturbation per local view, each of `kinds` equally likely.

    A volume has one caption, and a flip exchanges the sides in it too: where a flip is drawn for the sample, all its
    views flip and nothing else happens to them [choice]; a sample whose caption names what cannot change sides, such
    as the lingula, draws another kind. Global views only flip.

    Args:
        kinds (sequence of `str`): some of `KINDS`: GTGM's five by default [paper].
        rescale (`float`, defaults to 1.5): magnification about the centre of the view [paper].
        intensity_scale, intensity_shift (`float`, default to 0.25 and 0.1):
            Values are multiplied by up to 1 +- the first and moved by up to +- the second [choice].
        noise (two `float`, default to 0.01 and 0.2): standard deviation of Gaussian noise lies between them [paper].
        blur (two `float`, default to 0.5 and 1.5): that of the Gaussian kernel, in voxels [choice].

    Values are in the unit of the scaled views, [-1, 1] under a window; none leaves the range that its view had, or
    [-1, 1] if that is wider.

    Example:

    ```python
    >>> import numpy as np
    >>> import torch
    >>> from modeling_t3d.data.perturbation import CropPerturbation

    >>> view = torch.zeros(1, 8, 8, 8)
    >>> changed = CropPerturbation().perturb(view, "noise", np.random.default_rng(0))
    >>> 0.01 <= changed.std().item() <= 0.2
    True

    ```"""

    kinds: Sequence[str] = KINDS
    rescale: float = 1.5
    intensity_scale: float = 0.25
    intensity_shift: float = 0.1
    noise: Sequence[float] = (0.01, 0.2)
    blur: Sequence[float] = (0.5, 1.5)

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"crop_perturbation.kinds must be some of {', '.join(KINDS)}, got {list(self.kinds)}")
        if self.rescale < 1 or not 0 <= self.intensity_scale < 1 or self.intensity_shift < 0:
            raise ValueError(
                "crop_perturbation needs rescale >= 1, 0 <= intensity_scale < 1 and intensity_shift >= 0, got "
                f"{self.rescale}, {self.intensity_scale} and {self.intensity_shift}"
            )
        for name in ("noise", "blur"):
            limits = tuple(getattr(self, name))
            if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
                raise ValueError(f"crop_perturbation.{name} must be two numbers, 0 <= low <= high, got {limits}")
        if tuple(self.kinds) == ("flip",):
            raise ValueError(
                "crop_perturbation.kinds holds flip alone, which no caption that names one side only allows; add "
                "another kind"
            )

    def flips(self, sample: PretrainingSample) -> bool:
        """Whether a flip is drawn for the sample."""
        generator = np.random.default_rng((_PERTURBATIONS, 0, *sample.view_seed))
        return "flip" in self.kinds and generator.random() < 1 / len(self.kinds)

    def perturb(self, view: torch.Tensor, kind: str, generator: np.random.Generator) -> torch.Tensor:
        """A view `(channels, depth, height, width)` after one perturbation that is no flip."""
        low, high = view.amin().clamp(max=-1.0), view.amax().clamp(min=1.0)
        if kind == "rescale":
            return magnify(view, self.rescale)
        if kind == "intensity":
            scale, shift = generator.uniform(-1, 1, 2)
            changed = view * (1 + scale * self.intensity_scale) + shift * self.intensity_shift
        elif kind == "noise":
            drawn = torch.from_numpy(generator.standard_normal(view.shape, dtype=np.float32))
            least, most = self.noise
            changed = view + generator.uniform(least, most) * drawn
        else:
            least, most = self.blur
            changed = gaussian_blur(view, generator.uniform(least, most))
        return torch.maximum(torch.minimum(changed, high), low)

    def __call__(self, sample: PretrainingSample, views: torch.Tensor, positions: torch.Tensor) -> None:
        """Perturb the views `(views, channels, d, h, w)` of a sample that does not flip, and their positions."""
        kinds = [kind for kind in self.kinds if kind != "flip"]
        for place, view in enumerate(views):
            generator = np.random.default_rng((_PERTURBATIONS, 1 + place, *sample.view_seed))
            kind = kinds[generator.integers(len(kinds))]
            view.copy_(self.perturb(view, kind, generator))
            if kind == "rescale":
                positions[place, 3:] /= self.rescale


def magnify(view: torch.Tensor, factor: float) -> torch.Tensor:
    """The middle of a view `(channels, depth, height, width)` in the view's own size, trilinear."""
    # Views are in order (z, y, x), sampling places in order (x, y, z); one factor makes them alike.
    affine = torch.eye(3, 4, dtype=view.dtype) / factor
    places = nn.functional.affine_grid(affine[None], [1, *view.shape], align_corners=False)
    return nn.functional.grid_sample(view[None], places, padding_mode="border", align_corners=False)[0]


def gaussian_blur(view: torch.Tensor, sigma: float) -> torch.Tensor:
    """A view `(channels, depth, height, width)` convolved with a Gaussian of `sigma` voxels; edges are repeated."""
    if sigma == 0:
        return view
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=view.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    blurred = view[:, None]
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = -1
        padding = [0, 0, 0, 0, 0, 0]
        padding[4 - 2 * axis : 6 - 2 * axis] = [radius, radius]
        blurred = nn.functional.conv3d(
            nn.functional.pad(blurred, padding, mode="replicate"), kernel.view(1, 1, *shape)
        )
    return blurred[:, 0]


class PerturbingCollator:
    """
    A collator whose local views are perturbed, and whose texts have the sides of the views.

    Args:
        collator (callable): samples -> batch; see [`PretrainingCollator`].
        perturbation ([`CropPerturbation`]): draws from the samples' seeds.
    """

    def __init__(
        self,
        collator: Callable[[list[PretrainingSample]], dict[str, torch.Tensor]],
        perturbation: CropPerturbation,
    ) -> None:
        self.collator = collator
        self.perturbation = perturbation

    @property
    def identity(self) -> dict[str, Any]:
        """As that of [`PretrainingCollator`]."""
        return {**getattr(self.collator, "identity", {}), "crop_perturbation": asdict(self.perturbation)}

    def __call__(self, samples: Sequence[PretrainingSample]) -> dict[str, torch.Tensor]:
        """One batch; what becomes of a sample depends on its own seed."""
        mirrored = [mirrored_sample(sample) if self.perturbation.flips(sample) else None for sample in samples]
        batch = self.collator([other or sample for other, sample in zip(mirrored, samples, strict=True)])
        if "local_pixel_values" not in batch:
            raise ValueError("crop_perturbation changes local views, and this batch has none; set num_local_views")
        for number, sample in enumerate(samples):
            views, positions = batch["local_pixel_values"][number], batch["local_positions"][number]
            if mirrored[number] is None:
                self.perturbation(sample, views, positions)
                views *= batch["local_mask"][number, :, None, None, None, None]
                continue
            for name in ("pixel_values", "local_pixel_values"):
                if name in batch:
                    batch[name][number] = batch[name][number].flip(-1)
            positions[:, 2] *= -1  # the centre's x; the body box is [-1, 1]
        return batch


__all__ = ["KINDS", "CropPerturbation", "PerturbingCollator", "gaussian_blur", "magnify"]
