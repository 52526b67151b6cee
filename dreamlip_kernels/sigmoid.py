"""The sigmoid loss with many positives an image (docs/math.md section 4): every image-caption pair is a yes-or-no question of its own.

    features -> all_gather_rows (images travel) -> sigmoid_pairs (one rectangle, logits never stored) -> scalar

N images (n on this rank), K sub-captions an image, D width, M rows (images), C columns (captions) of the rectangle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import as_scale, check_features, check_mask, check_shared
from .distributed.collectives import (
    Group,
    agreement_sizes,
    all_gather_rows,
    all_reduce_sum,
    check_agreement,
    rank_and_size,
)
from .ops.tiles import tiles


def multi_positive_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    *,
    text_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """The sigmoid loss of N images against all N*K sub-captions, an image's own K the positives; docs/math.md eq. 19.

    Equals, without storing the logits::

        z = logit_scale * torch.einsum("md,nkd->mnk", image_features.float(), text_features.float()) + logit_bias
        sign = 2 * torch.eye(N)[:, :, None] - 1
        loss = -F.logsigmoid(sign * z).sum() / (N * K)

    With K = 1 it is SigLIP's (Zhai et al., 2023); with K captions the multi-positive sigmoid loss of FLAIR (Xiao et al., 2025). Differentiable once in
    features, scale and bias. Plain torch, tile by tile, on every device.

    Args:
        image_features: [N, D], normalised by the caller; float32, bfloat16, float16 or float64.
        text_features: [N, K, D], same dtype and device.
        logit_scale: the multiplier: pass ``logit_scale.exp()``.
        logit_bias: added to every logit, a float or a tensor of one value; SigLIP starts it at -10, for nearly all pairs are negatives.
        text_mask: [N, K] bool, True where a sub-caption is present; the mean is over those.
        group: process group; None is the world group where one is initialised. N is then this rank's share, equal on every rank;
            averaging the ranks' losses (and gradients, as DDP and ZeRO do) gives exactly the single-process loss.

    Returns:
        Scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or ranks hold different shapes.
    """
    fn = "multi_positive_sigmoid_loss"
    check_features(fn, image_features=(image_features, 2), text_features=(text_features, 3))
    check_shared(fn, "N", "image_features", image_features.shape[:1], "text_features", text_features.shape[:1])
    n, k, _ = text_features.shape
    check_mask(fn, "text_mask", text_mask, (n, k), text_features)
    scale = as_scale(fn, "logit_scale", logit_scale, image_features)
    bias = as_scale(fn, "logit_bias", logit_bias, image_features)
    check_agreement(fn, agreement_sizes(text_features, text_mask), image_features.device, group)
    rank, world = rank_and_size(group)
    mask = None if text_mask is None else text_mask.reshape(-1)
    total = _sigmoid_pairs(
        all_gather_rows(image_features, group), text_features.flatten(0, 1), scale, bias, mask, rank * n, k
    )
    if mask is None:
        return total / max(n * k, 1)
    return total * world / all_reduce_sum(mask.sum(dtype=torch.int64), group).clamp(min=1)


@torch.library.custom_op("dreamlip_kernels::sigmoid_pairs", mutates_args=())
def _sigmoid_pairs(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, y_mask: Tensor | None, first: int, k: int
) -> Tensor:
    """``-logsigmoid(sign * (scale * x @ y.T + bias)).sum()``, sign +1 at (first + c // k, c) and -1 elsewhere, masked columns left out."""
    with torch.autocast(x.device.type, enabled=False):
        x_scaled = x.to(scale.dtype) * scale
        total = x_scaled.new_zeros((), dtype=torch.float64)
        for rows, cols in tiles(x.shape[0], y.shape[0], x.device):
            u, _ = _wrongness(x_scaled, y, bias, y_mask, rows, cols, first, k)
            total -= F.logsigmoid(u.neg_()).sum(dtype=torch.float64)
        return total.to(scale.dtype)


@_sigmoid_pairs.register_fake
def _(x, y, scale, bias, y_mask, first, k):
    return torch.empty_like(scale)


@torch.library.custom_op("dreamlip_kernels::sigmoid_pairs_backward", mutates_args=())
def _sigmoid_pairs_backward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, y_mask: Tensor | None, d_total: Tensor, first: int, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        x_wide = x.to(scale.dtype)
        x_scaled = x_wide * scale
        dx, dy = torch.zeros_like(x_wide), torch.zeros_like(y, dtype=scale.dtype)
        dbias = x_wide.new_zeros((), dtype=torch.float64)
        for rows, cols in tiles(x.shape[0], y.shape[0], x.device):
            u, own = _wrongness(x_scaled, y, bias, y_mask, rows, cols, first, k)
            g = u.sigmoid_()
            g[own] = -g[own]
            dx[rows].addmm_(g, y[cols].to(g.dtype))
            dy[cols].addmm_(g.T, x_wide[rows])
            dbias += g.sum(dtype=torch.float64)
        dscale = (x_wide * dx).sum(dtype=torch.float64) * d_total
        factor = scale * d_total
        return (
            dx.mul_(factor).to(x.dtype),
            dy.mul_(factor).to(y.dtype),
            dscale.to(scale.dtype),
            (dbias * d_total).to(scale.dtype),
        )


@_sigmoid_pairs_backward.register_fake
def _(x, y, scale, bias, y_mask, d_total, first, k):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale), torch.empty_like(scale)


_sigmoid_pairs.register_autograd(
    lambda ctx, d_total: (*_sigmoid_pairs_backward(*ctx.saved_tensors, d_total, ctx.first, ctx.k), None, None, None),
    setup_context=lambda ctx, inputs, output: _save(ctx, *inputs),
)


def _save(ctx, x, y, scale, bias, y_mask, first, k):
    ctx.first, ctx.k = first, k
    ctx.save_for_backward(x, y, scale, bias, y_mask)


def _wrongness(
    x_scaled: Tensor, y: Tensor, bias: Tensor, y_mask: Tensor | None, rows: slice, cols: slice, first: int, k: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A tile of ``u = -sign * z``, whose softplus is the pair's loss, -inf in masked columns; and the index of its positives."""
    u = (x_scaled[rows] @ y[cols].to(x_scaled.dtype).T).add_(bias)
    # The tile's columns whose own image is among its rows: one stretch, for images and captions are in the same order.
    start, stop = max(cols.start, (rows.start - first) * k), min(cols.stop, (rows.stop - first) * k)
    column = torch.arange(start, max(start, stop), device=u.device)
    own = (column // k + (first - rows.start), column - cols.start)
    u[own] = -u[own]
    if y_mask is not None:
        u.masked_fill_(~y_mask[None, cols], -torch.inf)
    return u, own
