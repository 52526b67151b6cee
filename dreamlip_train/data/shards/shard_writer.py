"""A shard that appears under its name when it is whole."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any


class ShardWriter:
    """Context manager: ``add`` raw samples, as ``shards.read_shard`` gives them; the same samples give the same bytes.
    An empty shard is not written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial, self.samples = path, path.with_name(path.name + ".partial"), 0

    def __enter__(self) -> ShardWriter:
        self.tar = tarfile.open(self.partial, "w", format=tarfile.PAX_FORMAT)  # long and non-ASCII keys too
        return self

    def add(self, sample: dict[str, Any]) -> None:
        """Append the members of one sample."""
        self.samples += 1
        for extension, data in sample.items():
            if extension != "key":
                add_member(self.tar, f"{sample['key']}.{extension}", data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.tar.close()
            if kind is None and self.samples:
                with self.partial.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file without time stamp or owner."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
