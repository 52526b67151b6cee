"""What every framework's tokenizer needs: a long caption's sentences, and K of them as one fixed block of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


def split_sentences(caption: str) -> list[str]:
    """The sentences of ``caption``: cut after ``.``, ``!`` or ``?`` before white space, and at line ends.

    A simple rule; ``dreamlip_train.captions`` has one that knows abbreviations, decimals and lists.
    """
    return [sentence for part in _SENTENCE_END.split(caption) if (sentence := part.strip())]


def draw(sentences: list[str], k: int) -> list[str]:
    """At most ``k`` of them, without replacement, by torch's random state (a data loader's workers each have their
    own).
    """
    if len(sentences) <= k:
        return list(sentences)
    return [sentences[i] for i in torch.randperm(len(sentences))[:k].tolist()]


class SubCaptionTokenizer:
    """A tokenizer whose call gives K sub-captions for each caption: [n, K, L] instead of [n, L].

    ``SubCaptionTokenizer(open_clip.get_tokenizer("ViT-B-16"), 8)("A dog. A red ball.")`` is [1, 8, 77] with two rows
    filled; the other six are zeros, which ``text_mask`` calls missing. Every other attribute is the tokenizer's own.

    Args:
        tokenizer: called with a list of strings, gives integer tokens [n, L].
        num_sub_captions: K, the number of sub-captions drawn for each caption, without replacement.
        split: a caption's sub-captions; a caption may be a list of strings too, which is not split.

    Raises:
        ValueError: num_sub_captions is below 1.
    """

    def __init__(
        self,
        tokenizer: Callable[..., Tensor],
        num_sub_captions: int,
        split: Callable[[str], list[str]] = split_sentences,
    ):
        if num_sub_captions < 1:
            raise ValueError(f"SubCaptionTokenizer: num_sub_captions must be at least 1, got {num_sub_captions}")
        self.tokenizer, self.num_sub_captions, self.split = tokenizer, num_sub_captions, split

    def __getattr__(self, name: str):
        if name == "tokenizer":  # not there yet while this object is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, captions: str | Sequence[str] | Sequence[Sequence[str]], *args, **options) -> Tensor:
        """Integer tokens [n, K, L] of n captions; one string is n = 1. Further arguments are the tokenizer's."""
        captions = [captions] if isinstance(captions, str) else captions
        sub_captions = [draw(self.split(c) if isinstance(c, str) else list(c), self.num_sub_captions) for c in captions]
        flat = [sentence for sentences in sub_captions for sentence in sentences]
        rows = self.tokenizer(flat or [""], *args, **options)
        tokens = rows.new_zeros(len(sub_captions), self.num_sub_captions, rows.shape[-1])
        counts = torch.tensor([len(sentences) for sentences in sub_captions], dtype=torch.long)
        if flat:
            tokens[torch.arange(self.num_sub_captions) < counts[:, None]] = rows
        return tokens


def text_mask(tokens: Tensor) -> Tensor:
    """Which sub-captions of tokens [N, K, L] are there, [N, K] bool: a missing one's tokens are all 0."""
    return (tokens != 0).any(-1)


def mean_of_sub_captions(features: Tensor, mask: Tensor) -> Tensor:
    """One unit vector per caption, [N, D]: the mean of its unit sub-caption features [N, K, D] where mask [N,
    K] is set.
    """
    present = torch.where(mask[..., None], features, 0)
    return torch.nn.functional.normalize(present.sum(-2), dim=-1)
