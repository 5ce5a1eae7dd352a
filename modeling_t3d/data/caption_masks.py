# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Captions from segmentation masks: what is there, how large, on which side and where."""

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry_t3d import Volume, VolumeError
from ..volume_io_t3d import read_label_map
from .captions import CaptionError
from .manifest import ManifestRow

LabelNames = Mapping[str, Mapping[int, str]]

_SMALL = 50.0  # ml; of smaller structures the extent is told, and each of their parts by itself
_MOST_PARTS = 5  # of a small structure, the largest first
_MIDDLE = 0.1  # share of half the width within which a structure lies near the midline
_BOTH_SIDES = 0.25  # share of its voxels that a structure has on either side, at least, and in the middle, at most,
# when it lies on both sides
_INSIDE = 0.5  # share of its voxels that lie in one structure of another map, which then is its place
_LARGER = 2.0  # how many times larger a place is than what lies in it
_MIDLINE_LABELS = 5  # structures that a row needs for their box to give the midline; else the scan's own middle does


def read_label_names(path: str | Path) -> dict[str, dict[int, str]]:
    """
    Names of the values of label maps.

    Args:
        path (`str` or `Path`): a JSON file, `{mask: {value: name}}` or `{value: name}` for all masks, or a CSV file
            with the columns `label` and `name`. Masks that it does not name may hold 0 and one value: they are called
            as in the manifest.

    Returns:
        Mask -> value -> name; the mask `"*"` stands for all others.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                entries: Any = {line["label"]: line["name"] for line in csv.DictReader(file)}
        else:
            entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(value, dict) for value in entries.values()):
            entries = {"*": entries}
        return {mask: {int(value): str(name) for value, name in names.items()} for mask, names in entries.items()}
    except OSError as error:
        raise CaptionError(f"{path}: cannot be opened ({error.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CaptionError(
            f'{path}: label names are a JSON object such as {{"organs": {{"1": "liver"}}}}, or a CSV file with '
            "the columns label and name"
        ) from None


@dataclass(frozen=True)
class Structure:
    """One structure of a label map, or one part of a small one. Its height is a share of the scan, from the bottom;
    the place of a small one is the structure of another map that holds it."""

    name: str
    millilitres: float
    extent_mm: float
    height: float
    side: str
    place: str | None


class MaskCaptioner:
    """
    One sentence for each structure of a row's masks, or each part of a small one: name, volume, extent, side, and
    place: the structure of another mask that it lies in, or the third of the scan from bottom to top.

    Values of intensity are not read: the source serves CT, MR and microscopy alike.

    Args:
        label_names (`Mapping[str, Mapping[int, str]]`, *optional*):
            Mask -> value -> name, as [`read_label_names`] reads them. A mask that it does not name must be binary and
            is called as in the manifest. Names with `left` or `right` in them, such as `kidney_left`, keep their side.
        described (sequence of `str`, *optional*):
            The masks whose structures are told, such as lesions; the others are places alone. All by default.
        minimum_millilitres (`float`, defaults to 0.01): smaller structures are left out.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from modeling_t3d.data.caption_masks import MaskCaptioner
    >>> from modeling_t3d.data.manifest import ManifestRow
    >>> from modeling_t3d.volume_io_t3d import to_volume, write_nifti

    >>> mask = np.zeros((30, 20, 40), dtype=np.uint8)
    >>> mask[4:8, 6:12, 30:34] = 1
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "mask.nii.gz"
    >>> write_nifti(to_volume(mask, spacing=(2, 2, 2), axes="SAR"), path)
    >>> row = ManifestRow(1, path, "", "patient", "study", masks={"liver_cyst": path})
    >>> MaskCaptioner()(row, {})
    'Liver cyst of 0.77 ml, 12 mm across, on the right, in the lower third of the scan.'

    ```"""

    def __init__(
        self,
        label_names: LabelNames | None = None,
        *,
        described: Sequence[str] | None = None,
        minimum_millilitres: float = 0.01,
    ) -> None:
        self.label_names = {mask: dict(names) for mask, names in (label_names or {}).items()}
        self.described = None if described is None else list(described)
        self.minimum_millilitres = minimum_millilitres

    def settings(self) -> dict[str, Any]:
        """See [`CaptionSource`]."""
        names = {
            mask: {str(value): name for value, name in sorted(names.items())}
            for mask, names in self.label_names.items()
        }
        return {
            "source": "masks",
            "label_names": names,
            "described": self.described,
            "minimum_millilitres": self.minimum_millilitres,
        }

    def __call__(self, row: ManifestRow, record: Mapping[str, Any]) -> str:
        """See [`CaptionSource`]."""
        if not row.masks:
            raise CaptionError(
                f"row {row.number} names no masks, from which its caption was to come; fill its 'masks' cell, remove "
                "the row or choose another source"
            )
        maps = {}
        for name, path in row.masks.items():
            try:
                maps[name] = read_label_map(path).to_canonical()
            except VolumeError as error:
                raise CaptionError(f"row {row.number}: {error}") from None
        names = {mask: self._names(row, mask, volume) for mask, volume in maps.items()}
        midline = _midline(list(maps.values()))
        sentences = []
        for mask, volume in maps.items():
            if self.described is not None and mask not in self.described:
                continue
            others = [(maps[other], names[other]) for other in maps if other != mask]
            for structure in describe_structures(volume, names[mask], midline, others):
                if structure.millilitres >= self.minimum_millilitres:
                    sentences.append(sentence_of(structure))
        return " ".join(sentences) or self._without_structures(row)

    def _without_structures(self, row: ManifestRow) -> str:
        """Masks that are empty say that nothing was found; masks that are missing say nothing."""
        missing = [mask for mask in self.described or [] if mask not in row.masks]
        if missing:
            raise CaptionError(
                f"row {row.number} has no mask {missing[0]!r}, only {', '.join(map(repr, row.masks))}; name one of "
                "them, or remove the row"
            )
        return "No structure of the masks was found in this scan."

    def _names(self, row: ManifestRow, mask: str, volume: Volume) -> dict[int, str]:
        names = self.label_names.get(mask, self.label_names.get("*"))
        values = [int(value) for value in np.unique(volume.array) if value]
        if names is not None and mask not in self.label_names and values == [1] and len(row.masks) > 1:
            # A file for each structure: the value is the same in all, and the mask's own name tells them apart.
            own = next((name for name in names.values() if _words(name) == _words(mask)), None)
            if own is None:
                raise CaptionError(
                    f"row {row.number}: the mask {mask!r}, one of {len(row.masks)}, holds the value 1 alone, and no "
                    f'label has its name; give it names of its own, such as {{"{mask}": {{"1": "liver"}}}}'
                )
            return {1: own}
        if names is None:
            if len(values) > 1:
                raise CaptionError(
                    f"row {row.number}: the mask {mask!r} holds {len(values)} values without names; give label names "
                    f'such as {{"{mask}": {{"{values[0]}": "liver"}}}}'
                )
            return dict.fromkeys(values, mask)
        unnamed = [value for value in values if value not in names]
        if unnamed:
            raise CaptionError(
                f"row {row.number}: value {unnamed[0]} of the mask {mask!r} has no name; add it to the label names"
            )
        return {value: names[value] for value in values}


def describe_structures(
    volume: Volume,
    names: Mapping[int, str],
    midline: float,
    others: Sequence[tuple[Volume, Mapping[int, str]]] = (),
) -> list[Structure]:
    """
    The structures of a label map in the order of their values.

    Args:
        volume ([`Volume`]): canonical label map, (z, y, x).
        names (`Mapping[int, str]`): of the values that it holds.
        midline (`float`): world x in mm of the plane between the sides.
        others (sequence of pairs): other label maps and their names; those on the same grid can be a place.
    """
    flat = np.flatnonzero(volume.array)
    values = volume.array.reshape(-1)[flat].astype(np.int64)
    order = np.argsort(values, kind="stable")
    spacing = np.asarray(volume.spacing)
    reach = _MIDDLE * volume.array.shape[2] * spacing[2] / 2
    structures = []
    for value, members in zip(*_groups(values[order], flat[order]), strict=True):
        is_small = len(members) * float(np.prod(spacing)) / 1000 < _SMALL
        for part in _parts(members, volume) if is_small else [members]:
            places = np.stack(np.unravel_index(part, volume.array.shape), axis=1)
            offsets = places @ volume.affine[0, :3] + volume.affine[0, 3] - midline
            structures.append(
                Structure(
                    name=_words(names[value]),
                    millilitres=len(part) * float(np.prod(spacing)) / 1000,
                    extent_mm=float(((places.max(axis=0) - places.min(axis=0) + 1) * spacing).max()),
                    height=float(places[:, 0].mean()) / max(volume.array.shape[0] - 1, 1),
                    side=_side(offsets, reach),
                    place=_place(part, volume, others) if is_small else None,
                )
            )
    return structures


def _parts(members: np.ndarray, volume: Volume) -> list[np.ndarray]:
    """Flat indices of a structure's connected parts, the largest first."""
    # Indices on a grid with a margin, where no step leads around an edge.
    grid = tuple(side + 2 for side in volume.array.shape)
    places = np.stack(np.unravel_index(members, volume.array.shape)) + 1
    padded = np.ravel_multi_index(tuple(places), grid)
    steps = [(z * grid[1] + y) * grid[2] + x for z, y, x in itertools.product((-1, 0, 1), repeat=3)]
    remaining = dict(zip(padded.tolist(), members.tolist(), strict=True))
    parts = []
    while remaining:
        start = next(iter(remaining))
        part, queue = [remaining.pop(start)], [start]
        while queue:
            at = queue.pop()
            for neighbour in (at + step for step in steps):
                if neighbour in remaining:
                    part.append(remaining.pop(neighbour))
                    queue.append(neighbour)
        parts.append(np.sort(np.asarray(part)))
    return sorted(parts, key=len, reverse=True)[:_MOST_PARTS]


def _groups(values: np.ndarray, members: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Each value of a sorted array, and the members that stand at its places."""
    found, starts = np.unique(values, return_index=True)
    return found.tolist(), np.split(members, starts[1:]) if len(found) else []


def _place(members: np.ndarray, volume: Volume, others: Sequence[tuple[Volume, Mapping[int, str]]]) -> str | None:
    for other, names in others:
        if other.array.shape != volume.array.shape or not np.allclose(other.affine, volume.affine, atol=1e-3):
            continue
        found, counts = np.unique(other.array.reshape(-1)[members], return_counts=True)
        most = int(counts.argmax())
        is_larger = np.count_nonzero(other.array == found[most]) > _LARGER * len(members)
        if found[most] and counts[most] > _INSIDE * len(members) and is_larger:
            return _words(names[int(found[most])])
    return None


def _midline(maps: Sequence[Volume]) -> float:
    """World x in mm of the plane between the sides."""
    first = maps[0]
    middle = first.affine[0] @ [*((side - 1) / 2 for side in first.array.shape), 1.0]
    richest = max(maps, key=lambda volume: len(np.unique(volume.array)))
    if len(np.unique(richest.array)) > _MIDLINE_LABELS:
        columns = np.flatnonzero(richest.array.any(axis=(0, 1)))
        middle = richest.affine[0] @ [0.0, 0.0, (columns[0] + columns[-1]) / 2, 1.0]
    return float(middle)


def sentence_of(structure: Structure) -> str:
    """
    A structure in words.

    Example:

    ```python
    >>> from modeling_t3d.data.caption_masks import Structure, sentence_of

    >>> sentence_of(Structure("lung nodule", 0.52, 11.0, 0.7, "on the right", None))
    'Lung nodule of 0.52 ml, 11 mm across, on the right, in the upper third of the scan.'

    ```"""
    text = f"{structure.name[:1].upper()}{structure.name[1:]} of {_amount(structure.millilitres)} ml"
    if structure.millilitres < _SMALL:
        text += f", {_amount(structure.extent_mm)} mm across"
    if structure.place is not None:
        return f"{text}, in the {structure.place}."
    if not {"left", "right"} & set(structure.name.split()):
        text += f", {structure.side}"
    third = ("lower", "middle", "upper")[min(int(structure.height * 3), 2)]
    return f"{text}, in the {third} third of the scan."


def _side(offsets: np.ndarray, reach: float) -> str:
    """The side of voxels at these distances from the midline, mm to the right; the middle reaches so far."""
    shares = [float((offsets > 0).mean()), float((offsets < 0).mean())]
    if min(shares) > _BOTH_SIDES and (np.abs(offsets) < reach).mean() < _BOTH_SIDES:
        return "on both sides"
    if abs(offsets.mean()) < reach:
        return "near the midline"
    return "on the right" if offsets.mean() > 0 else "on the left"


def _amount(number: float) -> str:
    """Two significant digits, which is more than the edges of a mask allow."""
    digits = 1 - math.floor(math.log10(number))
    return f"{round(number, digits):.{max(digits, 0)}f}"


def _words(name: str) -> str:
    """`kidney_left` as one says it: the side first."""
    words = name.replace("_", " ").split()
    sides = [word for word in words if word in ("left", "right")]
    return " ".join(sides + [word for word in words if word not in sides])


__all__ = ["MaskCaptioner", "Structure", "describe_structures", "read_label_names", "sentence_of"]
