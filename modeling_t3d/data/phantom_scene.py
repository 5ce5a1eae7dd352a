# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the painters of a phantom share while they work on one study."""

from dataclasses import dataclass, field

import numpy as np

from .phantom_anatomy import Anatomy
from .phantom_canvas import Box, Canvas
from .phantom_findings import Lesion


@dataclass
class Scene:
    """What the painters share for one study: the grid, the patient, the tissue values and what has been found.

    Args:
        offset (`tuple[float, float, float]`): what to add to body-frame (x, y, z) to get world mm.
        diffuse (`dict[str, float]`): severity in [0, 1] of each diffuse finding that is there.
    """

    canvas: Canvas
    anatomy: Anatomy
    tissue: dict[str, float]
    offset: tuple[float, float, float]
    diffuse: dict[str, float]
    lesions: list[Lesion] = field(default_factory=list)
    lungs: tuple[Box, np.ndarray] | None = None
    occupied: list[tuple[tuple[float, float, float], float]] = field(default_factory=list)

    def record(self, finding: str, side: str, place: str, size: float, centre, severity: float = 0.5) -> None:
        """Note one occurrence; `centre` is (z, y, x) in the body frame, mm."""
        x, y, z = (float(c + o) for c, o in zip(reversed(centre), self.offset, strict=True))
        self.lesions.append(Lesion(finding, side, place, round(float(size), 1), (x, y, z), float(severity)))


__all__ = ["Scene"]
