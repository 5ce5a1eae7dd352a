# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What several test files share: the sample data beside the checkout and tiny inputs."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Path of a sample file or folder; skips the calling test, with the reason, where the sample data is absent."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"sample data {name!r} is not beside this checkout")
    return path
