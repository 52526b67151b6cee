"""A training run from config to report: what must fit is checked first, then the engine is built, the loop runs,
and the report is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dreamlip_train.checkpoint import files, loading, resume
from dreamlip_train.checkpoint.interoperability.pretrained import pretrained_weights
from dreamlip_train.checkpoint.ranks import on_first_rank
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.config.batch import chunks_per_rank, images_per_rank
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import format_config
from dreamlip_train.config.validation import validate
from dreamlip_train.data.loader import TrainLoader, is_worker_error, train_loader, worker_error
from dreamlip_train.data.validation import check_held_out
from dreamlip_train.evaluation.sharing import StoppedError
from dreamlip_train.jobs.folder_lock import FolderLock
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.flops import peak_flops, training_flops
from dreamlip_train.model.image_tower import why_no_patches
from dreamlip_train.model.weight_average import WeightAverage
from dreamlip_train.monitoring.environment import versions
from dreamlip_train.monitoring.run_log import EarlyLines, RunLog
from dreamlip_train.monitoring.step_metrics import StepMetrics
from dreamlip_train.monitoring.stop_signals import StopRequest
from dreamlip_train.monitoring.watchdog import Watchdog
from dreamlip_train.training.distributed import init_distributed
from dreamlip_train.training.engine.deepspeed_config import check_deepspeed_config
from dreamlip_train.training.engine.engine import build_engine, evaluation_model
from dreamlip_train.training.engine.optimizer import learning_rate
from dreamlip_train.training.evaluation import check_zero_shot, evaluate_run
from dreamlip_train.training.loop import Loop
from dreamlip_train.training.loss_backends import check_backends, choose_backends, qualify_device, release_backends
from dreamlip_train.training.summary import final_report


def train(
    config: Config, run_dir: str | Path, start: str = "auto", accept_changes: bool = False
) -> dict[str, Any] | None:
    """Train what ``config`` describes in ``run_dir`` and return summary.json's content (None on ranks other than 0,
    and when a signal ended the run).

    A SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any rank ends the run on all of them after the step, with a checkpoint.

    Args:
        start: "auto" resumes from the newest whole checkpoint of the run folder, or starts;
            "never" starts over where no checkpoint is whole; a path starts from that checkpoint or run.
        accept_changes: go on from a checkpoint although settings of the recipe differ from its own.
    Raises:
        UserError: a setting, the data or a checkpoint does not fit (the field is named).
        RunError: the last checkpoint could not be written, or train.max_nonfinite_steps steps in a row were not finite.
    """
    validate(config)
    check_deepspeed_config(config.deepspeed.config)  # refuses what DeepSpeed would ignore, before anything is built
    if not (config.data.shards or config.data.mixture):
        raise UserError(
            "data.shards: is empty; give the training shards, such as --data.shards 'shards/*.tar' (`dreamlip-train "
            "prepare` makes them)"
        )
    with StopRequest() as stop, EarlyLines(Path(run_dir)) as early:
        device = init_distributed()
        images_per_rank(config, dist.get_world_size())  # refuses a world that can't share the batch
        check_backends(config.loss, device)
        qualification = qualify_device(config.train.qualify, device)
        with contextlib.ExitStack() as stack:
            lock = FolderLock(Path(run_dir), "run.lock", "--run-dir")
            on_first_rank(lambda: _enter(stack, lock))
            stack.callback(release_backends)
            return _train(config, Path(run_dir), start, accept_changes, device, stop, qualification, early)


def _enter(stack: contextlib.ExitStack, lock: FolderLock) -> list[str]:
    stack.enter_context(lock)
    return [f"{lock.path.parent} was in use by {lock.taken_over}, which ended: taken over"] if lock.taken_over else []


def _train(
    config: Config,
    run_dir: Path,
    start: str,
    accept_changes: bool,
    device: torch.device,
    stop: StopRequest,
    qualification: str,
    early: EarlyLines,
) -> dict[str, Any] | None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start_from = resume.starting_point(run_dir, start)
    if start_from:
        resume.restore_quarantine(start_from, run_dir)
    model = _model(config, start_from)
    loader = _loader(config, run_dir, model)
    changes = resume.check_fits(start_from, config, loader.fingerprint, accept_changes) if start_from else {}
    backends_before = files.read_manifest(start_from).get("backends", {}) if start_from else {}
    choice = choose_backends(config, model, device, images_per_rank(config, ranks), backends_before)
    total_steps = config.train.steps or config.train.epochs * loader.steps_per_epoch
    log = RunLog(run_dir, rank, total_steps, config.logging.wandb_project, config)
    try:
        early.hand_over(log)
        log.message(_header(config, run_dir, device, total_steps, loader, choice.reasons))
        for line in filter(None, [qualification, *choice.changes]):
            log.message(line)
        _warn_of_warmup(config, total_steps, log)
        metrics = _metrics(config, model, log, device, total_steps)
        written_by = files.read_manifest(start_from)["world_size"] if start_from else ranks
        engine = build_engine(model, config, device, resized=written_by != ranks)
        torch.manual_seed(config.train.seed + rank)
        state = loading.load(engine, start_from, config.train.seed) if start_from else TrainState()
        state.backends = choice.backends
        average = _average(config, engine, start_from)
        if rank == 0:
            (run_dir / "config.toml").write_text(format_config(config), encoding="utf-8")
        if start_from:
            log.message(_resumed(start_from, state, loader, written_by, ranks))
        for name, (old, new) in changes.items():
            log.message(f"{name} was {old!r} until this checkpoint and is {new!r} now")
        log.begin(state.step)
        with Watchdog(rank, log.message, loader.heartbeats.silent) as watchdog:
            loop = Loop(engine, config, run_dir, loader, log, state, total_steps, stop, watchdog, metrics, average)
            done = loop.run()
        summary = _report(engine, config, run_dir, log, state, device, stop, average) if done else None
        if not done:
            where = files.step_folder(run_dir / "checkpoints", state.step)
            log.message(
                f"stopped by {stop.name or 'a signal to another rank'} after step {state.step}, saved as {where}; "
                "the same command resumes"
            )
    except BaseException as error:
        log.traceback()
        if is_worker_error(error):
            raise worker_error(error) from error
        raise
    finally:
        log.close()
    dist.barrier()
    return summary


def _model(config: Config, start_from: Path | None) -> DreamLIP:
    """A checkpoint has the weights; what its run once started from may be gone."""
    settings = dataclasses.replace(config.model, pretrained="") if start_from else config.model
    model = build_model(settings, config.train.seed, pretrained_weights(settings))
    _check_model(config, model)
    return model


def _check_model(config: Config, model: DreamLIP) -> None:
    """Refuse what the towers of ``model`` can't give."""
    if config.loss.grouping_weight > 0 and not model.has_patches:
        why = why_no_patches(model.clip.visual)
        raise UserError(
            f"loss.grouping_weight: the image tower of {config.model.name!r} gives no patch tokens ({why}); give "
            "loss.grouping_weight=0 and model.local_logit_scale=False to train the contrast alone, or use a ViT"
        )
    if config.train.compile and not model.packs_captions:
        raise UserError(
            f"train.compile: the text tower of {config.model.name!r} is not causal, so captions are not packed, for "
            "which alone it is compiled; leave it off"
        )


