"""A training run from config to report: shards -> batches -> ``engine.train_step`` -> checkpoints and metrics -> evaluation and pictures."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train import checkpoint
from dreamlip_train.config import Config
from dreamlip_train.config_file import format_config
from dreamlip_train.data import train_loader
from dreamlip_train.deepspeed_config import deepspeed_config
from dreamlip_train.doctor import backends, versions
from dreamlip_train.engine import StepResult, build_engine, evaluation_model, init_distributed, learning_rate, move_batch, train_step
from dreamlip_train.evaluate import evaluate
from dreamlip_train.model import build_model
from dreamlip_train.report import final_report
from dreamlip_train.runlog import RunLog, Stopwatch, memory_gb


def train(config: Config, run_dir: str | Path, resume: str = "auto") -> dict[str, Any] | None:
    """Train what ``config`` describes in ``run_dir`` and return summary.json's content (None on ranks other than 0).

    Args:
        resume: "auto" goes on from the newest whole checkpoint of the run folder, or starts; "never" insists on a new folder; a path starts from that
            checkpoint or run.
    Raises:
        ValueError: a setting, the data or a checkpoint does not fit (the field is named).
        RuntimeError: a checkpoint could not be written, or engine.max_nonfinite_steps steps in a row were not finite.
    """
    config.validate()
    deepspeed_config(config.engine, config.optim)  # refuses what DeepSpeed would ignore, before anything is built
    if not config.data.shards:
        raise ValueError(
            "data.shards: is empty; give the training shards, such as --data.shards 'shards/*.tar' (`dreamlip-train prepare` makes them)"
        )
    run_dir = Path(run_dir)
    device = init_distributed()
    start_from = _starting_point(run_dir, resume)
    dist.barrier()  # rank 0 writes into the folder that the others have just looked at
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = build_model(config.model, config.engine.seed)
    chosen = backends(config.loss.backend, device)
    loader = train_loader(
        config.data,
        image_size=model.image_size,
        tokenize=model.tokenize,
        batch_size=config.engine.batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.engine.seed,
        quarantine=run_dir / "quarantine.jsonl",
    )
    total_steps = config.engine.steps or config.engine.epochs * loader.steps_per_epoch
    engine = build_engine(model, config.engine, config.optim, device)
    torch.manual_seed(config.engine.seed + rank)
    progress, changed = checkpoint.load(engine, start_from, config) if start_from else (checkpoint.Progress(), {})
    if rank == 0:
        (run_dir / "config.toml").write_text(format_config(config), encoding="utf-8")
    log = RunLog(run_dir, rank, total_steps, progress.step)
    try:
        log.message(_header(config, run_dir, device, chosen, total_steps, loader.steps_per_epoch))
        if start_from:
            log.message(f"resumed from {start_from} at step {progress.step}")
        for name, (old, new) in changed.items():
            log.message(f"{name} was {old!r} until this checkpoint and is {new!r} now")
        _run(engine, config, run_dir, loader, log, progress, total_steps, device)
        summary = _finish(engine, config, run_dir, log, progress, chosen, device)
    finally:
        log.close()
    dist.barrier()
    return summary


def _starting_point(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from, or None for a new run."""
    checkpoints = run_dir / "checkpoints"
    if resume == "never":
        if (run_dir / "metrics.jsonl").exists() or checkpoints.exists():
            raise ValueError(f"--run-dir: {run_dir} already holds a run; give another folder, go on with --resume auto, or delete it")
        found = None
    elif resume == "auto":
        found = checkpoint.newest(checkpoints)
    else:
        found = checkpoint.find_checkpoint(Path(resume))
    run_dir.mkdir(parents=True, exist_ok=True)
    return found


def _run(
    engine: Any,
    config: Config,
    run_dir: Path,
    loader: Any,
    log: RunLog,
    progress: checkpoint.Progress,
    total_steps: int,
    device: torch.device,
) -> None:
    """Steps ``progress.step`` to ``total_steps``, saving and evaluating on the way."""
    loss_fn = DreamLIPLoss(
        mpcl_weight=config.loss.mpcl_weight,
        grouping_weight=config.loss.grouping_weight,
        negatives=config.loss.negatives,
        positives=config.loss.positives,
        threshold=config.loss.threshold,
        normalization=config.loss.normalization,
        contrast=config.loss.contrast,
        direction=config.loss.direction,
        backend=config.loss.backend,
    )
    watch, settings = Stopwatch(), config.engine
    before, began = progress.seconds, time.perf_counter()
    for batch in _batches(loader, progress.step, total_steps, watch):
        lr = learning_rate(progress.step, total_steps, config.optim)
        result = train_step(engine, loss_fn, move_batch(batch, device), lr, patches=config.loss.grouping_weight > 0)
        progress.step += 1
        progress.epoch, progress.position = divmod(progress.step, loader.steps_per_epoch)
        progress.seconds = before + time.perf_counter() - began
        watch.images += len(batch["keys"]) * dist.get_world_size()
        log.advance(progress.step)
        _count_skips(result, batch["keys"], config, run_dir, log, progress)
        if progress.step % settings.log_every == 0 or progress.step == total_steps:
            _log_step(result, lr, config, log, progress, total_steps, watch, device)
        save = progress.step % settings.save_every_steps == 0 or progress.step == total_steps
        evaluate_now = bool(config.eval.every_steps) and progress.step % config.eval.every_steps == 0 and progress.step < total_steps
        if save:
            checkpoint.save(engine, run_dir / "checkpoints", config, progress)
        if evaluate_now:
            _evaluate(engine, config, log, progress, device)
        if save or evaluate_now:
            watch.restart()  # their time belongs to no window of steps


