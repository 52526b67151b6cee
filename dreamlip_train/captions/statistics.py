"""What a set of samples holds, as mergeable counts: captions, sentences and tokens by source, and everything that is
wrong, by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dreamlip_train.captions.columns import (
    LONGEST_CAPTION,
    caption_columns,
    is_character_split,
    is_too_long,
    is_whole,
    split_sub_captions,
)

CountTokens = Callable[[str], int]
"""Tokens of a text, start and end included."""
EXAMPLES = 10


class Statistics:
    """Counts over samples; ``state`` is plain data, so that shards counted apart can be written down and added up."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        state = state or {"samples": 0, "masks": 0, "sources": {}, "bad": {}}
        self.samples, self.masks = state["samples"], state["masks"]
        self.sources: dict[str, dict[str, Counter[int]]] = {
            source: {name: Counter({int(n): c for n, c in histogram.items()}) for name, histogram in counts.items()}
            for source, counts in state["sources"].items()
        }
        self.bad: dict[str, dict[str, Any]] = {
            reason: {"count": b["count"], "examples": list(b["examples"])} for reason, b in state["bad"].items()
        }

    def add_sample(self, record: Mapping[str, Any], count_tokens: CountTokens | None, has_mask: bool = False) -> None:
        """Count one usable sample."""
        self.samples += 1
        self.masks += has_mask
        for source in caption_columns(record):
            value = record.get(source)
            if is_too_long(value):
                self.add_bad(f"caption longer than {LONGEST_CAPTION:,} characters, of which the first are read", source)
            sentences = split_sub_captions([value] if isinstance(value, str) and is_whole(source) else value)
            if not sentences:
                continue
            histograms = self.sources.setdefault(
                source, {"sentences": Counter(), "tokens": Counter(), "sentence_tokens": Counter()}
            )
            histograms["sentences"][len(sentences)] += 1
            if count_tokens is not None:
                lengths = [count_tokens(sentence) for sentence in sentences]
                histograms["sentence_tokens"].update(lengths)
                histograms["tokens"][sum(length - 2 for length in lengths) + 2] += 1

    def add_bad(self, reason: str, name: str, detail: str = "") -> None:
        """Count something that was left out (or, for findings that do no harm, merely noted)."""
        entry = self.bad.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(f"{name}: {detail}" if detail else name)

    def merge(self, other: Statistics) -> None:
        """Add the counts of another set of samples."""
        self.samples += other.samples
        self.masks += other.masks
        for source, histograms in other.sources.items():
            own = self.sources.setdefault(source, {name: Counter() for name in histograms})
            for name, histogram in histograms.items():
                own[name].update(histogram)
        for reason, entry in other.bad.items():
            own_bad = self.bad.setdefault(reason, {"count": 0, "examples": []})
            own_bad["count"] += entry["count"]
            own_bad["examples"] = (own_bad["examples"] + entry["examples"])[:EXAMPLES]

    @property
    def bad_count(self) -> int:
        """Everything counted by ``add_bad``."""
        return sum(entry["count"] for entry in self.bad.values())

    def bad_summary(self) -> str:
        """Every reason with its count and an example, on one line."""
        return "; ".join(
            f"{entry['count']} x {reason}, such as {entry['examples'][0]}" for reason, entry in self.bad.items()
        )

    @property
    def state(self) -> dict[str, Any]:
        """Plain data from which ``Statistics(state)`` continues."""
        return {"samples": self.samples, "masks": self.masks, "sources": self.sources, "bad": self.bad}

    def summary(self) -> dict[str, Any]:
        """The manifest's part: {"samples", "masks", "captions": {source: means and percentiles}, "bad"}."""
        return {
            "samples": self.samples,
            "masks": self.masks,
            "captions": {s: _describe(h) for s, h in self.sources.items()},
            "bad": self.bad,
        }


def _describe(histograms: Mapping[str, Counter[int]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"samples": histograms["sentences"].total()}
    for name in ("sentences", "tokens", "sentence_tokens"):
        histogram = histograms[name]
        if histogram:
            numbers[f"{name}_mean"] = round(sum(n * c for n, c in histogram.items()) / histogram.total(), 2)
            numbers |= {f"{name}_p{p}": percentile(histogram, p) for p in (50, 95)} | {f"{name}_max": max(histogram)}
    return numbers


def percentile(histogram: Counter[int], percent: float) -> int:
    """The smallest value that at least ``percent`` of the counted do not exceed."""
    enough, count = histogram.total() * percent / 100, 0
    for value in sorted(histogram):
        count += histogram[value]
        if count >= enough:
            return value
    return 0


def character_split_columns(record: Mapping[str, Any]) -> list[str]:
    """Caption columns whose text was stored as a list of its characters."""
    return [source for source in caption_columns(record) if is_character_split(record.get(source))]


def format_summary(title: str, manifest: Mapping[str, Any]) -> str:
    """A manifest as a short table to read."""
    lines = [
        f"{title}: {manifest['samples']} samples in {len(manifest['shards'])} shards, {manifest['masks']} with masks"
    ]
    for source, numbers in manifest["captions"].items():
        parts = [f"{numbers['samples']:>9} captions", f"{numbers['sentences_mean']:>5.1f} sentences each"]
        if "tokens_mean" in numbers:
            parts.append(
                f"{numbers['tokens_mean']:>6.1f} tokens each, {numbers['sentence_tokens_mean']:.1f} a sentence"
            )
        lines.append(f"  {source:<18} {', '.join(parts)}")
    for reason, entry in manifest["bad"].items():
        lines.append(f"  {entry['count']:>9} x {reason}, such as {'; '.join(entry['examples'][:3])}")
    return "\n".join(lines)
