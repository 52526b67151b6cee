"""Triton backend of group_patches: launches of the kernels in kernels/.

K up to 32 (backends/dispatch.py asks first).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dense import dense
from .kernels.backward_kernels import pool_backward
from .kernels.forward_kernels import pool_forward

_DEFAULT_THRESHOLD = -1e38  # the kernels read anything below -1e30 as 1 / (number of valid patches)

# (BLOCK_P, BLOCK_D, warps, stages) by (KP, dtype): without spills on sm_80 and sm_90
# (tests/kernels/test_compile_only.py); not tuned on a device yet.
BLOCKS = {
    (16, torch.bfloat16): (32, 128, 8, 3),
    (16, torch.float16): (32, 64, 4, 3),
    (16, torch.float32): (32, 64, 8, 2),
    (32, torch.bfloat16): (32, 32, 8, 2),
    (32, torch.float16): (16, 64, 8, 2),
    (32, torch.float32): (16, 64, 8, 2),
}


def launch_options(texts: int, dtype: torch.dtype) -> dict[str, int]:
    """The block sizes and launch options for K texts."""
    kp = max(16, triton.next_power_of_2(texts))
    block_p, block_d, warps, stages = BLOCKS[kp, dtype]
    return dict(KP=kp, BLOCK_P=block_p, BLOCK_D=block_d, num_warps=warps, num_stages=stages)


def _rows(*features: Tensor) -> list[Tensor]:
    """Features whose last dimension is contiguous; the kernels take the other strides as they are."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in features]


def _options(threshold: float | None, normalization: str, mask: Tensor | None, dtype: torch.dtype) -> dict:
    return dict(
        threshold=_DEFAULT_THRESHOLD if threshold is None else max(float(threshold), -1e29),
        NORMALIZATION=("minmax", "softmax", "none").index(normalization),
        HAS_MASK=mask is not None,
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
    )


def forward(patches, texts, threshold, normalization, patch_mask) -> tuple[Tensor, Tensor, Tensor]:
    """group_patches' outputs: pooled [N, K, D], similarities [N, K, P] and inverse patch norms [N, P] in float32."""
    x, t = _rows(patches, texts)
    n, p, d = x.shape
    k = t.shape[1]
    pooled = torch.empty(n, k, d, dtype=t.dtype, device=t.device)
    similarity = torch.empty(n, k, p, dtype=torch.float32, device=x.device)
    inv_norm = torch.empty(n, p, dtype=torch.float32, device=x.device)
    if n:
        mask = inv_norm if patch_mask is None else dense(patch_mask)
        strides = dict(stride_xn=x.stride(0), stride_xp=x.stride(1), stride_tn=t.stride(0), stride_tk=t.stride(1))
        options = _options(threshold, normalization, patch_mask, x.dtype) | launch_options(k, x.dtype)
        pool_forward[(n,)](x, t, mask, pooled, similarity, inv_norm, k, p, d, **strides, **options)
    return pooled, similarity, inv_norm


def backward(
    patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled
) -> tuple[Tensor, Tensor]:
    """The gradients of patches [N, P, D] and texts [N, K, D]."""
    x, t, up = _rows(patches, texts, d_pooled)
    n, p, d = x.shape
    k = t.shape[1]
    d_patches = torch.empty(n, p, d, dtype=x.dtype, device=x.device)
    d_texts = torch.empty(n, k, d, dtype=t.dtype, device=t.device)
    if n:
        workspace = torch.empty_like(similarity), torch.empty_like(inv_norm)
        mask = inv_norm if patch_mask is None else dense(patch_mask)
        strides = dict(stride_xn=x.stride(0), stride_xp=x.stride(1), stride_tn=t.stride(0), stride_tk=t.stride(1))
        strides |= dict(stride_un=up.stride(0), stride_uk=up.stride(1))
        options = _options(threshold, normalization, patch_mask, x.dtype) | launch_options(k, x.dtype)
        tensors = (x, t, up, mask, similarity, inv_norm, *workspace, d_patches, d_texts)
        pool_backward[(n,)](*tensors, k, p, d, **strides, **options)
    return d_patches, d_texts
