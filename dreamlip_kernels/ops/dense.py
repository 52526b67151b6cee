"""What kernels read as dense is dense: one function for every mask, vector and feature that a kernel addresses without
strides.
"""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 16  # bytes that cp.async, TMA and vector loads move at once


def dense(v: Tensor | None) -> Tensor | None:
    """``v`` in row-major order, its first element at a multiple of 16 bytes; ``v`` itself where that holds,
    else a copy. None stays None.

    A mask may be transposed, a column of a table, expanded, or cut out of a larger one, and ``contiguous()`` keeps
    what is contiguous but begins at an odd address.
    """
    if v is None:
        return None
    v = v.contiguous()
    return v if v.data_ptr() % ALIGNMENT == 0 else v.clone()


def aligned_rows(v: Tensor, step: int | None = None) -> Tensor:
    """``v`` with a dense last dimension and rows that begin at multiples of ``step`` elements, 16 bytes unless said
    otherwise.

    So TMA and wide loads read it; a copy padded with zeros where it is not so.
    """
    step = step or ALIGNMENT // v.element_size()
    d = v.shape[-1]
    rows_aligned = all(stride % step == 0 and stride > 0 for stride in v.stride()[:-1])
    if d and d % step == 0 and v.stride(-1) == 1 and rows_aligned and v.data_ptr() % ALIGNMENT == 0:
        return v
    padded = v.new_zeros(*v.shape[:-1], max(step, -(-d // step) * step))
    padded[..., :d] = v
    return padded
