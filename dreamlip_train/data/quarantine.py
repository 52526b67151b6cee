"""What a run could not use: counted by reason, and remembered by file and key in quarantine.jsonl."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_json import read_json_lines
from dreamlip_train.jobs.line_file import LineFile

logger = logging.getLogger("dreamlip_train")


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
        ids: the name within the set of each shard's path (``shard_names.shard_ids``); files of before have other names.
    """
    if path is None or not path.exists():
        return set()
    places, names = set(), set(ids.values())
    for entry in read_json_lines(path):
        name, key = entry.get("shard"), entry.get("key")
        if isinstance(name, str) and isinstance(key, str):
            places.add((name if name in names else ids.get(str(entry.get("path", name)), name), key))
    return places


class Quarantine:
    """What one rank of a run leaves out, in a file of all ranks; a full disk ends nothing (``LineFile``).

    Args:
        path: None notes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.file = None if path is None else LineFile(path, logger.error)

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Note {"shard": its name within the set, "path", "key", "reason", "detail"} each."""
        if self.file is not None:
            for entry in entries:
                self.file.write(json.dumps(entry))

    def require_written(self) -> None:
        """Everything noted is in the file, without which a resume would go on with other samples.

        Raises:
            OSError: it can't be written.
        """
        if self.file is not None:
            self.file.require_written()
