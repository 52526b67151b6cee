"""Conventions of number that ops and losses share: what sums are kept in, a vector without a direction,
and when values count as equal.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off on ``device``; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def inverse_norm(x: Tensor) -> Tensor:
    """``1 / |x|`` along the last dimension, 0 for a zero vector -> [...], in ``accumulate_dtype(x)``."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=accumulate_dtype(x))
    return torch.where(norm == 0, 0, 1 / norm)


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` along the last dimension; a zero vector stays zero and takes no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.inf, norm)


def logsumexp_of_any(z: Tensor, keepdim: bool = False) -> Tensor:
    """``z.logsumexp(0)``; where nothing is finite, -inf and no gradient, which torch's own would make NaN."""
    empty = torch.isneginf(z).all(0, keepdim=True)
    total = torch.where(empty, 0, z).logsumexp(0, keepdim=True)
    total = torch.where(empty, -torch.inf, total)
    return total if keepdim else total[0]


def flat_tolerance(dtype: torch.dtype) -> float:
    """Similarities whose range is no larger than this are all equal up to rounding: 32 ulp of one,
    in at least float32.
    """
    return 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
