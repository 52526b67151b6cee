"""Memory that shows mistakes: buffers full of NaN between two guard bands, for all that an op allocates while
``Guards`` is on, and for its inputs.

What nobody wrote is NaN in the result, what is read beyond an end is NaN too, and a write beyond an end changes a band.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 4096  # bytes; a multiple of every alignment that kernels ask for
_BAND_BYTE, _POISON_BYTE = 0xA5, 0xFF  # 0xFF.. is NaN in every floating dtype
_ALLOCATIONS = (
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "new_empty",
    "new_empty_strided",
    "new_full",
)
_ALLOCATIONS += ("new_ones", "new_zeros", "ones", "ones_like", "zeros", "zeros_like")


class Guards(TorchDispatchMode):
    """While on, what this package's ops allocate, in Python or in C++, lies in guarded buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Ops of this package run with the mode on, so that it sees what they allocate; allocations are replaced;
        all else passes.
        """
        kwargs = kwargs or {}
        if func.namespace.startswith("dreamlip"):
            device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            key = torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in _ALLOCATIONS or not result.numel() or result.layout != torch.strided:
            return result
        buffer, inside = _guarded(result)
        self.buffers.append((f"{name} {tuple(result.shape)} {result.dtype}", buffer))
        return inside if name.startswith(("empty", "new_empty")) else inside.copy_(result)

    def overwritten(self) -> str | None:
        """Which buffer was written beyond an end, or None."""
        bands = [torch.stack([buffer[:BAND], buffer[-BAND:]]) for _, buffer in self.buffers]
        whole = (torch.stack(bands) == _BAND_BYTE).flatten(1).all(1).tolist() if bands else []
        names = [name for (name, _), intact in zip(self.buffers, whole, strict=True) if not intact]
        return f"a write beyond the end of a buffer ({names[0]})" if names else None


def surrounded(tensor: Tensor) -> Tensor:
    """A copy of an input, strided alike, with NaN before, after and between its elements."""
    _, inside = _guarded(tensor, band_byte=_POISON_BYTE)
    return inside.copy_(tensor)


def _guarded(like: Tensor, band_byte: int = _BAND_BYTE) -> tuple[Tensor, Tensor]:
    extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    size = extent * like.element_size()
    buffer = torch.full((BAND + size + BAND,), band_byte, dtype=torch.uint8, device=like.device)
    middle = buffer[BAND : BAND + size].fill_(_POISON_BYTE)
    if like.dtype == torch.bool:
        middle.fill_(0)
    return buffer, middle.view(like.dtype).as_strided(like.shape, like.stride(), BAND // like.element_size())
