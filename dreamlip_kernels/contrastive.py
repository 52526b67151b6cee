"""Image-text contrast with many captions an image, on one primitive: the bidirectional log-sum-exp (docs/math.md sections 1 and 2).

    features -> all_gather_rows (images travel) -> bidirectional_logsumexp (one rectangle, logits never stored)
             -> all_reduce_logsumexp (row sums) -> [K, n] arithmetic -> scalar

N images (n on this rank), K sub-captions an image, D width, M rows, C columns of the rectangle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .checks import accumulate_dtype, as_scale, check_choice, check_features, check_mask, check_shared
from .distributed import Group, all_gather_rows, all_reduce_logsumexp, all_reduce_sum, check_agreement, rank_and_size
from .tiles import tiles


def bidirectional_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    y_mask: Tensor | None = None,
    x_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of ``scale * x @ y.T`` for each slot, without storing the [K, M, C] logits.

    Equals ``z = scale * torch.einsum("md,kcd->kmc", x.float(), y.float()); return z.logsumexp(2), z.logsumexp(1)``.
    docs/math.md, eq. 1-4. Differentiable once in x, y and scale.

    Args:
        x: [M, D], float32, bfloat16, float16 or float64, any strides; need not be normalised.
        y: [K, C, D], same dtype and device, any strides.
        scale: the logit multiplier, a float or a tensor of one value.
        y_mask: [K, C] bool; False drops a column: -inf in ``col``, no part in ``row``, no gradient.
        x_mask: [M] bool; False drops a row in the same way.
        backend: "auto" or one that ``explain()`` lists.

    Returns:
        row [K, M] and col [K, C], float32 (float64 for float64 inputs). A row or column without a logit is -inf.

    Raises:
        ValueError: shapes, dtypes or devices disagree.  RuntimeError: the requested backend cannot run here.
    """
    fn = "bidirectional_logsumexp"
    check_features(fn, x=(x, 2), y=(y, 3))
    check_mask(fn, "y_mask", y_mask, y.shape[:2], y)
    check_mask(fn, "x_mask", x_mask, x.shape[:1], x)
    return _bidirectional_logsumexp(x, y, as_scale(fn, "scale", scale, x), x_mask, y_mask, -1, dispatch.select(fn, x, backend))


def multi_positive_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    text_mask: Tensor | None = None,
    negatives: str = "slot",
    positives: str = "mean",
    reduction: str = "mean",
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Contrast of each image with its K sub-captions against every other image's, docs/math.md eq. 5-7.

    negatives="slot" equals the mean over k of K plain CLIP losses (DreamLIP); "all" puts all N*K captions into one softmax::

        row, col = bidirectional_logsumexp(image_features, text_features.transpose(0, 1), logit_scale)   # [K, N] each
        pos = logit_scale * torch.einsum("nd,nkd->kn", image_features, text_features)
        row = row.logsumexp(0) if negatives == "all" else row
        loss = ((row - pos) + (col - pos)).mean() / 2

    positives="logsum" (with negatives="all") sums an image's positives inside the logarithm of the image-to-text term.

    Args:
        image_features: [N, D], normalised by the caller; float32, bfloat16, float16 or float64.
        text_features: [N, K, D], same dtype and device.
        logit_scale: the multiplier, 1 / temperature: pass ``logit_scale.exp()``.
        text_mask: [N, K] bool, True where a sub-caption is present; missing ones are neither positive nor negative.
        reduction: "mean", or "none" for the [N, K] pair losses with masked entries 0 (positives="mean" only).
        group: process group; None is the world group where one is initialised. N is then this rank's share, equal on every rank;
            averaging the ranks' losses (and gradients, as DDP and ZeRO do) gives exactly the single-process loss.
        backend: as in ``bidirectional_logsumexp``.

    Returns:
        Scalar, or [N, K]; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or options disagree, or ranks hold different shapes.
        RuntimeError: the requested backend cannot run here.
    """
    fn = "multi_positive_contrastive_loss"
    check_features(fn, image_features=(image_features, 2), text_features=(text_features, 3))
    check_shared(fn, "N", "image_features", image_features.shape[:1], "text_features", text_features.shape[:1])
    n, k, _ = text_features.shape
    check_mask(fn, "text_mask", text_mask, (n, k), text_features)
    check_choice(fn, "negatives", negatives, ("slot", "all"))
    check_choice(fn, "positives", positives, ("mean", "logsum"))
    check_choice(fn, "reduction", reduction, ("mean", "none"))
    if positives == "logsum" and negatives != "all":
        raise ValueError(f"{fn}: positives='logsum' needs negatives='all', got negatives={negatives!r}")
    if positives == "logsum" and reduction == "none":
        raise ValueError(f"{fn}: reduction='none' needs positives='mean': the sum inside the log has no loss of a single pair")
    check_agreement(fn, agreement_sizes(text_features, text_mask), image_features.device, group)

    scale = as_scale(fn, "logit_scale", logit_scale, image_features)
    text_KND = text_features.transpose(0, 1)
    mask_KN = None if text_mask is None else text_mask.T
    chosen = dispatch.select("bidirectional_logsumexp", image_features, backend)
    own_first = rank_and_size(group)[0] * n  # pair (own_first + j, j) of the rectangle is a positive
    row, col = _bidirectional_logsumexp(all_gather_rows(image_features, group), text_KND, scale, None, mask_KN, own_first, chosen)
    row = all_reduce_logsumexp(row, group)  # [K, n]: this rank's images over the world's captions
    pos = scale * _paired_dot(image_features, text_KND, chosen != "torch")  # [K, n]
    if negatives == "all":
        row = _logsumexp_slots(row).expand_as(pos)
    col_term = _where(mask_KN, col - pos)
    if positives == "logsum":
        captioned = None if mask_KN is None else mask_KN.any(0)
        pos_sum = _logsumexp_slots(pos if mask_KN is None else pos.masked_fill(~mask_KN, -torch.inf))
        row_term = _where(captioned, row[0] - pos_sum[0])
        return (global_mean(row_term, captioned, group) + global_mean(col_term, mask_KN, group)) / 2
    pair = (_where(mask_KN, row - pos) + col_term) / 2
    return pair.T if reduction == "none" else global_mean(pair, mask_KN, group)


def agreement_sizes(text_features: Tensor, mask: Tensor | None) -> dict[str, int]:
    """What all ranks must agree on before their first collective."""
    n, k, d = text_features.shape
    return {"N (images a rank)": n, "K (sub-captions)": k, "D (width)": d, "text_mask (1 = given)": int(mask is not None)}


def global_mean(terms: Tensor, mask: Tensor | None, group: Group = None) -> Tensor:
    """This rank's part of the mean of masked ``terms`` over the world: the parts average to exactly that mean (eq. 8)."""
    if mask is None:
        return terms.sum() / max(terms.numel(), 1)
    count = all_reduce_sum(mask.sum(dtype=torch.int64), group).clamp(min=1)
    return terms.sum() * rank_and_size(group)[1] / count


