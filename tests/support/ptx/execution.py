"""A launch: the kernel's parameters from its arguments, and the grid, a few blocks at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from . import instructions  # noqa: F401
from .instructions.tensor_copies import TensorMap
from .machine.errors import WrongParameters
from .machine.memory import PARAMETER_WINDOW, GlobalMemory
from .machine.program import Program, parse
from .machine.wave import WARP, Wave
from .schedule import TOGETHER, Schedule, Scheduler

LANES = 2048  # threads of a wave, about: enough to make numpy's overhead small


@dataclass(frozen=True)
class Struct:
    """An argument that is a C struct: its layout as ``struct.pack`` names it, and its fields, pointers as tensors."""

    layout: str
    fields: tuple[Any, ...]

    def __init__(self, layout: str, *fields: Any):
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "fields", fields)


@dataclass
class Execution:
    """What a launch executed: instructions, each counted once for the threads that executed it together;
    and operands of
    products that cp.async wrote without a fence between (warp_group.py)."""

    instructions: int = 0
    unfenced_products: int = 0


@cache
def program(text: str, kernel: str | None = None) -> Program:
    return parse(text, kernel)


def execute(
    text: str,
    arguments: list[Any],
    grid: tuple[int, int, int],
    *,
    shared_bytes: int = 0,
    kernel: str | None = None,
    threads: int | None = None,
    names: list[str] | None = None,
    schedule: Schedule = TOGETHER,
) -> Execution:
    """Runs a kernel's PTX on the memory of tensors, in place.

    Args:
        text: PTX, of which ``kernel`` is the entry to run.
        arguments: for each parameter a CPU tensor (its address), TensorMap, int, float, bool, Struct, bytes (a struct
        without pointers), or None (a null pointer).
        grid: blocks in x, y and z.
        shared_bytes: dynamic shared memory of a block.
        threads: of a block, where the PTX doesn't say.
        names: of the arguments, for messages.
        schedule: the order of warps.

    Returns:
        What was executed.

    Raises:
        PtxError: what the kernel did wrong, by its class.
    """
    kernel_program = program(text, kernel)
    names = names or [f"argument {i}" for i in range(len(arguments))]
    memory = GlobalMemory(dict(_tensors(names, arguments)))
    parameters, places, maps = _parameters(kernel_program, arguments, memory)
    threads = kernel_program.threads or threads
    if threads is None or threads % WARP:
        raise WrongParameters(f"{threads} threads a block, expected a multiple of {WARP}")
    number = grid[0] * grid[1] * grid[2]
    step, execution = max(1, LANES // threads), Execution()
    with np.errstate(all="ignore"):
        for first in range(0, number, step):
            wave = Wave(
                kernel_program,
                memory,
                parameters,
                places,
                maps,
                grid,
                first,
                min(step, number - first),
                threads,
                shared_bytes,
            )
            scheduler = Scheduler(wave, schedule)
            scheduler.run()
            execution.instructions += scheduler.executed
            execution.unfenced_products += wave.unfenced_products
    return execution


def _tensors(names: list[str], arguments: list[Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and extent of every tensor among the arguments, those inside structs too."""
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            yield name, _extent(value)
        elif isinstance(value, Struct):
            yield from _tensors([f"{name}, field {i}" for i in range(len(value.fields))], list(value.fields))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and number of bytes between the first and the last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _parameters(kernel: Program, arguments: list[Any], memory: GlobalMemory):
    """(bytes of the parameter space, place of each parameter in it, tensor maps by the address of their parameter)."""
    if len(arguments) != len(kernel.parameters):
        raise WrongParameters(f"{kernel.name} has {len(kernel.parameters)} parameters, got {len(arguments)} arguments")
    data, places, maps = bytearray(), {}, {}
    for parameter, value in zip(kernel.parameters, arguments, strict=True):
        data += bytes(-len(data) % max(1, parameter.align))
        places[parameter.name] = len(data)
        if isinstance(value, TensorMap):
            maps[PARAMETER_WINDOW + len(data)] = value
            value = bytes(128)
        piece = _encoded(value, parameter, memory)
        if len(piece) != parameter.bytes:
            raise WrongParameters(f"{parameter.name} has {parameter.bytes} bytes, its argument {value!r} {len(piece)}")
        data += piece
    return np.frombuffer(bytes(data) + bytes(16), np.uint8), places, maps


def _encoded(value: Any, parameter, memory: GlobalMemory) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Struct):
        return struct.pack(value.layout, *(_address(v, memory) for v in value.fields))
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", _address(value, memory))
    if value is None:
        return bytes(parameter.bytes)
    if isinstance(value, float):
        return struct.pack("<d" if parameter.bytes == 8 else "<f", value)
    return (int(value) & (1 << 8 * parameter.bytes) - 1).to_bytes(parameter.bytes, "little")


def _address(value: Any, memory: GlobalMemory) -> Any:
    """A tensor's address, 0 for None; other values as they are."""
    if isinstance(value, torch.Tensor):
        return memory.address(value.data_ptr()) if value.numel() else 0
    return 0 if value is None else value
