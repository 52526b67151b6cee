"""The tensors of a TorchScript archive, as OpenAI published CLIP's weights, read as data:
none of the archive's code runs.

An archive is a zip file: ``NAME/data.pkl`` pickles the module as nested attributes whose tensors refer to the raw bytes
in ``NAME/data/N``; ``NAME/code/`` holds the program, which is not looked at. ``torch.jit.load`` would run a module's
``__setstate__``.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.tensor_files import FREE_BYTES, refuse_bomb

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MOST_COPIES = 4  # of the file's bytes, where tensors share them
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")


def is_torchscript(path: Path) -> bool:
    """Whether ``path`` is a zip file with TorchScript's parts."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The module's parameters and buffers by name, copies on the CPU.

    Raises:
        UserError: the archive is damaged, or its module is made of more than attributes and tensors.
    """
    try:
        refuse_bomb(path)
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            room = FREE_BYTES + _MOST_COPIES * path.stat().st_size
            module = _TensorUnpickler(archive.read(pickled), lambda key: archive.read(f"{root}data/{key}"), room).load()
        if isinstance(module, _Module):
            return dict(_named_tensors(module, ""))
    except UserError as error:
        raise UserError(f"WEIGHTS: {str(path)!r}: {error}") from error
    except Exception as error:  # zipfile, pickle and torch raise whatever damaged bytes lead them to
        raise UserError(f"WEIGHTS: {str(path)!r} can't be read as a TorchScript archive: {error!r}") from error
    raise UserError(f"WEIGHTS: {str(path)!r} holds a {type(module).__name__}, not a module")


class _Module:
    """What an archived module has: its attributes, in ``__dict__``."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise UserError(
                "a module in it has a state that only its own code could restore, and that code is not run; load it "
                "with torch.jit.load where you trust it, and save its state_dict() with torch.save"
            )
        self.__dict__.update(state)


class _TensorUnpickler(pickle._Unpickler):
    """Knows modules (as bare attributes), tensors, and lists of numbers; refuses every other global.

    Python's own, not C's, which makes a table as long as the largest number that a pickle remembers an object by.

    Args:
        read_storage: gives the bytes of a key.
        room: bytes that all tensors together may have.
    """

    def __init__(self, content: bytes, read_storage: Any, room: int) -> None:
        super().__init__(io.BytesIO(content))
        self.read_storage, self.room = read_storage, room

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Module,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return list
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return lambda value, _: value
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name == "device":
            return str
        raise UserError(f"it would call {module}.{name} when loaded, which no CLIP archive does: it was not loaded")

    def persistent_load(self, identity: Any) -> Tensor:
        kind, dtype, key, _, count = identity
        content = self.read_storage(key)
        if kind != "storage" or len(content) < count * dtype.itemsize:
            raise UserError(f"its data {key!r} are cut short")
        return torch.frombuffer(bytearray(content), dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)

    def _rebuild(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        within = offset >= 0 and min((*size, *stride), default=0) >= 0 and last < storage.numel()
        if 0 not in size and not (within and math.prod(size) <= storage.numel()):
            raise UserError(f"a tensor of shape {tuple(size)} reaches beyond its data")
        self.room -= storage.element_size() * math.prod(size)
        if self.room < 0:
            raise UserError("its tensors are far more than its data")
        return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()


def _named_tensors(module: _Module, prefix: str) -> list[tuple[str, Tensor]]:
    tensors = []
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            tensors.append((prefix + name, value))
        elif isinstance(value, _Module):
            tensors += _named_tensors(value, f"{prefix}{name}.")
    return tensors
