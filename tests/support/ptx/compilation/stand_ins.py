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
    """A host-side tensor descriptor: shape, strides and the block that one copy moves; of Gluon's its layout too."""

    base: TensorLike
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any = None


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
        layout = getattr(argument, "layout", None)
        return DescriptorLike(describe(argument.base), shape, strides, tuple(argument.block_shape), layout)
    return argument


def restore(argument: Any) -> Any:
    """What Triton's launch code takes in place of the described argument."""
    if isinstance(argument, DescriptorLike):
        base = torch.empty(0, dtype=argument.base.dtype)  # descriptors ask for an aligned address
        fields = base, list(argument.shape), list(argument.strides), list(argument.block_shape)
        if argument.layout is not None:
            from triton.experimental.gluon.nvidia import hopper

            return hopper.TensorDescriptor(*fields, argument.layout)
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(*fields)
    return argument
