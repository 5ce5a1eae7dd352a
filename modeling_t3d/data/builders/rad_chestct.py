# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""RAD-ChestCT: chest CT as arrays, with findings by location and no reports (zenodo.org/records/6406114).

Layout of the release, one folder:

    trn00001.npz, val00001.npz, tst00001.npz, ...                     one array `ct`
    CT_Scan_Metadata_Complete_35747.csv                               NoteAcc_DEID, VolumeAcc_DEID, MRN_DEID, ...
    img{train,valid,test}_Abnormality_and_Location_Labels.csv         NoteAcc_DEID, <finding>*<location>, ...

`ct` is int16 HU, cut at -1000 and 1000, on a grid of 0.8 mm in all directions, indices (slice, row, column) growing
towards inferior, posterior and left (github.com/rachellea/ct-volume-preprocessing; the release's table of lung extrema
names the axes alike). It is HU already: the table's slope and intercept are those of the original files. Volumes and
tables may lie in sub-folders.
"""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...geometry_t3d import Volume, VolumeReadError, affine_from_axes
from ..manifest_files import LABEL_VALUES
from .release import LayoutError, Release, find_table, read_table, read_wide_table

SOURCE = "https://zenodo.org/records/6406114"
SPACING = (0.8, 0.8, 0.8)  # mm, of every volume of the release
AXES = "IPL"
_MAXIMUM_DEFLATE = 1032  # bytes that one compressed byte can become
_METADATA = "CT_Scan_Metadata_Complete_35747.csv"
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def read_rad_chestct(path: str | Path) -> Volume:
    """
    A volume of the release: the array `ct` of an `.npz` file, in HU, on the release's grid.

    Args:
        path (`str` or `Path`): the file. Pickled content is never loaded.
    """
    try:
        array = _read_array(path)
    except VolumeReadError:
        raise
    except FileNotFoundError:
        raise VolumeReadError(f"{path}: no such file or folder") from None
    except MemoryError:
        raise VolumeReadError(f"{path}: the volume does not fit in memory") from None
    except Exception as error:  # a damaged file can make the parsers raise anything
        reason = f"truncated, damaged or another format ({type(error).__name__})"
        raise VolumeReadError(f"{path}: is not a readable .npz file: {reason}") from None
    return Volume(array, affine_from_axes(SPACING, AXES), source=str(path))


def _read_array(path: str | Path) -> np.ndarray:
    """The array `ct`, once its header promises what a volume is and no more than the archive can hold."""
    with zipfile.ZipFile(path) as archive:
        if "ct.npy" not in archive.namelist():
            raise VolumeReadError(f"{path}: holds no array 'ct'; it is not a volume of RAD-ChestCT")
        entry = archive.getinfo("ct.npy")
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(stream)
        if len(shape) != 3 or dtype.kind not in "iuf" or 0 in shape:
            raise VolumeReadError(f"{path}: 'ct' has shape {shape} and type {dtype}, not a volume's; see {SOURCE}")
        promised = math.prod(shape) * dtype.itemsize
        if promised > min(entry.file_size, entry.compress_size * _MAXIMUM_DEFLATE):
            raise VolumeReadError(
                f"{path}: its header promises {'x'.join(map(str, shape))} voxels ({promised:,} bytes), more than the "
                "file holds; it is truncated or damaged"
            )
        with archive.open(entry) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def build_rad_chestct(folder: Path) -> Release:
    """
    Rows of a RAD-ChestCT download, whole or in part: labels without reports, for evaluation and probes.

    Args:
        folder (`Path`): holds the volumes and tables, or their sub-folders.
    """
    metadata = find_table(folder, [_METADATA, f"**/{_METADATA}", "**/CT_Scan_Metadata_*.csv"], "patients", SOURCE)
    volumes = {path.name: path for path in sorted(folder.rglob("*.npz"))}
    release = Release()
    labels: dict[str, tuple[str, dict[str, int | None]]] = {}
    for name, split in _SPLITS.items():
        pattern = f"img{name}_Abnormality_and_Location_Labels.csv"
        path = find_table(folder, [pattern, f"**/{pattern}"], "findings and the split", SOURCE)
        for note, findings in _read_labels(path, volumes):
            if note in labels:
                raise LayoutError(
                    f"{path}: NoteAcc_DEID {note} stands in two of the label tables; download them again"
                )
            labels[note] = split, findings
    absent = unlabelled = repeated = 0
    used = set()
    for row in read_table(metadata, ["NoteAcc_DEID", "VolumeAcc_DEID", "MRN_DEID"]):
        volume_name = f"{row['VolumeAcc_DEID'].strip().removesuffix('.npz')}.npz"
        note = row["NoteAcc_DEID"].strip()
        if volume_name not in volumes:
            absent += 1
        elif volume_name in used:
            repeated += 1
        elif note not in labels:
            unlabelled += 1
            used.add(volume_name)
        else:
            split, findings = labels[note]
            used.add(volume_name)
            record: dict[str, Any] = {
                "volume": volumes[volume_name],
                "patient_id": row["MRN_DEID"].strip(),
                "study_id": note,
                "split": split,
                "labels": findings,
            }
            release.records.append(record)
    release.note(absent, "scans of the metadata table have no volume here and were left out")
    release.note(unlabelled, "volumes have no labels and were left out")
    release.note(repeated, "rows of the metadata table name a volume that an earlier row names and were left out")
    release.note(len(volumes) - len(used), "volumes are not named in the metadata table and were left out")
    if not release.records:
        raise LayoutError(f"{folder}: no volume of the metadata table is there; download the .npz files from {SOURCE}")
    return release


def _read_labels(path: Path, volumes: dict[str, Path]) -> Iterator[tuple[str, dict[str, int | None]]]:
    """Studies that have a volume, and their findings: present at any location, else unknown if one is not stated."""
    header, rows = read_wide_table(path, ["NoteAcc_DEID"])
    key = header.index("NoteAcc_DEID")
    places: dict[str, list[int]] = {}
    for position, name in enumerate(header):
        if position != key:
            places.setdefault(name.split("*", 1)[0], []).append(position)
    known = {name.removesuffix(".npz") for name in volumes}
    for number, row in enumerate(rows, start=1):
        if row[key].strip() not in known:
            continue
        # Zeros are most of some four thousand cells.
        stated = {
            position: cell.strip().lower()
            for position, cell in enumerate(row)
            if cell not in ("0", "0.0") and position != key
        }
        if wrong := [position for position, cell in stated.items() if cell not in LABEL_VALUES]:
            raise LayoutError(f"{path}: row {number}: {header[wrong[0]]!r} is not 1, 0 or empty; download it again")
        present = {position for position, cell in stated.items() if LABEL_VALUES[cell] == 1}
        unknown = {position for position, cell in stated.items() if LABEL_VALUES[cell] is None}
        yield (
            row[key].strip(),
            {
                name: 1 if not present.isdisjoint(cells) else 0 if unknown.isdisjoint(cells) else None
                for name, cells in places.items()
            },
        )


__all__ = ["AXES", "SPACING", "build_rad_chestct", "read_rad_chestct"]
