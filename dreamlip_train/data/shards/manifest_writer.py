"""manifest.json, written beside shards: what they hold and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.data.shards.manifest import MANIFEST
from dreamlip_train.jobs.atomic_json import write_json


class Manifest:
    """Grows by a shard at a time; ``further`` entries, such as what a join matched, stand at its end."""

    def __init__(self) -> None:
        self.total = Statistics()
        self.shards: dict[str, dict[str, int]] = {}
        self.further: dict[str, Any] = {}

    def add(self, name: str, note: Mapping[str, Any]) -> None:
        """Count a shard.

        Args:
            note: "samples" that have an image, "bytes" (None: it was left out), "counts", a ``Statistics``' state.
        """
        self.total.merge(Statistics(note["counts"]))
        if note["bytes"] is not None:
            self.shards[name] = {"samples": note["samples"], "bytes": note["bytes"]}

    def content(self) -> dict[str, Any]:
        """The file's content; shards by name."""
        return {"format": 1, **self.total.summary(), "shards": dict(sorted(self.shards.items())), **self.further}

    def write(self, folder: Path) -> dict[str, Any]:
        """Write ``folder``/manifest.json; returns its content."""
        content = self.content()
        write_json(folder / MANIFEST, content)
        return content
