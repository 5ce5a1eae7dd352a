# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the quality report needs of one volume: measures, a small picture, and why it cannot be used if it cannot."""

import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..geometry_t3d import Volume, VolumeError, VolumeIntensityError
from ..intensity_t3d import GAS_BELOW, check_finite, check_hounsfield
from ..volume_io_t3d import to_volume
from .sources import open_source

WINDOW = (-1000.0, 400.0)  # HU, of the pictures: lung and soft tissue at once
PICTURE_HEIGHT = 128  # pixels
_MAX_SAMPLED = 300_000  # voxels that measures are taken from


@dataclass
class VolumeFacts:
    """
    One volume in numbers.

    Args:
        number (`int`): row of the manifest.
        error (`str`): why it cannot be read, without its path; empty if it can.
        not_hounsfield (`str`): why its values cannot be HU; empty if they can.
        shape (three ints, z y x), spacing (three floats, z y x, mm): of the canonical volume.
        measures (`dict[str, float]`): slice spacing, pixel spacing, length (mm); tissue, lowest, highest (HU).
        warnings (`tuple[str, ...]`): from reading.
        picture (`bytes`): PNG of a coronal and an axial slice.
    """

    number: int
    error: str = ""
    not_hounsfield: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    measures: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    picture: bytes = b""


def examine_volume(number: int, path: Path, rescale: tuple[float, float] | None = None) -> VolumeFacts:
    """
    Open a volume and measure it; an error comes back as text in which the row stands for the path.

    Args:
        number (`int`): row of the manifest.
        path (`Path`): file or DICOM folder.
        rescale (two floats, *optional*): as in [`ManifestRow`].
    """
    try:
        volume = to_volume(open_source(path, rescale)).to_canonical()
        check_finite(volume.array, "")
    except (VolumeError, OSError, MemoryError) as error:
        return VolumeFacts(number, error=_without_path(str(error) or type(error).__name__, path))
    facts = VolumeFacts(number, shape=volume.array.shape, spacing=volume.spacing, warnings=volume.warnings)
    try:
        check_hounsfield(volume.array, "")
    except VolumeIntensityError as error:
        facts.not_hounsfield = _without_path(str(error), path).split(";")[0].removeprefix("not HU, ")
    facts.measures = _measure(volume)
    facts.picture = draw(volume)
    return facts


def _without_path(text: str, path: Path) -> str:
    """An error without the volume's path, which may name a patient."""
    inside = [file.name for file in path.rglob("*")] if path.is_dir() else []
    for named in (str(path.resolve()), str(path), path.name, *sorted(inside, key=len, reverse=True)):
        # Whole names alone, and no number as short as those that a message gives in mm.
        if not re.fullmatch(r"\d{0,4}", named):
            text = re.sub(rf"(?<![\w.]){re.escape(named)}(?!\w|\.\w)", "", text)
    return text.lstrip(": ")


def _measure(volume: Volume) -> dict[str, float]:
    step = max(1, math.ceil((volume.array.size / _MAX_SAMPLED) ** (1 / 3)))
    values = volume.array[::step, ::step, ::step].astype(np.float32).ravel()
    inside = values[values > values.min()]  # without the padding around the reconstructed circle
    inside = inside if inside.size else values
    tissue = inside[inside > GAS_BELOW]
    return {
        "slice spacing": volume.spacing[0],
        "pixel spacing": max(volume.spacing[1:]),
        "length": volume.spacing[0] * volume.array.shape[0],
        "tissue": float(np.median(tissue)) if tissue.size else float(np.median(inside)),
        "lowest": float(np.percentile(inside, 1)),
        "highest": float(np.percentile(inside, 99.9)),
    }


def draw(volume: Volume) -> bytes:
    """PNG of the middle coronal and axial slice of a canonical volume, superior and anterior up, right at the left."""
    from PIL import Image

    depth, height, _ = volume.array.shape
    coronal = volume.array[::-1, height // 2, ::-1], volume.spacing[0], volume.spacing[2]
    axial = volume.array[depth // 2, ::-1, ::-1], volume.spacing[1], volume.spacing[2]
    parts = []
    for slice_values, row_spacing, column_spacing in (coronal, axial):
        low, high = WINDOW
        grey = np.clip((slice_values.astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        aspect = (grey.shape[1] * column_spacing) / (grey.shape[0] * row_spacing)
        columns = max(8, min(4 * PICTURE_HEIGHT, round(PICTURE_HEIGHT * aspect)))
        parts.append(Image.fromarray(grey).resize((columns, PICTURE_HEIGHT), Image.Resampling.BILINEAR))
    gap = 4
    picture = Image.new("L", (sum(part.width for part in parts) + gap, PICTURE_HEIGHT), 0)
    picture.paste(parts[0], (0, 0))
    picture.paste(parts[1], (parts[0].width + gap, 0))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


__all__ = ["PICTURE_HEIGHT", "WINDOW", "VolumeFacts", "draw", "examine_volume"]
