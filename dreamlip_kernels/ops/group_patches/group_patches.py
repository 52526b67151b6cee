"""The registered op under the grouping loss: sub-captions pool the patches they are about (docs/math.md section 3).

    group_patches_op -> backend's forward: pooled, and for backward similarities and inverse patch norms
                     -> group_patches_backward_op -> backend's backward

N images, K sub-captions, P patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics import accumulate_dtype
from . import group_patches_torch

NORMALIZATIONS = ("minmax", "softmax", "none")


@torch.library.custom_op("dreamlip_kernels::group_patches", mutates_args=())
def group_patches_op(
    patches: Tensor, texts: Tensor, threshold: float | None, normalization: str, patch_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> pooled [N, K, D], and for backward the similarities [N, K, P] and inverse patch norms [N, P]."""
    with torch.autocast(patches.device.type, enabled=False):
        return _FORWARD[backend](patches, texts, threshold, normalization, patch_mask)


@group_patches_op.register_fake
def _(patches, texts, threshold, normalization, patch_mask, backend):
    n, p, _ = patches.shape
    dtype = accumulate_dtype(patches)
    pooled = texts.new_empty(texts.shape)
    return pooled, patches.new_empty(n, texts.shape[1], p, dtype=dtype), patches.new_empty(n, p, dtype=dtype)


@torch.library.custom_op("dreamlip_kernels::group_patches_backward", mutates_args=())
def group_patches_backward_op(
    patches: Tensor,
    texts: Tensor,
    similarity: Tensor,
    inv_norm: Tensor,
    threshold: float | None,
    normalization: str,
    patch_mask: Tensor | None,
    d_pooled: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> the gradients of patches [N, P, D] and texts [N, K, D]."""
    with torch.autocast(patches.device.type, enabled=False):
        return _BACKWARD[backend](patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled)


@group_patches_backward_op.register_fake
def _(patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled, backend):
    return patches.new_empty(patches.shape), texts.new_empty(texts.shape)


def _setup_context(ctx, inputs, output):
    patches, texts, ctx.threshold, ctx.normalization, patch_mask, ctx.backend = inputs
    _, similarity, inv_norm = output
    ctx.save_for_backward(patches, texts, similarity, inv_norm, patch_mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_pooled, d_similarity, d_inv_norm):
    patches, texts, similarity, inv_norm, patch_mask = ctx.saved_tensors
    if d_pooled is None:
        return None, None, None, None, None, None
    d_patches, d_texts = group_patches_backward_op(
        patches, texts, similarity, inv_norm, ctx.threshold, ctx.normalization, patch_mask, d_pooled, ctx.backend
    )
    return d_patches, d_texts, None, None, None, None


group_patches_op.register_autograd(_backward, setup_context=_setup_context)


# --- cpp and cuda backends: csrc/ -------------------------------------------------------------------------------------

_DEFAULT_THRESHOLD = -1e38  # csrc reads anything below -1e30 as 1 / (valid patches)


def _compiled_options(threshold: float | None, normalization: str) -> tuple[float, int]:
    number = _DEFAULT_THRESHOLD if threshold is None else max(float(threshold), -1e29)
    return number, NORMALIZATIONS.index(normalization)


def _forward_compiled(patches, texts, threshold, normalization, patch_mask):
    patches = group_patches_torch.without_masked(patches, patch_mask)
    options = _compiled_options(threshold, normalization)
    return torch.ops.dreamlip_csrc.patch_pool_forward(patches, texts, *options, patch_mask)


def _backward_compiled(patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled):
    patches = group_patches_torch.without_masked(patches, patch_mask)
    options = _compiled_options(threshold, normalization)
    return torch.ops.dreamlip_csrc.patch_pool_backward(
        patches, texts, similarity, inv_norm, *options, patch_mask, d_pooled
    )


# --- triton backend ---------------------------------------------------------------------------------------------------


def _forward_triton(*arguments):
    from . import group_patches_triton

    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, which need not be theirs
        return group_patches_triton.forward(*arguments)


def _backward_triton(*arguments):
    from . import group_patches_triton

    with torch.cuda.device_of(arguments[0]):
        return group_patches_triton.backward(*arguments)


_FORWARD = {
    "torch": group_patches_torch.forward,
    "cpp": _forward_compiled,
    "triton": _forward_triton,
    "cuda": _forward_compiled,
}
_BACKWARD = {
    "torch": group_patches_torch.backward,
    "cpp": _backward_compiled,
    "triton": _backward_triton,
    "cuda": _backward_compiled,
}
