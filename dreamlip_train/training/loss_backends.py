"""Which kernels the losses of a run use: qualified before the first collective, the same on every rank,
kept when the run resumes.
"""

from __future__ import annotations

import datetime
import os
import socket
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

import dreamlip_kernels
import dreamlip_kernels.backends.dispatch as dispatch
from dreamlip_train.config.schema import Config, LossConfig
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP

_LONGEST_WAIT = datetime.timedelta(hours=1)


def check_backends(loss: LossConfig, device: torch.device) -> None:
    """Refuse a backend in the loss section that does not exist or cannot run on ``device``.

    Raises:
        UserError: the field is named.
    """
    for op in dispatch.ops():
        field = _field_of(op, loss)
        try:
            raw = {} if loss.normalize_patches or op != "group_patches" else {"raw": 1}
            dispatch.select(op, torch.empty(0, device=device), requested_backend(loss, op), **raw)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error) if str(error).startswith("loss.") else f"{field}: {error}") from error


def requested_backend(loss: LossConfig, op: str) -> str:
    """What the settings ask of ``op``: its own field, else loss.backend where the op has that, else "auto"."""
    return dispatch.requested(_field_of(op, loss), op, _own(loss, op), loss.backend)


def _own(loss: LossConfig, op: str) -> str | None:
    return {"bidirectional_logsumexp": loss.contrastive_backend, "group_patches": loss.grouping_backend}.get(op)


def _field_of(op: str, loss: LossConfig) -> str:
    names = {"bidirectional_logsumexp": "loss.contrastive_backend", "group_patches": "loss.grouping_backend"}
    return "loss.backend" if _own(loss, op) is None else names[op]


def qualify_device(when: str, device: torch.device) -> str:
    """Test and time the kernels on this machine's devices where ``when`` asks for it;
    what a log should say of it, or "".

    The first rank of each machine works, and the others wait for its word in the process group's store:
    no collective waits, which could time out.

    Args:
        when: "auto" where a CUDA device has no verdict yet, "always", or "never".
    """
    if when == "never" or (when == "auto" and device.type != "cuda"):
        return ""
    store, word = _get_default_store(), f"dreamlip-qualified-{socket.gethostname()}"
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        store.wait([word], _LONGEST_WAIT)
        return ""
    outcome = "a failure"
    try:
        record = dreamlip_kernels.qualify(device, reuse=when == "auto")
        outcome = f"kernels qualified on {record.identity['device']} on {record.date}: {record.path}"
    except RuntimeError as error:  # the run goes on, with torch code
        outcome = f"the kernels could not be qualified, torch code runs: {error}"
    finally:
        store.set(word, outcome)
    return outcome


class Choice(NamedTuple):
    """The backend of each op for a whole run; why, as a log's header says it; and how it differs from what was asked or
    kept, a line each.
    """

    backends: dict[str, str]
    reasons: str
    changes: list[str]


def choose_backends(
    config: Config, model: DreamLIP, device: torch.device, images: int, before: dict[str, str]
) -> Choice:
    """The backend of each op, the same on all ranks and pinned in this process. Collective.

    Args:
        images: this rank's share of a step.
        before: what the checkpoint that the run resumes from was trained with; {} for a new run.
    Raises:
        RuntimeError: loss.backend names a backend that cannot run here.
    """
    backends, reasons, changes = {}, [], []
    for op, (probe, sizes) in _calls(config, model, device, images).items():
        requested = requested_backend(config.loss, op)
        backends[op] = dispatch.select(op, probe, requested, **sizes)
        reasons.append(f"{op}={backends[op]} ({dispatch.why(op, probe, requested, **sizes)})")
        old = before.get(op, backends[op])
        if requested == "auto" and old != backends[op]:
            why = (
                dispatch.why_not(op, old, probe, **sizes)
                if old in dispatch.backends(op)
                else "there is none of that name"
            )
            if why is None:
                backends[op], reasons[-1] = old, f"{op}={old} (as until this checkpoint)"
            else:
                changes.append(f"{op} ran by {old} until this checkpoint and runs by {backends[op]} now: {why}")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, backends)
    for op in backends:
        theirs = [choice[op] for choice in everyone]
        if len(set(theirs)) > 1:
            # The rank that has no verdict, or no such kernels, decides for all.
            changes.append(f"{op} runs by torch code on every rank, for they chose {theirs}")
            backends[op] = "torch"
        dispatch.pin(op, backends[op])
    return Choice(backends, ", ".join(reasons), changes)


def release_backends() -> None:
    """Give this process back what "auto" takes by itself: the end of a run that ``choose_backends`` pinned backends
    for.
    """
    for op in dispatch.ops():
        dispatch.pin(op, None)


def _calls(config: Config, model: DreamLIP, device: torch.device, images: int) -> dict[str, Any]:
    """For each op an empty tensor of the dtype, and the sizes, that a step calls it with."""
    k, d = config.data.num_sub_captions, model.embed_dim
    rows, columns = model.grid
    seen = max(1, int(rows * columns * (1 - config.model.patch_dropout)))
    patches = torch.empty(0, device=device, dtype=torch.float32 if config.train.precision == "fp32" else torch.bfloat16)
    chunk = min(images, config.train.chunk_size or images)
    world = images * dist.get_world_size()
    raw = {} if config.loss.normalize_patches else {"raw": 1}
    sigmoid = {"sigmoid_pairs": (torch.empty(0, device=device), {"M": world, "C": images * k, "D": d})}
    return (sigmoid if config.loss.pairs == "sigmoid" else {}) | {
        "bidirectional_logsumexp": (
            torch.empty(0, device=device),
            {"M": world, "C": images, "K": k, "D": d},
        ),
        "group_patches": (patches, {"N": chunk, "P": seen, "K": k, "D": d} | raw),
    }
