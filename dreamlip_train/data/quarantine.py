"""What a run could not use: counted by reason, and remembered by file and key in quarantine.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_json import read_json_lines


@dataclass
class BadCounts:
    """Samples left out so far: ``counts`` by reason, and the first few of each as "shard: key (detail)"."""

    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Samples left out for any reason."""
        return sum(self.counts.values())

    def add(self, entry: dict[str, Any]) -> None:
        """Count one entry of a worker."""
        self.counts[entry["reason"]] += entry.get("count", 1)
        examples = self.examples.setdefault(entry["reason"], [])
        if len(examples) < 5:
            examples.append(f"{entry.get('path', entry['shard'])}: {entry['key']} ({entry['detail']})")

    def __str__(self) -> str:
        return "; ".join(
            f"{count} x {reason}, such as {self.examples[reason][0]}" for reason, count in self.counts.most_common()
        )


def read_quarantine(path: Path | None, ids: Mapping[str, str]) -> set[tuple[str, str]]:
    """(the shard's name within its set, key) of every sample that a run has left out so far, wherever the set lay then.

    Args:
        ids: the name within the set of each shard's path (``shard_names.shard_ids``), for files that have paths.
    """
    if path is None or not path.exists():
        return set()
    entries = [entry for entry in read_json_lines(path) if {"shard", "key"} <= entry.keys()]
    return {(ids.get(entry["shard"], entry["shard"]), entry["key"]) for entry in entries}


def append_quarantine(path: Path | None, entries: list[dict[str, Any]]) -> None:
    """Note what was left out: {"shard": its name within the set, "path", "key", "reason", "detail"} each;
    nothing where there is no file to note it in.
    """
    if path is not None and entries:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
