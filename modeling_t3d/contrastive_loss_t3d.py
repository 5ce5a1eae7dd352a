# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Global alignment as pure functions of embeddings, in float32 or finer, a tile of logits at a time.

Each loss returns a sum and a count over this rank's own anchors; `global_mean` makes them the mean over all ranks.
Logits, masks and soft targets exist for a chunk of anchors only, and backward computes them again: memory grows with
`pairs * chunk`, never with the square of the batch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .pair_relations_t3d import PairIdentities, SoftTargets, at_least_float32

# A tile holds about this many logits (16 MiB of float32), but never fewer anchors than matrix products like.
_TILE_ELEMENTS = 2**22
_MINIMUM_CHUNK = 256


class _Tiles(NamedTuple):
    """What every tile of a loss shares."""

    identities: PairIdentities
    offset: int
    chunk_size: int
    soft: SoftTargets | None = None

    def rows(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Bounds of the chunks of anchors; one of none for a rank without any."""
        for start in range(0, max(num_rows, 1), self.chunk_size):
            yield start, min(start + self.chunk_size, num_rows)

    def buffer(self, anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Room for a tile: fresh memory for each would cost as much as filling it."""
        return candidates.new_empty(min(self.chunk_size, len(anchors)), len(candidates))

    def logits(
        self,
        anchors: torch.Tensor,
        candidates: torch.Tensor,
        scale: torch.Tensor,
        start: int,
        stop: int,
        buffer: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled similarities of some anchors to all candidates, and which of them are excluded."""
        logits = torch.mm(anchors[start:stop] * scale, candidates.T, out=buffer[: stop - start])
        return logits, self.identities.mask(start, stop)


def _tiles(
    identities: PairIdentities | None,
    offset: int,
    num_all: int,
    chunk_size: int | None,
    soft: SoftTargets | None = None,
) -> _Tiles:
    """The tiling of a batch of `num_all` pairs; `chunk_size=None` chooses."""
    chunk_size = chunk_size or max(_MINIMUM_CHUNK, _TILE_ELEMENTS // max(num_all, 1))
    soft = None if soft is None else soft.standardised()
    return _Tiles(identities or PairIdentities(), offset, chunk_size, soft)


class _Statistics(NamedTuple):
    """What one pass over the tiles learns of each anchor: vectors as long as the anchors."""

    log_sum: torch.Tensor  # log-sum-exp of its logits
    on_target: torch.Tensor  # its logits weighed by its targets
    target_sum: torch.Tensor | None  # the sum of its soft targets
    is_anchor: torch.Tensor  # whether it has a negative

    def losses(self) -> torch.Tensor:
        """Cross entropy per anchor, 0 where there is no negative."""
        return torch.where(self.is_anchor, self.log_sum - self.on_target, 0.0)


class _OnlineLogSum:
    """Log-sum-exp over the rows of tiles that arrive one after the other."""

    def __init__(self, like: torch.Tensor):
        # Finite, so that a column of which nothing has arrived yet does not turn into a NaN.
        self.maximum = torch.full_like(like, torch.finfo(like.dtype).min)
        self.sum = torch.zeros_like(like)

    def add(self, logits: torch.Tensor) -> None:
        """Take one more tile, whose numbers are spent afterwards."""
        maximum = torch.maximum(self.maximum, logits.amax(dim=0))
        self.sum = self.sum * (self.maximum - maximum).exp_() + logits.sub_(maximum).exp_().sum(dim=0)
        self.maximum = maximum

    def result(self) -> torch.Tensor:
        """What `logsumexp` of all of them is."""
        return self.maximum + self.sum.log()


def _row_log_sum(logits: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`logsumexp` over the last axis; every row has a finite logit, its own pair's."""
    maximum = logits.amax(dim=1, keepdim=True)
    return torch.sub(logits, maximum, out=buffer[: len(logits)]).exp_().sum(dim=1).log_() + maximum[:, 0]


def _measure(
    anchors: torch.Tensor, candidates: torch.Tensor, scale: torch.Tensor, tiles: _Tiles, both: bool
) -> list[_Statistics]:
    """Statistics of every row and, where the candidates are the other side of all pairs (`both`), of every column."""
    log_sums, on_target, target_sums, is_anchor = [], [], [], []
    columns = _OnlineLogSum(candidates[:, 0])
    on_column = torch.zeros_like(candidates[:, 0])
    first, second = (tiles.buffer(anchors, candidates) for _ in range(2))
    for start, stop in tiles.rows(len(anchors)):
        logits, excluded = tiles.logits(anchors, candidates, scale, start, stop, first)
        own = logits.diagonal(tiles.offset + start).clone()
        if tiles.soft is None:
            on_target.append(own)
        else:
            targets = tiles.soft.tile(start, stop, tiles.offset)
            targets = targets if excluded is None else targets.masked_fill_(excluded, 0.0)
            target_sums.append(targets.sum(dim=1))
            weighed = targets.mul_(logits)
            on_target.append(weighed.sum(dim=1))
            on_column += weighed.sum(dim=0)
            del targets, weighed
        if excluded is None:
            is_anchor.append(torch.ones_like(own, dtype=torch.bool) & (len(candidates) > 1))
        else:
            logits.masked_fill_(excluded, -torch.inf)
            is_anchor.append((~excluded).sum(dim=1) > 1)
        log_sums.append(_row_log_sum(logits, second))
        if both:
            columns.add(logits)
    row_sums = torch.cat(target_sums) if target_sums else None
    on_row = torch.cat(on_target)
    has_negative = torch.cat(is_anchor)
    # Targets and masks are symmetric: a column has the sum and the negatives of its row.
    if row_sums is not None:
        on_row, on_column = on_row / row_sums, on_column / row_sums if both else on_column
    else:
        on_column = on_row
    statistics = [_Statistics(torch.cat(log_sums), on_row, row_sums, has_negative)]
    if both:
        statistics.append(_Statistics(columns.result(), on_column, row_sums, has_negative))
    return statistics


def _differentiate(
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    scale: torch.Tensor,
    tiles: _Tiles,
    statistics: list[_Statistics],
    by_candidates: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of half the sum of `statistics`' losses by anchors, candidates (if asked) and scale."""
    by_anchors, of_scale = torch.empty_like(anchors), torch.zeros_like(scale)
    of_candidates = torch.zeros_like(candidates) if by_candidates else None
    rows, columns = statistics[0], statistics[1] if len(statistics) > 1 else None
    weight = rows.is_anchor.to(anchors.dtype) / 2
    # exp(logits - shift) = weight * softmax
    row_shift = (rows.log_sum - weight.log())[:, None]
    column_shift = None if columns is None else columns.log_sum - weight.log()
    first, second = (tiles.buffer(anchors, candidates) for _ in range(2))
    for start, stop in tiles.rows(len(anchors)):
        logits, excluded = tiles.logits(anchors, candidates, scale, start, stop, first)
        if excluded is not None:
            logits.masked_fill_(excluded, -torch.inf)
        # d loss / d logits = weight * (softmax - targets), over the row and over the column
        from_columns = None
        if column_shift is not None:
            from_columns = torch.sub(logits, column_shift, out=second[: stop - start]).exp_()
        gradient = logits.sub_(row_shift[start:stop]).exp_()
        if from_columns is not None:
            gradient += from_columns
        if tiles.soft is None:
            gradient.diagonal(tiles.offset + start).sub_(weight[start:stop] * len(statistics))
        else:
            targets = tiles.soft.tile(start, stop, tiles.offset)
            targets = targets if excluded is None else targets.masked_fill_(excluded, 0.0)
            shares = weight[start:stop, None] / rows.target_sum[start:stop, None]  # type: ignore[index]
            gradient -= targets * (shares if columns is None else shares + weight / rows.target_sum)
        pulled = gradient @ candidates
        of_scale += (pulled * anchors[start:stop]).sum()
        torch.mul(pulled, scale, out=by_anchors[start:stop])
        if of_candidates is not None:
            of_candidates.addmm_(gradient.T, anchors[start:stop])
    return by_anchors, None if of_candidates is None else of_candidates.mul_(scale), of_scale


class _ContrastiveSoftmax(torch.autograd.Function):
    """
    Half the sum of the cross entropies of this rank's images and reports, and the number of its pairs that count.

    In one process the two directions are rows and columns of the same logits, computed once. Over several each is
    this rank's anchors against all candidates (`all_image`, `all_text`; `None` in one process).
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        all_image: torch.Tensor | None,
        all_text: torch.Tensor | None,
        scale: torch.Tensor,
        tiles: _Tiles,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            if all_image is None:
                passes = [_measure(image, text, scale, tiles, both=True)]
            else:
                passes = [
                    _measure(anchors, candidates, scale, tiles, both=False)
                    for anchors, candidates in ((image, all_text), (text, all_image))
                ]
        ctx.save_for_backward(image, text, all_image, all_text, scale)
        ctx.tiles, ctx.passes = tiles, passes
        count = passes[0][0].is_anchor.sum()
        ctx.mark_non_differentiable(count)
        return sum(statistics.losses().sum() for one in passes for statistics in one) / 2, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: torch.Tensor, by_count: Any) -> tuple[torch.Tensor | None, ...]:
        image, text, all_image, all_text, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad
        with torch.autocast(image.device.type, enabled=False):
            if all_image is None:
                of_image, of_text, of_scale = _differentiate(image, text, scale, ctx.tiles, ctx.passes[0], needed[1])
                of_all_image = of_all_text = None
            else:
                of_image, of_all_text, of_scale = _differentiate(
                    image, all_text, scale, ctx.tiles, ctx.passes[0], needed[3]
                )
                of_text, of_all_image, of_scale_too = _differentiate(
                    text, all_image, scale, ctx.tiles, ctx.passes[1], needed[2]
                )
                of_scale = of_scale + of_scale_too
        gradients = (of_image, of_text, of_all_image, of_all_text, of_scale)
        return *(None if gradient is None else gradient.mul_(by_total) for gradient in gradients), None


def contrastive_softmax(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    all_image_embeds: torch.Tensor,
    all_text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    offset: int = 0,
    identities: PairIdentities | None = None,
    soft_targets: SoftTargets | None = None,
    chunk_size: int | None = None,
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
        all_image_embeds, all_text_embeds (`torch.Tensor` of shape `(all, dim)`): the pairs of all ranks; the same
            tensors in a single process, where the logits of one direction then serve both.
        logit_scale (`torch.Tensor`, a scalar): inverse temperature.
        offset (`int`): pairs of the ranks before this one.
        identities (`PairIdentities`, *optional*): pairs that are not negatives of each other.
        soft_targets (`SoftTargets`, *optional*): instead of targets on the diagonal.
        chunk_size (`int`, *optional*): anchors per tile; by default as many as make about 4 million logits.

    Returns:
        The sum over this rank's anchors and their number. A pair without a single negative is no anchor.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.contrastive_loss_t3d import contrastive_softmax

    >>> image = text = torch.eye(2)
    >>> total, count = contrastive_softmax(image, text, image, text, torch.tensor(3.0))
    >>> round((total / count).item(), 4)  # log(1 + exp(-3))
    0.0486

    ```"""
    one_process = all_image_embeds is image_embeds and all_text_embeds is text_embeds
    image, text, scale = at_least_float32(image_embeds, text_embeds, logit_scale)
    every = (None, None) if one_process else at_least_float32(all_image_embeds, all_text_embeds)
    tiles = _tiles(identities, offset, len(all_text_embeds), chunk_size, soft_targets)
    return _ContrastiveSoftmax.apply(image, text, *every, scale, tiles)


class _ContrastiveSigmoid(torch.autograd.Function):
    """The sum of the binary cross entropies of this rank's images with all reports."""

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        all_text: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        tiles: _Tiles,
    ) -> torch.Tensor:
        total = torch.zeros_like(scale)
        with torch.autocast(image.device.type, enabled=False):
            buffer = tiles.buffer(image, all_text)
            for start, stop in tiles.rows(len(image)):
                logits, excluded = tiles.logits(image, all_text, scale, start, stop, buffer)
                logits += bias
                logits.diagonal(tiles.offset + start).neg_()
                losses = nn.functional.softplus(logits)
                total += (losses if excluded is None else losses.masked_fill_(excluded, 0.0)).sum()
        ctx.save_for_backward(image, all_text, scale, bias)
        ctx.tiles = tiles
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        image, all_text, scale, bias = ctx.saved_tensors
        tiles = ctx.tiles
        of_image, of_text = torch.empty_like(image), torch.zeros_like(all_text)
        of_scale, of_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        with torch.autocast(image.device.type, enabled=False):
            buffer = tiles.buffer(image, all_text)
            for start, stop in tiles.rows(len(image)):
                logits, excluded = tiles.logits(image, all_text, scale, start, stop, buffer)
                gradient = logits.add_(bias).sigmoid_()
                # d softplus(-z) / dz = sigmoid(z) - 1
                gradient.diagonal(tiles.offset + start).sub_(1.0)
                if excluded is not None:
                    gradient.masked_fill_(excluded, 0.0)
                pulled = gradient @ all_text
                of_scale += (pulled * image[start:stop]).sum()
                of_bias += gradient.sum()
                torch.mul(pulled, scale, out=of_image[start:stop])
                of_text.addmm_(gradient.T, image[start:stop])
        gradients = (of_image, of_text.mul_(scale), of_scale, of_bias)
        return *(gradient.mul_(by_total) for gradient in gradients), None


def contrastive_sigmoid(
    image_embeds: torch.Tensor,
    all_text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    offset: int = 0,
    identities: PairIdentities | None = None,
    chunk_size: int | None = None,
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
    image, text, scale, bias = at_least_float32(image_embeds, all_text_embeds, logit_scale, logit_bias)
    tiles = _tiles(identities, offset, len(text), chunk_size)
    total = _ContrastiveSigmoid.apply(image, text, scale, bias, tiles)
    return total, torch.tensor(len(image), device=image.device)


__all__ = ["contrastive_sigmoid", "contrastive_softmax"]
