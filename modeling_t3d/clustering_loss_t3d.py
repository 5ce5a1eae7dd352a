# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Clustering of local views as pure functions of view vectors, in float32 or finer.

Each loss returns a sum and a count over this rank's own anchors; `global_mean` makes them the mean over all ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from .communication_t3d import world_size


def multi_view_contrastive(
    views: torch.Tensor,
    own_pair: torch.Tensor,
    view_mask: torch.Tensor,
    excluded: torch.Tensor | None = None,
    *,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Supervised contrast over views: each pair is a cluster, its valid views are the members.

    ```python
    for q in queries:                                    # one per anchor pair; `views[q]`: all views as q pools them
        candidates = [(j, u) for j in pairs for u in view_slots if view_mask[q, j, u] and not excluded[q, j]]
        for s in view_slots:                             # anchor: view s of pair own_pair[q]
            others = [c for c in candidates if c != (own_pair[q], s)]
            positives = [c for c in others if c[0] == own_pair[q]]
            if view_mask[q, own_pair[q], s] and positives:
                logits = {c: views[q][own_pair[q], s] @ views[q][c] / temperature for c in others}
                total += -mean(logits[p] - logsumexp(logits.values()) for p in positives)
                count += 1
    ```

    Equal similarities of `B` pairs with `S` valid views each give exactly `log(B * S - 1)` per anchor.

    Args:
        views (`torch.Tensor` of shape `(queries, pairs, view_slots, dim)`):
            Unit-norm vectors of the candidates as each query pools them.
        own_pair (`torch.LongTensor` of shape `(queries,)`): which of the candidate pairs the query belongs to.
        view_mask (`torch.BoolTensor` of shape `(queries, pairs, view_slots)`): views that exist.
        excluded (`torch.BoolTensor` of shape `(queries, pairs)`, *optional*): from `non_negatives`.
        temperature (`float`): of the softmax.

    Returns:
        The sum over anchors, their number, and the sum over anchors of the log of their number of candidates, which is
        the loss of views that carry no information.
    """
    num_queries, num_pairs, num_slots, _ = views.shape
    queries = torch.arange(num_queries, device=views.device)
    # (queries, 1, pairs, 1) and (1, slots, 1, slots)
    of_own_pair = (own_pair[:, None] == torch.arange(num_pairs, device=views.device))[:, None, :, None]
    same_slot = torch.eye(num_slots, dtype=torch.bool, device=views.device)[None, :, None, :]
    is_candidate = view_mask if excluded is None else view_mask & ~excluded[:, :, None]
    is_candidate = is_candidate[:, None] & ~(of_own_pair & same_slot)
    is_positive = is_candidate & of_own_pair
    num_positives = is_positive.sum(dim=(2, 3))
    is_anchor = view_mask[queries, own_pair] & (num_positives > 0)

    with torch.autocast(views.device.type, enabled=False):
        views = views.to(torch.promote_types(views.dtype, torch.float32))
        # (queries, slots of the anchor, pairs, slots of the candidate)
        logits = torch.einsum("qsd,qpud->qspu", views[queries, own_pair], views) / temperature
    # The logits of slots that are no anchor stay finite: their logsumexp is dropped, and so must its gradient be.
    dropped = ~is_candidate & is_anchor[:, :, None, None]
    log_denominator = logits.masked_fill(dropped, -torch.inf).logsumexp(dim=(2, 3))
    mean_positive = (logits * is_positive).sum(dim=(2, 3)) / num_positives.clamp(min=1)
    total = torch.where(is_anchor, log_denominator - mean_positive, 0.0).sum()
    log_candidates = is_candidate.sum(dim=(2, 3)).clamp(min=1).to(logits.dtype).log()
    return total, is_anchor.sum(), torch.where(is_anchor, log_candidates, 0.0).sum()


def chunked_multi_view_contrastive(
    pool: Callable[[int, int], torch.Tensor],
    own_pair: torch.Tensor,
    view_mask: torch.Tensor,
    excluded: torch.Tensor | None = None,
    *,
    temperature: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `multi_view_contrastive` for candidates too many to be held at once: the sum over chunks of queries, exact because
    queries do not interact. Of more than one chunk only the sums are kept; backward pools each chunk again.

    Args:
        pool (`Callable`): `pool(start, stop)` gives the `views` of those queries, `(stop - start, pairs, slots, dim)`.
        chunk_size (`int`): queries per chunk.
        own_pair, view_mask, excluded, temperature: as there, for all queries.
    """

    def one_chunk(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return multi_view_contrastive(
            pool(start, stop),
            own_pair[start:stop],
            view_mask[start:stop],
            None if excluded is None else excluded[start:stop],
            temperature=temperature,
        )

    num_queries = len(own_pair)
    if num_queries <= chunk_size:
        return one_chunk(0, num_queries)
    chunks = [
        checkpoint(one_chunk, start, min(start + chunk_size, num_queries), use_reentrant=False)
        for start in range(0, num_queries, chunk_size)
    ]
    total, count, log_candidates = (torch.stack(parts).sum(dim=0) for parts in zip(*chunks, strict=True))
    return total, count, log_candidates


def draw_candidate_pairs(
    num_own: int,
    num_all: int,
    offset: int,
    num_negative_pairs: int,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """
    Which pairs each anchor pair is scored against when not all are: `[i, i + o_1, ..., i + o_K]` modulo the batch,
    with `K` distinct offsets drawn once, by rank 0, for every anchor and rank. Every pair then serves equally often.

    Returns:
        `torch.LongTensor` of shape `(num_own, K + 1)`, the own pair first, `K = min(num_negative_pairs, num_all - 1)`.
    """
    offsets = torch.randperm(num_all - 1, generator=generator)[:num_negative_pairs].to(device) + 1
    if world_size(group) > 1:
        dist.broadcast(offsets, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    own = offset + torch.arange(num_own, device=device)
    return torch.cat([own[:, None], (own[:, None] + offsets) % num_all], dim=1)


__all__ = ["chunked_multi_view_contrastive", "draw_candidate_pairs", "multi_view_contrastive"]
