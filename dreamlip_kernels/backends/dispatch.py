"""Which backend runs an op: an explicit request works or raises; "auto" takes the best that can run and says once what and why."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import extension

logger = logging.getLogger("dreamlip_kernels")

# Looked up here, since torch.compile would not trace it. torch 2.10 is the first whose addmm adds 16-bit products to a float32 matrix.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TORCH_SUFFICES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


class Case(NamedTuple):
    """What a call asks of a backend.

    ``sizes`` holds what is known of the op's shape by the letters of its docstring, such as ``{"N": 256, "P": 196, "K": 8, "D": 512}``; it is empty where
    nobody knows yet, and a check then answers for the sizes that can run.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: dict[str, int]


_Check = Callable[[Case], str | None]  # why the backend cannot run such a call, or None


def _always(case: Case) -> str | None:
    return None


def _triton(case: Case) -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if not _TORCH_SUFFICES:
        return f"it needs torch 2.10 or later, this is {torch.__version__}"
    if case.dtype == torch.float64:
        return "it computes in float32 or less; float64 needs backend='torch'"
    if case.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 in the environment for Triton's interpreter"
    return None


def _cuda(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "it runs on CUDA tensors"
    if case.dtype == torch.float64:
        return "it computes in float32 or less; float64 needs backend='torch'"
    return extension.why_not("cuda")


def _cpp(case: Case, build: bool = False) -> str | None:
    if case.device.type != "cpu":
        return "it runs on CPU tensors"
    return extension.why_not("cpu", build)


# For each op, its backends in the order in which "auto" prefers them, with the test that says whether one can run.
# Triton and CUDA come after torch until they have been timed, and the tests marked gpu have passed, on a device.
_BACKENDS: dict[str, dict[str, _Check]] = {
    "bidirectional_logsumexp": {"torch": _always, "triton": _triton},
    "group_patches": {"cpp": _cpp, "torch": _always, "triton": _triton, "cuda": _cuda},
}
_announced: set[tuple[str, str, str]] = set()


def select(op: str, x: Tensor, requested: str = "auto", **sizes: int) -> str:
    """The name of the backend that runs ``op`` on tensors like ``x``.

    Args:
        sizes: the op's shape by the letters of its docstring: M, C, K, D of ``bidirectional_logsumexp``; N, P, K, D of ``group_patches``.

    Raises:
        ValueError: no such backend for this op.  RuntimeError: the requested backend cannot run here, or not at these sizes.
    """
    checks, case = _BACKENDS[op], Case(x.device, x.dtype, sizes)
    if requested != "auto":
        if requested not in checks:
            raise ValueError(f"{op}: unknown backend={requested!r}; choose from {['auto', *checks]}")
        if why := _check_and_build(checks[requested], case):
            raise RuntimeError(f"{op}: backend={requested!r} cannot run: {why}. Use backend='auto'")
        return requested
    skipped = []
    for backend, check in checks.items():
        if (why := _check_and_build(check, case)) is None:
            _announce(op, case.device.type, backend, skipped)
            return backend
        skipped.append(f"{backend}: {why}")
    raise RuntimeError(f"{op}: no backend can run on {case.device.type}: {'; '.join(skipped)}")


def _check_and_build(check: _Check, case: Case) -> str | None:
    """The check before a use: what only needs compiling is compiled now."""
    return check(case, build=True) if check is _cpp else check(case)


def why_not(op: str, backend: str, x: Tensor, **sizes: int) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors like ``x`` (at these sizes, see ``select``), or None."""
    return _BACKENDS[op][backend](Case(x.device, x.dtype, sizes))


def why(op: str, x: Tensor, requested: str = "auto", **sizes: int) -> str:
    """Why ``select`` takes the backend it takes, in a few words."""
    if requested != "auto":
        return "requested"
    skipped = []
    for backend, check in _BACKENDS[op].items():
        if (reason := check(Case(x.device, x.dtype, sizes))) is None:
            break
        skipped.append(f"{backend}: {reason}")
    return f"auto, since {'; '.join(skipped)}" if skipped else "auto, the first in order"


def explain() -> str:
    """A table of every op and backend: whether it can run on each device type here, and why not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = [("op", "backend", "device", "runs", "why not")]
    for op, checks in _BACKENDS.items():
        for backend, check in checks.items():
            for device in devices:
                why = check(Case(torch.device(device), torch.float32, {}))
                rows.append((op, backend, device, "no" if why else "yes", why or ""))
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, extension.describe()])


def _announce(op: str, device: str, backend: str, skipped: list[str]) -> None:
    if torch.compiler.is_compiling() or (op, device, backend) in _announced:
        return
    _announced.add((op, device, backend))
    logger.info("%s: backend %s on %s%s", op, backend, device, f" ({'; '.join(skipped)})" if skipped else "")
