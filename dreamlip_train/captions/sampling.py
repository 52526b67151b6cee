"""The K sub-captions of one training step, drawn from a record's pool. Pure functions; randomness is passed in."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from dreamlip_train.captions.columns import RAW, SubCaption, is_whole
from dreamlip_train.jobs.user_error import UserError

Sampling = Literal["uniform", "raw_first"]


def sample_sub_captions(
    pool: Sequence[SubCaption],
    k: int,
    rng: random.Random,
    *,
    sampling: Sampling = "uniform",
    source_weights: Mapping[str, float] | None = None,
    merged_num: int = 1,
) -> list[str]:
    """Draw up to k different sub-captions without replacement; a short pool gives fewer than k, never a repeat.

    Args:
        pool: from caption_pool.
        k: how many to draw.
        rng: the only source of randomness.
        sampling: "uniform" draws from the whole pool (paper eq. 4). "raw_first" puts the raw caption first and draws
            k - 1 of the rest (the release).
        source_weights: relative weight of each sub-caption of a column; 1 where not named, 0 never draws it.
        merged_num: before the draw each long caption is cut into runs of 1..merged_num consecutive sentences (uniform
            lengths from rng), and a run is one sub-caption: every sentence is in exactly one, so none is said twice and
            the last is drawn as often as the first.
    Raises:
        UserError: an unknown sampling.
    """
    if sampling not in ("uniform", "raw_first"):
        raise UserError(f'sampling: got {sampling!r}; give "uniform" or "raw_first"')
    weights = source_weights or {}
    candidates = list(_merge_runs(pool, merged_num, rng)) if merged_num > 1 else list(pool)
    head = []
    if sampling == "raw_first":
        head = [c for c in candidates if c.source == RAW][:1]
        candidates = [c for c in candidates if c.source != RAW]
    draws: dict[str, str] = {}
    for candidate in head + _weighted_order(candidates, weights, rng):
        if len(draws) == k:
            break
        # The MLLMs do write the same sentence; a repeat would be a negative of itself in the within-image contrast.
        draws.setdefault(candidate.text.casefold(), candidate.text)
    return list(draws.values())


def _weighted_order(pool: list[SubCaption], weights: Mapping[str, float], rng: random.Random) -> list[SubCaption]:
    """The order of successive weighted draws without replacement: sort by Exponential(weight) arrival times (Efraimidis
    and Spirakis, 2006).
    """
    arrivals = [
        (-math.log(1.0 - rng.random()) / w, i) for i, c in enumerate(pool) if (w := weights.get(c.source, 1.0)) > 0
    ]
    return [pool[i] for _, i in sorted(arrivals)]


def _merge_runs(pool: Sequence[SubCaption], merged_num: int, rng: random.Random) -> Iterator[SubCaption]:
    run: list[SubCaption] = []
    length = 1
    for piece in pool:
        follows = run and piece.source == run[-1].source and piece.index == run[-1].index + 1
        if run and (not follows or is_whole(piece.source) or len(run) == length):
            yield _joined(run)
            run = []
        if not run:
            length = rng.randint(1, merged_num)
        run.append(piece)
    if run:
        yield _joined(run)


def _joined(run: list[SubCaption]) -> SubCaption:
    texts = [piece.text for piece in run]
    # Official pieces have lost their full stops.
    sentences = [t if t[-1] in ".!?…\"'”’)。！？" else t + "." for t in texts[:-1]]
    return SubCaption(" ".join([*sentences, texts[-1]]), run[0].source, run[0].index)
