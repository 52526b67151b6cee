"""The loader's worker side: a reader takes samples from its stream of each data set (sample_stream.py) and gives whole
batches.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from dreamlip_train.data.samples import TrainingSample
from dreamlip_train.data.shards.sample_stream import NoUsableSampleError, SampleStream

Tokenize = Callable[[list[str]], tuple[Tensor, int]]
"""B texts -> their tokens int64 [B, L], and how many were too long and lost their ends."""
_NAME_BYTES = 400


class Heartbeats:
    """Shared memory in which each worker says which shard it reads and when it last got a sample."""

    def __init__(self, workers: int) -> None:
        self.names = [multiprocessing.Array("c", _NAME_BYTES, lock=False) for _ in range(workers)]
        self.times = multiprocessing.Array("d", workers, lock=False)  # 0: it waits to be asked for a batch
        self.leaving = multiprocessing.Value("b", 0, lock=False)  # 1: the training process ends its workers

    def beat(self, worker: int, shard: str) -> None:
        """``worker`` reads ``shard`` and got a sample of it now."""
        self.names[worker].value = shard.encode()[-_NAME_BYTES + 1 :]
        self.times[worker] = time.time()

    def rest(self, worker: int) -> None:
        """``worker`` has nothing to do."""
        self.times[worker] = 0.0

    def silent(self, seconds: float) -> list[str]:
        """What each worker does that has been without a sample for so long."""
        now = time.time()
        return [
            f"worker {worker} has read nothing from {self.names[worker].value.decode(errors='replace')} for "
            f"{now - last:.0f} s"
            for worker, last in enumerate(self.times)
            if last and now - last >= seconds
        ]


class Reader:
    """The batches of one reader: ``takes`` says how many samples of each stream the next ones take."""

    def __init__(self, streams: list[SampleStream], takes: list[list[int]], slots: int, tokenize: Tokenize) -> None:
        self.streams, self.takes, self.slots, self.tokenize = streams, iter(takes), slots, tokenize

    def batch(self) -> dict[str, Any]:
        """The next batch: images uint8 [N, 3, S, S], text int64 [N, K, L], text_mask bool [N, K], and what is known of
        where they are from.
        """
        takes = zip(self.streams, next(self.takes), strict=True)
        pairs = [next(stream.samples) for stream, take in takes for _ in range(take)]
        shards, samples = [shard for shard, _ in pairs], [sample for _, sample in pairs]
        tokens, cut = self._tokens(samples)
        return {
            "images": _stacked(samples),
            "text": tokens,
            "text_mask": self._text_mask(samples),
            "keys": [sample.key for sample in samples],
            "shards": shards,
            "cut": cut + sum(sample.too_long for sample in samples),
            **self._news(),
        }

    def _tokens(self, samples: list[TrainingSample]) -> tuple[Tensor, int]:
        """int64 [N, K, L], empty slots as empty texts; and how many texts were cut."""
        padded = (sample.sub_captions + [""] * (self.slots - len(sample.sub_captions)) for sample in samples)
        tokens, cut = self.tokenize([caption for captions in padded for caption in captions])
        return tokens.view(len(samples), self.slots, -1), cut

    def _text_mask(self, samples: list[TrainingSample]) -> Tensor:
        """bool [N, K]: which slots hold a sub-caption."""
        return torch.arange(self.slots) < torch.tensor([len(sample.sub_captions) for sample in samples])[:, None]

    def _news(self) -> dict[str, Any]:
        """How many samples were read and which were bad since the last batch."""
        seen = sum(stream.seen for stream in self.streams)
        bad = [entry for stream in self.streams for entry in stream.bad]
        for stream in self.streams:
            stream.seen, stream.bad = 0, []
        return {"seen": seen, "bad": bad}


def _stacked(samples: list[TrainingSample]) -> Tensor:
    """uint8 [N, 3, S, S], channels last in memory as decoded: a transposition per picture would cost a third of what
    cropping it does. default_collate writes them to shared memory at once.
    """
    return default_collate([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)


class ReaderDataset(IterableDataset):
    """What a DataLoader runs in its workers: worker i makes the batches of reader (first + i) mod workers,
    for DataLoader begins at its worker 0.

    ``make(worker, beat)`` gives a reader and how many batches it has left. An error in what the user gave travels as an
    item {"error": message}.
    """

    def __init__(
        self,
        make: Callable[[int, Callable[[str], None]], tuple[Reader, int]],
        workers: int,
        first: int,
        beats: Heartbeats,
    ) -> None:
        self.make, self.workers, self.first, self.beats = make, workers, first, beats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        process = info.id if info else 0
        reader, batches = self.make(
            (self.first + process) % self.workers, lambda shard: self.beats.beat(process, shard)
        )
        for _ in range(batches):
            try:
                batch = reader.batch()
            except NoUsableSampleError as error:
                batch = {"error": str(error)}
            self.beats.rest(process)
            yield batch


def start_worker(worker: int, beats: Heartbeats) -> None:
    """A signal to the process group is for the training process: it finishes its step, saves, and ends its workers.

    Its SIGTERM is the end then, also of a worker that sits in a read for ever, which the training process would
    otherwise wait for when it exits.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if beats.leaving.value:
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    torch.set_num_threads(1)
