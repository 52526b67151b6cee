"""JSON files that are whole or absent, also when several processes write one at the same time."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` at once: a crash leaves the old file or the new one, and of several writers the last one's is
    there whole.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        # A lone surrogate, of a file name or a caption, becomes the escape that JSON has for it.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
