"""CLIP's tokens, as open_clip's SimpleTokenizer gives them, at the rate a loader needs: with K captions an image text costs as much as pixels."""

from __future__ import annotations

import functools

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode
from torch import Tensor

_WORDS_KEPT = 200_000


class CaptionTokenizer(open_clip.SimpleTokenizer):
    """open_clip's SimpleTokenizer, several times faster: each word's ids are looked up once, and printable ASCII without entities is not repaired.

    ``tokenizer(texts)`` -> int64 [B, context_length]; texts that are too long are cut and keep their end token.
    """

    def __init__(self, context_length: int) -> None:
        super().__init__(context_length=context_length)
        self.words: dict[str, list[int]] = {}
        self.bytes = bytes_to_unicode()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        # What ftfy and html.unescape repair is not in such a text.
        plain = text.isascii() and text.isprintable() and "&" not in text
        found: list[int] = []
        for word in (text.lower() if plain else self.clean_fn(text)).split():
            found += self.words.get(word) or self._look_up(word)
        return found

    def _look_up(self, word: str) -> list[int]:
        """The ids of what stands between two spaces, kept; no token reaches across a space."""
        if len(self.words) >= _WORDS_KEPT:
            self.words.clear()
        pieces = [
            self.bpe("".join(self.bytes[byte] for byte in part.encode("utf-8"))) for part in self.pat.findall(word)
        ]
        self.words[word] = [self.encoder[piece] for part in pieces for piece in part.split(" ")]
        return self.words[word]

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        return self.with_cut([texts] if isinstance(texts, str) else texts, context_length)[0]

    def with_cut(self, texts: list[str], context_length: int | None = None) -> tuple[Tensor, int]:
        """The tokens, and how many of the texts were longer than the context and lost their ends."""
        length = context_length or self.context_length
        rows, cut = [], 0
        for text in texts:
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > length:
                ids[length - 1 :] = [self.eot_token_id]
                cut += 1
            rows.append(ids + [0] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), length), cut


@functools.cache
def _tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(77)


def count_tokens(text: str) -> int:
    """CLIP tokens of a text, start and end included, before any truncation."""
    return len(_tokenizer().encode(text)) + 2
