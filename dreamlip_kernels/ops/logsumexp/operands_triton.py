"""The operands of bidirectional_logsumexp as its Triton kernels take them.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chunks import up
from ..dense import dense
from ..operands import STEP, Operands
from ..rectangle import Rectangle
from .kernels.vector_kernels import FLOAT16, LARGEST_FEATURE, vectors
from .logsumexp_tiles import INTERPRETED, Blocks, blocks_for

# Where kernels read through tensor descriptors. Of sm_120, which has TMA too, the compiler spills with them.
TMA_MAJORS = (9, 10)
BLOCK, ROWS, WIDTH = 1024, 16, 128  # of the vector kernels: of a vector, and of a matrix
INTERPRETED_ROWS = 256  # the interpreter's time goes by programs
LARGEST_PROGRAMS = 1024  # that look for a largest feature, on each side at most: each later program reads all of them

_FEATURES = "x_ptr y_ptr x_mask_ptr y_mask_ptr x_out_ptr y_out_ptr numbers_ptr".split()
_SIZES = "D width stride_x stride_xd stride_yk stride_y stride_yd x_programs y_programs".split()
_COEFFICIENTS = "row_ptr col_ptr d_row_ptr d_col_ptr pos_ptr d_pos_ptr divisor_ptr rows_ptr cols_ptr own_ptr".split()


class TritonOperands(Operands):
    """``Operands`` with the tiles and the arguments of the kernels on their device; masks are dense."""

    def __init__(self, rectangle: Rectangle, without_masked: bool = False):
        self.rows = ROWS if rectangle.x.is_cuda else INTERPRETED_ROWS
        self.sizes = dict(zip("MCK", rectangle.sizes, strict=False))
        self.x_mask, self.y_mask = dense(rectangle.x_mask), dense(rectangle.y_mask)
        self.features: dict[str, Any] = dict.fromkeys(_FEATURES) | dict.fromkeys(_SIZES, 0)
        super().__init__(rectangle, without_masked)

    def as_float16(self, rectangle: Rectangle) -> None:
        """Set all of this object from float32 features, in two launches."""
        x, y, (m, c, k, d) = rectangle.x, rectangle.y, rectangle.sizes
        width = up(d, STEP)
        self.x = x.new_empty(m, width, dtype=torch.float16)
        self.y = y.new_empty(k, c, width, dtype=torch.float16)
        numbers = self.scale.new_empty(5, 4)
        self.x_divisor, self.y_divisor, self.x_scale, self.y_scale, self.slope = numbers[:, 0].unbind()
        blocks = [triton.cdiv(rows, self.rows) for rows in (m, k * c)]
        programs = [min(count, LARGEST_PROGRAMS) for count in blocks]
        pointers = (x, y, self.x_mask, self.y_mask, self.x, self.y, numbers)
        self.features = dict(zip(_FEATURES, pointers, strict=True))
        self.features |= dict(zip(_SIZES, (d, width, *x.stride(), *y.stride(), *programs), strict=True))
        largest = self.scale.new_empty(sum(programs))
        unused = dict.fromkeys(_COEFFICIENTS, largest) | dict(flag_ptr=largest.view(torch.int32))
        unused |= dict(diagonal=0, first_pair=0, stop_pair=0)
        for phase, count in ((LARGEST_FEATURE, sum(programs)), (FLOAT16, sum(blocks))):
            self.launch_vectors(phase, count, largest_ptr=largest, **unused)

    def launch_vectors(self, phase: int, programs: int, **coefficients: Any) -> None:
        """One phase of the kernel ``vectors``; of the features' two the coefficients are not read."""
        numbers = dict(scale_ptr=self.scale, slope_ptr=self.slope, BLOCK=BLOCK, BLOCK_R=self.rows, BLOCK_D=WIDTH)
        vectors[(programs,)](phase=phase, **self.features, **coefficients, **self.sizes, **numbers)

    def blocks(self, kernel: str) -> Blocks:
        """The tile shape of ``kernel``; a small one for the interpreter."""
        if not self.x.is_cuda:
            return INTERPRETED
        return blocks_for(kernel, self.x.element_size(), arch(self.x), self.x.shape[1])

    def arguments(self, blocks: Blocks) -> dict:
        """What the tiled kernels take of x and y: descriptors where the device has TMA, else pointers; with strides."""
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
            DESCRIPTOR=descriptor,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def arch(x: Tensor) -> int:
    """The compute capability of x's device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
