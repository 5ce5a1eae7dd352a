# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Global alignment as pure functions of embeddings, in float32 or finer, and which pairs are not negatives.

Each loss returns a sum and a count over this rank's own anchors; `global_mean` makes them the mean over all ranks.
"""

import torch
import torch.distributed as dist
from torch import nn

from .communication_t3d import all_gather, rank


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


__all__ = ["contrastive_sigmoid", "contrastive_softmax", "gathered_non_negatives", "non_negatives", "soft_targets"]
