"""The features of a rectangle as the 16-bit kernels of bidirectional_logsumexp read them, Triton's and CUDA's.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import aligned_rows
from .rectangle import Rectangle

_SMALLEST_DIVISOR = 2.0**-126
# Elements that widths and strides are multiples of: what Triton specializes on, and no less than TMA and cp.async need.
STEP = 16


class Operands:
    """x and y padded to widths in multiples of 16: 16-bit, or float32 for three TF32 products.

    float32 features become float16 after a power-of-two scaling: unit vectors cannot overflow, and float16's rounding
    is 8 times finer than bfloat16's. ``slope`` is the multiplier of the operands' products, x_scale and y_scale that of
    a gradient's sum over the other side's operands. ``without_masked`` makes rows that a mask drops zeros,
    so that no product sees what they hold.
    """

    def __init__(self, rectangle: Rectangle, without_masked: bool = False):
        x, y = rectangle.x, rectangle.y
        self.scale = self.x_scale = self.y_scale = self.slope = rectangle.scale
        self.x_divisor = self.y_divisor = None
        if x.dtype == torch.float32 and x.shape[1] and not rectangle.exact_float32:
            self.as_float16(rectangle)
        else:
            if without_masked:
                x, y = without_dropped(x, rectangle.x_mask), without_dropped(y, rectangle.y_mask)
            self.x, self.y = aligned_rows(x, STEP), aligned_rows(y, STEP)

    def as_float16(self, rectangle: Rectangle) -> None:
        """Set all of this object from float32 features. What a mask drops is 0: it has no part in the divisor, and
        over it may be infinite.
        """
        x_mask, y_mask = rectangle.x_mask, rectangle.y_mask
        self.x_divisor, self.y_divisor = _divisors(rectangle.x, rectangle.y, x_mask, y_mask)
        self.x_scale, self.y_scale = self.scale * self.x_divisor, self.scale * self.y_divisor
        self.slope = self.x_scale * self.y_divisor
        x, y = (
            torch.div(v, divisor, out=v.new_empty(v.shape, dtype=torch.float16))
            for v, divisor in ((rectangle.x, self.x_divisor), (rectangle.y, self.y_divisor))
        )
        self.x = aligned_rows(without_dropped(x, x_mask), STEP)
        self.y = aligned_rows(without_dropped(y, y_mask), STEP)


def without_dropped(v: Tensor, mask: Tensor | None) -> Tensor:
    """``v`` with zeros in the rows that the mask drops, whatever they hold."""
    return v if mask is None else v.masked_fill(~mask[..., None], 0)


def _divisors(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    """[2]: the powers of two just not above the largest element of x and of y, dropped rows apart."""
    largest = []
    for v, mask in ((x, x_mask), (y, y_mask)):
        if mask is None:
            largest.append(torch.linalg.vector_norm(v, torch.inf))
        else:
            largest.append(torch.linalg.vector_norm(v, torch.inf, dim=-1).where(mask, 0).amax())
    return torch.stack(largest).clamp_(min=_SMALLEST_DIVISOR).log2_().floor_().exp2_()