def _batches(loader: Any, step: int, total_steps: int, watch: Stopwatch) -> Iterator[dict[str, Any]]:
    """The batches of steps ``step`` to ``total_steps``, epoch after epoch, the time spent waiting for each on ``watch``."""
    while step < total_steps:
        epoch, position = divmod(step, loader.steps_per_epoch)
        batches = iter(loader.epoch(epoch, start_step=position))
        while step < total_steps:
            asked = time.perf_counter()
            batch = next(batches, None)
            watch.waited += time.perf_counter() - asked
            if batch is None:
                break
            step += 1
            yield batch


def _count_skips(result: StepResult, keys: list[str], config: Config, run_dir: Path, log: RunLog, progress: checkpoint.Progress) -> None:
    """Keep the samples of a skipped step in skipped.jsonl; stop when too many steps in a row were skipped."""
    if result.applied:
        progress.skipped_in_a_row, progress.skipped_keys = 0, []
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, keys)
    batch_keys = [key for of_rank in everyone for key in of_rank]
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    progress.skipped_keys += batch_keys
    if dist.get_rank() == 0:
        with (run_dir / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": progress.step, "keys": batch_keys}) + "\n")
    what = "the loss" if math.isnan(result.grad_norm) and not _finite(result.losses) else "a gradient"
    log.message(f"step {progress.step} was skipped: {what} is not finite; its {len(batch_keys)} samples are in {run_dir / 'skipped.jsonl'}")
    if progress.skipped_in_a_row >= config.engine.max_nonfinite_steps:
        shown = ", ".join(progress.skipped_keys[:8])
        raise RuntimeError(
            f"engine.max_nonfinite_steps: {progress.skipped_in_a_row} steps in a row were not finite, the last is {progress.step}. Their samples "
            f"({shown}, ...) are in {run_dir / 'skipped.jsonl'}; look at them, lower optim.lr, or use engine.precision='fp32'"
        )


def _log_step(
    result: StepResult,
    lr: float,
    config: Config,
    log: RunLog,
    progress: checkpoint.Progress,
    total_steps: int,
    watch: Stopwatch,
    device: torch.device,
) -> None:
    """One row of metrics.jsonl: losses averaged over the ranks, everything else rank 0's."""
    losses = {name: _mean_over_ranks(value) for name, value in result.losses.items()}
    row: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch}
    row |= {"loss": sum(losses.values()), **losses, **{name: float(value) for name, value in result.scales.items()}}
    row |= {"lr": lr, "grad_norm": result.grad_norm, **watch.window(), "memory": memory_gb(device), "skipped_steps": progress.skipped_steps}
    seconds_left = (total_steps - progress.step) * config.engine.batch_size * dist.get_world_size() / row["images_per_s"]
    parts = ", ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in losses.items())
    log.row(
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()},
        f"step {progress.step}/{total_steps}  loss {row['loss']:.3f} ({parts})  {row['images_per_s']:.0f} images/s  "
        f"waiting for data {row['data_wait']:.0%}  {time.strftime('%H:%M:%S', time.gmtime(seconds_left))} left",
    )
    advice = watch.advice(row["data_wait"], config.data.workers, len(os.sched_getaffinity(0)))
    if advice:
        log.message(advice)


def _evaluate(engine: Any, config: Config, log: RunLog, progress: checkpoint.Progress, device: torch.device) -> None:
    """Held-out numbers on the way, as a row of metrics.jsonl. Collective; rank 0 computes."""
    with evaluation_model(engine, config.model) as model:
        if dist.get_rank() == 0:
            report = evaluate(
                model, config.data, config.eval, device, threshold=config.loss.threshold, normalization=config.loss.normalization
            )
            recall = report["retrieval"]["long_caption"]
            summary = (
                f"held-out R@1 by long caption: text to image {recall['t2i']['r_at_1']:.1f}, image to text {recall['i2t']['r_at_1']:.1f}"
            )
            log.row({"step": progress.step, **report}, f"step {progress.step}  {summary}")
    dist.barrier()


def _finish(
    engine: Any, config: Config, run_dir: Path, log: RunLog, progress: checkpoint.Progress, chosen: dict[str, str], device: torch.device
) -> dict[str, Any] | None:
    """Evaluation, pictures and summary.json of the trained model."""
    facts = {"steps": progress.step, "seconds": progress.seconds, "skipped_steps": progress.skipped_steps}
    facts |= {"ranks": dist.get_world_size(), "device": device.type, "backends": chosen, "versions": versions()}
    with evaluation_model(engine, config.model) as model:
        return final_report(model, config, run_dir, log, facts, device) if dist.get_rank() == 0 else None


def _header(config: Config, run_dir: Path, device: torch.device, chosen: dict[str, str], total_steps: int, steps_per_epoch: int) -> str:
    ranks, batch = dist.get_world_size(), config.engine.batch_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    used = ", ".join(f"{op}={backend}" for op, backend in chosen.items())
    return (
        f"{ranks} x {name}, ZeRO-{config.engine.zero_stage}, {config.engine.precision}; backends {used}; "
        f"{batch} x {ranks} = {batch * ranks} images a step, {config.data.num_sub_captions} sub-captions each; "
        f"{total_steps} steps of {steps_per_epoch} an epoch; checkpoints in {run_dir / 'checkpoints'}"
    )


def _mean_over_ranks(value: Tensor) -> float:
    """The global loss: each rank's loss is its share of it, scaled so that the mean over ranks is exact."""
    total = value.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _finite(losses: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value)) for value in losses.values())
