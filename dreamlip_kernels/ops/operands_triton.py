"""x and y as the Triton kernels of bidirectional_logsumexp read them.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .logsumexp_tiles import INTERPRETED, Blocks, blocks_for
from .rectangle import Rectangle

_SMALLEST_UNIT = 2.0**-126
# Elements that widths and strides are multiples of: what Triton specializes on, and no less than TMA and cp.async need.
STEP = 16
# Where kernels read through tensor descriptors. Of sm_120, which has TMA too, the compiler spills with them.
TMA_MAJORS = (9, 10)


class Operands:
    """The features of a rectangle, padded to widths in multiples of 16: 16-bit, or float32 for three TF32 products.

    float32 features become float16 after a power-of-two scaling: unit vectors cannot overflow, and float16's rounding is 8
    times finer than bfloat16's. ``without_masked`` makes rows that a mask drops zeros, so that no product sees what they hold.
    """

    def __init__(self, rectangle: Rectangle, without_masked: bool = False):
        x, y = rectangle.x, rectangle.y
        self.scale = self.x_scale = self.y_scale = self.slope = rectangle.scale
        self.x_unit = self.y_unit = None
        x_mask, y_mask = rectangle.x_mask, rectangle.y_mask
        if x.dtype == torch.float32 and x.shape[1] and not rectangle.exact_float32:
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
        self.precision = "tf32x3" if rectangle.exact_float32 else "tf32"  # of 16-bit operands it has no meaning

    def blocks(self, kernel: str) -> Blocks:
        """The tile shape of ``kernel`` for these operands on their device; a small one for the interpreter."""
        if not self.x.is_cuda:
            return INTERPRETED
        return blocks_for(kernel, self.x.element_size(), arch(self.x), self.x.shape[1])

    def arguments(self, blocks: Blocks) -> dict:
        """What the tiled kernels take of x and y: descriptors where the device has TMA, else pointers; and their strides."""
        x, y = self.x, self.y
        descriptor = not x.is_cuda or arch(x) // 10 in TMA_MAJORS
        return dict(
            x=TensorDescriptor(x, x.shape, x.stride(), [blocks.m, blocks.d]) if descriptor else x,
            y=TensorDescriptor(y, y.shape, y.stride(), [1, blocks.c, blocks.d]) if descriptor else y,
            scale_ptr=self.scale,
            slope_ptr=self.slope,
            stride_x=x.stride(0),
            stride_yk=y.stride(0),
            stride_y=y.stride(1),
            BLOCK_M=blocks.m,
            BLOCK_C=blocks.c,
            BLOCK_D=blocks.d,
            PRECISION=self.precision,
            DESCRIPTOR=descriptor,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


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
    """``v`` with its last dimension dense and every stride a multiple of ``STEP``; a copy padded with zeros where it is not so."""
    d = v.shape[-1]
    strides_aligned = all(s % STEP == 0 and s > 0 for s in v.stride()[:-1])
    if d and d % STEP == 0 and v.stride(-1) == 1 and strides_aligned and v.data_ptr() % 16 == 0:
        return v
    padded = v.new_zeros(*v.shape[:-1], max(STEP, -(-d // STEP) * STEP))
    padded[..., :d] = v
    return padded


def arch(x: Tensor) -> int:
    """The compute capability of x's device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
