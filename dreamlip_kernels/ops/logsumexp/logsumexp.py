"""The primitive under every contrastive loss here, the bidirectional log-sum-exp (docs/math.md section 1), and its
registered ops.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import dispatch
from ...backends.settings import float32_products, settings
from ...checks import as_scale, check_features, check_mask, promoted
from ...numerics import accumulate_dtype
from ...options import ContrastiveBackend
from ..rectangle import Rectangle, Upstream
from . import logsumexp_cuda, logsumexp_torch


def bidirectional_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    y_mask: Tensor | None = None,
    x_mask: Tensor | None = None,
    backend: ContrastiveBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of ``scale * x @ y.T`` for each slot, without storing the [K, M, C] logits.

    Equals ``z = scale * torch.einsum("md,kcd->kmc", x.float(), y.float()); return z.logsumexp(2), z.logsumexp(1)``.
    docs/math.md, eq. 1-4. Differentiable once in x, y and scale.

    Args:
        x: [M, D], float32, bfloat16, float16 or float64, any strides; need not be normalized.
        y: [K, C, D], same device, any strides; of two dtypes torch's promotion decides.
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
    x, y = promoted(x, y)
    check_mask(fn, "y_mask", y_mask, y.shape[:2], y)
    check_mask(fn, "x_mask", x_mask, x.shape[:1], x)
    (m, d), (k, c, _) = x.shape, y.shape
    op_backend = dispatch.select(fn, x, backend, M=m, C=c, K=k, D=d)
    row, col, _ = logsumexp(x, y, as_scale(fn, "scale", scale, x), x_mask, y_mask, paired=False, backend=op_backend)
    return row, col


def logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    *,
    paired: bool,
    backend: str,
    x_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """row, col and pos of ``logsumexp_op``, differentiable, x_images those of columns too; arguments are checked
    already.
    """
    keep = backend == "torch" and _keeps_pairs(x, y, scale)
    float32 = float32_products(x)
    row, col, pos, _ = logsumexp_op(x, y, scale, x_mask, y_mask, paired, keep, float32, backend, x_images, x_images)
    return row, col, pos


def _keeps_pairs(x: Tensor, y: Tensor, scale: Tensor) -> bool:
    """Whether forward keeps exp(z - offset) of all pairs for backward: one product less, where they fit the workspace.

    On CPUs, where it was measured. On CUDA each elementwise operation of the torch backend is a pass over memory, and
    keeping the pairs adds as many passes as the product that it saves is worth.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    pairs = x.shape[0] * y.shape[0] * y.shape[1]
    needed = x.requires_grad or y.requires_grad or scale.requires_grad
    return needed and pairs * scale.element_size() <= settings.workspace_bytes


# --- registered ops ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("dreamlip_kernels::bidirectional_logsumexp", mutates_args=())
def logsumexp_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    paired: bool,
    keep: bool,
    float32: str,
    backend: str,
    x_images: Tensor | None = None,
    y_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row [K, M], col [K, C], if ``paired`` pos [K, C], the logits of the pairs (j, j), else [0, 0]; the saved pairs.

    One op for all of them: a positive's gradient and its share of the softmax's, which nearly cancel late in training,
    are added in float32 before anything is rounded, and no second dy [K, C, D] waits for its sum with the first.

    Args:
        keep: forward keeps [K, M, C] of the pairs for backward, else [0, 0, 0]; so do all backends but "torch".
        float32: how 16-bit kernels multiply float32 features, "fp16", or "torch" as its own setting says.
        x_images, y_images: [M] and [C] int32, both or none: pairs of equal ones are left out, apart from (j, j) where
            ``paired``.
    """
    rectangle = Rectangle(x, y, scale, x_mask, y_mask, float32, x_images, y_images)
    with torch.autocast(x.device.type, enabled=False):
        return _FORWARD[backend](rectangle, paired, keep)


@logsumexp_op.register_fake
def _(x, y, scale, x_mask, y_mask, paired, keep, float32, backend, x_images=None, y_images=None):
    k, c, _ = y.shape
    m, dtype = x.shape[0], accumulate_dtype(x)
    return (
        x.new_empty(k, m, dtype=dtype),
        x.new_empty(k, c, dtype=dtype),
        x.new_empty((k, c) if paired else (0, 0), dtype=dtype),
        x.new_empty((k, m, c) if keep and backend == "torch" else (0, 0, 0), dtype=dtype),
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
    pos: Tensor | None,
    saved_pairs: Tensor | None,
    d_row: Tensor,
    d_col: Tensor,
    d_pos: Tensor | None,
    diagonal: int,
    first_pair: int,
    stop_pair: int,
    needs_x: bool,
    needs_y: bool,
    float32: str,
    backend: str,
    full_precision: bool,
    x_images: Tensor | None = None,
    y_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (strided as y) and dscale; ``Upstream`` says what the gradients are of.

    A side that needs no gradient costs nothing and comes back without an element. ``full_precision`` leaves dx and dy
    in the dtype they were summed in, for a caller that sums on. With images (as in ``logsumexp_op``) d_pos is not None
    where pairs are a row's own."""
    rectangle = Rectangle(x, y, scale, x_mask, y_mask, float32, x_images, y_images)
    upstream = Upstream(row, col, d_row, d_col, pos, d_pos, diagonal, first_pair, stop_pair, saved_pairs)
    dtype = accumulate_dtype(x) if full_precision else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        return _BACKWARD[backend](rectangle, upstream, needs_x, needs_y, dtype)