def _average(config: Config, engine: Any, start_from: Path | None) -> WeightAverage | None:
    if not config.train.ema_decay:
        return None
    average = WeightAverage(engine.module, config.train.ema_decay)
    if start_from:
        average.load(start_from)  # a checkpoint without one begins it, with --accept-changes
    return average


def _loader(config: Config, run_dir: Path, model: DreamLIP) -> TrainLoader:
    """This rank's batches, after a look at the held-out shards."""
    loader = train_loader(
        config.data,
        image_size=model.image_size,
        tokenize=model.tokenize.with_cut,
        batch_size=images_per_rank(config, dist.get_world_size()),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        seed=config.train.seed,
        quarantine=run_dir / files.QUARANTINE,
    )
    if config.data.val_shards:
        check_held_out(config.data, image_size=model.image_size)
    check_zero_shot(config.eval)
    return loader


def _metrics(config: Config, model: DreamLIP, log: RunLog, device: torch.device, total_steps: int) -> StepMetrics:
    image_flops, token_flops = training_flops(model) if dist.get_rank() == 0 else (0.0, 0.0)
    return StepMetrics(
        log,
        device,
        total_steps,
        global_batch_size=config.train.global_batch_size,
        captions_per_image=config.data.num_sub_captions,
        context_length=config.model.context_length,
        num_workers=config.data.num_workers,
        image_flops=image_flops,
        token_flops=token_flops,
        peak_flops=peak_flops(device, config.train.precision),
    )


