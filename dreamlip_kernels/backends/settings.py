"""What a program may set once for all calls of the Triton backend: how much memory it works in, and how float32 features are computed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FLOAT32 = ("fp16", "torch")
_SMALLEST_WORKSPACE = 2**20


@dataclass
class Settings:
    """The values in force; change them with ``configure``."""

    workspace_bytes: int = 2**29
    float32: str = "fp16"

    @property
    def exact_float32(self) -> bool:
        """Whether float32 features are multiplied as float32."""
        return self.float32 == "torch" and torch.get_float32_matmul_precision() == "highest"


settings = Settings()


def configure(*, workspace_bytes: int | None = None, float32: str | None = None) -> None:
    """Set what the Triton backend of ``bidirectional_logsumexp`` (and the losses on it) does from now on; what is not named stays.

    Args:
        workspace_bytes: bound of the partial sums forward and of the chunk of gradient coefficients backward; 512 MB at the start. Less memory is more, smaller
            matrix products.
        float32: how float32 features are computed with. "fp16" (at the start): rounded to float16 after a power-of-two scaling, sums in float32; of unit
            vectors that is an error of about 2^-11 of a logit, as TF32's. "torch": as ``torch.get_float32_matmul_precision()`` says, each product as
            three TF32 ones where it is "highest" (nearly float32's own error, at less than a third of the speed), as "fp16" otherwise.

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
