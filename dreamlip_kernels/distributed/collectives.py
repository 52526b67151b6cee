"""The collectives of a loss over many ranks: images travel, captions stay (docs/math.md section 2).

Each rank computes one rectangle, all images x its own captions, so that every logit of the global matrix exists once in
the world. With one process, every function here is the identity and issues no collective.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

Group = Optional["dist.ProcessGroup"]


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """(rank, world size) of the group; ``None`` is the world group, or (0, 1) without an initialized process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """x [n, ...] of every rank concatenated in rank order -> [W*n, ...]; its gradient is summed over ranks and returned
    to the owner.
    """
    return x if rank_and_size(group)[1] == 1 else _AllGatherRows.apply(x, group)


def reduce_scatter_logsumexp(partial: Tensor, group: Group = None) -> Tensor:
    """``logsumexp`` over ranks of partial [K, W*n], of the columns this rank owns -> [K, n].

    One all-to-all of [K, W*n] each way: an owner sees every rank's part, so the sum is exact at any scale without a
    maximum agreed on first, and the owner knows what each rank's gradient is.
    """
    return partial if rank_and_size(group)[1] == 1 else _ReduceScatterLogsumexp.apply(partial, group)


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of a tensor that needs no gradient (counts)."""
    if rank_and_size(group)[1] == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def of_present_images(image_mask: Tensor | None, mask: Tensor | None, count: int) -> Tensor | None:
    """Which sub-captions or patches count [n, count], of image_mask [n] and their own mask:
    those that are there, of images that are.
    """
    if image_mask is None:
        return mask
    of_images = image_mask[:, None].expand(-1, count)
    return of_images if mask is None else of_images & mask


def global_mean(terms: Tensor, mask: Tensor | None, group: Group = None) -> Tensor:
    """This rank's part of the mean of masked ``terms`` over the world: the parts average to exactly that mean (eq.
    8).
    """
    if mask is None:
        return terms.sum() / max(terms.numel(), 1)
    count = all_reduce_sum(mask.sum(dtype=torch.int64), group).clamp(min=1)
    return terms.sum() * rank_and_size(group)[1] / count


def _gather(x: Tensor, world: int, group: Group) -> Tensor:
    out = x.new_empty(world * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, rank_and_size(group)[1], group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, world = rank_and_size(ctx.group)
        # W partial gradients are added up: 16 bits would lose what the fp32 accumulation of each rank kept.
        total = grad.contiguous().to(torch.promote_types(grad.dtype, torch.float32))
        own = total.new_empty(total.shape[0] // world, *total.shape[1:])
        dist.reduce_scatter_tensor(own, total, group=ctx.group)
        return own.to(grad.dtype), None


class _ReduceScatterLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, group: Group) -> Tensor:
        k, world = partial.shape[0], rank_and_size(group)[1]
        sent = partial.view(k, world, -1).transpose(0, 1).contiguous()
        parts = torch.empty_like(sent)
        dist.all_to_all_single(parts, sent, group=group)
        total = parts.logsumexp(dim=0)
        ctx.group = group
        ctx.save_for_backward(parts, total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts, total = ctx.saved_tensors
        # An empty sum has no part in anything, and -inf - -inf would be NaN.
        share = torch.where(torch.isneginf(parts), 0, (parts - total).exp())
        sent = torch.where(share == 0, 0, grad * share)
        d_parts = torch.empty_like(sent)
        dist.all_to_all_single(d_parts, sent, group=ctx.group)
        return d_parts.transpose(0, 1).reshape(grad.shape[0], -1), None
