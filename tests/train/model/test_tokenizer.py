"""The faster tokenizer gives open_clip's ids for any text, and counts what it cuts."""

import random

import open_clip
import pytest
import torch

from dreamlip_train.model import tokenizer
from dreamlip_train.model.tokenizer import CaptionTokenizer, count_tokens

TEXTS = [
    "",
    "a dog",
    "A LARGE dog's   tail, isn't it? 42 x 17.5%",
    "  tabs\tand\nnew lines ",
    "fish &amp; chips &lt;br&gt; &eacute;",
    "It’s a “café” … naïve façade – ﬁne",
    "broken mojibake: cafÃ© and â€œquotesâ€\x9d",
    "日本語 의 한국어 😀 emoji",
    "<start_of_text> odd <end_of_text> <br/> </s>",
    "\x1b[31mterminal\x1b[0m and \x07 control",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "word " * 100,
]


@pytest.mark.parametrize("context", [16, 77])
def test_the_ids_are_open_clips(context):
    theirs, ours = open_clip.SimpleTokenizer(context_length=context), CaptionTokenizer(context)
    rng = random.Random(0)
    ascii_ = "".join(map(chr, range(32, 127)))
    noise = ["".join(rng.choice(ascii_) for _ in range(rng.randrange(60))) for _ in range(300)]
    noise += [
        "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2FFF)])) for _ in range(20))
        for _ in range(100)
    ]
    for text in TEXTS + noise:
        assert torch.equal(ours([text]), theirs([text])), text
        assert ours.encode(text) == theirs.encode(text), text
    assert torch.equal(ours(TEXTS), theirs(TEXTS)) and torch.equal(ours("a dog"), theirs("a dog"))
    assert ours([]).shape == (0, context)


def test_what_is_cut_keeps_its_end_and_is_counted():
    ours = CaptionTokenizer(8)
    tokens, cut = ours.with_cut(["one two three four five six", "one two three four five six seven", "word " * 50, "a"])
    assert cut == 2
    assert (tokens == ours.eot_token_id).sum(dim=1).tolist() == [1, 1, 1, 1]
    assert tokens.argmax(dim=1).tolist() == [7, 7, 7, 2]


def test_the_word_table_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenizer, "_WORDS_KEPT", 3)
    ours, theirs = CaptionTokenizer(77), open_clip.SimpleTokenizer(context_length=77)
    text = "a b c d e f g a b"
    assert ours.encode(text) == theirs.encode(text) and len(ours.words) <= 3


def test_long_words_have_open_clip_s_tokens():
    """They are merged in n log n; open_clip takes the square of their length."""
    rng = random.Random(0)
    ours, theirs = CaptionTokenizer(77), open_clip.SimpleTokenizer(context_length=77)
    words = ["a" * n for n in (65, 66, 127, 300)] + [
        "ab" * 100,
        "haha" * 40,
        "ing" * 50,
        "é" * 80,
        "狗" * 70,
        "!?" * 60,
    ]
    words += ["".join(rng.choices("etaoinshrdlu", k=rng.randint(65, 400))) for _ in range(60)]
    words += ["".join(rng.choices("photograph the running", k=200)).replace(" ", "") for _ in range(20)]
    for word in words:
        assert ours.encode(word) == theirs.encode(word), word


@pytest.mark.parametrize("text", ["&#" + "9" * 5000, "a &#" + "0" * 5000 + "65; dog", "&#x" + "f" * 5000 + ";"])
def test_a_number_of_thousands_of_digits_ends_nothing(text):
    """html.unescape raised a ValueError: one such caption ended training, in every epoch again."""
    tokens, _ = CaptionTokenizer(77).with_cut([text])
    assert tokens.shape == (1, 77) and count_tokens(text) >= 2
