"""What kernels read as dense is dense: one function for every mask, vector and feature that a kernel addresses without strides."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 16  # bytes that cp.async, TMA and vector loads move at once


def dense(v: Tensor | None) -> Tensor | None:
    """``v`` in row-major order, its first element at a multiple of 16 bytes; ``v`` itself where that holds, else a copy. None stays None.

    A mask may be transposed, a column of a table, expanded, or cut out of a larger one, and ``contiguous()`` keeps
    what is contiguous but begins at an odd address.
    """
    if v is None:
        return None
    v = v.contiguous()
    return v if v.data_ptr() % ALIGNMENT == 0 else v.clone()
