"""A text to its sentences: linear in its length, whatever is in it.

    text -> lines -> markers of lists and headings off -> candidate ends (``_ENDER``) -> those that end a sentence
    (``_ends_sentence``)

An end inside a quotation or bracket does not count; abbreviations, initials and numbers before it are looked at through
a window of a few words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_NEW_LINE = re.compile(r"\r\n?|[\n\x0b\x0c\x85\u2028\u2029]|</s>|<br ?/?>")
_MARKER = re.compile(r"(?:[-*+•‣▪●·–—>]|#{1,6}|\(?\d{1,3}[.)]|[a-hA-H]\))(?=\s)\s*")
# A number that may begin an item within a line, where items 1, 2, .. were before it.
_INNER_MARKER = re.compile(r" (\d{1,2})[.)] (?=\S)")

_ENDER = re.compile(
    r"""
      (?<![.!?…؟]) (?P<stop>[.!?…؟]++)          # a run of enders, from its first character on: linear
      ["'”’»)\]*_]*+ (?=\s|$)                   # what closes after it, then white space or the end
    | (?<=[a-z]{2}) \. (?=[A-Z](?:[a-z]|\s))    # a full stop that lacks its space: "a car.A tree"
    | [。！？｡．]++ [」』”’）"]*+                  # CJK: no space follows
    | [۔।॥።։။។๚๛]++ ["'”’»)]*+                 # Urdu, Devanagari, Ethiopic, Armenian, Burmese, Khmer, Thai
    """,
    re.VERBOSE,
)
# Emoji after an end belong to what they comment on.
_EMOJI = re.compile(r"(?: ?[\u2600-\u27bf\u2b50\u2b55\U0001f000-\U0001faff\ufe0f\u200d])+(?= |$)")

# What belongs together whatever ends inside it; bounded, for an opening without its closing is a slip and no quotation.
_QUOTED = re.compile(
    r"""
      (?<![^\s(\[“*]) "(?=\S) [^"]{1,500} (?<=\S)"
    | “[^”]{1,500}” | «[^»]{1,500}» | 「[^」]{1,500}」 | 『[^』]{1,500}』 | （[^）]{1,500}）
    | \([^()]{1,500}\) | \[[^][]{1,500}\]
    """,
    re.VERBOSE,
)
_WINDOW = 64  # characters before and after an end that can matter
_OPENERS = " \"'“‘«([*_¿¡"

# A full stop after these never ends a sentence.
_TITLES = frozenset(
    (
        "mr mrs ms mx dr prof rev hon gen col capt cmdr lt sgt gov sen rep pres mt e.g i.e eg ie z.b vs cf viz approx "
        "est messrs mme mlle"
    ).split()
)
# A full stop after these is inside the sentence when a number follows ("No. 5", "Fig. 2", "Hwy. 61").
_BEFORE_NUMBER = frozenset("no nos nr fig figs vol pp p pg ch sec apt hwy rte rm ste ext".split())
# These can end a sentence or not ("an Inc. logo", "by Apple Inc. The logo ..."): what follows decides.
_MAYBE_LAST = frozenset(
    (
        "etc inc ltd co corp jr sr st ave blvd rd dr hwy apt dept bldg ft in oz lb lbs kg km cm mm sq hr hrs min mins "
        "gal pt qt yd "
        "jan feb mar apr jun jul aug sept sep oct nov dec al"
    ).split()
)
_UNITS = frozenset("in ft oz lb lbs kg km cm mm sq hr hrs min mins gal pt qt yd".split())  # after a number
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]$|^[A-Z]$")
_STARTERS = frozenset(
    (
        "a an the this that these those it its there here he she they we you his her their our in on at to from with "
        "behind above below beside "
        "under near next over around inside outside across some several many most all both each another one two three "
        "four five six "
        "and but so as while when overall additionally also meanwhile however"
    ).split()
)


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text`` in order, white space collapsed, without the markers of lists, headings and quotations
    before them.
    """
    return [piece for line in _NEW_LINE.split(text) for piece in _split_line(" ".join(line.split())) if piece]


def _split_line(line: str) -> Iterator[str]:
    marker = _MARKER.match(line)
    if marker is None:
        yield from _split_item(line)
        return
    # Items that follow one another within the line: "1. A ball 2. A box", "4. A ball 5. A box".
    begin, first = marker.end(), marker.group().strip(" ().")
    if first.isdecimal():
        number = int(first)
        for inner in _INNER_MARKER.finditer(line, marker.end()):
            if int(inner.group(1)) == number + 1 and (first == "1" or not line[inner.end()].islower()):
                yield from _split_item(line[begin : inner.start()])
                begin, number = inner.end(), number + 1
    yield from _split_item(line[begin:])


def _split_item(line: str) -> Iterator[str]:
    start = 0
    quoted = [span for match in _QUOTED.finditer(line) if (span := match.span()) != (0, len(line))]
    quoted.reverse()  # the next one is the last
    for ender in _ENDER.finditer(line):
        while quoted and quoted[-1][1] < ender.end():
            quoted.pop()
        inside = quoted and quoted[-1][0] < ender.start() and ender.end() < quoted[-1][1]
        if inside or not _ends_sentence(line, start, ender):
            continue
        emoji = _EMOJI.match(line, ender.end())
        end = emoji.end() if emoji else ender.end()
        yield line[start:end].strip()
        start = end
    yield line[start:].strip()


def _ends_sentence(line: str, start: int, ender: re.Match[str]) -> bool:
    """Whether a candidate ends the sentence that began at ``start``."""
    after = line[ender.end() : ender.end() + _WINDOW].lstrip()
    if not after:
        return True
    stop = ender["stop"]
    before = line[max(start, ender.start() - _WINDOW) : ender.start()]
    word = before.rpartition(" ")[2].lstrip(_OPENERS)
    lower = word.lower()
    if stop is None and ender.group() == ".":  # no space follows: an address, or an abbreviation, or a slip
        return not (set(word) & set("./@:") or lower in _TITLES or lower in _MAYBE_LAST)
    if stop is None:
        return not (ender.group()[-1] in "」』”" and after[0] == "と")  # 「..」と: he says ".."
    following = after.lstrip(_OPENERS)
    closes = ender.end() > ender.end("stop")
    if following[:1].islower() and (closes or stop.startswith(("..", "…"))):
        return False
    if stop != "." or closes:
        return True
    if lower in _TITLES or (lower in _BEFORE_NUMBER and following[:1].isdigit()):
        return False
    if word.isdigit() and ender.start() - len(word) - 1 <= start:
        return False  # nothing but a number: a list item's
    if not following[:1].isalnum():
        return True
    is_word = lower in _UNITS and re.search(r"\d\S* \S+$", before) is None  # "come in." is no inches
    if (lower in _MAYBE_LAST and not is_word) or _DOTTED.search(word):
        # "The U.S. sign", "the U.S. Navy", but "in the U.S. The sign"; "St. John", but "in Main St. A car".
        return following[0].isupper() and re.split(r"\W", following, maxsplit=1)[0].lower() in _STARTERS
    return True
