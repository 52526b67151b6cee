"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` at the end of the block, when its bytes are on disk.

    A crash leaves the old file or the new one; where the block raises or writes nothing, the old one stays.

    Args:
        shared: several processes may write ``path`` at the same time; the last one's file is there whole.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial")
    try:
        yield partial
        if partial.exists():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
