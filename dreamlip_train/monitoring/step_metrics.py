"""A row of metrics.jsonl: the losses of a step and the pace since the last row, as all ranks see them together."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreamlip_train.monitoring.run_log import RunLog
from dreamlip_train.monitoring.throughput import Stopwatch, memory_gb

_MANY_CUT = 0.02  # of the captions


@dataclass
class StepMetrics:
    """Logs steps of a run; every rank has one.

    image_flops, token_flops: of an image and of a caption token. peak_flops: of the device per second,
    None where unknown.
    """

    log: RunLog
    device: torch.device
    total_steps: int
    global_batch_size: int
    captions_per_image: int
    context_length: int
    num_workers: int
    image_flops: float = 0.0
    token_flops: float = 0.0
    peak_flops: float | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    warned_of_cut: bool = False

    def count(self, batch: dict[str, Any]) -> None:
        """Count what a step trains on."""
        self.watch.tokens += int((batch["text"] != 0).sum())
        self.watch.images += len(batch["keys"])
        self.watch.cut += batch["cut"]

    def row(self, about: dict[str, Any], losses: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Log one step. Losses are global, images and tokens those of all ranks, the wait the longest of any;
        the rest is rank 0's.

        Args:
            about: step, epoch, lr, grad_norm, skipped_steps; of a mixture also draws and set_epochs, by set.
            values: the logit scales and bias by name.
        """
        parts, counts, wait = self._over_ranks(losses)
        pace = self._pace(counts)
        row = {"step": about["step"], "epoch": about["epoch"], "loss": sum(parts.values()), **parts}
        row |= {name: float(value) for name, value in values.items()}
        row |= {"lr": about["lr"], "grad_norm": about["grad_norm"]} | pace | {"data_wait": wait}
        row |= {"captions_cut": int(counts["cut"]), "memory": memory_gb(self.device)}
        row |= {"skipped_steps": about["skipped_steps"]}
        row |= {name: about[name] for name in ("draws", "set_epochs") if name in about}
        self.log.row({name: _finite_or_none(value) for name, value in row.items()}, self._summary(row, parts))
        advice = self.watch.advice(wait, self.num_workers, len(os.sched_getaffinity(0)))
        if advice:
            self.log.message(advice)
        self._warn_of_cut(int(counts["cut"]), int(counts["images"]) * self.captions_per_image)

    def _over_ranks(self, losses: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float], float]:
        """(mean losses, summed counts with this rank's seconds, longest wait) of all ranks."""
        window = self.watch.window()
        names = ("images", "tokens", "cut")
        own = [*(float(value) for value in losses.values()), *(window[name] for name in names)]
        sums = torch.tensor(own, device=self.device)
        wait = torch.tensor(window["data_wait"], device=self.device)
        ranks = dist.get_world_size()
        if ranks > 1:
            dist.all_reduce(sums)
            dist.all_reduce(wait, op=dist.ReduceOp.MAX)
        values = sums.tolist()
        parts = {name: value / ranks for name, value in zip(losses, values, strict=False)}
        counts = dict(zip(names, values[len(losses) :], strict=True)) | {"seconds": window["seconds"]}
        return parts, counts, float(wait)

    def _pace(self, counts: dict[str, float]) -> dict[str, float]:
        seconds = counts["seconds"]
        total = counts["images"] * self.image_flops + counts["tokens"] * self.token_flops
        flops = total / seconds / dist.get_world_size()
        pace = {"images_per_s": counts["images"] / seconds, "tokens_per_s": counts["tokens"] / seconds}
        pace |= {"tflops": flops / 1e12}
        return pace | ({"mfu": flops / self.peak_flops} if self.peak_flops else {})

    def _summary(self, row: dict[str, Any], parts: dict[str, float]) -> str:
        seconds_left = (self.total_steps - row["step"]) * self.global_batch_size / row["images_per_s"]
        each = ", ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in parts.items())
        mfu = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
        return (
            f"step {row['step']}/{self.total_steps}  loss {row['loss']:.3f} ({each})  {row['images_per_s']:.0f} "
            "images/s"
            f"{mfu}  waiting for data {row['data_wait']:.0%}  {duration(seconds_left)} left"
        )

    def _warn_of_cut(self, cut: int, captions: int) -> None:
        """Once, when more than a few captions lose their ends."""
        if not self.warned_of_cut and cut > _MANY_CUT * captions:
            self.warned_of_cut = True
            self.log.message(
                f"{cut} of the last {captions} captions are longer than model.context_length={self.context_length} "
                "tokens "
                "and lose their ends; raise it, or draw shorter ones (data.merged_num, data.splitter)"
            )


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; days where there are any."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