def _warn_of_warmup(config: Config, total_steps: int, log: RunLog) -> None:
    warmup = config.optim.warmup_steps
    if warmup > total_steps:
        highest = learning_rate(total_steps - 1, total_steps, config.optim)
        log.message(
            f"optim.warmup_steps={warmup} is longer than the run of {total_steps} steps: the rate ends at "
            f"{highest:.3g} and never reaches optim.lr={config.optim.lr:g}; give a shorter warm-up",
            loud=True,
        )


def _report(
    engine: Any,
    config: Config,
    run_dir: Path,
    log: RunLog,
    state: TrainState,
    device: torch.device,
    stop: StopRequest,
    average: WeightAverage | None,
) -> dict[str, Any] | None:
    """Evaluation of the trained model by all ranks, pictures and summary.json by rank 0."""
    facts = {"steps": state.step, "seconds": state.seconds, "skipped_steps": state.skipped_steps}
    facts |= {"ranks": dist.get_world_size(), "device": device.type}
    facts |= {"backends": state.backends, "versions": versions()}
    with evaluation_model(engine, config.model, average if config.eval.weights == "ema" else None) as model:
        try:
            report = evaluate_run(model, config, device, lambda: stop.name is not None)
        except StoppedError:
            log.message(
                f"the report was broken off by {stop.name or 'another rank'}; everything is trained and saved, "
                "the same command writes it"
            )
            return None
        return final_report(model, config, run_dir, log, facts, report) if dist.get_rank() == 0 else None


def _header(
    config: Config, run_dir: Path, device: torch.device, total_steps: int, loader: TrainLoader, used: str
) -> str:
    """The first line of a run: what runs where, why, how large, and where it will be."""
    ranks, batch, data = dist.get_world_size(), config.train.global_batch_size, config.data
    chunks = chunks_per_rank(config, ranks)
    share = f"{batch // ranks} per rank" + (f" in {chunks} chunks" if chunks > 1 else "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    muon = f" ({config.optim.lr * config.optim.muon_lr_scale:g} for Muon)" if config.optim.optimizer == "muon" else ""
    captions = batch * data.num_sub_captions
    return (
        f"{ranks} x {name}, ZeRO-{config.deepspeed.zero_stage}, {config.train.precision}; backends {used}; "
        f"{batch} images per step ({share}), learning rate {config.optim.lr:g}{muon}, "
        f"{data.num_sub_captions} sub-captions each, up to "
        f"{captions * config.model.context_length:,} tokens; {total_steps} steps of {loader.steps_per_epoch} per "
        f"epoch ({loader.fingerprint}); "
        f"checkpoints in {run_dir / 'checkpoints'}"
    )


def _resumed(start_from: Path, state: TrainState, loader: TrainLoader, written_by: int, ranks: int) -> str:
    text = f"resumed from {start_from} at step {state.step}"
    if written_by != ranks:
        text += f", which {written_by} ranks wrote (now {ranks}; random states start anew)"
    if state.layouts and not state.layouts[-1].same_readers(loader.layout):
        text += (
            f"; epoch {state.epoch} goes on with its {loader.steps_per_epoch - state.position} x "
            f"{loader.layout.global_batch} samples that nobody has "
            "read, dealt out anew (bad samples on the way may let as many others come twice)"
        )
    return text
