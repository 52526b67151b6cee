"""Steps that were skipped because a value was not finite, and loss spikes: their samples are kept,
and too many skips end the run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.jobs.line_file import LineFile
from dreamlip_train.jobs.user_error import RunError
from dreamlip_train.monitoring.loss_spikes import LossSpikes
from dreamlip_train.monitoring.run_log import RunLog
from dreamlip_train.training.step import StepResult

_SKIPPED_SAMPLES_KEPT = 1000


class UnusualSteps:
    """Writes ``skipped.jsonl`` and ``spikes.jsonl`` of a run folder, and counts skips in ``state``.
    Every rank has one.
    """

    def __init__(self, run_dir: Path, state: TrainState, log: RunLog, max_nonfinite_steps: int) -> None:
        self.run_dir, self.state, self.log, self.max_nonfinite_steps = run_dir, state, log, max_nonfinite_steps
        self.spikes, self.spiking = LossSpikes(), False
        self.files: dict[str, LineFile] = {}

    def note(self, result: StepResult, loss: float, batch: dict[str, Any]) -> None:
        """Look at a step with the global ``loss``. Collective.

        Raises:
            RunError: it is one of too many skipped steps in a row.
        """
        if result.applied:
            self.state.skipped_in_a_row, self.state.skipped_samples = 0, []
            self._note_spike(loss, batch)
        else:
            self.spiking = False
            self._note_skip(loss, batch)

    def _note_spike(self, loss: float, batch: dict[str, Any]) -> None:
        median = self.spikes.check(loss)
        if median is not None:
            path, _ = self._keep_samples("spikes.jsonl", batch, loss=loss, median=median)
            if not self.spiking:
                self.log.message(
                    f"loss spike at step {self.state.step}: {loss:.4g}, the median before it is {median:.4g}; "
                    f"its samples are in {path}"
                )
        self.spiking = median is not None

    def _note_skip(self, loss: float, batch: dict[str, Any]) -> None:
        state = self.state
        what = "a gradient" if math.isfinite(loss) else "the loss"
        path, samples = self._keep_samples("skipped.jsonl", batch, why=f"{what} is not finite")
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        state.skipped_samples = (state.skipped_samples + samples)[-_SKIPPED_SAMPLES_KEPT:]
        self.log.message(
            f"step {state.step} was skipped: {what} is not finite; its {len(samples)} samples are in {path}"
        )
        if state.skipped_in_a_row >= self.max_nonfinite_steps:
            examples = ", ".join(f"{sample['shard']}: {sample['key']}" for sample in state.skipped_samples[:8])
            raise RunError(
                f"train.max_nonfinite_steps: {state.skipped_in_a_row} steps in a row were not finite, the last is "
                f"{state.step}. Their samples ({examples}, ...) are in {path}; look at them, lower optim.lr, or use "
                "train.precision='fp32'"
            )

    def _keep_samples(self, name: str, batch: dict[str, Any], **about: Any) -> tuple[Path, list[dict[str, str]]]:
        """One line of ``name`` in the run folder with the samples of all ranks. Collective."""
        own = [{"shard": shard, "key": key} for shard, key in zip(batch["shards"], batch["keys"], strict=True)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        samples = [sample for of_rank in everyone for sample in of_rank]
        path = self.run_dir / name
        if dist.get_rank() == 0:
            if name not in self.files:
                self.files[name] = LineFile(path, self.log.message)
            self.files[name].write(json.dumps({"step": self.state.step, **about, "samples": samples}))
        return path, samples
