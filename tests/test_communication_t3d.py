# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The communicator in a single process; `tests/distributed` has what several compute."""

import torch

from modeling_t3d.communication_t3d import gather_sizes, global_mean


def test_global_mean_without_a_single_anchor_is_zero():
    assert global_mean(torch.tensor(0.0), torch.tensor(0)).item() == 0.0


def test_single_process_needs_no_group():
    assert gather_sizes(3, torch.device("cpu")) == [3]
