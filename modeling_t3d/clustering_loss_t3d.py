# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Clustering of local views as pure functions of view vectors, in float32 or finer: by contrast, by prototypes, by
decorrelation.

Losses over anchors return a sum and a count over this rank's own; `global_mean` makes them the mean over all ranks.
"""

from collections.abc import Callable
from math import log

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from .communication_t3d import all_reduce_max, all_reduce_sum, sum_over_ranks, world_size

# Added to variances: views that are all alike correlate with nothing, and their gradient stays finite.
_VARIANCE_FLOOR = 1e-8


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
        views (`torch.Tensor` of shape `(queries or 1, pairs, view_slots, dim)`):
            Unit-norm vectors of the candidates as each query pools them, or as all do.
        own_pair (`torch.LongTensor` of shape `(queries,)`): which of the candidate pairs the query belongs to.
        view_mask (`torch.BoolTensor` of shape `(queries, pairs, view_slots)`): views that exist.
        excluded (`torch.BoolTensor` of shape `(queries, pairs)`, *optional*): from `PairIdentities.mask`.
        temperature (`float`): of the softmax.

    Returns:
        The sum over anchors, their number, and the sum over anchors of the log of their number of candidates, which is
        the loss of views that carry no information.
    """
    num_pairs, num_slots = views.shape[1:3]
    queries = torch.arange(len(own_pair), device=views.device)
    is_shared = len(views) < len(own_pair)
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
        anchors = views[0, own_pair] if is_shared else views[queries, own_pair]
        every = "pud" if is_shared else "qpud"
        logits = torch.einsum(f"qsd,{every}->qspu", anchors, views[0] if is_shared else views) / temperature
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
    excluded: Callable[[int, int], torch.Tensor | None],
    *,
    temperature: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `multi_view_contrastive` for candidates too many to be held at once: the sum over chunks of queries, exact because
    queries do not interact. Of more than one chunk only the sums are kept; backward pools each chunk again.

    Args:
        pool (`Callable`): `pool(start, stop)` gives the `views` of those queries.
        excluded (`Callable`): `excluded(start, stop)` gives what is excluded of them, or `None`.
        chunk_size (`int`): queries per chunk.
        own_pair, view_mask, temperature: as there, for all queries.
    """

    def one_chunk(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return multi_view_contrastive(
            pool(start, stop),
            own_pair[start:stop],
            view_mask[start:stop],
            excluded(start, stop),
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


@torch.no_grad()
def sinkhorn_codes(
    scores: torch.Tensor,
    mask: torch.Tensor,
    *,
    epsilon: float,
    num_iterations: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    r"""
    Soft assignments of the views of all ranks to prototypes that are used equally, by Sinkhorn-Knopp.

    ```python
    codes = exp(scores / epsilon)                   # of all ranks, valid rows only
    for _ in range(num_iterations):
        codes /= codes.sum(over views)              # every prototype has as much as any other
        codes /= codes.sum(over prototypes)         # every view has 1
    ```

    The divisions are kept as one factor per prototype and one per view: an iteration reads the matrix twice, writes
    nothing, and has one all-reduce, of a vector; before the first there is one more.

    Args:
        scores (`torch.Tensor` of shape `(views, prototypes)`): similarities of this rank's views.
        mask (`torch.BoolTensor` of shape `(views,)`): views that exist; the codes of others are 0.
        epsilon (`float`): smaller is harder.
        num_iterations (`int`): of both divisions.

    Returns:
        `torch.Tensor` of shape `(views, prototypes)`: each valid row sums to 1.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.clustering_loss_t3d import sinkhorn_codes

    >>> scores = torch.tensor([[1.0, 0.0], [0.9, 0.0]])  # both views prefer the first prototype
    >>> sinkhorn_codes(scores, torch.ones(2, dtype=torch.bool), epsilon=0.05, num_iterations=100).sum(dim=0).round()
    tensor([1., 1.])

    ```"""
    scores = scores / epsilon
    # Each view's largest score goes into its factor: no row underflows, whatever epsilon is.
    largest = scores.amax(dim=1)
    codes = scores.sub_(largest[:, None]).exp_()
    tiny = torch.finfo(codes.dtype).tiny
    overall = all_reduce_max(largest.masked_fill(~mask, torch.finfo(codes.dtype).min).amax(), group)
    of_views = torch.where(mask, (largest - overall).exp(), 0.0)
    of_prototypes = codes.new_ones(codes.shape[1])
    for _ in range(num_iterations):
        of_prototypes = 1 / all_reduce_sum(of_views @ codes, group).clamp(min=tiny)
        of_views = torch.where(mask, 1 / (codes @ of_prototypes).clamp(min=tiny), 0.0)
    return codes.mul_(of_prototypes).mul_(of_views[:, None])


def swapped_prediction(
    views: torch.Tensor,
    view_mask: torch.Tensor,
    prototypes: torch.Tensor,
    *,
    temperature: float,
    epsilon: float,
    num_iterations: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Each view predicts the assignments of the other views of its pair (SwAV). Assignments have no gradient.

    ```python
    codes = sinkhorn_codes(views @ prototypes.T)                        # over the valid views of all ranks
    for i in own_pairs:
        for s in valid views of i, if there are at least two:           # anchor
            predicted = log_softmax(prototypes @ views[i, s] / temperature)
            total += -mean(codes[i, t] @ predicted for t in valid views of i if t != s)
            count += 1
    ```

    Args:
        views (`torch.Tensor` of shape `(pairs, view_slots, dim)`): unit-norm vectors of this rank's views.
        view_mask (`torch.BoolTensor` of shape `(pairs, view_slots)`): views that exist.
        prototypes (`torch.Tensor` of shape `(prototypes, dim)`): of unit norm, the same on every rank.
        temperature (`float`): of the prediction.
        epsilon, num_iterations: as in `sinkhorn_codes`.

    Returns:
        The sum over anchors, their number, and the sum over anchors of the log of the number of prototypes, which is
        the loss of views that carry no information.
    """
    with torch.autocast(views.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(views.dtype, prototypes.dtype), torch.float32)
        scores = views.to(dtype) @ prototypes.to(dtype).T
    codes = sinkhorn_codes(
        scores.detach().flatten(0, 1),
        view_mask.flatten(),
        epsilon=epsilon,
        num_iterations=num_iterations,
        group=group,
    ).view_as(scores)
    predicted = (scores / temperature).log_softmax(dim=-1)
    num_others = view_mask.sum(dim=1, keepdim=True) - view_mask.long()
    of_others = (codes.sum(dim=1, keepdim=True) - codes) / num_others.clamp(min=1)[..., None]
    is_anchor = view_mask & (num_others > 0)
    total = torch.where(is_anchor, -(of_others * predicted).sum(dim=-1), 0.0).sum()
    count = is_anchor.sum()
    return total, count, count * log(len(prototypes))


def redundancy_reduction(
    views: torch.Tensor,
    view_mask: torch.Tensor,
    *,
    off_diagonal_weight: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Views of one pair agree in every dimension, and dimensions say different things (Barlow Twins): no negatives.

    ```python
    for s, t in combinations(view_slots, 2):                    # mean over those with at least two pairs
        z1, z2 = views[both, s], views[both, t]                 # pairs of all ranks that have both views
        z1, z2 = ((z - z.mean(0)) / z.std(0, biased) for z in (z1, z2))
        c = z1.T @ z2 / len(z1)
        loss = 1 / 2 * (sum((c[k, k] - 1) ** 2) + off_diagonal_weight * sum(c[k, l] ** 2 for k != l))
    ```

    Views that carry no information give `dim / 2`.

    Args:
        views (`torch.Tensor` of shape `(pairs, view_slots, dim)`): vectors of this rank's views.
        view_mask (`torch.BoolTensor` of shape `(pairs, view_slots)`): views that exist.
        off_diagonal_weight (`float`): the smaller, the more dimensions may repeat each other.

    Returns:
        The loss over the pairs of all ranks, the same on every rank, and the number of their views that took part. The
        average of the ranks' gradients is the gradient in one process.
    """
    first, second = torch.triu_indices(views.shape[1], views.shape[1], offset=1, device=views.device)
    with torch.autocast(views.device.type, enabled=False):
        views = views.to(torch.promote_types(views.dtype, torch.float32))
        # (2, slot pairs, pairs, dim), 0 where one of the two views is missing
        both = torch.stack([views[:, first], views[:, second]]).transpose(1, 2)
        weights = (view_mask[:, first] & view_mask[:, second]).T.to(views.dtype)[..., None]
        sums = sum_over_ranks(
            torch.cat([(both * weights).sum(dim=2), weights.sum(dim=1).expand(2, -1, 1)], dim=-1), group
        )
        count = sums[0, :, -1:].detach()
        centred = (both - (sums[..., :-1] / count.clamp(min=1))[:, :, None]) * weights
        squares = centred.square().sum(dim=2).transpose(0, 1)
        products = centred[0].transpose(1, 2) @ centred[1]
        # One message: (slot pairs, 2 + dim, dim)
        moments = sum_over_ranks(torch.cat([squares, products], dim=1), group) / count.clamp(min=1)[..., None]
        deviations = (moments[:, :2] + _VARIANCE_FLOOR).sqrt()
        correlation = moments[:, 2:] / (deviations[:, 0, :, None] * deviations[:, 1, None, :])
        diagonal = correlation.diagonal(dim1=1, dim2=2)
        off_diagonal = correlation.square().sum(dim=(1, 2)) - diagonal.square().sum(dim=1)
        losses = ((diagonal - 1).square().sum(dim=1) + off_diagonal_weight * off_diagonal) / 2
    is_measured = count[:, 0] > 1
    loss = torch.where(is_measured, losses, 0.0).sum() / is_measured.sum().clamp(min=1)
    taking_part = (view_mask & (view_mask.sum(dim=1, keepdim=True) > 1)).sum()
    return loss, all_reduce_sum(taking_part, group)


__all__ = [
    "chunked_multi_view_contrastive",
    "draw_candidate_pairs",
    "multi_view_contrastive",
    "redundancy_reduction",
    "sinkhorn_codes",
    "swapped_prediction",
]
