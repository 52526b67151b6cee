"""pool_forward, a Triton kernel: one program per image, patches read in chunks; the second pass over them hits the L2
cache.

    pass 1: similarities and norms -> statistics of each row -> pass 2, columns by columns: pooled = weights @ patches

One image's sub-captions and patches meet nobody else's, so every sum has one owner: no atomics, the same bits each
time. Names of sizes are those of scores_kernels.py.
"""

import triton
import triton.language as tl

from .scores_kernels import (
    inverse_norm,
    load_tile,
    pooling_weights,
    row_statistics,
    similarities,
    two_dots,
    valid_patches,
)


# One compiled kernel serves every K and P: specialized on 1 and on multiples of 16 each shape would compile its own.
@triton.jit(do_not_specialize=["K", "P", "threshold"])
def pool_forward(
    x_ptr,
    t_ptr,
    mask_ptr,
    out_ptr,
    s_ptr,
    inv_ptr,
    K,
    P,
    D,
    threshold,
    stride_xn,
    stride_xp,
    stride_tn,
    stride_tk,
    NORMALIZATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [N, K, D], s [N, K, P] and inv [N, P] of one image. A threshold below -1e30 is 1 / (number of valid
    patches).
    """
    n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, KP)
    keep_k = offs_k < K
    x_image, t_image = x_ptr + n * stride_xn, t_ptr + n * stride_tn
    s_rows = s_ptr + (n * K + offs_k)[:, None] * P
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        w, of_t, of_x = similarities(
            t_image, stride_tk, x_image, stride_xp, offs_k, offs_p, keep_k, valid, D, PRECISION, KP, BLOCK_P, BLOCK_D
        )
        inv = inverse_norm(of_x)
        w = w * inverse_norm(of_t)[:, None] * inv[None, :]
        tl.store(inv_ptr + n * P + offs_p, inv, mask=offs_p < P)
        tl.store(s_rows + offs_p[None, :], w, mask=keep_k[:, None] & (offs_p < P)[None, :])
    tl.debug_barrier()  # other threads of this program read what was stored
    rows = row_statistics(s_ptr, mask_ptr, n, K, P, threshold, offs_k, NORMALIZATION, HAS_MASK, KP, BLOCK_P)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((KP, BLOCK_D), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
            w = tl.load(s_rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
            inv = tl.load(inv_ptr + n * P + offs_p, mask=valid, other=0.0)
            x = load_tile(x_image, stride_xp, offs_p, valid, offs_d, D)
            a, _, _ = pooling_weights(w, rows, valid, NORMALIZATION)
            acc = two_dots(a * inv[None, :], x, acc, PRECISION)
        out = out_ptr + (n * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=keep_k[:, None] & (offs_d < D)[None, :])
