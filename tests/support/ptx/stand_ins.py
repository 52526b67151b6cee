"""Arguments of a launch as two processes can exchange them: what Triton's compiler looks at, without the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorLike:
    """A tensor argument: the compiler reads its dtype and whether its address is a multiple of 16."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class DescriptorLike:
    """A host-side tensor descriptor: shape, strides and the block that one copy moves."""

    base: TensorLike
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]


@dataclass
class Compiled:
    """A kernel's PTX, its dynamic shared memory, each parameter's type, and each tensor map's swizzle and box."""

    ptx: str
    shared_bytes: int
    signature: dict[str, Any]
    tensor_maps: list[dict[str, Any]]
    scratch_bytes: int


def describe(argument: Any) -> Any:
    """``argument`` without its data; equal descriptions compile to the same code."""
    if isinstance(argument, torch.Tensor):
        return TensorLike(argument.dtype, argument.data_ptr() % 16)
    if hasattr(argument, "block_shape"):
        shape, strides = (tuple(int(v) for v in values) for values in (argument.shape, argument.strides))
        return DescriptorLike(describe(argument.base), shape, strides, tuple(argument.block_shape))
    return argument


def restore(argument: Any) -> Any:
    """What Triton's launch code takes in place of the described argument."""
    if isinstance(argument, DescriptorLike):
        from triton.tools.tensor_descriptor import TensorDescriptor

        base = torch.empty(0, dtype=argument.base.dtype)  # TensorDescriptor asks for an aligned address
        return TensorDescriptor(base, list(argument.shape), list(argument.strides), list(argument.block_shape))
    return argument
