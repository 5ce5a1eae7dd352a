# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Vectors and identities of the loss tests."""

import torch
from torch import nn

from modeling_t3d.contrastive_loss_t3d import gathered_non_negatives

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def identities(batch: int) -> torch.Tensor:
    """Two pairs of one study, one of another, the rest without an identity."""
    ids = torch.full((batch,), -1)
    ids[0] = ids[2] = 7
    ids[1] = 5
    return ids


def exclude(study_ids, report_ids, batch: int) -> torch.Tensor:
    return gathered_non_negatives(study_ids, report_ids, [batch], torch.device("cpu"))
