"""A record's caption columns, and their values as sub-captions.

    record {"raw_caption": .., "longSV_captions": .., ..} -> caption_pool -> [SubCaption, ..] ->
    sampling.sample_sub_captions

Raw and short captions are one sub-caption each; a long caption is split into sentences.
Dirty values (None, NaN, "", numbers, "nan", a caption stored as a list of single characters) give no sub-caption.
What is read of one caption is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from dreamlip_train.captions.sentences import split_sentences
from dreamlip_train.jobs.user_error import UserError

RAW = "raw_caption"
LONG_CAPTION = "long_captions"
"""The column of a long caption that no captioner of DreamLIP's wrote."""
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
LONGEST_CAPTION = 20_000
"""Characters that are read of one caption; a hundred times what a model sees of it. What is cut is counted where
captions are counted.
"""

_CONTEXT_WORDS = 55  # which are some 77 tokens
_MISSING = frozenset({"", "nan", "none", "null"})

_OFFICIAL = re.compile(r"\n|</s>|[.]")


def text_columns(text: str) -> dict[str, str]:
    """A caption without a column, such as a KEY.txt, under its column: one of several sentences that CLIP's context
    can't hold is a long caption, and will be split; any other is a raw one.
    """
    words = len(text[:LONGEST_CAPTION].split())
    if words > _CONTEXT_WORDS and len(split_sub_captions(text)) > 1:
        return {LONG_CAPTION: text}
    return {RAW: text}


def is_caption_column(name: str) -> bool:
    """Whether a column holds captions by its name: raw_caption, and short..._captions and long..._captions of any
    captioner.
    """
    return name == RAW or (name.startswith(("short", "long")) and name.endswith("_captions"))


def caption_columns(record: Mapping[str, Any]) -> list[str]:
    """The caption columns of a record in the order of a pool: raw, shorts, longs; those of other captioners after
    DreamLIP's.
    """
    others = sorted(name for name in record if is_caption_column(name) and name not in CAPTION_COLUMNS)
    shorts = [*SHORT, *(name for name in others if is_whole(name))]
    longs = [*LONG, *(name for name in others if not is_whole(name))]
    return [name for name in (RAW, *shorts, *longs) if name in record]


class SubCaption(NamedTuple):
    """One sub-caption, the column it comes from, and its 0-based position within that column's caption."""

    text: str
    source: str
    index: int


def is_character_split(value: Any) -> bool:
    """Whether a caption was stored as a list of its characters: more than three items, none longer than one
    character.
    """
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 3
        and all(isinstance(c, str) and len(c) <= 1 for c in islice(value, LONGEST_CAPTION))
    )


def is_too_long(value: Any) -> bool:
    """Whether only the first ``LONGEST_CAPTION`` characters of a caption, or of a list of pieces together, are read."""
    if isinstance(value, (list, tuple)):
        return sum(len(item) if isinstance(item, str) else 0 for item in value) + len(value) > LONGEST_CAPTION
    return isinstance(value, str) and len(value) > LONGEST_CAPTION


def split_sub_captions(text: str | Sequence[str] | float | None, splitter: Splitter = "sentence") -> list[str]:
    """The sub-captions of one caption value, in order; of its first ``LONGEST_CAPTION`` characters.

    Args:
        text: a caption; or a list, which is taken as already split. None, NaN, numbers, blanks and lists of single
            characters give [].
        splitter: "sentence" ends a piece at a newline, "</s>" or a sentence end, takes list markers off,
            and keeps abbreviations, decimals, ellipses and quotations whole. "official" is
            ``re.split(r"\\n|</s>|[.]", text)``, stripped, empty pieces dropped. "whole" keeps the caption,
            or a list's joined pieces, as one.
    Raises:
        UserError: an unknown splitter.
    """
    if splitter not in ("sentence", "official", "whole"):
        raise UserError(f'splitter: got {splitter!r}; give "sentence", "official" or "whole"')
    if isinstance(text, (list, tuple)):
        pieces = [] if is_character_split(text) else _pieces(text)
        return [" ".join(pieces)] if splitter == "whole" and pieces else pieces
    if not isinstance(text, str):
        return []
    text = text[:LONGEST_CAPTION]
    if text.strip().lower() in _MISSING:
        return []
    if splitter == "whole":
        return [clean] if (clean := _clean(text)) else []
    if splitter == "official":
        return [piece.strip() for piece in _OFFICIAL.split(text) if piece.strip()]
    return [clean for piece in split_sentences(text) if (clean := _clean(piece))]


def _pieces(items: Sequence[Any]) -> list[str]:
    """A list's texts, until they have ``LONGEST_CAPTION`` characters together."""
    pieces, left = [], LONGEST_CAPTION
    for item in islice(items, LONGEST_CAPTION):
        text = _clean(item[:left]) if isinstance(item, str) else ""
        if text:
            pieces.append(text)
            left -= len(text)
        if left <= 0:
            break
    return pieces


def caption_pool(
    record: Mapping[str, Any], sources: Sequence[str] = (), splitter: Splitter = "sentence"
) -> list[SubCaption]:
    """Every sub-caption of a record: raw, then shorts, then the sentences of the long captions (or the columns named,
    in their order).

    A string in the raw or a short column is one sub-caption; in any other column it is split.
    A list is taken as already split.
    """
    pool = []
    for source in sources or caption_columns(record):
        value = record.get(source)
        if isinstance(value, str) and is_whole(source):
            value = [value]
        pool += [SubCaption(text, source, i) for i, text in enumerate(split_sub_captions(value, splitter))]
    return pool


def is_whole(source: str) -> bool:
    """Whether a column's caption is one sub-caption (raw and short columns) rather than several sentences."""
    return source == RAW or source.startswith("short")


def _clean(value: Any) -> str:
    """A caption's text with white space collapsed, or "" when it says nothing (not a string, blank, "nan",
    no letter or digit).
    """
    if not isinstance(value, str):
        return ""
    text = " ".join(value.split())
    return text if text.lower() not in _MISSING and any(c.isalnum() for c in text) else ""
