# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Captions from metadata: how a volume was acquired, its grid, and, if asked for, its labels. Nothing that identifies
a person can enter: numbers, and words of fixed lists."""

import math
from collections.abc import Mapping
from typing import Any

from ..geometry_t3d import VolumeError
from ..volume_dicom_t3d import BODY_PARTS
from .captions import CaptionError
from .manifest import ManifestRow
from .sources import read_row, read_row_acquisition

MODALITIES = {
    "CT": "Computed tomography",
    "MR": "Magnetic resonance imaging",
    "PT": "Positron emission tomography",
    "US": "Ultrasound",
}
# Columns of a manifest that are read where the file itself says nothing, in any case and with or without underscores.
COLUMNS = {
    "modality": ("modality",),
    "body_part": ("bodypart", "bodypartexamined"),
    "contrast": ("contrast", "contrastbolusagent"),
    "slice_thickness": ("slicethickness",),
    "tube_voltage": ("tubevoltage", "kvp"),
}
_NO = ("", "0", "0.0", "no", "none", "nan", "false", "without")


class MetadataCaptioner:
    """
    Facts of acquisition in sentences: "Computed tomography of the chest with contrast agent. 300 slices 1.25 mm apart,
    0.7 mm in plane, 375 mm from bottom to top."

    DICOM headers are asked first, then the columns of the manifest in `COLUMNS`. Names, dates, numbers of patients and
    studies, institutions, and descriptions in free text are never read.

    Args:
        modality (`str`, *optional*): where neither header nor manifest names one: a key of `MODALITIES`.
        with_labels (`bool`, defaults to `False`): also say which labels are present and which are not. A model that
            is scored on these labels has then been trained on them.
    """

    def __init__(self, *, modality: str | None = None, with_labels: bool = False) -> None:
        if modality is not None and modality not in MODALITIES:
            raise CaptionError(f"modality must be one of {', '.join(MODALITIES)} or None, got {modality!r}")
        self.modality = modality
        self.with_labels = with_labels

    def settings(self) -> dict[str, Any]:
        """See [`CaptionSource`]."""
        return {"source": "metadata", "modality": self.modality, "with_labels": self.with_labels}

    def __call__(self, row: ManifestRow, record: Mapping[str, Any]) -> str:
        """See [`CaptionSource`]."""
        try:
            facts = {**_facts_of_columns(record), **read_row_acquisition(row)}
            volume = read_row(row).to_canonical()
        except VolumeError as error:
            raise CaptionError(f"row {row.number}: {error}") from None
        modality = facts.get("modality", self.modality)
        subject = MODALITIES.get(str(modality), "Scan")
        if "body_part" in facts:
            subject += f" of the {facts['body_part']}"
        if facts.get("contrast"):
            subject += " with contrast agent"
        thickness = facts.get("slice_thickness")
        slices, step = volume.array.shape[0], volume.spacing[0]
        grid = f"{slices} slices {step:.3g} mm apart, {max(volume.spacing[1:]):.3g} mm in plane"
        grid += f", {slices * step:.0f} mm from bottom to top"
        sentences = [subject, grid]
        if thickness:
            sentences.append(f"Slice thickness {thickness:.3g} mm")
        if facts.get("tube_voltage"):
            sentences.append(f"Tube voltage {facts['tube_voltage']:.0f} kV")
        if self.with_labels:
            sentences += [f"{name[:1].upper()}{name[1:]}" for name, value in row.labels.items() if value == 1]
            sentences += [f"No {name}" for name, value in row.labels.items() if value == 0]
        return "".join(f"{sentence}. " for sentence in sentences).strip()


def _facts_of_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest's cells say, where it is a number or a word of a list."""
    cells = {
        name.lower().replace("_", "").replace(" ", ""): str(value or "").strip() for name, value in record.items()
    }
    found = {fact: next((cells[name] for name in names if cells.get(name)), "") for fact, names in COLUMNS.items()}
    facts: dict[str, Any] = {}
    if found["modality"].upper() in MODALITIES:
        facts["modality"] = found["modality"].upper()
    code = found["body_part"].upper().replace(" ", "").replace("_", "")
    if code in BODY_PARTS:
        facts["body_part"] = BODY_PARTS[code]
    if found["contrast"].lower() not in _NO:
        facts["contrast"] = True
    for fact in ("slice_thickness", "tube_voltage"):
        try:
            number = float(found[fact])
        except ValueError:
            continue
        if math.isfinite(number) and number > 0:
            facts[fact] = number
    return facts


__all__ = ["COLUMNS", "MODALITIES", "MetadataCaptioner"]
