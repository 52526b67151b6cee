"""A device that is not there: what the shipped launchers launch runs as executed PTX, and torch does on the CPU what
cuBLAS would do.

    with device(90):
        row, col = bidirectional_logsumexp(x, y, scale, backend="triton")      # x, y on the CPU

Inside, tensors say that they are on a CUDA device of that capability, and every ``kernel[grid](...)`` is compiled for
it, as Triton's own launch code
would, and executed on the arguments' memory. Nothing here knows a kernel:
grids, arguments and constants are the launcher's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .compilation.compile import compile_triton
from .compilation.stand_ins import Compiled, describe
from .execution import Execution, execute
from .instructions.tensor_copies import TensorMap
from .schedule import TOGETHER, Schedule

# Bytes of shared memory a block may have.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass
class Launch:
    """One launch that happened: the kernel, what it was compiled to, its arguments by name, its grid and how many
    instructions were executed.
    """

    kernel: str
    compiled: Compiled
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    execution: Execution | None = None


@contextmanager
def device(
    capability: int, *, schedule: Schedule = TOGETHER, mutate: Callable[[str, str], str] | None = None
) -> Iterator[list[Launch]]:
    """Within, launches of Triton kernels are compiled for ``capability`` (80, 86, 90, ...) and executed;
    yields the list of them.

    ``mutate(kernel, ptx)`` gives the PTX to execute in place of what was compiled: how a test plants a defect.
    """
    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup=False, **kwargs):
        function = kernel.fn
        arguments, options = tuple(map(describe, args)), {name: describe(value) for name, value in kwargs.items()}
        compiled = compile_triton(function.__module__, function.__qualname__, capability, arguments, options)
        values = dict(zip(compiled.signature, args, strict=False)) | kwargs
        grid = grid(values) if callable(grid) else grid
        launch = Launch(function.__qualname__, compiled, values, (*grid, 1, 1)[:3])
        launches.append(launch)
        text = mutate(launch.kernel, compiled.ptx) if mutate else compiled.ptx
        names, flat = _flattened(compiled, values)
        launch.execution = execute(
            text, flat, launch.grid, shared_bytes=compiled.shared_bytes, names=names, schedule=schedule
        )

    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    properties = SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=132,
        name=f"executed sm_{capability}",
        shared_memory_per_block_optin=SHARED_LIMIT[capability],
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
    )
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))  # by which the dispatcher accepts CPU tensors
        enter(mock.patch.object(InterpretedFunction, "run", run))
        enter(mock.patch.object(JITFunction, "run", run))
        enter(mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True), create=True))
        enter(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10)))
        enter(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
        _products_on_the_cpu()
        yield launches


def _flattened(compiled: Compiled, values: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Names and values of the PTX's parameters, as Triton's launcher passes them:
    a tensor map is followed by the tensor's shape and strides, and all by two
    pointers to scratch memory."""
    flat: list[tuple[str, Any]] = []
    maps = iter(compiled.tensor_maps)
    for name, kind in compiled.signature.items():
        if kind == "constexpr":
            continue
        value = values[name]
        if not kind.startswith("tensordesc"):
            flat.append((name, float(value) if kind.startswith("fp") else value))
            continue
        meta, shape, strides = next(maps), list(value.shape), list(value.strides)
        flat.append((name, TensorMap(value.base, shape, strides, meta["block_size"], meta["swizzle"])))
        flat += [(f"{name}.shape[{i}]", size) for i, size in enumerate(shape)]
        flat += [(f"{name}.stride[{i}]", stride) for i, stride in enumerate(strides)]
    if compiled.scratch_bytes:
        raise NotImplementedError("a kernel with scratch memory in global memory")
    flat += [("global scratch", None), ("profile scratch", None)]
    return [name for name, _ in flat], [value for _, value in flat]


_library: list[torch.library.Library] = []


def _products_on_the_cpu() -> None:
    """16-bit matrix products with float32 results, which torch has for CUDA alone."""
    if _library:
        return
    _library.append(torch.library.Library("aten", "IMPL"))

    def mm(a, b, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def mm_out(a, b, out_dtype, *, out):
        return out.copy_(mm(a, b, out_dtype))

    def addmm(c, a, b, out_dtype, *, beta=1, alpha=1):
        return torch.addmm(c.to(out_dtype), a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha)

    def addmm_out(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        return out.copy_(addmm(c, a, b, out_dtype, beta=beta, alpha=alpha))

    kernels = {"mm.dtype": mm, "mm.dtype_out": mm_out, "bmm.dtype": mm, "bmm.dtype_out": mm_out}
    kernels |= {"addmm.dtype": addmm, "addmm.dtype_out": addmm_out}
    for name, kernel in kernels.items():
        _library[0].impl(name, kernel, "CPU")
