"""A shard that appears under its name when it is whole."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_file import atomic_write


class ShardWriter:
    """Context manager: ``add`` raw samples, as ``shards.read_shard`` gives them; the same samples give the same bytes.
    An empty shard is not written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.samples, self.stack = path, 0, ExitStack()
        self.keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self.partial = self.stack.enter_context(atomic_write(self.path))
        self.stack.push(self._drop_empty)
        # Its format takes long and non-ASCII keys too.
        self.tar = self.stack.enter_context(tarfile.open(self.partial, "w", format=tarfile.PAX_FORMAT))
        return self

    def add(self, sample: Mapping[str, Any]) -> None:
        """Append the members of one sample, whose key is its own: as a neighbor another of it would be read as one."""
        assert sample["key"] not in self.keys, f"two samples of {self.path} have the key {sample['key']!r}"
        self.keys.add(sample["key"])
        self.samples += 1
        for extension, data in sample.items():
            if extension != "key":
                member = tarfile.TarInfo(f"{sample['key']}.{extension}")  # without time stamp or owner
                member.size = len(data)
                self.tar.addfile(member, io.BytesIO(data))

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def _drop_empty(self, *_: object) -> None:
        if not self.samples:
            self.partial.unlink(missing_ok=True)


def json_member(record: Mapping[str, Any]) -> bytes:
    """A sample's captions and further fields as the content of its KEY.json; what JSON lacks becomes text."""
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "replace")
