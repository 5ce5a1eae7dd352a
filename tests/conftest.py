# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Every test starts from the same seed, on one thread per worker, offline, and with no trainer's state left over."""

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Marks of Transformers' common tests, which `test_transformers_common` imports where their sources are."""
    for mark in ("accelerate", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_compile"):
        config.addinivalue_line("markers", f"{mark}_test{'s' * (mark == 'accelerate')}: of Transformers")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps device and precision for the life of a process: the next test may want others."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
