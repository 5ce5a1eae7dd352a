# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The collectives that make an objective global: the whole batch's rows, sums and means, exact in value and gradient.

`group=None` is the default process group where one is initialised, and a single process otherwise.
"""

import torch
import torch.distributed as dist


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


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks on every rank; backward sums every rank's gradient of it."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """
    Differentiable sum over ranks. Where every rank goes on to compute the same loss from it, the average of the ranks'
    gradients, as data-parallel training takes it, is the gradient of that loss in one process.
    """
    return tensor if world_size(group) == 1 else _SumOverRanks.apply(tensor, group)


def all_reduce_max(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Largest value over ranks, without a gradient."""
    tensor = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
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


__all__ = [
    "all_gather",
    "all_reduce_max",
    "all_reduce_sum",
    "gather_sizes",
    "global_mean",
    "rank",
    "sum_over_ranks",
    "world_size",
]
