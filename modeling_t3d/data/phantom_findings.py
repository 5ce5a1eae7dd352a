# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The findings that a phantom can have: their prevalence, how they go together, and what one occurrence records."""

from dataclasses import dataclass
from typing import Literal

from .phantom_canvas import RandomDraws


@dataclass(frozen=True)
class FindingSpec:
    """What is fixed about one finding.

    Args:
        extent (`str`): `"focal"` (a lesion of a few centimetres at most) or `"diffuse"` (an organ or a large region).
        index (`int`): value of the finding in the lesion label map, from 1.
        prevalence (`float`): share of studies that have it.
        course (`str`): `"chronic"` findings stay with the patient, `"acute"` ones are drawn anew for each study.
        size_mm (`tuple[float, float]`): range of the diameter, or of the thickness of a diffuse collection, in mm;
            (0, 0) where no size is stated.
        factors (`tuple[tuple[str, float], ...]`): how strongly the patient's traits, which are independent and
            uniform, scale its probability up and down; this leaves the prevalence as stated.
    """

    extent: Literal["focal", "diffuse"]
    index: int
    prevalence: float
    course: Literal["chronic", "acute"]
    size_mm: tuple[float, float]
    factors: tuple[tuple[str, float], ...]


FINDINGS: dict[str, FindingSpec] = {
    "emphysema": FindingSpec("diffuse", 1, 0.19, "chronic", (0, 0), (("smoking", 0.9), ("age", 0.2))),
    "pleural effusion": FindingSpec("diffuse", 2, 0.20, "acute", (18, 75), (("heart failure", 0.8), ("tumour", 0.2))),
    "cardiomegaly": FindingSpec("diffuse", 3, 0.15, "chronic", (0, 0), (("heart failure", 0.8), ("age", 0.2))),
    "consolidation": FindingSpec("diffuse", 4, 0.18, "acute", (45, 100), (("smoking", 0.2), ("heart failure", 0.1))),
    "ascites": FindingSpec("diffuse", 5, 0.10, "acute", (14, 32), (("heart failure", 0.4), ("tumour", 0.5))),
    "hepatic steatosis": FindingSpec("diffuse", 6, 0.25, "chronic", (0, 0), (("metabolic", 0.5),)),
    "lung nodule": FindingSpec("focal", 7, 0.42, "chronic", (6, 20), (("smoking", 0.3), ("tumour", 0.2))),
    "liver cyst": FindingSpec("focal", 8, 0.20, "chronic", (8, 30), (("age", 0.4),)),
    "liver metastasis": FindingSpec("focal", 9, 0.08, "chronic", (8, 30), (("tumour", 0.9),)),
    "kidney cyst": FindingSpec("focal", 10, 0.25, "chronic", (8, 30), (("age", 0.6),)),
    "kidney stone": FindingSpec("focal", 11, 0.10, "chronic", (4, 10), (("metabolic", 0.5),)),
    "coronary calcification": FindingSpec("focal", 12, 0.25, "chronic", (4, 10), (("age", 0.6), ("smoking", 0.3))),
    "aortic calcification": FindingSpec("focal", 13, 0.28, "chronic", (4, 10), (("age", 0.7), ("smoking", 0.2))),
    "lymphadenopathy": FindingSpec("focal", 14, 0.12, "acute", (12, 26), (("tumour", 0.8),)),
}

TRAITS = ("age", "smoking", "heart failure", "tumour", "metabolic")


@dataclass(frozen=True)
class Lesion:
    """One occurrence of a finding in one study.

    Args:
        finding (`str`): a key of `FINDINGS`.
        side (`str`): `"right"`, `"left"`, `"bilateral"` or `"none"` for what has no side.
        place (`str`): where it lies, in words.
        size_mm (`float`): largest diameter or thickness in mm; 0 where no size is stated.
        centre_mm (`tuple[float, float, float]`): world position (x, y, z) in mm, RAS+.
        severity (`float`): from 0 (mild) to 1 (severe).
    """

    finding: str
    side: str
    place: str
    size_mm: float
    centre_mm: tuple[float, float, float]
    severity: float


def draw_traits(draws: RandomDraws) -> dict[str, float]:
    """What makes a patient prone to several findings at once: numbers in [0, 1), seen in the image in no other way."""
    return {trait: draws.uniform(0.0, 1.0) for trait in TRAITS}


def draw_findings(draws: RandomDraws, traits: dict[str, float], course: str) -> dict[str, bool]:
    """Which findings of a course are there: a trait at level t scales the probability by 1 + strength (3 t^2 - 1).

    The mean of that factor over patients is 1, and few patients have much of a trait.
    """
    present = {}
    for name, spec in FINDINGS.items():
        probability = spec.prevalence
        for trait, strength in spec.factors:
            probability *= 1.0 + strength * (3.0 * traits[trait] ** 2 - 1.0)
        if spec.course == course:
            present[name] = draws.chance(probability)
    return present


__all__ = ["FINDINGS", "TRAITS", "FindingSpec", "Lesion", "draw_findings", "draw_traits"]
