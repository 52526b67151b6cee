"""One shard of ``recaption``: claimed, its pictures asked about, its copy written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from dreamlip_train.data.shards.shard_names import file_name
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard
from dreamlip_train.jobs.job_folder import finished, make_once
from dreamlip_train.jobs.work_claims import Claims
from dreamlip_train.prepare.recaption.answers import AnswerFile
from dreamlip_train.prepare.recaption.captioners import LocalModel, Picture, Prompt
from dreamlip_train.prepare.recaption.clip_filter import ClipFilter
from dreamlip_train.prepare.recaption.endpoint import Endpoint
from dreamlip_train.prepare.shard_copy import copy_shard


@dataclass(frozen=True)
class RecaptionSettings:
    """Everything a worker needs to do a shard."""

    output: Path
    state: Path
    model: str
    endpoint: str
    prompts: tuple[Prompt, ...]
    batch_size: int
    timeout: float
    retries: int
    max_bad_fraction: float
    stale_minutes: float
    trust_remote_code: bool
    clip_model: str = ""
    clip_weights: str = ""
    keep_above: float | None = None
    owner: str = ""

    def paths(self, shard: str) -> tuple[Path, Path]:
        """Where a shard's copy appears, and the note that it is done."""
        name = file_name(shard)
        return self.output / name, self.state / f"{name}.json"

    def answers(self, shard: str) -> Path:
        """Where a shard's answers are written down as they come."""
        return self.state / f"{file_name(shard)}.jsonl"


class ShardTask:
    """Called with a shard, captions it, unless it is done or somebody else's; returns what was done, as counts.

    Args:
        on_answers: called with the counts of the answers that have come since.
    """

    def __init__(
        self, settings: RecaptionSettings, on_answers: Callable[[Counter[str]], None] = lambda _: None
    ) -> None:
        self.settings, self.on_answers = settings, on_answers

    def __call__(self, shard: str) -> Counter[str]:
        settings, name = self.settings, file_name(shard)
        file, note = settings.paths(shard)
        if finished(file, note) is not None:
            return Counter({"done before": 1})
        claims = Claims(settings.state / "claims", 60 * settings.stale_minutes, settings.owner)
        if not claims.take(name):
            return Counter({"busy elsewhere": 1})
        try:
            if finished(file, note) is not None:  # by the one who has just released it
                return Counter({"done before": 1})
            answers = self._ask(shard, claims)
            captions = answers.captions
            make_once(
                file,
                note,
                lambda: copy_shard(shard, file, lambda _, sample: captions.get(sample["key"], {}), "not captioned"),
            )
            return answers.counts + Counter({"shards done": 1})
        finally:
            claims.release(name)

    def _ask(self, shard: str, claims: Claims) -> AnswerFile:
        """Captions by key: those kept from before, and new ones."""
        settings, name = self.settings, file_name(shard)
        with AnswerFile(settings.answers(shard), settings.prompts, settings.max_bad_fraction) as answers:
            pictures = _pictures(shard, set(answers.captions))
            first = next(pictures, None)
            if first is None:  # no model is loaded for nothing
                return answers
            claims.renew(name)
            coming = _captioner(settings).answers(chain([first], pictures), settings.batch_size)
            with closing(coming):
                for group, under_way in coming:
                    before = answers.counts.copy()
                    keys, images = zip(*(picture for picture, _ in group), strict=True)
                    new = [answer for _, answer in group]
                    if settings.keep_above is not None:
                        new = _clip_filter(settings).apply(images, new)
                    answers.add(keys, new, under_way)
                    claims.renew(name)
                    self.on_answers(answers.counts - before)
        return answers


def _pictures(shard: str, done: set[str]) -> Iterator[Picture]:
    """Those of the samples that are not done, up to the end of the shard or its damage."""
    try:
        for sample in read_shard(shard):
            image = image_of(sample)
            if image is not None and sample["key"] not in done:
                yield sample["key"], image
    except ShardError:
        pass  # the copy's counts say so


_captioners: dict[RecaptionSettings, Any] = {}


def _captioner(settings: RecaptionSettings) -> Any:
    """The model, made once per process."""
    if settings not in _captioners:
        _captioners.clear()
        if settings.endpoint:
            _captioners[settings] = Endpoint(
                settings.endpoint,
                settings.model,
                settings.prompts,
                timeout=settings.timeout,
                retries=settings.retries,
            )
        else:
            _captioners[settings] = LocalModel(
                settings.model, settings.prompts, trust_remote_code=settings.trust_remote_code
            )
    return _captioners[settings]


@lru_cache(1)
def _clip_filter(settings: RecaptionSettings) -> ClipFilter:
    """The filter, made once per process."""
    return ClipFilter(settings.clip_model, settings.clip_weights, settings.keep_above or 0.0)
