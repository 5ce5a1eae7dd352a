# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Deterministic thorax-abdomen CT phantoms: a seed gives a volume in HU, its masks, its findings and a report.

A seed is one study. Ten consecutive seeds belong to seven patients, so that some patients have two or three studies:
the patient decides anatomy, habitus and chronic findings, the study decides contrast phase, kernel, noise, resolution,
field of view and acute findings. What decides the scan never depends on the findings.
"""

from dataclasses import dataclass

import numpy as np

from ..geometry_t3d import Volume
from .phantom_abdomen import (
    paint_ascites,
    paint_bowel,
    paint_kidneys,
    paint_spine,
    paint_trunk,
    paint_upper_abdomen,
)
from .phantom_anatomy import Anatomy, tissue_values
from .phantom_canvas import Canvas, RandomDraws
from .phantom_chest import paint_consolidation, paint_effusion, paint_great_vessels, paint_heart, paint_lungs
from .phantom_findings import FINDINGS, Lesion, draw_findings, draw_traits
from .phantom_lesions import paint_focal
from .phantom_reports import write_report
from .phantom_scan import NOMINAL_RESOLUTION, ScanSettings, draw_scan, finish, world_affine
from .phantom_scene import Scene

# Raised by every change that alters a volume, a mask, a label or a report; results of two versions do not compare.
PHANTOM_VERSION = "2"

STUDIES_PER_PATIENT = (1, 1, 2, 1, 3, 1, 1)  # of seven patients that share ten seeds
SPLIT_STARTS = {"train": 0, "validation": 10_000_000, "test": 20_000_000}
SPLIT_SIZE = 10_000_000
# Streams of random numbers, so that one part of the generator can change without moving the draws of another.
ANATOMY, CHRONIC, SCAN, ACUTE, NOISE, REPORT, FILE, ORGAN, LESION = range(1, 10)


@dataclass(frozen=True)
class Phantom:
    """One study.

    Args:
        volume (`Volume`): int16 HU of shape (depth, height, width), axes towards superior, anterior, right.
        organs (`np.ndarray`): uint8 label map on the same grid, values of `ORGANS`.
        lesions (`np.ndarray`): uint8 label map on the same grid, values `FINDINGS[name].index`.
        findings (`tuple[Lesion, ...]`): each occurrence with side, place, size and position.
        labels (`dict[str, int]`): 1 or 0 for each key of `FINDINGS`.
        findings_text, impression_text (`str`): the two sections of the report.
        patient_id, study_id (`str`): synthetic identities.
        scan (`ScanSettings`): how it was scanned.
    """

    volume: Volume
    organs: np.ndarray
    lesions: np.ndarray
    findings: tuple[Lesion, ...]
    labels: dict[str, int]
    findings_text: str
    impression_text: str
    patient_id: str
    study_id: str
    scan: ScanSettings

    def lesion_mask(self, finding: str) -> np.ndarray:
        """Boolean mask (depth, height, width) of one finding."""
        return self.lesions == FINDINGS[finding].index


def patient_number(seed: int) -> int:
    """The patient of a seed: ten consecutive seeds hold seven patients with one to three studies each."""
    block, place = divmod(seed, sum(STUDIES_PER_PATIENT))
    owners = [patient for patient, studies in enumerate(STUDIES_PER_PATIENT) for _ in range(studies)]
    return block * len(STUDIES_PER_PATIENT) + owners[place]


def phantom_split(seed: int) -> str:
    """`"train"`, `"validation"` or `"test"`: ranges of ten million seeds, which no patient straddles."""
    for name, start in SPLIT_STARTS.items():
        if start <= seed < start + SPLIT_SIZE:
            return name
    raise ValueError(f"phantom seed {seed} lies outside 0..{len(SPLIT_STARTS) * SPLIT_SIZE - 1}")


def phantom_seeds(split: str, count: int) -> range:
    """The first `count` seeds of a split.

    Example:
        >>> phantom_seeds("test", 3)
        range(20000000, 20000003)
    """
    if split not in SPLIT_STARTS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLIT_STARTS)}")
    return range(SPLIT_STARTS[split], SPLIT_STARTS[split] + count)


def generate_phantom(
    seed: int, *, shape: tuple[int, int, int] | None = None, resolution: float = NOMINAL_RESOLUTION
) -> Phantom:
    """Make one study.

    Args:
        seed (`int`): from 0; `phantom_split` says to which split it belongs.
        shape (`tuple[int, int, int]`, *optional*): voxels along (z, y, x) over the whole field of view (about
            420 x 290 x 390 mm); by default it follows from `resolution` and is about (105, 73, 98).
        resolution (`float`): nominal voxel size in mm, from which each study departs by up to 10 %.

    Example:
        >>> phantom = generate_phantom(0, shape=(26, 18, 24))
        >>> phantom.volume.array.shape, phantom.volume.array.dtype.name
        ((26, 18, 24), 'int16')
    """
    phantom_split(seed)
    patient = patient_number(seed)
    scan = draw_scan(RandomDraws(SCAN, seed), shape, resolution)
    chronic, acute = RandomDraws(CHRONIC, patient), RandomDraws(ACUTE, seed)
    traits = draw_traits(chronic)
    present = draw_findings(chronic, traits, "chronic") | draw_findings(acute, traits, "acute")
    severity = {
        name: (chronic if spec.course == "chronic" else acute).uniform(0.0, 1.0) for name, spec in FINDINGS.items()
    }
    diffuse = {name: severity[name] for name, spec in FINDINGS.items() if spec.extent == "diffuse" and present[name]}
    anatomy = Anatomy(
        RandomDraws(ANATOMY, patient),
        breath=scan.breath,
        heart_enlargement=diffuse.get("cardiomegaly"),
        hyperinflation=12.0 + 14.0 * diffuse["emphysema"] if "emphysema" in diffuse else 0.0,
    )
    tissue = tissue_values(scan.phase, RandomDraws(SCAN, seed, 1))
    if "hepatic steatosis" in diffuse:
        fat = 24.0 + 10.0 * diffuse["hepatic steatosis"]
        tissue["liver"] -= fat * (1.0 if scan.phase == "non-contrast" else 1.3)
    z, y, x = (
        centre - 0.5 * (count - 1) * step
        for centre, count, step in zip(scan.centre, scan.shape, scan.spacing, strict=True)
    )
    origin = (z, y, x)
    scene = Scene(Canvas(scan.shape, scan.spacing, origin), anatomy, tissue, scan.offset, diffuse)
    paint_organs(scene, RandomDraws(ORGAN, patient), RandomDraws(ACUTE, seed, 1))
    for name, spec in FINDINGS.items():
        if spec.extent == "focal" and present[name]:
            number = patient if spec.course == "chronic" else seed
            paint_focal(scene, name, RandomDraws(LESION, spec.index, number))
    array = finish(scene.canvas, scan, RandomDraws(NOISE, seed))
    found = {lesion.finding for lesion in scene.lesions}
    labels = {name: int(name in found) for name in FINDINGS}
    findings_text, impression_text = write_report(
        scene.lesions, scan.phase, RandomDraws(REPORT, seed), follow_up=is_follow_up(seed)
    )
    return Phantom(
        volume=Volume(array, world_affine(scan, origin), modality="CT"),
        organs=scene.canvas.organs,
        lesions=scene.canvas.lesions,
        findings=tuple(scene.lesions),
        labels=labels,
        findings_text=findings_text,
        impression_text=impression_text,
        patient_id=f"phantom-patient-{patient:08d}",
        study_id=f"phantom-study-{seed:08d}",
        scan=scan,
    )


def is_follow_up(seed: int) -> bool:
    """Whether the patient has an earlier study."""
    return seed > 0 and patient_number(seed - 1) == patient_number(seed)


def paint_organs(scene: Scene, draws: RandomDraws, acute: RandomDraws) -> None:
    """Paint everything but the focal lesions; `draws` belongs to the patient, `acute` to the study."""
    paint_trunk(scene, draws)
    if "ascites" in scene.diffuse:
        paint_ascites(scene)
    paint_lungs(scene, draws)
    if "consolidation" in scene.diffuse:
        paint_consolidation(scene, acute)
    if "pleural effusion" in scene.diffuse:
        paint_effusion(scene, acute)
    paint_upper_abdomen(scene, draws)
    paint_bowel(scene, draws)
    paint_spine(scene, draws)
    paint_kidneys(scene)
    paint_heart(scene)
    paint_great_vessels(scene)


__all__ = [
    "PHANTOM_VERSION",
    "SPLIT_STARTS",
    "Phantom",
    "generate_phantom",
    "patient_number",
    "phantom_seeds",
    "phantom_split",
]
