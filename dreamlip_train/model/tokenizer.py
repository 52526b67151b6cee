"""CLIP's tokens, as open_clip's SimpleTokenizer gives them, at the rate a loader needs:
with K captions per image, text costs as much as pixels.
"""

from __future__ import annotations

import functools
import heapq
import re
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError

_WORDS_KEPT = 200_000
_LONG_WORD = 64  # bytes; longer ones are merged in n log n instead of n squared, and not kept
_NO_CHARACTER = re.compile(r"&#[0-9]{4000,};?")
_MOST_CHARACTERS = 64  # read of a text for each token of the context; the rest could not be seen


@functools.cache
def _tables() -> dict[str, Any]:
    """open_clip's vocabulary and merges, which take a tenth of a second to read."""
    return vars(open_clip.SimpleTokenizer())


class CaptionTokenizer(open_clip.SimpleTokenizer):
    """open_clip's SimpleTokenizer, several times faster: each word's ids are looked up once, and printable ASCII
    without entities is not repaired.

    ``tokenizer(texts)`` -> int64 [B, context_length]; texts that are too long are cut and keep their end token.
    """

    def __init__(self, context_length: int) -> None:
        tables = _tables()
        self.__dict__.update(tables | {"context_length": context_length, "cache": dict(tables["cache"])})
        self.words: dict[str, list[int]] = {}
        self.bytes = bytes_to_unicode()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        # What ftfy and html.unescape repair is not in such a text.
        plain = text.isascii() and text.isprintable() and "&" not in text
        tokens: list[int] = []
        for word in (text.lower() if plain else self.clean_fn(_readable(text))).split():
            tokens += self.words.get(word) or self._look_up(word)
        return tokens

    def _look_up(self, word: str) -> list[int]:
        """The ids of what stands between two spaces, kept; no token reaches across a space."""
        if len(self.words) >= _WORDS_KEPT:
            self.words.clear()
        parts = [
            "".join(self.bytes[byte] for byte in part.encode("utf-8", "replace")) for part in self.pat.findall(word)
        ]
        pieces = [piece for part in parts for piece in self._pieces(part)]
        ids = [self.encoder[piece] for piece in pieces]
        if len(word) <= _LONG_WORD:
            self.words[word] = ids
        return ids

    def _pieces(self, part: str) -> list[str]:
        """``bpe(part).split(" ")``, which takes the square of a part's length, in n log n for long ones."""
        if len(part) <= _LONG_WORD:
            return self.bpe(part).split(" ")
        symbols: list[str] = [*part[:-1], part[-1] + "</w>"]
        follower = [*range(1, len(symbols)), -1]
        previous = [-1, *range(len(symbols) - 1)]
        heap: list[tuple[int, int, str, str]] = []

        def push(left: int) -> None:
            right = follower[left]
            if right >= 0 and (rank := self.bpe_ranks.get((symbols[left], symbols[right]))) is not None:
                heapq.heappush(heap, (rank, left, symbols[left], symbols[right]))

        for place in range(len(symbols) - 1):
            push(place)
        while heap:
            # All pairs of the lowest rank first, from left to right; what they form waits.
            rank, merged = heap[0][0], []
            while heap and heap[0][0] == rank:
                _, left, first, second = heapq.heappop(heap)
                right = follower[left]
                if right < 0 or (symbols[left], symbols[right]) != (first, second):
                    continue
                symbols[left], symbols[right] = first + second, ""
                follower[left] = follower[right]
                if follower[left] >= 0:
                    previous[follower[left]] = left
                merged.append(left)
            for left in merged:
                push(left)
                if previous[left] >= 0:
                    push(previous[left])
        return [symbol for symbol in symbols if symbol]

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        return self.with_cut([texts] if isinstance(texts, str) else texts, context_length)[0]

    def with_cut(self, texts: list[str], context_length: int | None = None) -> tuple[Tensor, int]:
        """The tokens, and how many of the texts were longer than the context and lost their ends."""
        length = context_length or self.context_length
        rows, cut = [], 0
        for text in texts:
            if len(text) > _MOST_CHARACTERS * length:
                text = " ".join(text.split())[: _MOST_CHARACTERS * length]
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > length:
                ids[length - 1 :] = [self.eot_token_id]
                cut += 1
            rows.append(ids + [0] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), length), cut


def _readable(text: str) -> str:
    """``text`` as html.unescape can read it: Python makes no number of "&#" and 4,301 digits, which is no character."""
    return _NO_CHARACTER.sub("\ufffd", text) if "&#" in text else text


@functools.cache
def _tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(77)


def count_tokens(text: str) -> int:
    """CLIP tokens of a text, start and end included, before any truncation."""
    return len(_tokenizer().encode(text)) + 2


class HubTokenizer:
    """The tokenizer of another text tower (SigLIP's) from the Hugging Face hub, its cache, or a folder, as open_clip
    uses it. Called like CaptionTokenizer.

    Raises:
        UserError: it is not there.
    """

    def __init__(self, name: str, context_length: int, options: dict[str, Any]) -> None:
        try:
            self.inner = open_clip.tokenizer.HFTokenizer(name, context_length=context_length, **options)
        except Exception as error:  # whatever transformers, the hub and the network raise
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"model.config: the tokenizer {name!r} can't be had: {reason}; give the folder of a copy as "
                "text_cfg.hf_tokenizer_name"
            ) from error
        self.context_length, self.vocab_size = context_length, len(self.inner.tokenizer)

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        return self.with_cut([texts] if isinstance(texts, str) else texts, context_length)[0]

    def with_cut(self, texts: list[str], context_length: int | None = None) -> tuple[Tensor, int]:
        """The tokens, and how many of the texts were longer than the context and lost their ends."""
        length = context_length or self.context_length
        texts = [_readable(text) for text in texts]
        whole = self.inner.tokenizer([self.inner.clean_fn(text) for text in texts])["input_ids"]
        return self.inner(texts, length), sum(len(ids) > length for ids in whole)
