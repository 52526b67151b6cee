"""Sentence splitting and the draw of sub-captions: nothing cut wrongly, nothing repeated, every sentence equally
often.
"""

import math
import random
import re
from collections import Counter

import pytest

from dreamlip_train.captions.columns import LONG, RAW, caption_pool, is_character_split, split_sub_captions
from dreamlip_train.captions.sampling import sample_sub_captions
from dreamlip_train.captions.statistics import Statistics

SPLITS = {
    "The U.S. sign says 3.5 km. A dog runs.": ["The U.S. sign says 3.5 km.", "A dog runs."],
    "Mr. Smith meets Dr. Jones. They talk.": ["Mr. Smith meets Dr. Jones.", "They talk."],
    "There are toys, e.g. a car. The car is red.": ["There are toys, e.g. a car.", "The car is red."],
    "Bus No. 5 waits. It is full!": ["Bus No. 5 waits.", "It is full!"],
    "He waits... and waits. Then he goes.": ["He waits... and waits.", "Then he goes."],
    'The sign reads "Stop." A car stops.': ['The sign reads "Stop."', "A car stops."],
    "Is it a cat? Yes! It is.": ["Is it a cat?", "Yes!", "It is."],
    "one\ntwo</s>three": ["one", "two", "three"],
    "No full stop at the end": ["No full stop at the end"],
    "": [],
    "   \n ": [],
    "nan": [],
}


@pytest.mark.parametrize("text", SPLITS)
def test_sentences(text):
    assert split_sub_captions(text) == SPLITS[text]


def test_official_splitter_is_the_release_s():
    text = "The U.S. sign says 3.5 km.\nA dog</s>runs."
    expected = [piece.strip() for piece in re.split(r"\n|</s>|[.]", text) if piece.strip()]
    assert split_sub_captions(text, "official") == expected
    assert len(expected) == 6


@pytest.mark.parametrize("dirty", [None, math.nan, 3, "", [], [None, "", math.nan], ["A", " ", "d", "o", "g"]])
def test_dirty_values_give_nothing(dirty):
    assert split_sub_captions(dirty) == []


def test_a_list_is_already_split_and_a_string_is_never_iterated():
    """FLAIR iterates strings as characters and trains to R@1 0.0002."""
    assert split_sub_captions(["A U.S. flag. On a pole.", "A dog."]) == ["A U.S. flag. On a pole.", "A dog."]
    assert split_sub_captions("A dog.") == ["A dog."]
    assert is_character_split(list("A dog runs")) and not is_character_split(["A", "dog"])


RECORD = {
    RAW: "my holiday. day 3",
    "shortSV_captions": "A dog on a beach. Sunny.",
    "longSV_captions": "A dog runs. The sea is blue. Sand is wet. Clouds hang low. A ball lies there.",
    "longIB_captions": math.nan,
    "longLLA_captions": None,
}


def test_pool_keeps_raw_and_short_whole_and_splits_long():
    pool = caption_pool(RECORD)
    assert [p.text for p in pool[:2]] == ["my holiday. day 3", "A dog on a beach. Sunny."]
    assert [(p.source, p.index) for p in pool[2:]] == [("longSV_captions", i) for i in range(5)]
    assert [p.source for p in caption_pool(RECORD, ("longSV_captions", RAW))] == ["longSV_captions"] * 5 + [RAW]


def test_whole_keeps_a_long_caption_as_one_text():
    assert split_sub_captions("A dog.  It runs.\nThe sea.", "whole") == ["A dog. It runs. The sea."]
    assert split_sub_captions(["A dog.", "It runs."], "whole") == ["A dog. It runs."]
    assert split_sub_captions("nan", "whole") == split_sub_captions([], "whole") == []
    assert len(caption_pool(RECORD, splitter="whole")) == 3


def draws(k, count=4000, record=RECORD, **options):
    rng = random.Random(0)
    pool = caption_pool(record)
    return [sample_sub_captions(pool, k, rng, **options) for _ in range(count)]


def test_every_sub_caption_is_drawn_equally_often_the_last_too():
    """The release draws from range(len - 1) and never shows the last sentence."""
    counts = Counter(text for drawn in draws(3) for text in drawn)
    assert len(counts) == 7
    expected = 4000 * 3 / 7
    for text, count in counts.items():
        assert abs(count - expected) < 5 * math.sqrt(expected), (
            f"{text!r} was drawn {count} times, expected about {expected:.0f}"
        )


def test_no_repeats_and_short_pools_stay_short():
    assert all(len(set(drawn)) == len(drawn) == 5 for drawn in draws(5, 200))
    assert all(len(drawn) == 7 for drawn in draws(12, 50))
    twice = {"longIB_captions": "A dog runs. The sea.", "longSV_captions": "a dog runs. The sun."}
    assert all(len(drawn) == 3 for drawn in draws(4, 50, twice)), "the same sentence by two MLLMs is one positive"


def test_raw_first():
    drawn = draws(3, 300, sampling="raw_first")
    assert all(d[0] == RECORD[RAW] for d in drawn)
    assert all(RECORD[RAW] not in d[1:] and len(d) == 3 for d in drawn)
    assert draws(2, 1, {LONG[0]: "One. Two."}, sampling="raw_first") != [[]], "without a raw caption the rest is drawn"


def test_source_weights():
    counts = Counter(text for drawn in draws(1, source_weights={RAW: 5.0, "shortSV_captions": 0.0}) for text in drawn)
    assert counts["A dog on a beach. Sunny."] == 0
    assert abs(counts[RECORD[RAW]] - 4000 * 5 / 10) < 5 * math.sqrt(2000)


def test_merged_sentences_are_consecutive_and_said_once():
    whole = split_sub_captions(RECORD["longSV_captions"])
    for drawn in draws(9, 300, merged_num=3):
        merged = [d for d in drawn if d not in (RECORD[RAW], RECORD["shortSV_captions"])]
        sentences = [s for m in merged for s in split_sub_captions(m)]
        assert sorted(sentences) == sorted(whole)
        for m in merged:
            start = whole.index(split_sub_captions(m)[0])
            assert (
                split_sub_captions(m) == whole[start : start + len(split_sub_captions(m))]
                and len(split_sub_captions(m)) <= 3
            )
    assert any(len(split_sub_captions(m)) == 3 for drawn in draws(9, 100, merged_num=3) for m in drawn)


def test_the_same_rng_draws_the_same():
    assert draws(4, 20) == draws(4, 20)


@pytest.mark.parametrize(
    "call",
    [lambda: split_sub_captions("a", "words"), lambda: sample_sub_captions([], 1, random.Random(0), sampling="last")],
)
def test_unknown_modes_are_named(call):
    with pytest.raises(ValueError, match="got '(words|last)'"):
        call()


def test_columns_of_another_captioner_are_drawn_and_counted():
    """After ``recaption --name Qwen`` on shards without other captions training found none, and validate called all
    unusable.
    """
    record = {
        "longQwen_captions": "A dog runs. It barks.",
        "shortQwen_captions": "A dog.",
        "longitude": "3",
        "captions": "x",
    }
    pool = caption_pool(record)
    assert [(p.text, p.source) for p in pool] == [
        ("A dog.", "shortQwen_captions"),
        ("A dog runs.", "longQwen_captions"),
        ("It barks.", "longQwen_captions"),
    ]
    assert caption_pool(record | RECORD)[0].source == RAW
    statistics = Statistics()
    statistics.add_sample(record, None)
    assert set(statistics.summary()["captions"]) == {"shortQwen_captions", "longQwen_captions"}