def _where(mask: Tensor | None, value: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0)


def _logsumexp_slots(z: Tensor) -> Tensor:
    # [K, n] -> [1, n]. An image without a caption anywhere has only -inf, where torch's own gradient would be NaN.
    empty = torch.isneginf(z).all(0, keepdim=True)
    return torch.where(empty, -torch.inf, torch.where(empty, 0, z).logsumexp(0, keepdim=True))


# --- registered ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dreamlip_kernels::bidirectional_logsumexp", mutates_args=())
def _bidirectional_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, diagonal: int, backend: str
) -> tuple[Tensor, Tensor]:
    """``diagonal`` >= 0 says that the pairs (diagonal + j, j) are positives, whose large gradient a 16-bit backend adds apart."""
    with torch.autocast(x.device.type, enabled=False):
        return _FORWARD[backend](x, y, scale, x_mask, y_mask)


@_bidirectional_logsumexp.register_fake
def _(x, y, scale, x_mask, y_mask, diagonal, backend):
    k, c, _ = y.shape
    dtype = accumulate_dtype(x)
    return x.new_empty(k, x.shape[0], dtype=dtype), x.new_empty(k, c, dtype=dtype)


@torch.library.custom_op("dreamlip_kernels::bidirectional_logsumexp_backward", mutates_args=())
def _bidirectional_logsumexp_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    row: Tensor,
    col: Tensor,
    d_row: Tensor,
    d_col: Tensor,
    diagonal: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _BACKWARD[backend](x, y, scale, x_mask, y_mask, row, col, d_row, d_col, diagonal)


@_bidirectional_logsumexp_backward.register_fake
def _(x, y, scale, x_mask, y_mask, row, col, d_row, d_col, diagonal, backend):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)


def _setup_context(ctx, inputs, output):
    x, y, scale, x_mask, y_mask, ctx.diagonal, ctx.backend = inputs
    ctx.save_for_backward(x, y, scale, x_mask, y_mask, *output)


def _backward(ctx, d_row, d_col):
    dx, dy, dscale = _bidirectional_logsumexp_backward(*ctx.saved_tensors, d_row, d_col, ctx.diagonal, ctx.backend)
    return dx, dy, dscale, None, None, None, None


