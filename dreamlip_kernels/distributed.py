"""The collectives of a loss over many ranks: images travel, captions stay (docs/math.md section 2).

Each rank computes one rectangle, all images x its own captions, so that every logit of the global matrix exists once in the
world. With one process, every function here is the identity and issues no collective.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

Group = Optional["dist.ProcessGroup"]


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """(rank, world size) of the group; ``None`` is the world group, or (0, 1) without an initialised process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def check_agreement(fn: str, sizes: dict[str, int], device: torch.device, group: Group = None) -> None:
    """Raise ValueError on every rank unless all ranks hold the same sizes.

    One all-gather of a few integers, read on the host: collectives on unequal sizes hang or return garbage, and no rank can know
    from its own tensors. Skipped while a CUDA graph is captured (a graph's shapes are fixed).
    """
    rank, world = rank_and_size(group)
    if world == 1 or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    mine = torch.tensor(list(sizes.values()), dtype=torch.int64, device=device)
    everyone = mine.new_empty(world * len(sizes))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    for name, column in zip(sizes, everyone.view(world, -1).T.tolist(), strict=True):
        if len(set(column)) > 1:
            raise ValueError(
                f"{fn}: {name} must be the same on every rank, got {column} by rank (this is rank {rank}); "
                "drop or pad the last partial batch"
            )


def all_gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """x [n, ...] of every rank concatenated in rank order -> [W*n, ...]; its gradient is summed over ranks and returned to the owner."""
    return x if rank_and_size(group)[1] == 1 else _AllGatherRows.apply(x, group)


def all_reduce_logsumexp(partial: Tensor, group: Group = None) -> Tensor:
    """``logsumexp`` over ranks of partial [K, W*n], reduced to the columns this rank owns -> [K, n].

    Backward gathers the upstream gradient [K, n] of every rank, so it costs as much as one all-gather of [K, W*n].
    """
    return partial if rank_and_size(group)[1] == 1 else _AllReduceLogsumexp.apply(partial, group)


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of a tensor that needs no gradient (counts)."""
    if rank_and_size(group)[1] == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


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


class _AllReduceLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, group: Group) -> Tensor:
        rank, world = rank_and_size(group)
        shift = partial.clone()
        dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=group)
        shift = torch.where(torch.isneginf(shift), 0, shift)
        total = (partial - shift).exp()
        dist.all_reduce(total, group=group)
        total = total.log() + shift
        ctx.group = group
        ctx.save_for_backward(partial, total)
        n = partial.shape[1] // world
        return total[:, rank * n : (rank + 1) * n].clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        partial, total = ctx.saved_tensors
        _, world = rank_and_size(ctx.group)
        k, n = grad.shape
        everyone = _gather(grad, world, ctx.group).view(world, k, n).transpose(0, 1).reshape(k, world * n)
        share = torch.where(torch.isneginf(total), 0, (partial - total).exp())
        return torch.where(share == 0, 0, everyone * share), None
