"""The operands of bidirectional_logsumexp as its Triton kernels take them.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operands import Operands
from .logsumexp_tiles import INTERPRETED, Blocks, blocks_for

# Where kernels read through tensor descriptors. Of sm_120, which has TMA too, the compiler spills with them.
TMA_MAJORS = (9, 10)


class TritonOperands(Operands):
    """``Operands`` with the tiles and the arguments of the kernels on their device."""

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
