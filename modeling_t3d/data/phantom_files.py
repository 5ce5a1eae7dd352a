# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Writes phantoms to a folder as NIfTI files of many orientations, with the manifest that training reads."""

import csv
import json
import multiprocessing
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry_t3d import Volume
from ..volume_io_t3d import write_nifti
from .phantom_canvas import RandomDraws
from .phantom_findings import FINDINGS
from .phantom_scan import NOMINAL_RESOLUTION
from .phantom_studies import FILE, PHANTOM_VERSION, generate_phantom, phantom_split

ORIENTATIONS = tuple(product(permutations(range(3)), product((1, -1), repeat=3)))  # all 48
SETTINGS_NAME = "phantoms.json"
TEXT_ONLY_SHAPE = (12, 12, 12)  # labels and reports do not depend on the grid


class PhantomFolderError(ValueError):
    """A folder whose phantoms were made by another version or with other settings."""


@dataclass(frozen=True)
class WritePlan:
    """What each worker needs to know to write one study."""

    folder: Path
    resolution: float
    shape: tuple[int, int, int] | None
    compress: bool
    masks: bool | Collection[str]

    def has_masks(self, seed: int) -> bool:
        """Whether this study's label maps are wanted."""
        return self.masks if isinstance(self.masks, bool) else phantom_split(seed) in self.masks


def write_phantoms(
    folder: str | Path,
    seeds: Iterable[int],
    num_workers: int = 1,
    *,
    compress: bool = True,
    masks: bool | Collection[str] = False,
    resolution: float = NOMINAL_RESOLUTION,
    shape: tuple[int, int, int] | None = None,
) -> Path:
    """Write studies and return the path of their `manifest.csv`.

    Files that an earlier, interrupted call has written are kept; none appears under its name before it is complete.

    Args:
        folder (`str` or `Path`): where to write; made if absent.
        seeds (`Iterable[int]`): the studies; `phantom_seeds` gives those of a split.
        num_workers (`int`): processes. More than one needs the caller's script to be importable, as `spawn` does.
        compress (`bool`): `.nii.gz` instead of `.nii`.
        masks (`bool` or names of splits):
            Also write the label maps of lesions and organs, named in the column `masks`, of all studies or of those
            of some splits.
        resolution, shape: as in `generate_phantom`.
    """
    seeds = list(seeds)
    folder = Path(folder)
    plan = WritePlan(folder, resolution, shape, compress, masks)
    check_settings(plan)
    (folder / "volumes").mkdir(exist_ok=True)
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(write_study, [plan] * len(seeds), seeds, chunksize=8))
    else:
        rows = [write_study(plan, seed) for seed in seeds]
    manifest = folder / "manifest.csv"
    columns = ["volume", "findings", "impression", "patient_id", "study_id", "split"]
    columns += ["masks"] * bool(masks) + [f"label:{name}" for name in FINDINGS]
    partial = folder / ".partial-manifest.csv"
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, manifest)
    return manifest


def check_settings(plan: WritePlan) -> None:
    """Leave a note of version and settings in a new folder; refuse a folder whose note differs."""
    settings = {
        "version": PHANTOM_VERSION,
        "resolution": plan.resolution,
        "shape": list(plan.shape) if plan.shape else None,
    }
    note = plan.folder / SETTINGS_NAME
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != settings:
            raise PhantomFolderError(
                f"{plan.folder}: holds phantoms made with {json.dumps(found)}, not {json.dumps(settings)}; "
                "choose another folder or delete this one"
            )
    elif (plan.folder / "manifest.csv").exists():
        raise PhantomFolderError(f"{plan.folder}: holds a manifest.csv that is not of phantoms; choose another folder")
    else:
        plan.folder.mkdir(parents=True, exist_ok=True)
        partial = plan.folder / f".partial-{SETTINGS_NAME}"
        partial.write_text(json.dumps(settings), encoding="utf-8")
        os.replace(partial, note)


def phantom_version(folder: Path) -> str | None:
    """Version of the generator that made a folder's phantoms; `None` where no note in it says so."""
    note = folder / SETTINGS_NAME
    return json.loads(note.read_text(encoding="utf-8"))["version"] if note.exists() else None


def write_study(plan: WritePlan, seed: int) -> dict[str, Any]:
    """Write one study's files unless they are there, and return its row of the manifest."""
    suffix = ".nii.gz" if plan.compress else ".nii"
    names = {"volume": f"volumes/phantom-{seed:08d}{suffix}"}
    if plan.has_masks(seed):
        for kind in ("lesions", "organs"):
            names[kind] = f"masks/phantom-{seed:08d}-{kind}.nii.gz"
    there = all((plan.folder / name).exists() for name in names.values())
    phantom = generate_phantom(seed, shape=TEXT_ONLY_SHAPE if there else plan.shape, resolution=plan.resolution)
    if not there:
        arrays = {"volume": phantom.volume.array, "lesions": phantom.lesions, "organs": phantom.organs}
        for kind, name in names.items():
            path = plan.folder / name
            path.parent.mkdir(exist_ok=True)
            write_nifti(turned(Volume(arrays[kind], phantom.volume.affine), seed), path)
    row: dict[str, Any] = {
        "volume": names["volume"],
        "findings": phantom.findings_text,
        "impression": phantom.impression_text,
        "patient_id": phantom.patient_id,
        "study_id": phantom.study_id,
        "split": phantom_split(seed),
    }
    if plan.has_masks(seed):
        row["masks"] = json.dumps({kind: names[kind] for kind in ("lesions", "organs")})
    return row | {f"label:{name}": value for name, value in phantom.labels.items()}


def turned(volume: Volume, seed: int) -> Volume:
    """The same volume stored in one of the 48 axis orders and directions, which the seed chooses."""
    order, signs = RandomDraws(FILE, seed).choice(ORIENTATIONS)
    array, affine = volume.array.transpose(order), volume.affine[:, [*order, 3]].copy()
    for axis, sign in enumerate(signs):
        if sign < 0:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1.0
            array = np.flip(array, axis)
    return Volume(np.ascontiguousarray(array), affine)


__all__ = ["PhantomFolderError", "phantom_version", "write_phantoms"]
