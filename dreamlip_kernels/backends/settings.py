"""What a program may set once for all calls: how much memory the ops work in, and how float32 features are
multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOAT32 = ("torch", "fp16")
_SMALLEST_WORKSPACE = 2**20


@dataclass
class Settings:
    """The values in force; change them with ``configure``."""

    workspace_bytes: int = 2**29
    float32: str = "torch"
    resident: bool = True
    """Whether exp_sums_resident may take the place of exp_sums: not while the tiles of exp_sums are tuned."""


settings = Settings()


def configure(*, workspace_bytes: int | None = None, float32: str | None = None) -> None:
    """Set what ``bidirectional_logsumexp`` (and the losses on it) does from now on; what is not named stays.

    Args:
        workspace_bytes: bound of what forward keeps of the pairs for backward (torch backend, on a CPU), of the partial
            sums forward and of the chunk of gradient coefficients backward (Triton and CUDA backends); 512 MB at the
            start. Less memory is more, smaller matrix products.
        float32: how the Triton and CUDA backends multiply float32 features. "torch" (at the start): as
            ``torch.get_float32_matmul_precision()`` says. At "highest" each product is three TF32 ones, with nearly
            float32's own error, at less than a third of the speed; at "high" and "medium", and under autocast, they are
            rounded to float16 after a power-of-two scaling, with sums in float32: of unit vectors that is an error of
            about 2^-11 of a logit, as TF32's. "fp16": always the latter.

    Raises:
        ValueError: a value is not one of these.
    """
    if workspace_bytes is not None and workspace_bytes < _SMALLEST_WORKSPACE:
        raise ValueError(
            f"configure: workspace_bytes must be at least {_SMALLEST_WORKSPACE} (1 MB), got {workspace_bytes!r}"
        )
    if float32 is not None and float32 not in _FLOAT32:
        raise ValueError(f"configure: float32 must be one of {_FLOAT32}, got {float32!r}")
    if workspace_bytes is not None:
        settings.workspace_bytes = int(workspace_bytes)
    if float32 is not None:
        settings.float32 = float32


def float32_products(x: Tensor) -> str:
    """How 16-bit kernels shall multiply features like ``x``, should they be float32: "fp16", or "torch" as torch says.

    Asked where the op is called: its backward runs outside autocast and must multiply as its forward did.
    """
    under_autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return "fp16" if under_autocast else settings.float32
