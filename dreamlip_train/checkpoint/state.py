"""What a run is beside its weights and optimizer: where it stands, and its random states."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from dreamlip_train.data.epoch_plan import ReaderLayout


@dataclass
class TrainState:
    """Where a run stands: ``step`` steps done, ``position`` of them in epoch ``epoch`` by the readers in ``layouts``;
    what was skipped for non-finite values; seconds trained; the backend that each op of the losses runs by.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    layouts: list[ReaderLayout] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_samples: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    backends: dict[str, str] = field(default_factory=dict)

    def advance(self, layout: ReaderLayout, steps_per_epoch: int) -> None:
        """Count one step that the readers of ``layout`` have read."""
        if not self.layouts or not self.layouts[-1].same_readers(layout):
            self.layouts.append(layout)
        last = self.layouts[-1]
        self.layouts[-1] = ReaderLayout(last.ranks, last.workers, last.batch_size, last.steps + 1)
        self.step += 1
        self.position += 1
        if self.position == steps_per_epoch:
            self.epoch, self.position, self.layouts = self.epoch + 1, 0, []


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    kind, keys, *rest = cast(tuple, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
