"""The Triton kernel of sigmoid_pairs: a tile of logits becomes its losses' sum and, for matrix products to come,
its gradient G.

M rows (images), C columns (captions), K captions per image, D width.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(v, stride, first, count, d, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Rows first.. and columns d.. of v [count, D], zeros beyond its edges: [BLOCK, BLOCK_D]."""
    if DESCRIPTOR:
        tile = v.load([first, d])
    else:
        rows = first + tl.arange(0, BLOCK)
        cols = d + tl.arange(0, BLOCK_D)
        inside = (rows < count)[:, None] & (cols < D)[None, :]
        tile = tl.load(v + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _softplus_and_sigmoid(u):
    """log(1 + exp(u)), to 2e-7 of itself where it is small too, and 1 / (1 + exp(-u))."""
    e = tl.exp(-tl.abs(u))
    # log(1 + e) / e on [0, 1], a Chebyshev fit: small values, of confident negatives, are most of what is added up,
    # and log(1 + e) would lose them.
    series = 0.044214192777872086 - e * 0.008574675768613815
    series = -0.10785368084907532 + e * series
    series = 0.17757023870944977 + e * series
    series = -0.2449961155653 + e * series
    series = 0.3327617645263672 + e * series
    series = -0.49997448921203613 + e * series
    series = 0.9999998211860657 + e * series
    return tl.maximum(u, 0.0) + e * series, tl.where(u > 0, 1.0, e) / (1.0 + e)


@triton.jit
def _dots(
    x,
    y,
    stride_x,
    stride_y,
    first_m,
    first_c,
    M,
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """x @ y.T of the tile at (first_m, first_c): [BLOCK_M, BLOCK_C]."""
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_tile = _tile(x, stride_x, first_m, M, d, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
        y_tile = _tile(y, stride_y, first_c, C, d, D, BLOCK_C, BLOCK_D, DESCRIPTOR)
        acc = tl.dot(x_tile, y_tile.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _present(offs, stop, mask_ptr, HAS_MASK: tl.constexpr):
    """Which rows or columns lie before ``stop`` and are not masked."""
    keep = offs < stop
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + offs, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _same_image(x_images_ptr, y_images_ptr, offs_m, offs_c, M, C):
    """Which pairs are of one image: [BLOCK_M, BLOCK_C]."""
    x_image = tl.load(x_images_ptr + offs_m, mask=offs_m < M, other=-1)
    y_image = tl.load(y_images_ptr + offs_c, mask=offs_c < C, other=-2)
    return x_image[:, None] == y_image[None, :]


@triton.jit(do_not_specialize=["first", "k", "first_row", "first_col", "rows", "cols", "first_sum"])
def sigmoid_tile(
    x,
    y,
    x_mask_ptr,
    y_mask_ptr,
    x_images_ptr,
    y_images_ptr,
    scale_ptr,
    g_ptr,
    sums_ptr,
    M,
    C,
    D,
    stride_x,
    stride_y,
    first,
    k,
    first_row,
    first_col,
    rows,
    cols,
    stride_g,
    first_sum,
    sums,
    HAS_X_MASK: tl.constexpr,
    HAS_Y_MASK: tl.constexpr,
    SAME_IS_POSITIVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """One tile of a chunk of rows x cols pairs: sums [2, sums] of the losses and of the gradients, G [rows,
    cols] over 2^-15.

    Of all pairs but a caption's own, at (first + c // k, c), which adds nothing and has a G of 0. With numbers of
    images [M] and [C], pairs of one image are positives or add nothing, and the others negatives.
    scale_ptr holds the slope and the bias.
    """
    tiles_c = tl.cdiv(cols, BLOCK_C)
    tile_m, tile_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    first_m, first_c = first_row + tile_m * BLOCK_M, first_col + tile_c * BLOCK_C
    acc = _dots(x, y, stride_x, stride_y, first_m, first_c, M, C, D, BLOCK_M, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTOR)
    offs_m, offs_c = first_m + tl.arange(0, BLOCK_M), first_c + tl.arange(0, BLOCK_C)
    u = acc * tl.load(scale_ptr) + tl.load(scale_ptr + 1)
    if x_images_ptr is not None:
        same = _same_image(x_images_ptr, y_images_ptr, offs_m, offs_c, M, C)
        u = tl.where(same, -u if SAME_IS_POSITIVE else float("-inf"), u)
    # A mask is spread over the tile: only tiles at an edge or on the diagonal should need its registers.
    stop_m, stop_c = first_row + rows, first_col + cols
    if HAS_X_MASK or first_m + BLOCK_M > stop_m:
        u = tl.where(_present(offs_m, stop_m, x_mask_ptr, HAS_X_MASK)[:, None], u, float("-inf"))
    if HAS_Y_MASK or first_c + BLOCK_C > stop_c:
        u = tl.where(_present(offs_c, stop_c, y_mask_ptr, HAS_Y_MASK)[None, :], u, float("-inf"))
    if (first_m <= first + (first_c + BLOCK_C - 1) // k) & (first + first_c // k < first_m + BLOCK_M):
        u = tl.where(offs_m[:, None] == (first + offs_c // k)[None, :], float("-inf"), u)
    softplus, g = _softplus_and_sigmoid(u)
    if SAME_IS_POSITIVE:
        g = tl.where(same, -g, g)
    tl.store(sums_ptr + first_sum + tl.program_id(0), tl.sum(softplus))
    if GRADIENT:
        tl.store(sums_ptr + sums + first_sum + tl.program_id(0), tl.sum(g))
        to = g_ptr + (offs_m - first_row).to(tl.int64)[:, None] * stride_g + (offs_c - first_col)[None, :]
        inside = (offs_m < first_row + rows)[:, None] & (offs_c < first_col + cols)[None, :]
        tl.store(to, (g * 32768.0).to(g_ptr.dtype.element_ty), mask=inside)
