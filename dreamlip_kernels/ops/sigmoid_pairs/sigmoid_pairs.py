"""The registered op under the sigmoid loss (docs/math.md eq. 19): the sum over all pairs and, from the same visit of
each tile, its gradients.

There is no normalizer, so a pair's gradient is known as soon as its logit is: three products per pair in place of four,
two where one side is frozen, one at inference. M rows (images), C columns (captions), K captions per image, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.settings import float32_products
from . import sigmoid_pairs_torch
from .sigmoid_pairs_torch import Pairs


@torch.library.custom_op("dreamlip_kernels::sigmoid_pairs", mutates_args=())
def sigmoid_pairs_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    first: int,
    k: int,
    needs_x: bool,
    needs_y: bool,
    needs_scale: bool,
    float32: str,
    backend: str,
    x_images: Tensor | None = None,
    same_image: str = "ignore",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``-logsigmoid(sign * (scale * x @ y.T + bias)).sum()``, sign +1 at (first + c // k, c) and -1 elsewhere,
    without what masks drop.

    With x_images [M] int32 the other pairs (m, c) with ``x_images[m] == x_images[first + c // k]`` are left out, or
    with ``same_image="positive"`` have the sign +1.

    -> the sum, and its gradients dx [M, D], dy [C, D] (each [0] where it is not needed), dscale and dbias (0 without
    ``needs_scale``), all in scale's dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        pairs = Pairs(x, y, scale, bias, x_mask, y_mask, first, k, float32, x_images, same_image)
        return _FORWARD[backend](pairs, needs_x, needs_y, needs_scale)


@sigmoid_pairs_op.register_fake
def _(x, y, scale, bias, x_mask, y_mask, first, k, needs_x, needs_y, *_):
    dx = x.new_empty(x.shape if needs_x else 0, dtype=scale.dtype)
    dy = y.new_empty(y.shape if needs_y else 0, dtype=scale.dtype)
    return torch.empty_like(scale), dx, dy, torch.empty_like(scale), torch.empty_like(scale)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.needs_x, ctx.needs_y, ctx.needs_scale = inputs[8:11]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_total, *_):
    if d_total is None:
        return (None,) * 15
    dx, dy, dscale, dbias = ctx.saved_tensors
    dx = (dx * d_total).to(ctx.dtype) if ctx.needs_x else None
    dy = (dy * d_total).to(ctx.dtype) if ctx.needs_y else None
    of_scale = (dscale * d_total, dbias * d_total) if ctx.needs_scale else (None, None)
    return dx, dy, *of_scale, *(None,) * 11


sigmoid_pairs_op.register_autograd(_backward, setup_context=_setup_context)


def sigmoid_pairs(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    *,
    first: int,
    k: int,
    backend: str,
    x_images: Tensor | None = None,
    same_image: str = "ignore",
) -> Tensor:
    """The sum of ``sigmoid_pairs_op``; no gradient is computed of what needs none."""
    needs = [torch.is_grad_enabled() and v.requires_grad for v in (x, y, scale, bias)]
    needs = (*needs[:2], any(needs[2:]))
    return sigmoid_pairs_op(
        x, y, scale, bias, x_mask, y_mask, first, k, *needs, float32_products(x), backend, x_images, same_image
    )[0]


def _triton(*arguments):
    from . import sigmoid_pairs_triton

    with torch.cuda.device_of(arguments[0].x):  # Triton launches on the current device, which need not be theirs
        return sigmoid_pairs_triton.forward(*arguments)


_FORWARD = {"torch": sigmoid_pairs_torch.forward, "triton": _triton}
