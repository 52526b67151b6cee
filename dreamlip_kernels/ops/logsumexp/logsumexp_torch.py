"""Torch backend of bidirectional_logsumexp: one tile of logits at a time, on any device and in any dtype.

    forward   z of a tile -> its log-sum-exps over rows and columns, with true maxima -> folded into the totals
              with ``keep`` exp(z) of all pairs is stored, and its plain sums are the totals; or z, at a large scale
    backward  z of a tile again, or what forward saved -> its gradient g -> dx += g y, dy += g.T x

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..products import accumulate, matmul, multiplies_sixteen_bit
from ..rectangle import Rectangle, Upstream, paired_slices
from ..tiles import tiles

# Plain sums of exp(z) are taken where no offset is needed: terms are at most 2^106 for unit vectors,
# and sums within these bounds are right to float32. Others are computed again from true maxima (docs/math.md,
# section 5).
LARGEST_TERM, SMALLEST_SUM, LARGEST_SUM = 106 * math.log(2), -82 * math.log(2), 126 * math.log(2)
GRADIENT_EXPONENT = 13  # 16-bit g is scaled to coefficients below 2^14: a row's and a column's together stay in float16


class _Operands:
    """x and the slots of y as the products take them: 16-bit on CUDA, else in the accumulation dtype.

    What a mask drops is 0, whatever it held. ``own_rows`` and ``own_cols`` are those of the pairs that stay although
    their images are equal.
    """

    def __init__(self, rectangle: Rectangle, own_rows: slice, own_cols: slice):
        self.rectangle, self.scale = rectangle, rectangle.scale
        self.own_rows, self.own_cols = own_rows, own_cols
        self.sixteen_bit = multiplies_sixteen_bit(rectangle.x)
        self.x_dropped, self.y_dropped = (None if v is None else ~v for v in (rectangle.x_mask, rectangle.y_mask))
        self.x = self._read(rectangle.x, self.x_dropped)
        self.x_scaled = self.x if self.sixteen_bit else self.x * self.scale

    def _read(self, v: Tensor, dropped: Tensor | None) -> Tensor:
        v = v if self.sixteen_bit else v.to(self.scale.dtype)
        return v if dropped is None else v.masked_fill(dropped[:, None], 0)

    def slot(self, k: int) -> Tensor:
        """y[k], [C, D]."""
        return self._read(self.rectangle.y[k], None if self.y_dropped is None else self.y_dropped[k])

    def logits(self, y: Tensor, k: int, rows: slice, cols: slice, out: Tensor | None = None) -> Tensor:
        """The logits of one tile of slot k, of which ``y`` is what ``slot`` read; -inf of pairs that are left out."""
        z = matmul(self.x_scaled[rows], y[cols].T, out)
        if self.sixteen_bit:  # a scaled x would be rounded once more
            z.mul_(self.scale)
        if self.y_dropped is not None:
            z.masked_fill_(self.y_dropped[k, None, cols], -torch.inf)
        if self.x_dropped is not None:
            z.masked_fill_(self.x_dropped[rows, None], -torch.inf)
        if self.rectangle.x_images is not None and self.rectangle.y_images is not None:
            same = self.rectangle.x_images[rows, None] == self.rectangle.y_images[None, cols]
            self.own_of(same, rows, cols)[0].fill_(False)
            z.masked_fill_(same, -torch.inf)
        return z

    def own_of(self, tile: Tensor, rows: slice, cols: slice) -> tuple[Tensor, slice]:
        """The diagonal of a tile that are rows' own pairs, a view, and their columns."""
        diagonal = self.own_rows.start - self.own_cols.start
        first = max(cols.start, rows.start - diagonal, self.own_cols.start)
        stop = max(first, min(cols.stop, rows.stop - diagonal, self.own_cols.stop))
        if first == stop:
            return torch.diagonal(tile[:0]), slice(first, first)
        corner = tile[first + diagonal - rows.start :, first - cols.start :]
        return torch.diagonal(corner)[: stop - first], slice(first, stop)

    def without_logits(self) -> tuple[Tensor, Tensor]:
        """Which rows [K, M] and columns [K, C] a mask leaves without any logit."""
        m, c, k, _ = self.rectangle.sizes
        none = self.scale.new_zeros((), dtype=torch.bool)
        x_dropped = (none if self.x_dropped is None else self.x_dropped).expand(k, m)
        y_dropped = (none if self.y_dropped is None else self.y_dropped).expand(k, c)
        return x_dropped | y_dropped.all(1, keepdim=True), y_dropped | x_dropped.all(1, keepdim=True)


