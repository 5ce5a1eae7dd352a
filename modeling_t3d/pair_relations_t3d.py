# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How pairs relate beyond being paired: which are not negatives of each other, and whose reports are alike.

Both are kept as vectors of the pairs and written out for the rows that are asked for: never for the whole batch.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .communication_t3d import all_gather, rank


def at_least_float32(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in one dtype: half precision becomes float32; float64 stays."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.ndim else dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


class PairIdentities(NamedTuple):
    """
    Which pairs are not negatives of each other although they differ: same study, or same report.

    `mask[i, j] = j != offset + i and any(own[i] == every[j] >= 0 for own, every in zip(self.own, self.every))`

    Args:
        own (`tuple` of `torch.LongTensor`s of shape `(own,)`): identities of this rank's pairs, one tensor per kind; a
            negative identity never matches.
        every (`tuple` of `torch.LongTensor`s of shape `(all,)`): those of all ranks' pairs.
        offset (`int`): pairs of the ranks before this one.
    """

    own: tuple[torch.Tensor, ...] = ()
    every: tuple[torch.Tensor, ...] = ()
    offset: int = 0

    def mask(self, start: int, stop: int, candidates: torch.Tensor | None = None) -> torch.Tensor | None:
        """
        The rows of own pairs `start` to `stop`; `None` where there are no identities.

        Args:
            candidates (`torch.LongTensor` of shape `(stop - start, candidates)`, *optional*): the pairs that each row
                is about; all by default.

        Returns:
            `torch.BoolTensor` of shape `(stop - start, all or candidates)`.
        """
        if not self.own:
            return None
        device = self.own[0].device
        if candidates is None:
            candidates = torch.arange(len(self.every[0]), device=device)[None]
        same = torch.zeros((), dtype=torch.bool, device=device)
        for own, every in zip(self.own, self.every, strict=True):
            rows = own[start:stop, None]
            same = same | ((rows == every[candidates]) & (rows >= 0))
        own_index = self.offset + torch.arange(start, stop, device=device)
        return same & (candidates != own_index[:, None])


def gather_identities(
    study_ids: torch.Tensor | None,
    report_ids: torch.Tensor | None,
    sizes: list[int],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> PairIdentities:
    """
    This rank's identities among those of all ranks.

    Args:
        study_ids, report_ids (`torch.LongTensor` of shape `(sizes[rank],)`, *optional*): given by all ranks or none.
        sizes (`list[int]`): pairs per rank, from `gather_sizes`.
    """
    own = tuple(identity.to(device) for identity in (study_ids, report_ids) if identity is not None)
    every = tuple(all_gather(identity, sizes, group) for identity in own)
    return PairIdentities(own, every, sum(sizes[: rank(group)]))


class SoftTargets(NamedTuple):
    """
    Targets that own up to similar reports: 1 on the diagonal, `temperature * (1 - exp(-rate * max(corr(a, b), 0)))`
    off it. The loss masks them and then normalises each row to sum 1.

    Args:
        own, every (`torch.Tensor` of shapes `(own, dim)` and `(all, dim)`):
            Report vectors of this rank and of all; they are correlated over `dim` and get no gradient.
        temperature, rate (`float`): as above.
    """

    own: torch.Tensor
    every: torch.Tensor
    temperature: float
    rate: float

    def standardised(self) -> "SoftTargets":
        """The same with vectors whose products are the correlations."""
        own, every = (
            nn.functional.normalize(features - features.mean(dim=-1, keepdim=True), dim=-1)
            for features in at_least_float32(self.own.detach(), self.every.detach())
        )
        return self._replace(own=own, every=every)

    def tile(self, start: int, stop: int, offset: int) -> torch.Tensor:
        """Of standardised vectors, the rows `start` to `stop`: `(stop - start, all)`, not normalised."""
        correlation = self.own[start:stop] @ self.every.T
        targets = correlation.clamp_(min=0).mul_(-self.rate).expm1_().mul_(-self.temperature)
        targets.diagonal(offset + start).fill_(1.0)
        return targets


__all__ = ["PairIdentities", "SoftTargets", "at_least_float32", "gather_identities"]
