"""Matrix products with float32 sums: 16-bit operands multiplied as 16-bit on CUDA, from torch 2.10 on; all others as
torch's own precision setting says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def multiplies_sixteen_bit(v: Tensor) -> bool:
    """Whether products of features like ``v`` are made of 16-bit operands; elsewhere they are widened first."""
    return v.is_cuda and v.dtype in SIXTEEN_BIT and dispatch.ADDS_SIXTEEN_BIT_PRODUCTS


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` with sums of at least float32."""
    if multiplies_sixteen_bit(a):
        if out is None:
            return torch.ops.aten.mm.dtype(a, b, torch.float32)
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    if a.dtype in SIXTEEN_BIT:
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` with sums of at least float32."""
    if multiplies_sixteen_bit(a):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
