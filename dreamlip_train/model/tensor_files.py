"""Weight files that strangers made: what is read of one is no larger than the file lets expect, and plain numbers."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FREE_BYTES = 64 * 2**20
_MOST_RATIO = 50  # weights hardly compress


def refuse_bomb(path: Path) -> None:
    """Look at the sizes in the directory of a zip file, which torch's files are.

    Raises:
        ValueError: its content is far larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > FREE_BYTES + _MOST_RATIO * path.stat().st_size:
        raise ValueError(f"{size:,} bytes would come out of {path.stat().st_size:,}: a bomb, no weights")


def require_plain(state: Mapping[Any, Any]) -> None:
    """Raises:
    ValueError: a tensor is not dense numbers by a name, or its shape claims more of them than the file has.
    """
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is no tensor by its name, but a {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            kind = "meta" if value.is_meta else f"{value.layout}, {value.dtype}"
            raise ValueError(f"{name!r} is no dense tensor of real numbers ({kind})")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name!r} has the shape {tuple(value.shape)}, and fewer numbers in the file")
