"""The steps of a run: train, agree with the other ranks, log, save, evaluate, and stop when asked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dreamlip_train.checkpoint import saving
from dreamlip_train.checkpoint.ranks import SaveError, all_or_none
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.config.batch import chunks_per_rank
from dreamlip_train.config.schema import Config
from dreamlip_train.data.loader import TrainLoader
from dreamlip_train.evaluation.sharing import StoppedError
from dreamlip_train.jobs.user_error import RunError
from dreamlip_train.model.weight_average import WeightAverage
from dreamlip_train.monitoring.run_log import RunLog
from dreamlip_train.monitoring.step_metrics import StepMetrics
from dreamlip_train.monitoring.stop_signals import StopRequest
from dreamlip_train.monitoring.watchdog import Watchdog
from dreamlip_train.training.engine.engine import evaluation_model
from dreamlip_train.training.engine.optimizer import learning_rate
from dreamlip_train.training.evaluation import evaluate_run, headline
from dreamlip_train.training.grad_cache import cached_train_step, split_batch
from dreamlip_train.training.prefetch import training_batches
from dreamlip_train.training.step import StepResult, dreamlip_loss, move_batch, train_step
from dreamlip_train.training.unusual_steps import UnusualSteps


@dataclass
class Loop:
    """Steps ``state.step`` to ``total_steps``; every rank runs one."""

    engine: Any
    config: Config
    run_dir: Path
    loader: TrainLoader
    log: RunLog
    state: TrainState
    total_steps: int
    stop: StopRequest
    watchdog: Watchdog
    metrics: StepMetrics
    average: WeightAverage | None = None

    def __post_init__(self) -> None:
        self.ranks = dist.get_world_size()
        self.chunks = chunks_per_rank(self.config, self.ranks)
        self.unusual = UnusualSteps(self.run_dir, self.state, self.log, self.config.train.max_nonfinite_steps)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step

    def run(self) -> bool:
        """Train to the last step, or to a signal; True when all steps are done. The loader's workers are ended whatever
        happens.

        A checkpoint of the last step is saved in both cases.

        Raises:
            RunError: that checkpoint could not be written, or train.max_nonfinite_steps steps in a row were not finite.
        """
        batches = training_batches(
            self.loader,
            self.state,
            self.total_steps,
            self._move,
            self.engine.device,
            self.metrics.watch,
            prefetch=self.config.train.prefetch,
        )
        with contextlib.closing(batches):
            return self._steps(batches)

    def _steps(self, batches: Iterator[tuple[dict[str, Any], Any]]) -> bool:
        config, state = self.config, self.state
        loss_fn, patches = dreamlip_loss(config.loss), config.loss.grouping_weight > 0
        one_step = cached_train_step if self.chunks > 1 else train_step
        before, began = state.seconds, time.perf_counter()
        for batch, moved in batches:
            lr = learning_rate(state.step, self.total_steps, config.optim)
            self.watchdog.now(f"in step {state.step + 1}")
            self.metrics.count(batch)
            dropped = config.model.patch_dropout if state.step < self.total_steps - config.train.undropped_steps else 0
            self.engine.module.drop_patches(dropped)
            result = one_step(self.engine, loss_fn, moved, lr, patches=patches)
            state.advance(self.loader.layout, self.loader.steps_per_epoch)
            state.seconds = before + time.perf_counter() - began
            loss, stop, clock_says_save = self._agree(result)
            self.log.advance(state.step)
            self.unusual.note(result, loss, batch)
            if self.average is not None and result.applied:
                self.average.update(self.engine.module, state.step)
            if self._is_due(config.logging.every_steps, at_the_end=True):
                self._log(result, lr)
            if stop or clock_says_save or self._is_due(config.checkpoint.every_steps, at_the_end=True):
                self._save()
            if stop and state.step < self.total_steps:
                self._require_saved(f"stopped by {self.stop.name or 'a signal to another rank'}")
                return False
            if self._is_due(config.eval.every_steps, at_the_end=False):
                self._evaluate()
            self.watchdog.now("waiting for data")
        self._require_saved("trained to the end")
        return True

    def _move(self, batch: dict[str, Any]) -> Any:
        """``batch`` as the step takes it, on the device: whole, or in the chunks of gradient caching."""
        device, pack, whole = self.engine.device, self.config.train.pack_captions, not self.engine.module.packs_captions
        if self.chunks > 1:
            return [move_batch(chunk, device, pack, whole) for chunk in split_batch(batch, self.chunks)]
        return move_batch(batch, device, pack, whole)

    def _is_due(self, every_steps: int, *, at_the_end: bool) -> bool:
        """Whether what happens ``every_steps`` steps (0: never) happens after this one;
        the last step has a rule of its own.
        """
        if self.state.step == self.total_steps:
            return at_the_end
        return every_steps > 0 and self.state.step % every_steps == 0

    def _agree(self, result: StepResult) -> tuple[float, bool, bool]:
        """(the global loss, whether any rank was asked to stop, whether the clock of rank 0 says to save),
        alike on every rank.
        """
        minutes = self.config.checkpoint.every_minutes
        due = bool(minutes) and dist.get_rank() == 0 and time.monotonic() - self.saved_at >= 60 * minutes
        flags = torch.tensor([0.0, float(self.stop.name is not None), float(due)], device=self.engine.device)
        flags[0] = sum(result.losses.values())
        if self.ranks > 1:
            dist.all_reduce(flags)
        loss, stop, save = flags.tolist()
        return loss / self.ranks, stop > 0, save > 0

    def _log(self, result: StepResult, lr: float) -> None:
        state = self.state
        about = {"step": state.step, "epoch": state.epoch, "lr": lr, "grad_norm": result.grad_norm}
        about |= {"skipped_steps": state.skipped_steps}
        about |= self.loader.drawn(state.epoch, state.position)
        self.metrics.row(about, result.losses, result.scales)

    def _save(self) -> None:
        """A checkpoint; where that fails the run goes on with those it has."""
        self.watchdog.now("saving a checkpoint")
        self.saved_at = time.monotonic()
        try:
            with all_or_none():
                self.loader.quarantine_log.require_written()
            folder = self.run_dir / "checkpoints"
            path = saving.save(self.engine, folder, self.config, self.state, self.loader.fingerprint, self.average)
        except SaveError as error:
            self.log.message(f"CHECKPOINT NOT SAVED: {error}. Training goes on without it; make room", loud=True)
        else:
            self.saved_step = self.state.step
            self.log.message(f"saved {path} in {time.monotonic() - self.saved_at:.1f} s", on_terminal=False)
        self.metrics.watch.restart()  # its time belongs to no window of steps

    def _require_saved(self, why: str) -> None:
        if self.saved_step != self.state.step:
            raise RunError(
                f"{why} at step {self.state.step}, but that checkpoint could not be written (see log.txt); "
                "the newest is "
                f"of step {self.saved_step}. Make room and give the same command again"
            )

    def _evaluate(self) -> None:
        """Held-out numbers on the way, as a row of metrics.jsonl. Collective."""
        self.watchdog.now("evaluating")
        average = self.average if self.config.eval.weights == "ema" else None
        step, device = self.state.step, self.engine.device
        try:
            with evaluation_model(self.engine, self.config.model, average) as model:
                report = evaluate_run(model, self.config, device, lambda: self.stop.name is not None)
        except StoppedError:
            self.log.message(f"step {step}: the evaluation was broken off by {self.stop.name or 'another rank'}")
        else:
            if dist.get_rank() == 0:
                self.log.row({"step": step, **report}, f"step {step}  {headline(report)}")
        self.metrics.watch.restart()
