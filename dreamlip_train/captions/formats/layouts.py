"""Which published layout a table has, told by its columns, and what they are called here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dreamlip_train.captions.columns import LONG_CAPTION, RAW, is_caption_column
from dreamlip_train.jobs.user_error import UserError

IMAGE_COLUMN = "Image Path"
# The names in DreamLIP's JSON files for the columns of its CSV files.
_DREAMLIP_JSON = {
    "ImagePath": IMAGE_COLUMN,
    "RawCaption": RAW,
    **{
        f"{mllm}Caption{length.capitalize()}": f"{length}{mllm}_captions"
        for mllm in ("IB", "SV", "LLA")
        for length in ("short", "long")
    },
}
# What a table's names for its pictures and captions have in them, the likeliest first.
_IMAGE_WORDS = ("url", "path", "file", "image", "img")
_LONG_WORDS, _RAW_WORDS = ("caption", "description"), ("text", "comment", "sentence", "raw")
# What --columns calls ours in short.
_SHORTHAND = {"url": IMAGE_COLUMN, "image": IMAGE_COLUMN, "path": IMAGE_COLUMN, "raw": RAW}


@dataclass(frozen=True)
class Layout:
    """A layout that people publish: its name, and {its column: ours}. A table has it when it has all the columns, and a
    JSON document when it is of that form (annotations.py).
    """

    name: str
    columns: Mapping[str, str]
    form: str = ""


LAYOUTS = (
    Layout("ShareGPT4V / LLaVA conversations", {"image": IMAGE_COLUMN, "conversations": "longSV_captions"}),
    Layout("FLAIR annotations", {"image": IMAGE_COLUMN, "caption": LONG_CAPTION}, form="annotations"),
    Layout("COCO captions", {"image": IMAGE_COLUMN, "caption": RAW}, form="images and annotations"),
    Layout("Karpathy's splits", {"filename": IMAGE_COLUMN, "sentences": RAW}),
    Layout("Conceptual Captions, no header", {"url": IMAGE_COLUMN, "caption": RAW}, form="no header"),
    Layout("ALBEF / BLIP annotations", {"image": IMAGE_COLUMN, "caption": RAW}),
    Layout("DOCCI descriptions", {"image_file": IMAGE_COLUMN, "description": LONG_CAPTION}),
    Layout("DOCCI with pictures", {"image": IMAGE_COLUMN, "description": LONG_CAPTION}),
    Layout("Recap-DataComp", {"url": IMAGE_COLUMN, "re_caption": LONG_CAPTION, "org_caption": RAW}),
    Layout("PixelProse", {"url": IMAGE_COLUMN, "vlm_caption": LONG_CAPTION, "original_caption": RAW}),
)


def layout_of(names: Iterable[str], form: str = "") -> Layout | None:
    """The published layout that a table with these columns has; None for DreamLIP's own names, and for others."""
    names = set(names)
    if any(is_caption_column(_DREAMLIP_JSON.get(name, name)) for name in names):
        return None
    return next((layout for layout in LAYOUTS if layout.form == form and layout.columns.keys() <= names), None)


def describe_layout(names: Sequence[str], columns: Mapping[str, str], form: str = "") -> str:
    """The layout's name, for people."""
    layout = layout_of(names, form)
    if columns:
        return "columns as --columns says"
    if layout is not None:
        return layout.name
    return "DreamLIP's JSON" if any(name in _DREAMLIP_JSON for name in names) else "DreamLIP's columns"


def renaming(names: Iterable[str], columns: Mapping[str, str], form: str = "") -> dict[str, str]:
    """{a table's column: ours} of a table with the columns ``names``.

    Args:
        columns: {ours: the table's} as the user says, which comes before what a layout says.
    """
    layout = layout_of(names, form) if not columns else None
    by_layout = {**_DREAMLIP_JSON, **(layout.columns if layout else {})}
    by_user = {theirs: ours for ours, theirs in columns.items()}
    hidden = {ours: f"{ours} of the table" for ours in columns if ours not in by_user}
    return {theirs: ours for theirs, ours in by_layout.items() if ours not in columns} | hidden | by_user


def advice(names: Sequence[str]) -> str:
    """What a user can say of a table whose columns are not known: words of --columns with the table's own names, where
    they look like it.
    """
    known = [_DREAMLIP_JSON.get(name, name) for name in names]
    words = []
    image = _alike(names, _IMAGE_WORDS)
    if IMAGE_COLUMN not in known:
        words.append(f"url={_quoted(image)}")
    if not any(map(is_caption_column, known)):
        caption = _alike([name for name in names if name != image], (*_LONG_WORDS, *_RAW_WORDS))
        is_raw = any(word in caption.lower() for word in _RAW_WORDS)
        words.append(f"{'raw' if is_raw else 'long'}={_quoted(caption)}")
    return f"--columns {' '.join(words)} (long is split into sentences, raw is one)"


def _alike(names: Sequence[str], words: Sequence[str]) -> str:
    """The first name that is one of ``words``, or has one in it; THEIRS where none has."""
    exact = (name for word in words for name in names if name.lower() == word)
    return next(exact, next((name for word in words for name in names if word in name.lower()), "THEIRS"))


def _quoted(name: str) -> str:
    return shlex.quote(name) if len(name) <= 40 else "THEIRS"


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """{ours: the table's} of "OURS=THEIRS" words, or of words in pairs; url, raw, long and short stand for our names.

    Raises:
        UserError: a word without its partner, a name twice, or one of ours that is no caption's.
    """
    if all("=" in word for word in words):
        pairs = [tuple(word.split("=", 1)) for word in words]
    elif len(words) % 2 == 0:
        pairs = list(zip(words[::2], words[1::2], strict=True))
    else:
        raise UserError(f"--columns: {words[-1]!r} has no partner; give OURS=THEIRS, such as url=URL long=re_caption")
    columns: dict[str, str] = {}
    for short, theirs in pairs:
        ours = _our_name(short)
        if ours in columns or theirs in columns.values():
            raise UserError(f"--columns: {short}={theirs}: a column is named twice")
        columns[ours] = theirs
    return columns


def _our_name(word: str) -> str:
    name = _SHORTHAND.get(word, word)
    if name.startswith(("long", "short")) and not name.endswith("_captions") and name.isidentifier():
        name += "_captions"
    if name != IMAGE_COLUMN and not is_caption_column(name):
        raise UserError(
            f"--columns: {word!r} is no column of ours; give url, raw, long or short, or a captioner's "
            "longNAME_captions or shortNAME_captions"
        )
    return name
