"""The features of a rectangle as the 16-bit kernels of bidirectional_logsumexp read them, Triton's and CUDA's.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import ALIGNMENT
from .rectangle import Rectangle

_SMALLEST_UNIT = 2.0**-126


class Operands:
    """x and y with rows that begin at multiples of 16 bytes: 16-bit, or float32 for three TF32 products.

    float32 features become float16 after a power-of-two scaling: unit vectors cannot overflow, and float16's rounding is 8
    times finer than bfloat16's. ``slope`` is the multiplier of the operands' products, x_scale and y_scale that of a
    gradient's sum over the other side's operands. ``without_masked`` makes rows that a mask drops zeros, so that no
    product sees what they hold.
    """

    def __init__(self, rectangle: Rectangle, without_masked: bool = False):
        x, y = rectangle.x, rectangle.y
        self.scale = self.x_scale = self.y_scale = self.slope = rectangle.scale
        self.x_unit = self.y_unit = None
        x_mask, y_mask = rectangle.x_mask, rectangle.y_mask
        if x.dtype == torch.float32 and not rectangle.exact_float32:
            self.x_unit, self.y_unit = _units(x, y, x_mask, y_mask)
            self.x_scale, self.y_scale = self.scale * self.x_unit, self.scale * self.y_unit
            self.slope = self.x_scale * self.y_unit
            x, y = (
                torch.div(v, u, out=v.new_empty(v.shape, dtype=torch.float16))
                for v, u in ((x, self.x_unit), (y, self.y_unit))
            )
            without_masked = True  # what they hold had no part in the unit, and may be infinite in it
        if without_masked:
            x, y = (v if mask is None else v.masked_fill(~mask[..., None], 0) for v, mask in ((x, x_mask), (y, y_mask)))
        self.x, self.y = _aligned(x), _aligned(y)


def _units(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    """[2]: the powers of two just not above the largest element of x and of y, dropped rows apart."""
    largest = []
    for v, mask in ((x, x_mask), (y, y_mask)):
        if mask is None:
            largest.append(torch.linalg.vector_norm(v, torch.inf))
        else:
            largest.append(torch.linalg.vector_norm(v, torch.inf, dim=-1).where(mask, 0).amax())
    return torch.stack(largest).clamp_(min=_SMALLEST_UNIT).log2_().floor_().exp2_()


def _aligned(v: Tensor) -> Tensor:
    """``v`` with its last dimension dense and every row at a multiple of 16 bytes; a copy padded with zeros where it is not so."""
    step = ALIGNMENT // v.element_size()
    d = v.shape[-1]
    rows_aligned = all(s % step == 0 and s > 0 for s in v.stride()[:-1])
    if d and d % step == 0 and v.stride(-1) == 1 and rows_aligned and v.data_ptr() % ALIGNMENT == 0:
        return v
    padded = v.new_zeros(*v.shape[:-1], max(step, -(-d // step) * step))
    padded[..., :d] = v
    return padded