@logsumexp_backward_op.register_fake
def _(
    x,
    y,
    scale,
    x_mask,
    y_mask,
    row,
    col,
    pos,
    saved_pairs,
    d_row,
    d_col,
    d_pos,
    diagonal,
    first_pair,
    stop_pair,
    needs_x,
    needs_y,
    float32,
    backend,
    full_precision,
    x_images=None,
    y_images=None,
):
    dtype = accumulate_dtype(x) if full_precision else x.dtype
    return (
        x.new_empty(x.shape if needs_x else 0, dtype=dtype),
        torch.empty_like(y, dtype=dtype) if needs_y else y.new_empty(0, dtype=dtype),
        torch.empty_like(scale),
    )


def _setup_context(ctx, inputs, output):
    x, y, scale, x_mask, y_mask, ctx.paired, ctx.keep, ctx.float32, ctx.backend, x_images, y_images = inputs
    row, col, pos, saved_pairs = output
    ctx.set_materialize_grads(False)  # of the saved pairs, a gradient of zeros would be as large as they are
    ctx.mark_non_differentiable(saved_pairs)
    ctx.save_for_backward(x, y, scale, x_mask, y_mask, row, col, pos, saved_pairs, x_images, y_images)


def _backward(ctx, d_row, d_col, d_pos, _):
    x, y, scale, x_mask, y_mask, row, col, pos, saved_pairs, x_images, y_images = ctx.saved_tensors
    d_row = torch.zeros_like(row) if d_row is None else d_row
    d_col = torch.zeros_like(col) if d_col is None else d_col
    if d_pos is None and x_images is not None:  # which pairs are a row's own, and stay, is told by it
        d_pos = torch.zeros_like(pos)
    needs_x, needs_y, needs_scale = ctx.needs_input_grad[:3]
    dx, dy, dscale = logsumexp_backward_op(
        x,
        y,
        scale,
        x_mask,
        y_mask,
        row,
        col,
        pos,
        saved_pairs if ctx.keep else None,
        d_row,
        d_col,
        d_pos if ctx.paired else None,
        0,
        0,
        y.shape[1],
        needs_x,
        needs_y,
        ctx.float32,
        ctx.backend,
        False,
        x_images,
        y_images,
    )
    return dx if needs_x else None, dy if needs_y else None, dscale if needs_scale else None, *[None] * 8


logsumexp_op.register_autograd(_backward, setup_context=_setup_context)


def _forward_triton(rectangle, paired, keep):
    from . import logsumexp_triton

    with torch.cuda.device_of(rectangle.x):  # Triton launches on the current device, which need not be theirs
        return logsumexp_triton.forward(rectangle, paired, keep)


def _backward_triton(rectangle, *arguments):
    from . import logsumexp_gradient_triton

    with torch.cuda.device_of(rectangle.x):
        return logsumexp_gradient_triton.backward(rectangle, *arguments)


_FORWARD = {"torch": logsumexp_torch.forward, "triton": _forward_triton, "cuda": logsumexp_cuda.forward}
_BACKWARD = {"torch": logsumexp_torch.backward, "triton": _backward_triton, "cuda": logsumexp_cuda.backward}