def forward(rectangle: Rectangle, paired: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row [K, M], col [K, C], if ``paired`` pos [K, C] else [0, 0], if ``keep`` what backward reads, [K, M, C],
    else empty.
    """
    m, c, slots, _ = rectangle.sizes
    own = slice(0, min(m, c) if paired else 0)
    operands = _Operands(rectangle, own, own)
    saved_pairs = operands.scale.new_empty(0, 0, 0)
    if keep:
        saved_pairs = operands.scale.new_empty(slots, m, c)
    plain = keep and _offset(operands) == 0
    if plain:
        row, col = _plain_logsumexps(operands, saved_pairs)
    if not plain or not _sums_are_right(operands, row, col):
        row, col = _tiled_logsumexps(operands, saved_pairs if keep and not plain else None)
    pos = _positives(operands) if paired else row.new_empty(0, 0)
    return row, col, pos, saved_pairs


def _tiled_logsumexps(operands: _Operands, saved_pairs: Tensor | None) -> tuple[Tensor, Tensor]:
    """row and col from true maxima, one tile at a time; the logits stay in ``saved_pairs``."""
    m, c, slots, _ = operands.rectangle.sizes
    row = operands.scale.new_full((slots, m), -torch.inf)
    col = operands.scale.new_full((slots, c), -torch.inf)
    for k in range(slots):
        y = operands.slot(k)
        for rows, cols in tiles(m, c, y.device):
            z = operands.logits(y, k, rows, cols, None if saved_pairs is None else saved_pairs[k, rows, cols])
            row[k, rows] = torch.logaddexp(row[k, rows], z.logsumexp(1))
            col[k, cols] = torch.logaddexp(col[k, cols], z.logsumexp(0))
    return row, col


def _plain_logsumexps(operands: _Operands, saved_pairs: Tensor) -> tuple[Tensor, Tensor]:
    """row and col, for ``_sums_are_right`` to judge, from plain sums of exp(z), which stay in ``saved_pairs``."""
    m, c, slots, _ = operands.rectangle.sizes
    row_sum, col_sum = operands.scale.new_zeros(slots, m), operands.scale.new_zeros(slots, c)
    for k in range(slots):
        y = operands.slot(k)
        for rows, cols in tiles(m, c, y.device):
            e = operands.logits(y, k, rows, cols, out=saved_pairs[k, rows, cols]).exp_()
            row_sum[k, rows] += e.sum(1)
            col_sum[k, cols] += e.sum(0)
    return row_sum.log_(), col_sum.log_()


def _offset(operands: _Operands) -> float:
    """The offset nearest 0 at which no term of unit vectors is too large and, at a scale up to 65, no sum too small."""
    bound = abs(float(operands.scale))
    return max(bound - LARGEST_TERM, min(0.0, -SMALLEST_SUM - bound))


def _sums_are_right(operands: _Operands, row: Tensor, col: Tensor) -> bool:
    """Whether plain sums of exp(z) give these log-sum-exps: each is inside the range, or without a logit."""
    for log_sum, empty in zip((row, col), operands.without_logits(), strict=True):
        if not (((log_sum >= SMALLEST_SUM) & (log_sum <= LARGEST_SUM)) | empty).all():  # NaN is not
            return False
    return True


def _positives(operands: _Operands) -> Tensor:
    """The logits [K, C] of the pairs (j, j)."""
    sum_dtype = operands.scale.dtype
    x = operands.x.to(sum_dtype) * operands.scale
    return torch.stack([torch.sum(x * operands.slot(k), dim=-1) for k in range(operands.rectangle.sizes[2])])


class _Gradient:
    """g = d_row exp(z - row) + d_col exp(z - col), a tile at a time, with what comes down to the positives added in
    float32.

    Where products are 16-bit, g is divided by ``divisor`` and without its positives, whose whole gradient ``own``
    gathers."""

    def __init__(self, operands: _Operands, upstream: Upstream):
        self.operands = operands
        # A row or column without a logit has no gradient: exp(z - inf) is 0, and its upstream may be anything.
        empty_row, empty_col = torch.isneginf(upstream.row), torch.isneginf(upstream.col)
        self.a, self.row = upstream.d_row.masked_fill(empty_row, 0), upstream.row.masked_fill(empty_row, torch.inf)
        self.b, self.col = upstream.d_col.masked_fill(empty_col, 0), upstream.col.masked_fill(empty_col, torch.inf)
        self.saved_pairs = upstream.saved_pairs
        # Beside an offset the logits were saved: z - offset would be rounded where z - row is not.
        self.saved_are_logits = self.saved_pairs is not None and _offset(operands) != 0
        if self.saved_pairs is not None and not self.saved_are_logits:
            self.saved_pairs = self.saved_pairs if _sums_are_right(operands, upstream.row, upstream.col) else None
        if self.saved_pairs is not None and not self.saved_are_logits:  # as coefficients of exp(z)
            self.a, self.b = self.a * (-self.row).exp(), self.b * (-self.col).exp()
        self.d_pos = None if upstream.d_pos is None else self._of_present_pairs(upstream.d_pos)
        self.divisor = self.own = None
        if operands.sixteen_bit:
            largest = torch.maximum(self.a.abs().amax(), self.b.abs().amax())
            self.divisor = torch.exp2(torch.floor(torch.log2(largest)) - GRADIENT_EXPONENT).where(largest > 0, 1)
            self.own = None if self.d_pos is None else torch.zeros_like(self.d_pos)

    def _of_present_pairs(self, d_pos: Tensor) -> Tensor:
        """d_pos [K, C], 0 where there is no pair or a mask drops its row or column."""
        x_dropped, y_dropped = self.operands.x_dropped, self.operands.y_dropped
        without = torch.ones(d_pos.shape[1], dtype=torch.bool, device=d_pos.device)
        own_rows, own_cols = self.operands.own_rows, self.operands.own_cols
        without[own_cols] = False if x_dropped is None else x_dropped[own_rows]
        return d_pos.masked_fill(without if y_dropped is None else without | y_dropped, 0)

    def tile(self, y: Tensor, k: int, rows: slice, cols: slice) -> Tensor:
        """g of one tile of slot k, of which ``y`` is what ``slot`` read."""
        if self.saved_pairs is not None and not self.saved_are_logits:
            g = (self.a[k, rows, None] + self.b[k, None, cols]).mul_(self.saved_pairs[k, rows, cols])
        else:
            z = self.operands.logits(y, k, rows, cols) if self.saved_pairs is None else self.saved_pairs[k, rows, cols]
            g = (z - self.row[k, rows, None]).exp_().mul_(self.a[k, rows, None])
            g.add_((z - self.col[k, None, cols]).exp_().mul_(self.b[k, None, cols]))
        if self.d_pos is not None:
            self._add_positives(g, k, rows, cols)
        return g if self.divisor is None else (g / self.divisor).to(self.operands.x.dtype)

    def _add_positives(self, g: Tensor, k: int, rows: slice, cols: slice) -> None:
        """The tile's pairs that are positives take d_pos; those of 16-bit products leave g for ``own``."""
        own, columns = self.operands.own_of(g, rows, cols)
        assert self.d_pos is not None
        own += self.d_pos[k, columns]
        if self.own is not None:
            self.own[k, columns] = own
            own.zero_()


def backward(
    rectangle: Rectangle, upstream: Upstream, needs_x: bool, needs_y: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, D], dy (strided as y), each in ``dtype`` or without an element where nobody needs it; and dscale."""
    (m, c, slots, d), sum_dtype = rectangle.sizes, rectangle.scale.dtype
    own_rows, own_cols = paired_slices(m, c, upstream)
    operands = _Operands(rectangle, own_rows, own_cols)
    gradient = _Gradient(operands, upstream)
    through_x = needs_x or not needs_y  # one of the two products gives dscale
    dx = operands.scale.new_zeros((m, d) if through_x else 0)
    dy = torch.empty_like(rectangle.y, dtype=dtype) if needs_y else rectangle.y.new_empty(0, dtype=dtype)
    dscale = operands.scale.new_zeros((), dtype=torch.float64)
    for k in range(slots):
        y = operands.slot(k)
        dy_k = torch.zeros_like(y, dtype=sum_dtype) if needs_y else y.new_empty(0, dtype=sum_dtype)
        for rows, cols in tiles(m, c, y.device):
            g = gradient.tile(y, k, rows, cols)
            if through_x:
                accumulate(dx[rows], g, y[cols])
            if needs_y:
                accumulate(dy_k[cols], g.T, operands.x[rows])
        if needs_y:
            if gradient.divisor is not None:
                dy_k.mul_(gradient.divisor)
            if gradient.own is not None:
                dy_k[own_cols].addcmul_(gradient.own[k, own_cols, None], operands.x[own_rows])
            if not through_x:
                dscale += (y * dy_k).sum(dtype=torch.float64)
            dy[k] = dy_k.mul_(operands.scale)
    if through_x:
        if gradient.divisor is not None:
            dx.mul_(gradient.divisor)
        if gradient.own is not None:
            for k in range(slots):
                dx[own_rows].addcmul_(gradient.own[k, own_cols, None], operands.slot(k)[own_cols])
        dscale = (operands.x * dx).sum(dtype=torch.float64)
    dx = dx.mul_(operands.scale).to(dtype) if needs_x else rectangle.x.new_empty(0, dtype=dtype)
    return dx, dy, dscale.to(sum_dtype)
