# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The objectives as pure functions of embeddings in float32 or finer, and the collectives that make them global.

Every loss returns a sum and a count over this rank's own anchors; `global_mean` turns them into the mean over all
ranks. `group=None` is the default process group where one is initialised, and a single process otherwise.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes that share the batch."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Place of this process among them."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def gather_sizes(size: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """How many pairs each rank holds. The only host synchronisation of the losses, and none in a single process."""
    if world_size(group) == 1:
        return [size]
    sizes = torch.zeros(world_size(group), dtype=torch.int64, device=device)
    sizes[rank(group)] = size
    dist.all_reduce(sizes, group=group)
    return sizes.tolist()


class _AllGather(torch.autograd.Function):
    """Rows of every rank in rank order; backward sums every rank's gradient of a row on the rank that owns it."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        # Collectives need equal shapes: pad to the largest batch, cut afterwards.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        start = sum(ctx.sizes[: rank(ctx.group)])
        return gradient[start : start + ctx.sizes[rank(ctx.group)]], None, None


def all_gather(tensor: torch.Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """
    Differentiable gather along the first axis.

    Args:
        tensor (`torch.Tensor` of shape `(sizes[rank], ...)`): this rank's rows.
        sizes (`list[int]`): rows per rank, from `gather_sizes`; they may differ.

    Returns:
        `torch.Tensor` of shape `(sum(sizes), ...)`: the rows of rank 0, then of rank 1, ...
    """
    if world_size(group) == 1:
        return tensor
    if tensor.dtype == torch.bool:
        return _AllGather.apply(tensor.to(torch.uint8), sizes, group).bool()
    return _AllGather.apply(tensor, sizes, group)


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum over ranks, without a gradient: for counts and logged values."""
    tensor = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def global_mean(total: torch.Tensor, count: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """
    Mean over the anchors of all ranks, from this rank's sum and number of anchors; 0 where no rank has an anchor.

    The value is the same on every rank. The gradient is that of `world_size * total / global count`: averaged over
    ranks, as data-parallel training does, it is the gradient of the mean in one process.
    """
    sums = all_reduce_sum(torch.stack([total.detach(), count.to(total)]), group)
    global_count = sums[1].clamp(min=1)
    own_share = total * (world_size(group) / global_count)
    return own_share + (sums[0] / global_count - own_share).detach()


def non_negatives(
    ids: list[tuple[torch.Tensor, torch.Tensor]], num_own: int, num_all: int, offset: int, device: torch.device
) -> torch.Tensor:
    """
    Which pairs are not negatives of each other although they differ: same study, or same report.

    `mask[i, j] = j != offset + i and any(own[i] == every[j] >= 0 for own, every in ids)`

    Args:
        ids (`list` of two `torch.LongTensor`s of shapes `(num_own,)` and `(num_all,)`):
            This rank's and all ranks' identities of one kind; a negative identity never matches.
        num_own, num_all, offset (`int`): pairs of this rank, of all ranks, and before this rank's first.

    Returns:
        `torch.BoolTensor` of shape `(num_own, num_all)`.
    """
    mask = torch.zeros(num_own, num_all, dtype=torch.bool, device=device)
    for own, every in ids:
        mask |= (own[:, None] == every[None, :]) & (own[:, None] >= 0)
    own_index = offset + torch.arange(num_own, device=device)
    return mask & (own_index[:, None] != torch.arange(num_all, device=device)[None, :])


def gathered_non_negatives(
    study_ids: torch.Tensor | None,
    report_ids: torch.Tensor | None,
    sizes: list[int],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """
    `non_negatives` of this rank's pairs among those of all ranks, from this rank's identities.

    Args:
        study_ids, report_ids (`torch.LongTensor` of shape `(sizes[rank],)`, *optional*): given by all ranks or none.
        sizes (`list[int]`): pairs per rank, from `gather_sizes`.

    Returns:
        `torch.BoolTensor` of shape `(sizes[rank], sum(sizes))`.
    """
    identities = [identity.to(device) for identity in (study_ids, report_ids) if identity is not None]
    pairs = [(identity, all_gather(identity, sizes, group)) for identity in identities]
    own = rank(group)
    return non_negatives(pairs, sizes[own], sum(sizes), sum(sizes[:own]), device)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def soft_targets(
    text_features: torch.Tensor, all_text_features: torch.Tensor, offset: int, *, temperature: float, rate: float
) -> torch.Tensor:
    """
    Targets that own up to similar reports: `temperature * (1 - exp(-rate * max(corr(a, b), 0)))` off the diagonal,
    1 on it. The rows are normalised to sum 1 by the loss, after its mask.

    Args:
        text_features, all_text_features (`torch.Tensor` of shapes `(own, dim)` and `(all, dim)`):
            Report vectors; they are correlated over `dim` and get no gradient.
        offset (`int`): pairs of the ranks before this one.

    Returns:
        `torch.Tensor` of shape `(own, all)`.
    """
    with torch.autocast(text_features.device.type, enabled=False):
        own, every = (
            nn.functional.normalize(features - features.mean(dim=-1, keepdim=True), dim=-1)
            for features in map(_at_least_float32, (text_features.detach(), all_text_features.detach()))
        )
        targets = temperature * (1 - torch.exp(-rate * (own @ every.T).clamp(min=0)))
    rows = torch.arange(len(own), device=own.device)
    targets[rows, offset + rows] = 1.0
    return targets


def contrastive_softmax(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    all_image_embeds: torch.Tensor,
    all_text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    offset: int = 0,
    excluded: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Image-text contrast in both directions, each row a classification among all ranks' candidates.

    ```python
    for i in own_pairs:                                             # every embedding of unit norm
        for anchor, candidates in ((image[i], all_text), (text[i], all_image)):
            logits = [logit_scale * anchor @ candidates[j] for j in all_pairs if not excluded[i, j]]
            total += -(targets[i] * log_softmax(logits)).sum() / 2  # targets: 1 for the own pair, unless soft
    ```

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(own, dim)`): this rank's pairs.
        all_image_embeds, all_text_embeds (`torch.Tensor` of shape `(all, dim)`): the pairs of all ranks.
        logit_scale (`torch.Tensor`, a scalar): inverse temperature.
        offset (`int`): pairs of the ranks before this one.
        excluded (`torch.BoolTensor` of shape `(own, all)`, *optional*): from `non_negatives`.
        targets (`torch.Tensor` of shape `(own, all)`, *optional*): from `soft_targets`; normalised here.

    Returns:
        The sum over this rank's anchors and their number. A pair without a single negative is no anchor.
    """
    rows = torch.arange(len(image_embeds), device=image_embeds.device)
    own_column = offset + rows
    if excluded is None:
        excluded = torch.zeros(len(rows), len(all_text_embeds), dtype=torch.bool, device=rows.device)
    if targets is not None:
        targets = targets.masked_fill(excluded, 0.0)
        targets = targets / targets.sum(dim=-1, keepdim=True)
    losses = torch.zeros((), device=rows.device)
    for anchors, candidates in ((image_embeds, all_text_embeds), (text_embeds, all_image_embeds)):
        with torch.autocast(rows.device.type, enabled=False):
            logits = logit_scale * (_at_least_float32(anchors) @ _at_least_float32(candidates).T)
        log_probabilities = logits.masked_fill(excluded, -torch.inf).log_softmax(dim=-1)
        if targets is None:
            losses = losses - log_probabilities[rows, own_column] / 2
        else:
            losses = losses - (targets * log_probabilities.masked_fill(excluded, 0.0)).sum(dim=-1) / 2
    is_anchor = (~excluded).sum(dim=-1) > 1
    return torch.where(is_anchor, losses, 0.0).sum(), is_anchor.sum()


def contrastive_sigmoid(
    image_embeds: torch.Tensor,
    all_text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    offset: int = 0,
    excluded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Every image-text combination as a yes-or-no question (SigLIP): summed over combinations, divided by pairs.

    ```python
    for i in own_pairs:
        for j in all_pairs:
            if not excluded[i, j]:
                sign = 1 if j == offset + i else -1
                total += -log_sigmoid(sign * (logit_scale * image[i] @ all_text[j] + logit_bias))
    ```

    Arguments as in `contrastive_softmax`; `logit_bias` is a scalar. Each combination is counted once, by the rank
    that owns its image.

    Returns:
        The sum over this rank's images and their number.
    """
    rows = torch.arange(len(image_embeds), device=image_embeds.device)
    with torch.autocast(rows.device.type, enabled=False):
        logits = logit_scale * (_at_least_float32(image_embeds) @ _at_least_float32(all_text_embeds).T) + logit_bias
    signs = torch.full_like(logits, -1.0)
    signs[rows, offset + rows] = 1.0
    losses = -nn.functional.logsigmoid(signs * logits)
    if excluded is not None:
        losses = losses.masked_fill(excluded, 0.0)
    return losses.sum(), torch.tensor(len(rows), device=rows.device)


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
        views = _at_least_float32(views)
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


__all__ = [
    "all_gather",
    "all_reduce_sum",
    "chunked_multi_view_contrastive",
    "contrastive_sigmoid",
    "contrastive_softmax",
    "draw_candidate_pairs",
    "gather_sizes",
    "gathered_non_negatives",
    "global_mean",
    "multi_view_contrastive",
    "non_negatives",
    "rank",
    "soft_targets",
    "world_size",
]
