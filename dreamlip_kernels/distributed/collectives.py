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
# The backend that ranks agreed on last, for the calls that a CUDA graph captures.
_agreed: dict[tuple[str, str, Group], str] = {}


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """(rank, world size) of the group; ``None`` is the world group, or (0, 1) without an initialised process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def agreement_sizes(text_features: Tensor, mask: Tensor | None) -> dict[str, int]:
    """What all ranks must agree on before their first collective."""
    n, k, d = text_features.shape
    return {
        "N (images a rank)": n,
        "K (sub-captions)": k,
        "D (width)": d,
        "text_mask (1 = given)": int(mask is not None),
    }


def check_agreement(
    fn: str, sizes: dict[str, int], device: torch.device, group: Group = None, *, backend: str = "torch"
) -> str:
    """Raise ValueError on every rank unless all ranks hold the same sizes; return ``backend`` where all ranks chose that one, else "torch".

    Ranks choose by the verdicts on their own machines: one that has none decides for all.

    One all-gather of a few integers, read on the host: collectives on unequal sizes hang or return garbage, and no rank can know
    from its own tensors. Skipped while a CUDA graph is captured (a graph's shapes are fixed). Where the group connects CPUs too
    (``init_process_group("cpu:gloo,cuda:nccl")``), the integers go that way and no device is waited for.
    """
    rank, world = rank_and_size(group)
    if world == 1:
        return backend
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _agreed.get((fn, backend, group), backend)
    connects_cpus = "cpu:" in dist.get_backend_config(group)
    numbers = [*sizes.values(), int.from_bytes(backend.encode()[:7], "big")]
    mine = torch.tensor(numbers, dtype=torch.int64, device="cpu" if connects_cpus else device)
    everyone = mine.new_empty(world * len(numbers))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    *columns, names = everyone.view(world, -1).T.tolist()
    for name, column in zip(sizes, columns, strict=True):
        if len(set(column)) > 1:
            raise ValueError(
                f"{fn}: {name} must be the same on every rank, got {column} by rank (this is rank {rank}); "
                "drop or pad the last partial batch"
            )
    agreed = _agreed[fn, backend, group] = backend if len(set(names)) == 1 else "torch"
    return agreed


def all_gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """x [n, ...] of every rank concatenated in rank order -> [W*n, ...]; its gradient is summed over ranks and returned to the owner."""
    return x if rank_and_size(group)[1] == 1 else _AllGatherRows.apply(x, group)


def reduce_scatter_logsumexp(partial: Tensor, group: Group = None) -> Tensor:
    """``logsumexp`` over ranks of partial [K, W*n], of the columns this rank owns -> [K, n].

    One all-to-all of [K, W*n] each way: an owner sees every rank's part, so the sum is exact at any scale without a maximum agreed on first, and the owner
    knows what each rank's gradient is.
    """
    return partial if rank_and_size(group)[1] == 1 else _ReduceScatterLogsumexp.apply(partial, group)


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of a tensor that needs no gradient (counts)."""
    if rank_and_size(group)[1] == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def global_mean(terms: Tensor, mask: Tensor | None, group: Group = None) -> Tensor:
    """This rank's part of the mean of masked ``terms`` over the world: the parts average to exactly that mean (eq. 8)."""
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
