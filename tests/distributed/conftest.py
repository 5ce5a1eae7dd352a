# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What one process computes, which several must too."""

import pytest
from distributed_cases import CASES, run_mean_of_two_batches, run_plain


@pytest.fixture(scope="session")
def single_process() -> dict[str, dict]:
    return {case: run_plain(**overrides) for case, overrides in CASES.items()}


@pytest.fixture(scope="session")
def mean_of_two_batches() -> dict[str, dict]:
    return {case: run_mean_of_two_batches(**overrides) for case, overrides in CASES.items()}
