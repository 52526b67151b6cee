"""Weight files: what is read of a stranger's is no larger than the file lets expect, and plain numbers; and a disk that
is full is said in our words, whatever the libraries that write make of it.
"""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.jobs.user_error import RunError

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


def save_tensors(content: Any, path: Path) -> None:
    """``torch.save``.

    Raises:
        RunError: the file can't be written.
    """
    with _writing(path):
        torch.save(content, path)


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' ``save_file``.

    Raises:
        RunError: the file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _writing(path):
        try:
            save_file(tensors, path, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"--output: {str(path)!r} can't be written: {reason} ({free:.2f} GB free); make room, or give another place"
        ) from error
