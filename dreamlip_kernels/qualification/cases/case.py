"""What qualification knows of an op: cases that compare it with the oracle, and calls that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


def torch_dtype(name: str) -> torch.dtype:
    """The features' dtype of a dtype class, such as "float32 as float16"."""
    return getattr(torch, name.split()[0])


class Case(NamedTuple):
    """One comparison: ``op`` and ``oracle`` map the same inputs to a tuple of outputs;
    ``draw(seed)`` makes the inputs, all of which need gradients.
    """

    name: str
    op: Callable[..., Outputs]
    oracle: Callable[..., Outputs]
    draw: Callable[[int], Outputs]
    capture: bool = False
    """Whether it is also captured in a CUDA graph."""
    resolution: float = 0.0
    """What rounding alone moves an output, or a gradient that is one number, by: such a sum of terms that cancel may
    come out better than that by chance.
    """

    def upstream(self, inputs: Outputs) -> Outputs:
        """A random gradient for each output, of values that every dtype holds."""
        gen = torch.Generator().manual_seed(0)
        with torch.no_grad():
            outputs = self.op(*inputs)
        return tuple(torch.randn(o.shape, generator=gen).bfloat16().to(o.device) for o in outputs)

    def values(self, fn: Callable[..., Outputs], inputs: Iterable[Tensor], upstream: Outputs) -> Outputs:
        """Outputs of ``fn`` and the gradients of all inputs under ``upstream``."""
        leaves = [v.detach().requires_grad_() for v in inputs]
        outputs = fn(*leaves)
        gradients = torch.autograd.grad(
            outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
        )
        return tuple(o.detach() for o in outputs) + gradients


class Speed(NamedTuple):
    """One timed call: ``make()`` allocates the inputs and returns the step, a forward and a backward pass."""

    shape: str
    width: int
    similarities: int
    make: Callable[[], Callable[[], object]]
    flops: int
    """Operations of the least work that forward and backward need."""
    moved: int
    """Bytes that they must read and write."""
