"""The next batch travels to the device while the current step computes: a thread makes it ready, on a CUDA device on a
stream of its own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.data.loader import TrainLoader
from dreamlip_train.monitoring.throughput import Stopwatch


def training_batches(
    loader: TrainLoader,
    state: TrainState,
    total_steps: int,
    move: Callable[[dict[str, Any]], Any],
    device: torch.device,
    watch: Stopwatch,
    *,
    prefetch: bool,
) -> Generator[tuple[dict[str, Any], Any]]:
    """``(batch, move(batch))`` from where ``state`` stands, epoch after epoch, until it has ``total_steps`` steps;
    the caller advances it.

    The time spent waiting for each batch goes onto ``watch``.
    """
    while state.step < total_steps:
        with (
            contextlib.closing(loader.epoch(state.epoch, tuple(state.layouts))) as source,
            contextlib.closing(_moved(loader, source, move, device, prefetch)) as batches,
        ):
            while state.step < total_steps:
                began = time.perf_counter()
                batch = next(batches, None)
                watch.seconds_waited += time.perf_counter() - began
                if batch is None:
                    break
                yield batch


def _moved(
    loader: TrainLoader,
    source: Iterator[dict[str, Any]],
    move: Callable[[dict[str, Any]], Any],
    device: torch.device,
    prefetch: bool,
) -> Generator[tuple[dict[str, Any], Any], None, None]:
    if not prefetch:
        yield from ((batch, move(batch)) for batch in source)
        return
    batches = prefetched(source, move, device)
    try:
        # `yield from` would close it, and wait for its thread, before the loader hears of it.
        for batch in batches:  # noqa: UP028
            yield batch
    finally:
        loader.leave()
        batches.close()


def prefetched(
    batches: Iterator[Any], move: Callable[[Any], Any], device: torch.device
) -> Generator[tuple[Any, Any], None, None]:
    """``(batch, move(batch))`` for each of ``batches``, in order, one ahead of what was asked for;
    errors come where their batch would have.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def offer(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            if stream is not None:
                torch.cuda.set_device(device)  # of this thread
            for batch in batches:
                with torch.cuda.stream(stream):  # nothing where there is none
                    moved = move(batch)
                    copied = stream.record_event() if stream is not None else None
                if not offer("batch", (batch, moved, copied)):
                    return
            offer("end", None)
        except BaseException as error:
            offer("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            batch, moved, copied = value
            if copied is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                for tensor in _tensors(moved):
                    tensor.record_stream(current)  # or its memory would be given away while this stream still reads it
            yield batch, moved
    finally:
        stopped.set()
        thread.join()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):  # PackedCaptions
        yield from _tensors(list(vars(value).values()))
