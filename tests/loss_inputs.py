# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Vectors, identities and dense relations of the loss tests."""

import torch
from torch import nn

from modeling_t3d.pair_relations_t3d import PairIdentities

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


def relations(*kinds: torch.Tensor | None) -> PairIdentities:
    """All pairs of a batch among each other."""
    given = tuple(kind for kind in kinds if kind is not None)
    return PairIdentities(given, given)


def dense_mask(batch: int, *kinds: torch.Tensor | None) -> torch.Tensor:
    """Which pairs share an identity, written out for the whole batch."""
    mask = torch.zeros(batch, batch, dtype=torch.bool)
    for i in range(batch):
        for j in range(batch):
            mask[i, j] = i != j and any(kind is not None and kind[i] == kind[j] >= 0 for kind in kinds)
    return mask


def dense_targets(texts: torch.Tensor, temperature: float, rate: float) -> torch.Tensor:
    """Soft targets of the whole batch, not normalised."""
    correlation = torch.corrcoef(texts)
    targets = temperature * (1 - torch.exp(-rate * correlation.clamp(min=0)))
    return targets.fill_diagonal_(1.0)
