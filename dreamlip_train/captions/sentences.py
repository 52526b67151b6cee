"""From a record's caption columns to the K sub-captions of one training step. Pure functions; randomness is passed in.

    record {"raw_caption": .., "longSV_captions": .., ..} -> caption_pool -> [SubCaption, ..] -> sample_sub_captions -> [str, ..]

Raw and short captions are one sub-caption each; a long caption is split into sentences. Dirty values (None, NaN, "", numbers,
"nan", a caption stored as a list of single characters) give no sub-caption.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dreamlip_train.jobs.user_error import UserError

RAW = "raw_caption"
SHORT = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")
LONG = ("longIB_captions", "longSV_captions", "longLLA_captions")
CAPTION_COLUMNS = (
    RAW,
    "shortIB_captions",
    "longIB_captions",
    "shortSV_captions",
    "longSV_captions",
    "shortLLA_captions",
    "longLLA_captions",
)
"""DreamLIP's caption columns, in the order of its CSV files."""

Splitter = Literal["sentence", "official", "whole"]
Sampling = Literal["uniform", "raw_first"]

_MISSING = frozenset({"", "nan", "none", "null"})

# A full stop after these never ends a sentence.
_TITLES = frozenset("mr mrs ms mx dr prof rev hon gen col capt lt sgt mt e.g i.e eg ie vs cf viz approx est".split())
# A full stop after these is inside the sentence when a number follows ("No. 5", "Fig. 2").
_BEFORE_NUMBER = frozenset("no nos nr fig figs vol pp p pg".split())
# These can end a sentence or not ("an Inc. logo", "by Apple Inc. The logo ..."): what follows decides.
_MAYBE_LAST = frozenset(
    "etc inc ltd co corp jr sr st ave blvd rd dept ft jan feb mar apr jun jul aug sept sep oct nov dec al".split()
)
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]$|^[A-Z]$")
_SENTENCE_STARTERS = frozenset(
    (
        "a an the this that these those it its there here he she they we you his her their our in on at to from with behind above below beside "
        "under near next over around inside outside across some several many most all both each another one two three four five six "
        "and but so as while when overall additionally also meanwhile however"
    ).split()
)

_ALWAYS = re.compile(r"\n|</s>")
# A sentence ender with the quotes and brackets that close after it, before white space or the end; a full stop before a capital that lacks its space; a
# CJK one anywhere. One set of characters first: the expression is then sought for at those alone, four times as fast.
_ENDER = re.compile(
    r"[.!?…。！？](?:(?<=[.!?…])[.!?…]*[\"'”’)\]]*(?=\s|$)|(?<=[a-z]{2}\.)(?=[A-Z][a-z])|(?<=[。！？])[。！？]*[」』”]*)"
)
_OFFICIAL = re.compile(r"\n|</s>|[.]")


class SubCaption(NamedTuple):
    """One sub-caption, the column it comes from, and its 0-based position within that column's caption."""

    text: str
    source: str
    index: int


