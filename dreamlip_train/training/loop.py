"""The steps of a run: train, agree with the other ranks, log, save, evaluate, and stop when asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.checkpoint import saving
from dreamlip_train.checkpoint.ranks import SaveError
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.config.batch import chunks_per_rank
from dreamlip_train.config.schema import Config
from dreamlip_train.data.loader import TrainLoader
from dreamlip_train.evaluation.held_out import StoppedError, evaluate
from dreamlip_train.jobs.user_error import RunError
from dreamlip_train.model.flops import Cost
from dreamlip_train.monitoring.loss_spikes import LossSpikes
from dreamlip_train.monitoring.run_log import RunLog
from dreamlip_train.monitoring.stop_signals import StopRequest
from dreamlip_train.monitoring.throughput import Stopwatch, memory_gb
from dreamlip_train.monitoring.watchdog import Watchdog
from dreamlip_train.training.engine import evaluation_model
from dreamlip_train.training.grad_cache import cached_train_step, split_batch
from dreamlip_train.training.objective import dreamlip_loss
from dreamlip_train.training.optimizer import learning_rate
from dreamlip_train.training.prefetch import prefetched
from dreamlip_train.training.step import StepResult, move_batch, train_step

_MANY_CUT = 0.02  # of the captions


@dataclass
class Loop:
    """Steps ``progress.step`` to ``total_steps``; every rank runs one."""

    engine: Any
    config: Config
    run_dir: Path
    loader: TrainLoader
    log: RunLog
    progress: TrainState
    total_steps: int
    stop: StopRequest
    watchdog: Watchdog
    cost: Cost

    def __post_init__(self) -> None:
        self.ranks = dist.get_world_size()
        self.chunks = chunks_per_rank(self.config, self.ranks)
        self.watch, self.spikes = Stopwatch(), LossSpikes()
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        self.spiking = self.said_cut = False

    def run(self) -> bool:
        """Train to the last step, or to a signal; True when all steps are done. The loader's workers are ended whatever happens."""
        with contextlib.closing(self._batches()) as batches:
            return self._steps(batches)

    def _steps(self, batches: Iterator[tuple[dict[str, Any], Any]]) -> bool:
        """True when all steps are done, False when a signal ended the run; a checkpoint of that moment is saved in both cases.

        Raises:
            RunError: the last checkpoint could not be written, or train.max_nonfinite_steps steps in a row were not finite.
        """
        config, progress = self.config, self.progress
        loss_fn = dreamlip_loss(config.loss)
        before, began = progress.seconds, time.perf_counter()
        for batch, moved in batches:
            lr = learning_rate(progress.step, self.total_steps, config.optim)
            self.watchdog.now(f"in step {progress.step + 1}")
            self.watch.tokens += int((batch["text"] != 0).sum())
            self.watch.images += len(batch["keys"])
            self.watch.cut += batch["cut"]
            result = self._step(loss_fn, moved, lr)
            progress.advance(self.loader.layout, self.loader.steps_per_epoch)
            progress.seconds = before + time.perf_counter() - began
            loss, stop, save = self._agree(result)
            self.log.advance(progress.step)
            self._note_unusual(result, loss, batch)
            last = progress.step == self.total_steps
            if progress.step % config.logging.every_steps == 0 or last:
                self._log_step(result, lr)
            pause = stop or save or last or progress.step % config.checkpoint.every_steps == 0
            if pause:
                self._save()
            if stop and not last:
                self._require_saved(f"stopped by {self.stop.name or 'a signal to another rank'}")
                return False
            if config.eval.every_steps and progress.step % config.eval.every_steps == 0 and not last:
                self._evaluate()
                pause = True
            if pause:
                self.watch.restart()  # their time belongs to no window of steps
            self.watchdog.now("waiting for data")
        self._require_saved("trained to the end")
        return True

    def _step(self, loss_fn: DreamLIPLoss, moved: Any, lr: float) -> StepResult:
        patches = self.config.loss.grouping_weight > 0
        step = cached_train_step if self.chunks > 1 else train_step
        return step(self.engine, loss_fn, moved, lr, patches=patches)

    def _move(self, batch: dict[str, Any]) -> Any:
        """``batch`` as the step takes it, on the device: whole, or in the chunks of gradient caching."""
        device, pack = self.engine.device, self.config.train.pack_captions
        if self.chunks > 1:
            return [move_batch(chunk, device, pack) for chunk in split_batch(batch, self.chunks)]
        return move_batch(batch, device, pack)

    def _batches(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """The batches that are left, epoch after epoch, as loaded and as moved, the time spent waiting for each on the stopwatch."""
        while self.progress.step < self.total_steps:
            with (
                contextlib.closing(self.loader.epoch(self.progress.epoch, tuple(self.progress.layouts))) as loaded,
                contextlib.closing(self._moved(loaded)) as batches,
            ):
                while self.progress.step < self.total_steps:
                    asked = time.perf_counter()
                    batch = next(batches, None)
                    self.watch.waited += time.perf_counter() - asked
                    if batch is None:
                        break
                    yield batch

    def _moved(self, loaded: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
        if not self.config.train.prefetch:
            yield from ((batch, self._move(batch)) for batch in loaded)
            return
        batches = prefetched(loaded, self._move, self.engine.device)
        try:
            for batch in batches:  # noqa: UP028 - `yield from` would close it, and wait for its thread, before the loader hears of it
                yield batch
        finally:
            self.loader.leave()
            batches.close()

    def _agree(self, result: StepResult) -> tuple[float, bool, bool]:
        """(the global loss, whether any rank was asked to stop, whether the clock of rank 0 says to save), alike on every rank."""
        minutes = self.config.checkpoint.every_minutes
        due = bool(minutes) and dist.get_rank() == 0 and time.monotonic() - self.saved_at >= 60 * minutes
        flags = torch.tensor([0.0, float(self.stop.name is not None), float(due)], device=self.engine.device)
        flags[0] = sum(result.losses.values())
        if self.ranks > 1:
            dist.all_reduce(flags)
        loss, stop, save = flags.tolist()
        return loss / self.ranks, stop > 0, save > 0

    def _save(self) -> None:
        """A checkpoint; where that fails the run goes on with those it has."""
        self.watchdog.now("saving a checkpoint")
        self.saved_at = time.monotonic()
        try:
            path = saving.save(
                self.engine, self.run_dir / "checkpoints", self.config, self.progress, self.loader.fingerprint
            )
        except SaveError as error:
            self.log.message(f"CHECKPOINT NOT SAVED: {error}. Training goes on without it; make room", loud=True)
            return
        self.saved_step = self.progress.step
        self.log.message(f"saved {path} in {time.monotonic() - self.saved_at:.1f} s", shown=False)

    def _require_saved(self, why: str) -> None:
        if self.saved_step != self.progress.step:
            raise RunError(f"{why} at step {self.progress.step}, but that checkpoint could not be written (see log.txt); the newest is of step "
                               f"{self.saved_step}. Make room and give the same command again")  # fmt: skip

    def _evaluate(self) -> None:
        """Held-out numbers on the way, as a row of metrics.jsonl. Collective; rank 0 computes."""
        self.watchdog.now("evaluating, or waiting for rank 0 to")
        config = self.config
        with evaluation_model(self.engine, config.model) as model:
            if dist.get_rank() == 0:
                selection = config.selection()
                try:
                    report = evaluate(
                        model,
                        config.data,
                        config.eval,
                        self.engine.device,
                        **selection,
                        should_stop=lambda: self.stop.name is not None,
                    )
                except StoppedError:
                    self.log.message(f"step {self.progress.step}: the evaluation was broken off by {self.stop.name}")
                else:
                    recall = report["retrieval"]["long_caption"]
                    t2i, i2t = recall["t2i"]["r_at_1"], recall["i2t"]["r_at_1"]
                    text = f"step {self.progress.step}  held-out R@1 by long caption: text to image {t2i:.1f}, image to text {i2t:.1f}"
                    self.log.row({"step": self.progress.step, **report}, text)
        dist.barrier()

    def _note_unusual(self, result: StepResult, loss: float, batch: dict[str, Any]) -> None:
        """Keep the samples of a skipped step and of a loss spike; stop when too many steps in a row were skipped."""
        progress = self.progress
        if result.applied:
            progress.skipped_in_a_row, progress.skipped_samples = 0, []
            median = self.spikes.check(loss)
            if median is not None:
                path, _ = self._keep_samples("spikes.jsonl", batch, loss=loss, median=median)
                if not self.spiking:
                    self.log.message(
                        f"loss spike at step {progress.step}: {loss:.4g}, the median before it is {median:.4g}; its samples are in {path}"
                    )
            self.spiking = median is not None
            return
        what = "a gradient" if math.isfinite(loss) else "the loss"
        path, samples = self._keep_samples("skipped.jsonl", batch, why=f"{what} is not finite")
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        progress.skipped_samples = (progress.skipped_samples + samples)[-1000:]
        self.log.message(
            f"step {progress.step} was skipped: {what} is not finite; its {len(samples)} samples are in {path}"
        )
        if progress.skipped_in_a_row >= self.config.train.max_nonfinite_steps:
            shown = ", ".join(f"{sample['shard']}: {sample['key']}" for sample in progress.skipped_samples[:8])
            raise RunError(
                f"train.max_nonfinite_steps: {progress.skipped_in_a_row} steps in a row were not finite, the last is {progress.step}. Their samples "
                f"({shown}, ...) are in {path}; look at them, lower optim.lr, or use train.precision='fp32'"
            )

    def _keep_samples(self, name: str, batch: dict[str, Any], **about: Any) -> tuple[Path, list[dict[str, str]]]:
        """One line of ``name`` in the run folder with the samples of all ranks. Collective."""
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(
            everyone, [{"shard": shard, "key": key} for shard, key in zip(batch["shards"], batch["keys"], strict=True)]
        )
        samples = [sample for of_rank in everyone for sample in of_rank]
        path = self.run_dir / name
        if dist.get_rank() == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.progress.step, **about, "samples": samples}) + "\n")
        return path, samples

    def _log_step(self, result: StepResult, lr: float) -> None:
        """One row of metrics.jsonl. Losses are global, images and tokens those of all ranks, the wait the longest of any; the rest is rank 0's."""
        progress, names = self.progress, list(result.losses)
        window = self.watch.window()
        seconds = window["seconds"]
        sums = torch.tensor(
            [*(float(value) for value in result.losses.values()), window["images"], window["tokens"], window["cut"]],
            device=self.engine.device,
        )
        wait = torch.tensor(window["data_wait"], device=self.engine.device)
        if self.ranks > 1:
            dist.all_reduce(sums)
            dist.all_reduce(wait, op=dist.ReduceOp.MAX)
        *losses, images, tokens, cut = sums.tolist()
        parts = dict(zip(names, (value / self.ranks for value in losses), strict=True))
        flops = (images * self.cost.image + tokens * self.cost.token) / seconds / self.ranks
        row: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch, "loss": sum(parts.values()), **parts}
        row |= {name: float(value) for name, value in result.scales.items()} | {"lr": lr, "grad_norm": result.grad_norm}
        row |= {
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait": float(wait),
            "tflops": flops / 1e12,
        }
        row |= {"mfu": flops / self.cost.peak} if self.cost.peak else {}
        row |= {
            "captions_cut": int(cut),
            "memory": memory_gb(self.engine.device),
            "skipped_steps": progress.skipped_steps,
        }
        seconds_left = (self.total_steps - progress.step) * self.loader.layout.global_batch / row["images_per_s"]
        shown = ", ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in parts.items())
        mfu = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
        self.log.row(
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            },
            f"step {progress.step}/{self.total_steps}  loss {row['loss']:.3f} ({shown})  {row['images_per_s']:.0f} images/s{mfu}  "
            f"waiting for data {row['data_wait']:.0%}  {duration(seconds_left)} left",
        )
        advice = self.watch.advice(row["data_wait"], self.config.data.num_workers, len(os.sched_getaffinity(0)))
        if advice:
            self.log.message(advice)
        self._note_cut(int(cut), int(images) * self.config.data.num_sub_captions)

    def _note_cut(self, cut: int, captions: int) -> None:
        """Once, when more than a few captions lose their ends."""
        if not self.said_cut and cut > _MANY_CUT * captions:
            self.said_cut = True
            self.log.message(
                f"{cut} of the last {captions} captions are longer than model.context_length={self.config.model.context_length} tokens and lose their ends; "
                "raise it, or draw shorter ones (data.merged_num, data.splitter)"
            )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; days where there are any."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
