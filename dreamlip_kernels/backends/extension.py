"""The compiled kernels of csrc/: found where pip built them, or compiled once at their first use;
why they can't run, where they can't.

Importing this package loads what was built and never compiles; the state, once decided, is kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from . import first_build

logger = logging.getLogger("dreamlip_kernels")

_BUILT = "dreamlip_kernels._C"
LEAST_CAPABILITY = (8, 0)  # of the CUDA kernels: cp.async, and tensor cores that take bfloat16
_state: dict[str, Any] = {}
_building = threading.Lock()


def sources() -> Path | None:
    """The folder of the C++ sources: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).parents[1]
    return next((folder for folder in (here / "csrc", here.parent / "csrc") if (folder / "ops.cpp").is_file()), None)


def why_not(device: str, build: bool = False) -> str | None:
    """Why the compiled kernels cannot run on ``device`` ("cpu" or "cuda"), or None; with ``build`` they are compiled if
    that is all that is missing.
    """
    if build and not _state:
        if torch.compiler.is_compiling():
            return "it is not compiled yet, and can't be inside torch.compile: call the op once before"
        _compile()
    if "why" in _state:
        return _state["why"]
    if not _state:  # could be compiled, and nobody has asked yet
        return None if device == "cpu" else "the extension is not built; install with nvcc on PATH"
    if device == "cuda" and not _state["cuda"]:
        return (
            "the extension was built without CUDA; install with nvcc on PATH (CUDA_HOME) and without DREAMLIP_NO_CUDA"
        )
    return None


def why_not_on(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on that device, or None."""
    if (why := why_not("cuda")) is not None:
        return why
    capability, _ = _device_limits(device.index)
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 (Ampere) or later, this GPU has {capability[0]}.{capability[1]}"
    return None


def why_not_pool(device: torch.device, p: int, k: int, d: int, element_bytes: int) -> str | None:
    """Why the CUDA kernels of group_patches cannot hold an image of P patches, K sub-captions and width D, or None."""
    bytes_of_block, (_, limit) = patch_pool_shared_bytes(p, k, d, element_bytes), _device_limits(device.index)
    if bytes_of_block > limit:
        return f"P={p}, K={k}, D={d} needs {bytes_of_block} of {limit} bytes of shared memory a block"
    return None


def _device_limits(index: int | None) -> tuple[tuple[int, int], int]:
    """(compute capability, bytes of shared memory that a block may have) of a CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


# torch.compiler.assume_constant_result(_device_limits), which would import the whole compiler now.
_device_limits._dynamo_marked_constant = True


def patch_pool_shared_bytes(p: int, k: int, d: int, element_bytes: int) -> int:
    """Bytes of shared memory that a block of the CUDA kernels of group_patches can do with, forward and backward.

    ``least_pool_bytes`` of csrc/patch_pool_plan.h, which torch.compile could not trace.
    """
    up = lambda n: -(-n // 128) * 128  # noqa: E731
    texts, p16, d, parts = 8 if k <= 8 else 16, -(-p // 16) * 16, -(-d // 8) * 8, 4 // element_bytes
    ring = 2 * up(min(p, 32) * 128)
    rows = up(2 * texts * (-(-d * element_bytes // 128) * 128 + 16))
    coefficients = up(parts * texts * (p16 * element_bytes + 16))
    return ring + 128 + rows + coefficients + up(texts * p16 * 4) + up((texts + 2) * p16 * 4) + up(12 * texts)


def build_info() -> dict[str, Any] | None:
    """{"torch", "compiler", "cuda", "cuda_architectures"} of the loaded extension, or None."""
    module = _state.get("module")
    return module.build_info() if module is not None else None


def describe() -> str:
    """One line: what is built, for what, or why nothing is."""
    why = why_not("cpu")
    if why is not None:
        return f"csrc: not usable: {why}"
    info = build_info()
    if info is None:
        return "csrc: not built; compiled at the first use"
    cuda = f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "no CUDA"
    return f"csrc: built with {info['compiler']}, torch {info['torch']}, {cuda}"


def _find() -> None:
    """Set _state["module"], or _state["why"], or leave both open when only compiling is missing."""
    if importlib.util.find_spec(_BUILT) is not None:
        try:
            module = importlib.import_module(_BUILT)
        except ImportError as error:  # symbols of another torch
            reason = str(error).splitlines()[0]
            _state["why"] = (
                f"the extension was built against another torch than {torch.__version__} ({reason}); "
                "install the package again"
            )
            return
        built_for = module.build_info()["torch"]
        _state["cuda"] = module.build_info()["cuda"]  # a value, which torch.compile can trace
        if built_for.split("+")[0] != torch.__version__.split("+")[0]:
            _state["why"] = (
                f"the extension was built against torch {built_for}, this is {torch.__version__}; "
                "install the package again"
            )
            return
        _state["module"] = module
        return
    compiler = os.environ.get("CXX", "c++")
    if sources() is None:
        _state["why"] = "the C++ sources are not installed; install the package again"
    elif shutil.which(compiler) is None:
        _state["why"] = f"no C++ compiler ({compiler}) to build it with; install one, or set CXX"
    elif importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        _state["why"] = "ninja is not installed; pip install ninja"


def _compile() -> None:
    """Build the CPU sources; several threads and processes wait for one another."""
    folder = sources()
    assert folder is not None  # why_not asked
    with _building:
        if _state:  # another thread was first
            return
        name = f"dreamlip_kernels_{torch.__version__.replace('.', '_').replace('+', '_')}"
        files = [str(folder / "ops.cpp"), str(folder / "patch_pool_cpu.cpp")]
        try:
            module = first_build.build(name, files, ["-O3", "-g0", "-Wno-psabi"])
        except Exception as error:  # compilers and torch's builder raise whatever they like
            _state["why"] = f"compiling it failed: {str(error).strip() or type(error).__name__}"
            logger.warning("the C++ kernels could not be compiled: %s", _state["why"])
            return
        _state.update(cuda=None, module=module)


_find()
