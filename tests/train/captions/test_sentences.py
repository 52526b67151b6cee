"""Sentences as a reader would cut them, in time that is linear in the text whatever is in it."""

import gc
import json
import random
import re
import time
from pathlib import Path

import pytest

from dreamlip_train.captions.columns import LONGEST_CAPTION, RAW, caption_pool, is_too_long, split_sub_captions
from dreamlip_train.captions.sampling import sample_sub_captions
from dreamlip_train.captions.sentences import split_sentences
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.model.tokenizer import CaptionTokenizer

TEXTS = Path(__file__).parents[2] / "support/inputs/texts/sentences.jsonl"
CASES = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
MEGABYTE = 1 << 20


def random_letters(seed: int) -> str:
    """A megabyte of a-z."""
    return random.Random(seed).randbytes(MEGABYTE).translate(bytes(97 + i % 26 for i in range(256))).decode()


HOSTILE = {
    "dots": "." * MEGABYTE,
    "dots that end in a word": "." * MEGABYTE + "a",
    "ellipses": "… " * (MEGABYTE // 2),
    "dots and letters": ".a" * (MEGABYTE // 2),
    "e.g.": "e.g. " * (MEGABYTE // 5),
    "U.S.": "U.S. " * (MEGABYTE // 5),
    "U.S. unspaced": "U.S." * (MEGABYTE // 4),
    "No. 5": "No. 5 " * (MEGABYTE // 6),
    "Mr.": "Mr. " * (MEGABYTE // 4),
    "one word": "a" * MEGABYTE,
    "one word of random letters": random_letters(0),
    "random words": re.sub(".{200}", r"\g<0> ", random_letters(1)),
    "open quotes": ' "a' * (MEGABYTE // 3),
    "open brackets": "(" * MEGABYTE,
    "brackets and words": "(a [b " * (MEGABYTE // 6),
    "curly quotes": "“a" * (MEGABYTE // 2),
    "quotes after a stop": "A." + '"' * MEGABYTE + "b",
    "CJK stops": "。" * MEGABYTE,
    "CJK": "狗。" * (MEGABYTE // 2),
    "blanks": " " * MEGABYTE + "a",
    "new lines": "\n" * MEGABYTE + "a",
    "numbers": "1. A 2. B " * (MEGABYTE // 10),
    "list": "\n".join(f"{i}. A ball." for i in range(MEGABYTE // 14)),
    "breaks": "<br " * (MEGABYTE // 4),
    "emoji": "A. " + "🎉" * MEGABYTE,
    "combining": "e" + "\u0301" * MEGABYTE,
    "lone surrogates": "\ud800" * MEGABYTE,
    "entities": "&amp;" * (MEGABYTE // 5),
    "markers": "- " * (MEGABYTE // 2),
    "hashes": "#" * MEGABYTE,
    "underscores after a stop": "A." + "_" * MEGABYTE,
}


@pytest.fixture(scope="module", autouse=True)
def own_garbage_only():
    """The objects that other tests left are not searched in these tests' time: that alone once took a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(77)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("2) Two dogs. 3) Three cats.", ["Two dogs.", "Three cats."]),
        ("9. A ball 10. A box", ["A ball", "A box"]),
    ],
)
def test_a_line_that_goes_on_with_a_list(text, pieces):
    """Only lists that begin with 1 were seen within a line."""
    assert split_sub_captions(text) == pieces


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:30])
def test_pieces_are_a_readers(case):
    assert split_sub_captions(case["text"]) == case["pieces"]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_megabyte_of_anything_is_read_at_once(text, tokenizer):
    """16 kB of dots took hours: the text before and after each end was copied, and the same run was sought from each of
    its characters.
    """
    began = time.process_time()
    record = {RAW: text, "longSV_captions": text, "longIB_captions": text.split(" ")}
    pool = caption_pool(record)
    tokenizer.with_cut([*sample_sub_captions(pool, 8, random.Random(0), merged_num=3), text])
    # Three columns and four copies; 0.2 s each on an idle core.
    assert time.process_time() - began < 0.8
    assert sum(len(piece.text) for piece in pool) <= 3 * LONGEST_CAPTION


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_splitting_is_linear_by_itself(text):
    began = time.process_time()
    split_sentences(text[: MEGABYTE // 4])
    assert time.process_time() - began < 1.0


def test_what_is_cut_is_counted():
    long = "A dog runs. " * 3000
    assert is_too_long(long) and is_too_long([long]) and not is_too_long("A dog.") and not is_too_long(3)
    statistics = Statistics()
    statistics.add_sample({"longSV_captions": long}, None)
    assert statistics.bad["caption longer than 20,000 characters, of which the first are read"]["count"] == 1


def test_nothing_but_white_space_and_markers_is_lost():
    for case in CASES:
        left = "".join("".join(case["pieces"]).split())
        text = "".join(case["text"].replace("</s>", "").replace("<br/>", "").split())
        for character in left:  # the pieces are the text with some of it left out
            assert character in text
            text = text[text.index(character) + 1 :]
