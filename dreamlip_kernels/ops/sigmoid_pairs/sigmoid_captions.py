"""The registered op under ``reduction="none"`` of the sigmoid loss: each caption's sum over all images (docs/math.md
eq. 19), as torch code.

What a caption's loss weighs is known only in backward, so its tiles are visited once more there: four products a pair
where the sum of all takes three. M rows (images), C columns (captions), K captions per image, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import sigmoid_captions_torch
from .sigmoid_pairs_torch import Pairs


@torch.library.custom_op("dreamlip_kernels::sigmoid_captions", mutates_args=())
def sigmoid_captions_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    first: int,
    k: int,
    x_images: Tensor | None,
    same_image: str,
) -> Tensor:
    """``-logsigmoid(sign * (scale * x @ y.T + bias)).sum(0)``, [C] in scale's dtype: sign, masks and images are those
    of ``sigmoid_pairs_op``.
    """
    with torch.autocast(x.device.type, enabled=False):
        return sigmoid_captions_torch.forward(_pairs(x, y, scale, bias, x_mask, y_mask, first, k, x_images, same_image))


@torch.library.custom_op("dreamlip_kernels::sigmoid_captions_backward", mutates_args=())
def sigmoid_captions_backward_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    first: int,
    k: int,
    x_images: Tensor | None,
    same_image: str,
    d_loss: Tensor,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [M, D] and dy [C, D] (each [0] where it is not needed), dscale and dbias, of d_loss [C]; scale's dtype."""
    with torch.autocast(x.device.type, enabled=False):
        pairs = _pairs(x, y, scale, bias, x_mask, y_mask, first, k, x_images, same_image)
        return sigmoid_captions_torch.backward(pairs, d_loss, needs_x, needs_y)


def _pairs(x, y, scale, bias, x_mask, y_mask, first, k, x_images, same_image) -> Pairs:
    return Pairs(x, y, scale, bias, x_mask, y_mask, first, k, x_images=x_images, same_image=same_image)


@sigmoid_captions_op.register_fake
def _(x, y, scale, bias, x_mask, y_mask, first, k, x_images, same_image):
    return y.new_empty(y.shape[0], dtype=scale.dtype)


@sigmoid_captions_backward_op.register_fake
def _(x, y, scale, bias, x_mask, y_mask, first, k, x_images, same_image, d_loss, needs_x, needs_y):
    dx = x.new_empty(x.shape if needs_x else 0, dtype=scale.dtype)
    dy = y.new_empty(y.shape if needs_y else 0, dtype=scale.dtype)
    return dx, dy, torch.empty_like(scale), torch.empty_like(scale)


def _setup_context(ctx, inputs, output):
    x, y, scale, bias, x_mask, y_mask, ctx.first, ctx.k, x_images, ctx.same_image = inputs
    ctx.save_for_backward(x, y, scale, bias, x_mask, y_mask, x_images)


def _backward(ctx, d_loss):
    x, y, scale, bias, x_mask, y_mask, x_images = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    arguments = x, y, scale, bias, x_mask, y_mask, ctx.first, ctx.k, x_images, ctx.same_image
    dx, dy, dscale, dbias = sigmoid_captions_backward_op(*arguments, d_loss, *needs[:2])
    gradients = dx.to(x.dtype), dy.to(y.dtype), dscale, dbias
    return *(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *[None] * 6


sigmoid_captions_op.register_autograd(_backward, setup_context=_setup_context)


def sigmoid_captions(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    *,
    first: int,
    k: int,
    x_images: Tensor | None = None,
    same_image: str = "ignore",
) -> Tensor:
    """``sigmoid_captions_op``: [C]."""
    return sigmoid_captions_op(x, y, scale, bias, x_mask, y_mask, first, k, x_images, same_image)
