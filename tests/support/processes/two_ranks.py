"""Run by test_two_ranks.py on 2 ranks: what needs a second rank to be true, into facts.json in the folder
given.

The folder holds ``zero-S/step-00000003`` for the stages of ``RESIZED``, written by one process.
"""

import json
import math
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from forked import python_module
from tiny import GLOBAL_BATCH, RESUMED_STEPS, STEPS, batch, held_out_config, run_steps, tiny_config, tiny_engine

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.checkpoint import loading
from dreamlip_train.checkpoint.files import complete_checkpoints
from dreamlip_train.checkpoint.loading import load
from dreamlip_train.checkpoint.ranks import SaveError
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.evaluation.sharing import Share, StoppedError
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.training.distributed import init_distributed
from dreamlip_train.training.engine.engine import build_engine, evaluation_model
from dreamlip_train.training.engine.optimizer import learning_rate
from dreamlip_train.training.evaluation import evaluate_run
from dreamlip_train.training.grad_cache import cached_train_step, split_batch
from dreamlip_train.training.step import move_batch, train_step

RESIZED = ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "amp_bf16"))


def global_losses(engine, config, first: int, last: int) -> list[float]:
    losses = torch.tensor(run_steps(engine, config, first, last, dist.get_rank(), 2), dtype=torch.float64)
    dist.all_reduce(losses)
    return (losses / 2).tolist()


def weights(engine, config) -> list[torch.Tensor]:
    with evaluation_model(engine, config.model) as model:
        return [p.detach().clone() for p in model.parameters()]


def skips_what_one_rank_cannot_use(engine, config) -> list[bool]:
    """NaN loss on rank 1, then an infinite gradient on rank 1: neither step may move a weight of any rank,
    and the next one must.
    """
    before, moved = weights(engine, config), []
    good = move_batch(batch(5, dist.get_rank(), 2), engine.device)
    bad = {**good, "images": good["images"].float() / 255}
    if dist.get_rank() == 1:
        bad["images"][0, 0, 0, 0] = math.nan

    def blow_up(**features):
        losses = DreamLIPLoss()(**features)
        if dist.get_rank() == 1:
            features["image_features"].register_hook(lambda grad: grad * math.inf)
        return losses

    for data, loss_fn in ((bad, DreamLIPLoss()), (good, blow_up), (good, DreamLIPLoss())):
        result = train_step(engine, loss_fn, data, 1e-3)
        same = all(torch.equal(a, b) for a, b in zip(before, weights(engine, config), strict=True))
        moved.append(result.applied or not same)
    return moved


def a_full_disk_on_one_rank(engine, config, folder: Path) -> str:
    """The message, alike on both ranks, of a save that fails on rank 1 alone."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        save(engine, folder, config, TrainState(step=9))
        return "saved"
    except SaveError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def resumed(folder: Path, stage: int, precision: str) -> list[float]:
    """Losses of four steps after the checkpoint that one process wrote."""
    config = tiny_config(stage, precision)
    device = init_distributed()
    engine = build_engine(build_model(config.model, 7), config, device, resized=True)
    progress = load(engine, folder / "step-00000003")
    return global_losses(engine, config, progress.step, RESUMED_STEPS)


def in_chunks(stage: int, chunk: int) -> list[float]:
    """Global losses of the first ten steps by gradient caching."""
    config = tiny_config(stage, chunk_size=chunk)
    engine, losses = tiny_engine(config), []
    for step in range(10):
        chunks = [
            move_batch(part, engine.device)
            for part in split_batch(batch(step, dist.get_rank(), 2), GLOBAL_BATCH // 2 // chunk)
        ]
        result = cached_train_step(engine, DreamLIPLoss(), chunks, learning_rate(step, STEPS, config.optim))
        losses.append(float(sum(result.losses.values())))
    losses = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(losses)
    return (losses / 2).tolist()


def held_out(folder: Path) -> dict:
    """The evaluation of the first model by both ranks, under ZeRO-1 and 3; what each rank sees of an error, and of a
    wish to stop, of rank 1 alone.
    """
    found = {}
    for stage in (1, 3):
        config = held_out_config(stage, folder)
        engine = build_engine(build_model(config.model, 0), config, init_distributed())
        with evaluation_model(engine, config.model) as model:
            found[str(stage)] = evaluate_run(model, config, engine.device, lambda: False)
    second = dist.get_rank() == 1

    def fail_on_the_second(batch: int) -> int:
        if second:
            raise UserError(f"batch {batch} is bad")
        return batch

    for what, work, stop in (("error", fail_on_the_second, False), ("stop", lambda batch: batch, second)):
        try:
            found[what] = Share(distributed=True).map(work, range(9), lambda stop=stop: stop)
        except (UserError, StoppedError) as error:
            found[what] = f"{type(error).__name__} {error}"
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    assert everyone[0] == everyone[1]
    return found


loading.subprocess = SimpleNamespace(run=python_module)  # a conversion imports DeepSpeed, which is imported here
folder = Path(sys.argv[1])
facts = {
    "held_out": held_out(folder),
    "losses": {},
    "moved": {},
    "resumed": {},
    "chunks": {f"{stage} {chunk}": in_chunks(stage, chunk) for stage, chunk in ((1, 2), (2, 1))},
}
for stage in (0, 1, 2, 3):
    config = tiny_config(stage)
    engine = tiny_engine(config)
    facts["losses"][stage] = global_losses(engine, config, 0, 3)
    save(engine, folder / f"two-{stage}", config, TrainState(step=3))
    facts["losses"][stage] += global_losses(engine, config, 3, STEPS)
    facts["moved"][stage] = skips_what_one_rank_cannot_use(engine, config)
    if stage == 1:
        facts["full"] = a_full_disk_on_one_rank(engine, config, folder / "two-1")
        facts["kept"] = [path.name for path in complete_checkpoints(folder / "two-1")]
for stage, precision in RESIZED:
    facts["resumed"][f"{stage} {precision}"] = resumed(folder / f"one-{stage}-{precision}", stage, precision)
if dist.get_rank() == 0:
    (folder / "facts.json").write_text(json.dumps(facts))
dist.barrier()  # a rank that leaves while the other still talks makes gloo abort it
dist.destroy_process_group()
