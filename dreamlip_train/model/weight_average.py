"""An exponential moving average of a model's weights, in fp32 beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamlip_train.jobs.user_error import UserError

FILE = "ema.pt"


class WeightAverage:
    """``average = d * average + (1 - d) * weights`` after each step, d = min(decay, (1 + step) / (10 + step)):
    early weights are forgotten sooner.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in model.parameters()]
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """``model`` has the average as its weights for a while."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._write(model, self.average)
        try:
            yield
        finally:
            self._write(model, own)

    @staticmethod
    @torch.no_grad()
    def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])

    def save(self, folder: Path) -> None:
        """Write ``folder``/ema.pt, tensors only."""
        torch.save({name: value.cpu() for name, value in self.average.items()}, folder / FILE)

    def load(self, folder: Path) -> bool:
        """Go on from ``folder``/ema.pt; False where there is none."""
        if not (folder / FILE).is_file():
            return False
        values = read_average(folder)
        for name, value in self.average.items():
            value.copy_(values[name])
        return True


def read_average(folder: Path) -> dict[str, Tensor]:
    """The average weights that a checkpoint holds, by name.

    Raises:
        UserError: it holds none.
    """
    if not (folder / FILE).is_file():
        raise UserError(
            f"--weights: {folder} holds no average of the weights; its run had train.ema_decay=0. Take --weights raw"
        )
    return torch.load(folder / FILE, map_location="cpu", weights_only=True)