_bidirectional_logsumexp.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dreamlip_kernels::paired_dot", mutates_args=())
def _paired_dot(x: Tensor, y: Tensor, rounded: bool) -> Tensor:
    """``torch.einsum("nd,knd->kn", x.float(), y.float())`` without a float copy of y: x [N,D], y [K,N,D] -> [K,N] float32.

    ``rounded`` rounds float32 inputs to the 11 bits of float16, as a backend does that computes the log-sum-exps so: the same
    rounding in a positive and in the sum that contains it cancels in the loss.
    """
    round_ = _eleven_bits if rounded and x.dtype == torch.float32 else (lambda v: v)
    x = round_(x.to(accumulate_dtype(x)))
    out = x.new_empty(y.shape[:2])
    for k in range(y.shape[0]):
        torch.sum(x * round_(y[k]), dim=-1, out=out[k])
    return out


def _eleven_bits(v: Tensor) -> Tensor:
    # Dekker's splitting: float16's significand without its range.
    shifted = v * (2**13 + 1)
    return shifted - (shifted - v)


@_paired_dot.register_fake
def _(x, y, rounded):
    return x.new_empty(y.shape[:2], dtype=accumulate_dtype(x))


@torch.library.custom_op("dreamlip_kernels::paired_dot_backward", mutates_args=())
def _paired_dot_backward(x: Tensor, y: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.zeros_like(x, dtype=d_out.dtype)
    dy = torch.empty_like(y)
    for k in range(y.shape[0]):
        dx.addcmul_(d_out[k, :, None], y[k].to(d_out.dtype))
        dy[k] = d_out[k, :, None] * x
    return dx.to(x.dtype), dy


@_paired_dot_backward.register_fake
def _(x, y, d_out):
    return torch.empty_like(x), torch.empty_like(y)


_paired_dot.register_autograd(
    lambda ctx, d_out: (*_paired_dot_backward(*ctx.saved_tensors, d_out), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


# --- torch backend: one tile of logits at a time, true maxima ---------------------------------------------------------------


def _logits(x_scaled: Tensor, y: Tensor, rows: slice, cols: slice, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    z = x_scaled[rows] @ y[cols].to(x_scaled.dtype).T
    if y_mask is not None:
        z.masked_fill_(~y_mask[None, cols], -torch.inf)
    if x_mask is not None:
        z.masked_fill_(~x_mask[rows, None], -torch.inf)
    return z


def _forward_torch(x, y, scale, x_mask, y_mask):
    x_scaled = x.to(scale.dtype) * scale
    row = x_scaled.new_full((y.shape[0], x.shape[0]), -torch.inf)
    col = x_scaled.new_full(y.shape[:2], -torch.inf)
    for k in range(y.shape[0]):
        for rows, cols in tiles(x.shape[0], y.shape[1], x.device):
            z = _logits(x_scaled, y[k], rows, cols, x_mask, None if y_mask is None else y_mask[k])
            row[k, rows] = torch.logaddexp(row[k, rows], z.logsumexp(1))
            col[k, cols] = torch.logaddexp(col[k, cols], z.logsumexp(0))
    return row, col


def _backward_torch(x, y, scale, x_mask, y_mask, row, col, d_row, d_col, diagonal):
    x_wide = x.to(scale.dtype)
    x_scaled = x_wide * scale
    dx = torch.zeros_like(x_wide)
    dy = torch.empty_like(y)
    # A row or column without a logit has no gradient: exp(z - inf) is 0, and its upstream may be anything.
    d_row, row = torch.where(torch.isneginf(row), 0, d_row), row.masked_fill(torch.isneginf(row), torch.inf)
    d_col, col = torch.where(torch.isneginf(col), 0, d_col), col.masked_fill(torch.isneginf(col), torch.inf)
    for k in range(y.shape[0]):
        dy_k = torch.zeros_like(y[k], dtype=scale.dtype)
        for rows, cols in tiles(x.shape[0], y.shape[1], x.device):
            z = _logits(x_scaled, y[k], rows, cols, x_mask, None if y_mask is None else y_mask[k])
            g = (z - row[k, rows, None]).exp_().mul_(d_row[k, rows, None])
            g.add_(z.sub_(col[k, None, cols]).exp_().mul_(d_col[k, None, cols]))
            dx[rows].addmm_(g, y[k, cols].to(g.dtype))
            dy_k[cols].addmm_(g.T, x_wide[rows])
        dy[k] = dy_k.mul_(scale)
    dscale = (x_wide * dx).sum(dtype=torch.float64).to(scale.dtype)
    return dx.mul_(scale).to(x.dtype), dy, dscale


def _forward_triton(x, y, scale, x_mask, y_mask):
    from . import contrastive_triton

    return contrastive_triton.forward(x, y, scale, x_mask, y_mask)


def _backward_triton(x, y, scale, x_mask, y_mask, row, col, d_row, d_col, diagonal):
    from . import contrastive_triton

    return contrastive_triton.backward(x, y, scale, x_mask, y_mask, row, col, d_row, d_col, diagonal)


_FORWARD = {"torch": _forward_torch, "triton": _forward_triton}
_BACKWARD = {"torch": _backward_torch, "triton": _backward_triton}
