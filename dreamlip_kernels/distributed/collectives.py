"""The collectives of a loss over many ranks: images travel, captions stay (docs/math.md section 2).

Each rank computes one rectangle, all images x its own captions, so that every logit of the global matrix exists once in
the world. With one process, every function here is the identity and issues no collective. What communicates is a
registered op, which torch.compile leaves whole, and its gradient another.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._library.custom_ops import CustomOpDef

from ..numerics import logsumexp_of_any

Group = Optional["dist.ProcessGroup"]


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """(rank, world size) of the group; ``None`` is the world group, or (0, 1) without an initialized process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def process_group(group: Group) -> dist.ProcessGroup:
    """The group itself, or the world's; one is initialized."""
    group = group or dist.group.WORLD
    assert group is not None
    return group


def group_name(group: Group) -> str:
    """The name by which a registered op, which takes no process groups, is told one; of an initialized group."""
    return process_group(group).group_name


def group_of_name(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType] - a NewType that torch 2.6 has not


def all_gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """x [n, ...] of every rank concatenated in rank order -> [W*n, ...]; its gradient is summed over ranks and returned
    to the owner.
    """
    return x if rank_and_size(group)[1] == 1 else all_gather_rows_op(x, group_name(group))


def reduce_scatter_logsumexp(partial: Tensor, group: Group = None) -> Tensor:
    """``logsumexp`` over ranks of partial [K, W*n], of the columns this rank owns -> [K, n].

    One all-to-all of [K, W*n] each way: an owner sees every rank's part, so the sum is exact at any scale without a
    maximum agreed on first, and the owner knows what each rank's gradient is.
    """
    world = rank_and_size(group)[1]
    if world == 1:
        return partial
    parts = partial.view(partial.shape[0], world, -1).transpose(0, 1).contiguous()
    return logsumexp_of_any(all_to_all_op(parts, group_name(group)))


def reduce_scatter_sum(partial: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of partial [K, W*n], of the columns this rank owns -> [K, n]; differentiable."""
    if rank_and_size(group)[1] == 1:
        return partial
    return reduce_scatter_rows_op(partial.T, group_name(group)).T


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of a tensor that needs no gradient (counts)."""
    return x if rank_and_size(group)[1] == 1 else all_reduce_sum_op(x, group_name(group))


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


def reduced(terms: Tensor, mask: Tensor | None, reduction: str, group: Group = None) -> Tensor:
    """``terms``, 0 where masked, as they are ("none"), or this rank's part of their mean or sum over the world: the
    parts average to exactly that mean or sum.
    """
    if reduction == "none":
        return terms
    return global_mean(terms, mask, group) if reduction == "mean" else terms.sum() * rank_and_size(group)[1]


# --- registered ops; ``group`` is the name of a process group --------------------------------------------------------


@torch.library.custom_op("dreamlip_kernels::all_gather_rows", mutates_args=())
def all_gather_rows_op(x: Tensor, group: str) -> Tensor:
    """x [n, ...] of every rank -> [W*n, ...]."""
    process_group = group_of_name(group)
    out = x.new_empty(rank_and_size(process_group)[1] * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=process_group)
    return out


@torch.library.custom_op("dreamlip_kernels::reduce_scatter_rows", mutates_args=())
def reduce_scatter_rows_op(x: Tensor, group: str) -> Tensor:
    """The sum over ranks of x [W*n, ...], of the rows this rank owns -> [n, ...]."""
    process_group = group_of_name(group)
    # W partial gradients are added up: 16 bits would lose what the fp32 accumulation of each rank kept.
    total = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    own = total.new_empty(total.shape[0] // rank_and_size(process_group)[1], *total.shape[1:])
    dist.reduce_scatter_tensor(own, total, group=process_group)
    return own.to(x.dtype)


@torch.library.custom_op("dreamlip_kernels::all_to_all", mutates_args=())
def all_to_all_op(x: Tensor, group: str) -> Tensor:
    """x [W, ...]: part w goes to rank w, and what comes from rank w is part w."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group_of_name(group))
    return out


@torch.library.custom_op("dreamlip_kernels::all_reduce_sum", mutates_args=())
def all_reduce_sum_op(x: Tensor, group: str) -> Tensor:
    """The sum over ranks."""
    out = x.clone()
    dist.all_reduce(out, group=group_of_name(group))
    return out


@all_gather_rows_op.register_fake
def _(x, group):
    return x.new_empty(rank_and_size(group_of_name(group))[1] * x.shape[0], *x.shape[1:])


@reduce_scatter_rows_op.register_fake
def _(x, group):
    return x.new_empty(x.shape[0] // rank_and_size(group_of_name(group))[1], *x.shape[1:])


@all_to_all_op.register_fake
@all_reduce_sum_op.register_fake
def _(x, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _transposed_by(linear: CustomOpDef, op: CustomOpDef) -> None:
    """Register ``op`` as what takes the gradient of the linear op ``linear`` back."""

    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    linear.register_autograd(lambda ctx, grad: (op(grad, ctx.group), None), setup_context=setup_context)


_transposed_by(all_gather_rows_op, reduce_scatter_rows_op)
_transposed_by(reduce_scatter_rows_op, all_gather_rows_op)
_transposed_by(all_to_all_op, all_to_all_op)