def is_character_split(value: Any) -> bool:
    """Whether a caption was stored as a list of its characters: more than three items, none longer than one character."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 3
        and all(isinstance(c, str) and len(c) <= 1 for c in value)
    )


def split_sub_captions(text: str | Sequence[str] | float | None, splitter: Splitter = "sentence") -> list[str]:
    """The sub-captions of one caption value, in order.

    Args:
        text: a caption; or a list, which is taken as already split. None, NaN, numbers, blanks and lists of single characters give [].
        splitter: "sentence" ends a piece at a newline, "</s>" or a sentence end, and keeps abbreviations, decimals, ellipses and quotes whole.
            "official" is ``re.split(r"\\n|</s>|[.]", text)``, stripped, empty pieces dropped. "whole" keeps the caption, or a list's joined pieces, as one.
    Raises:
        UserError: an unknown splitter.
    """
    if splitter not in ("sentence", "official", "whole"):
        raise UserError(f'splitter: got {splitter!r}; give "sentence", "official" or "whole"')
    if isinstance(text, (list, tuple)):
        pieces = [] if is_character_split(text) else [clean for item in text if (clean := _clean(item))]
        return [" ".join(pieces)] if splitter == "whole" and pieces else pieces
    if not isinstance(text, str) or text.strip().lower() in _MISSING:
        return []
    if splitter == "whole":
        return [clean] if (clean := _clean(text)) else []
    if splitter == "official":
        return [piece.strip() for piece in _OFFICIAL.split(text) if piece.strip()]
    return [clean for line in _ALWAYS.split(text) for piece in _split_line(line) if (clean := _clean(piece))]


def caption_pool(
    record: Mapping[str, Any], sources: Sequence[str] = (), splitter: Splitter = "sentence"
) -> list[SubCaption]:
    """Every sub-caption of a record: raw, then shorts, then the sentences of the long captions (or the columns named, in their order).

    A string in the raw or a short column is one sub-caption; in any other column it is split. A list is taken as already split.
    """
    pool = []
    for source in sources or (RAW, *SHORT, *LONG):
        value = record.get(source)
        if isinstance(value, str) and is_whole(source):
            value = [value]
        pool += [SubCaption(text, source, i) for i, text in enumerate(split_sub_captions(value, splitter))]
    return pool


def is_whole(source: str) -> bool:
    """Whether a column's caption is one sub-caption (raw and short columns) rather than several sentences."""
    return source == RAW or source.startswith("short")


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
        sampling: "uniform" draws from the whole pool (paper eq. 4). "raw_first" puts the raw caption first and draws k - 1 of the rest (the release).
        source_weights: relative weight of each sub-caption of a column; 1 where not named, 0 never draws it.
        merged_num: before the draw each long caption is cut into runs of 1..merged_num consecutive sentences (uniform lengths from rng), and
            a run is one sub-caption: every sentence is in exactly one, so none is said twice and the last is drawn as often as the first.
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
    drawn: dict[str, str] = {}
    for candidate in head + _weighted_order(candidates, weights, rng):
        if len(drawn) == k:
            break
        # The MLLMs do write the same sentence; a repeat would be a negative of itself in the within-image contrast.
        drawn.setdefault(candidate.text.casefold(), candidate.text)
    return list(drawn.values())


def _weighted_order(pool: list[SubCaption], weights: Mapping[str, float], rng: random.Random) -> list[SubCaption]:
    """The order of successive weighted draws without replacement: sort by Exponential(weight) arrival times (Efraimidis and Spirakis, 2006)."""
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
    ended = [t if t[-1] in ".!?…\"'”’)。！？" else t + "." for t in texts[:-1]]
    return SubCaption(" ".join([*ended, texts[-1]]), run[0].source, run[0].index)


def _clean(value: Any) -> str:
    """A caption's text with white space collapsed, or "" when it says nothing (not a string, blank, "nan", no letter or digit)."""
    if not isinstance(value, str):
        return ""
    text = " ".join(value.split())
    return text if text.lower() not in _MISSING and any(c.isalnum() for c in text) else ""


def _split_line(line: str) -> Iterator[str]:
    start = 0
    for ender in _ENDER.finditer(line):
        if _ends_sentence(line[start : ender.start()], ender.group(), line[ender.end() :].lstrip()):
            yield line[start : ender.end()]
            start = ender.end()
    yield line[start:]


def _ends_sentence(before: str, ender: str, after: str) -> bool:
    """Whether the ender between ``before`` (since the last sentence) and ``after`` ends a sentence."""
    if not after:
        return True
    following = after.lstrip("\"'“‘([")
    if not following[:1].isalnum():
        return True
    closes_quote = ender[-1] not in ".!?…。！？"
    if following[0].islower() and (closes_quote or ender.startswith(("..", "…"))):
        return False
    if ender != ".":
        return True
    words = before.split()
    word = words[-1].lstrip("\"'“‘([") if words else ""
    if len(words) <= 1 and word.isdigit():
        return False  # "1. A red ball": the number of a list item
    lower = word.lower()
    if lower in _TITLES or (lower in _BEFORE_NUMBER and following[0].isdigit()):
        return False
    if lower in _MAYBE_LAST or _DOTTED.search(word):
        # "The U.S. sign", "the U.S. Navy", but "in the U.S. The sign"; "St. John", but "in Main St. A car".
        return following[0].isupper() and re.split(r"\W", following, maxsplit=1)[0].lower() in _SENTENCE_STARTERS
    return True
