"""The primitive under every contrastive loss here, the bidirectional log-sum-exp (docs/math.md section 1), and its torch backend.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..checks import as_scale, check_features, check_mask
from ..numerics import accumulate_dtype
from .paired_dot import paired_dot, paired_slices
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
    (m, d), (k, c, _) = x.shape, y.shape
    chosen = dispatch.select(fn, x, backend, M=m, C=c, K=k, D=d)
    row, col, _ = logsumexp_op(x, y, as_scale(fn, "scale", scale, x), x_mask, y_mask, False, chosen)
    return row, col


# --- registered ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dreamlip_kernels::bidirectional_logsumexp", mutates_args=())
def logsumexp_op(
    x: Tensor, y: Tensor, scale: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, paired: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """row, col, and with ``paired`` the positives' logits pos [K, C], those of the pairs (j, j), computed as the sums that contain them; else [0, 0].

    One op for all three: a positive's gradient and its share of the softmax's, which nearly cancel late in training, are added in float32 before anything
    is rounded, and no second dy [K, C, D] waits for its sum with the first.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _FORWARD[backend](x, y, scale, x_mask, y_mask, paired)


@logsumexp_op.register_fake
def _(x, y, scale, x_mask, y_mask, paired, backend):
    k, c, _ = y.shape
    dtype = accumulate_dtype(x)
    return (
        x.new_empty(k, x.shape[0], dtype=dtype),
        x.new_empty(k, c, dtype=dtype),
        x.new_empty((k, c) if paired else (0, 0), dtype=dtype),
    )


@torch.library.custom_op("dreamlip_kernels::bidirectional_logsumexp_backward", mutates_args=())
def logsumexp_backward_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    row: Tensor,
    col: Tensor,
    d_row: Tensor,
    d_col: Tensor,
    d_pos: Tensor | None,
    diagonal: int,
    backend: str,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (strided as y) and dscale. With d_pos [K, C] the pairs (diagonal + j, j), as far as there are such rows, are positives with that upstream.

    ``wide`` leaves dx and dy in the dtype they were summed in, for a caller that sums on.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = accumulate_dtype(x) if wide else x.dtype
        return _BACKWARD[backend](x, y, scale, x_mask, y_mask, row, col, d_row, d_col, d_pos, diagonal, dtype)


@logsumexp_backward_op.register_fake
def _(x, y, scale, x_mask, y_mask, row, col, d_row, d_col, d_pos, diagonal, backend, wide):
    dtype = accumulate_dtype(x) if wide else x.dtype
    return x.new_empty(x.shape, dtype=dtype), torch.empty_like(y, dtype=dtype), torch.empty_like(scale)


def _setup_context(ctx, inputs, output):
    x, y, scale, x_mask, y_mask, ctx.paired, ctx.backend = inputs
    ctx.save_for_backward(x, y, scale, x_mask, y_mask, *output[:2])


def _backward(ctx, d_row, d_col, d_pos):
    dx, dy, dscale = logsumexp_backward_op(
        *ctx.saved_tensors, d_row, d_col, d_pos if ctx.paired else None, 0, ctx.backend, False
    )
    return dx, dy, dscale, None, None, None, None


logsumexp_op.register_autograd(_backward, setup_context=_setup_context)


# --- torch backend: one tile of logits at a time, true maxima ---------------------------------------------------------------


def _logits(
    x_scaled: Tensor, y: Tensor, rows: slice, cols: slice, x_mask: Tensor | None, y_mask: Tensor | None
) -> Tensor:
    z = x_scaled[rows] @ y[cols].to(x_scaled.dtype).T
    if y_mask is not None:
        z.masked_fill_(~y_mask[None, cols], -torch.inf)
    if x_mask is not None:
        z.masked_fill_(~x_mask[rows, None], -torch.inf)
    return z


def _forward_torch(x, y, scale, x_mask, y_mask, paired):
    x_scaled = x.to(scale.dtype) * scale
    row = x_scaled.new_full((y.shape[0], x.shape[0]), -torch.inf)
    col = x_scaled.new_full(y.shape[:2], -torch.inf)
    for k in range(y.shape[0]):
        for rows, cols in tiles(x.shape[0], y.shape[1], x.device):
            z = _logits(x_scaled, y[k], rows, cols, x_mask, None if y_mask is None else y_mask[k])
            row[k, rows] = torch.logaddexp(row[k, rows], z.logsumexp(1))
            col[k, cols] = torch.logaddexp(col[k, cols], z.logsumexp(0))
    return row, col, paired_dot(x_scaled, y) if paired else x_scaled.new_empty(0, 0)


def _backward_torch(x, y, scale, x_mask, y_mask, row, col, d_row, d_col, d_pos, diagonal, dtype):
    x_wide = x.to(scale.dtype)
    x_scaled = x_wide * scale
    dx = torch.zeros_like(x_wide)
    dy = torch.empty_like(y, dtype=dtype)
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
        if d_pos is not None:
            rows, cols = paired_slices(x.shape[0], y.shape[1], diagonal)
            dx[rows].addcmul_(d_pos[k, cols, None], y[k, cols])
            dy_k[cols].addcmul_(d_pos[k, cols, None], x_wide[rows])
        dy[k] = dy_k.mul_(scale)
    dscale = (x_wide * dx).sum(dtype=torch.float64).to(scale.dtype)
    return dx.mul_(scale).to(dtype), dy, dscale


def _forward_triton(*arguments):
    from . import logsumexp_triton

    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, which need not be theirs
        return logsumexp_triton.forward(*arguments)


def _backward_triton(*arguments):
    from . import logsumexp_triton

    with torch.cuda.device_of(arguments[0]):
        return logsumexp_triton.backward(*arguments)


_FORWARD = {"torch": _forward_torch, "triton": _forward_triton}
_BACKWARD = {"torch": _backward_torch, "triton": _backward_triton}
