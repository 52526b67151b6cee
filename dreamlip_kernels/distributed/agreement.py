"""Whether all ranks hold the same shapes, and which backend they take: asked before their first collective,
for no rank can know it alone.

Collectives on unequal sizes hang or return garbage. DREAMLIP_CHECK says how often ranks compare:

    shapes   (the default) at each shape that a rank has not met before, through the process group's store:
             no device waits, and a step of
             known shapes compares nothing
    always   at each call, by a collective whose result is read on the host
    never
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import weakref
from dataclasses import dataclass, field
from typing import Sequence  # noqa: UP035 - torch 2.6 reads the op's schema from this one

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from .collectives import Group, group_name, group_of_name, process_group, rank_and_size

MODES = ("always", "shapes", "never")
SIZES = (
    "N (images a rank)",
    "K (sub-captions)",
    "D (width)",
    "image_mask (1 = passed)",
    "text_mask (1 = passed)",
    "image_ids (1 = passed)",
    "label_smoothing (in millionths)",
    "same_image (1 = 'positive')",
)
LONGEST_WAIT = datetime.timedelta(minutes=10)  # for a rank that compiles, or loads, while the others already compare
_LEAVING = datetime.timedelta(seconds=10)  # for ranks that have yet to read the sizes they all raise about


@dataclass
class _Memory:
    """What a rank remembers of one process group."""

    calls: int = 0
    backends: dict[str, str] = field(default_factory=dict)  # what was asked, as text -> the backend that all take


_memory: weakref.WeakKeyDictionary[dist.ProcessGroup, _Memory] = weakref.WeakKeyDictionary()


def agreement_sizes(
    text_features: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    same_image: str = "ignore",
) -> dict[str, int]:
    """What all ranks must agree on before their first collective, as integers."""
    is_given = (int(v is not None) for v in (image_mask, text_mask, image_ids))
    values = (*text_features.shape, *is_given, round(label_smoothing * 1e6), int(same_image == "positive"))
    return dict(zip(SIZES, values, strict=True))


def check_agreement(
    fn: str, sizes: dict[str, int], scale: Tensor, group: Group = None, *, backend: str = "torch"
) -> tuple[Tensor, str]:
    """Raise ValueError on every rank unless all ranks hold the same sizes; return ``scale``, and ``backend`` where all
    ranks chose that one, else "torch".

    Ranks choose by the verdicts on their own machines: one that has none decides for all.
    How often ranks compare stands above; while a CUDA graph is captured they don't. Under torch.compile they compare
    when the graph runs, in an op that ``scale`` goes through so that it comes before what multiplies by it; each keeps
    the backend that it was compiled with.
    """
    if rank_and_size(group)[1] == 1:
        return scale, backend
    if torch.compiler.is_compiling():
        return agreement_op(scale, fn, list(sizes.values()), backend, group_name(group)), backend
    return scale, _agreed(fn, sizes, scale.device, group, backend)


def _agreed(fn: str, sizes: dict[str, int], device: torch.device, group: Group, backend: str) -> str:
    """The backend for all, compared or remembered; ValueError where sizes differ."""
    mode = os.environ.get("DREAMLIP_CHECK", "shapes")
    if mode not in MODES:
        raise ValueError(f"DREAMLIP_CHECK must be one of {MODES}, got {mode!r}")
    memory = _memory.setdefault(process_group(group), _Memory())
    memory.calls += 1
    request = json.dumps([fn, sizes, backend])
    if mode == "never" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return memory.backends.get(request, backend)
    if mode == "always":
        memory.backends[request] = _compared(fn, sizes, _by_collective(sizes, backend, device, group), group, backend)
    elif request not in memory.backends:
        memory.backends[request] = _compared(
            fn, sizes, _by_store(fn, sizes, backend, memory.calls, group), group, backend
        )
    return memory.backends[request]


@torch.library.custom_op("dreamlip_kernels::agreement", mutates_args=())
def agreement_op(scale: Tensor, fn: str, sizes: Sequence[int], backend: str, group: str) -> Tensor:
    """``scale``, once all ranks are known to hold the same sizes."""
    _agreed(fn, dict(zip(SIZES, sizes, strict=True)), scale.device, group_of_name(group), backend)
    return scale.clone()


@agreement_op.register_fake
def _(scale, fn, sizes, backend, group):
    return torch.empty_like(scale)


agreement_op.register_autograd(lambda ctx, grad: (grad, None, None, None, None))


def _compared(fn: str, sizes: dict[str, int], by_rank: list[list], group: Group, backend: str) -> str:
    """The backend for all, of sizes and backend of each rank; ValueError where sizes differ."""
    *columns, backends = zip(*by_rank, strict=True)
    for name, column in zip(sizes, columns, strict=True):
        if len(set(column)) > 1:
            raise ValueError(
                f"{fn}: {name} must be the same on every rank, got {list(column)} by rank (this is rank "
                f"{rank_and_size(group)[0]}); "
                "drop or pad the last partial batch"
            )
    return backend if len(set(backends)) == 1 else "torch"


def _by_collective(sizes: dict[str, int], backend: str, device: torch.device, group: Group) -> list[list]:
    """Sizes and backend of every rank, as integers. Where the group connects CPUs too they go that way,
    and no device is waited for.
    """
    numbers = [*sizes.values(), int.from_bytes(backend.encode()[:7], "big")]
    on_cpu = "cpu:" in dist.get_backend_config(group)
    mine = torch.tensor(numbers, dtype=torch.int64, device="cpu" if on_cpu else device)
    everyone = mine.new_empty(rank_and_size(group)[1] * len(numbers))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return everyone.view(-1, len(numbers)).tolist()


def _by_store(fn: str, sizes: dict[str, int], backend: str, call: int, group: Group) -> list[list]:
    """Sizes and backend of every rank, each of which meets new ones at this call; RuntimeError where one does not."""
    rank, world = rank_and_size(group)
    store, name = _get_default_store(), group_name(group)
    keys = [f"dreamlip_kernels/agreement/{name}/{call}/{r}" for r in range(world)]
    store.set(keys[rank], json.dumps([*sizes.values(), backend]))
    try:
        store.wait(keys, LONGEST_WAIT)
    except RuntimeError as error:  # DistStoreError, of the store's timeout
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"{fn}: rank {rank} met new shapes, {sizes}, at call {call} of the losses, and ranks {missing} did not "
            "within "
            f"{LONGEST_WAIT.total_seconds():.0f} s: they hold other shapes, or stopped. Drop or pad the last partial "
            "batch"
        ) from error
    by_rank = [json.loads(store.get(key)) for key in keys]
    if any(sizes != by_rank[0][:-1] for *sizes, _ in by_rank):
        # Every rank is about to raise, and the store ends with its process: nobody leaves before all have read it.
        store.set(f"{keys[rank]}/read", "")
        with contextlib.suppress(RuntimeError):
            store.wait([f"{key}/read" for key in keys], _LEAVING)
    return by_rank
