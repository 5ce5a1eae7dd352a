# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""From the folder of a public data set, or one's own, to the rows of a manifest; one file per layout.

A builder reads tables and looks for files; it opens no volume and downloads nothing.
"""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bimcv_r import build_bimcv_r
from .ct_rate import build_ct_rate
from .inspect_ctpa import build_inspect
from .plain_folder import build_folder
from .rad_chestct import build_rad_chestct, read_rad_chestct
from .release import LayoutError, Release, assign_splits

BUILDERS: dict[str, Callable[..., Release]] = {
    "ct-rate": build_ct_rate,
    "bimcv-r": build_bimcv_r,
    "inspect": build_inspect,
    "rad-chestct": build_rad_chestct,
    "folder": build_folder,
}


def build_records(layout: str, folder: str | Path, **options: Any) -> Release:
    """
    Rows of a manifest from a folder that is laid out as a release is.

    Args:
        layout (`str`): a name of `BUILDERS`.
        folder (`str` or `Path`): where the release lies, whole or in part.
        options: of that builder.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> from modeling_t3d.data.builders import build_records

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "scan.nii.gz").write_bytes(b"")
    >>> _ = (folder / "scan.txt").write_text("The heart is of normal size.")
    >>> build_records("folder", folder).records[0]["report"]
    'The heart is of normal size.'

    ```"""
    if layout not in BUILDERS:
        nearest = difflib.get_close_matches(layout, BUILDERS, n=1)
        hint = f"; do you mean {nearest[0]!r}?" if nearest else ""
        raise LayoutError(f"unknown layout {layout!r}{hint} There are {', '.join(map(repr, BUILDERS))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise LayoutError(f"{folder}: no such folder; give the one that holds the release")
    builder = BUILDERS[layout]
    known = [name for name in inspect.signature(builder).parameters if name != "folder"]
    if unknown := sorted(set(options) - set(known)):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise LayoutError(f"the layout {layout!r} has no option {unknown[0]!r}; {takes}")
    return builder(folder, **options)


__all__ = ["BUILDERS", "LayoutError", "Release", "assign_splits", "build_records", "read_rad_chestct"]
