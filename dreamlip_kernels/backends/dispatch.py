"""Which backend runs an op: an explicit request works or raises; "auto" takes what was proved right and fastest here,
and says once what and why.

"auto" takes, first of these that can run the call: what this process pinned; the order of the device's verdict
(verdicts.py); the order of ``_BACKENDS``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension, verdicts
from .child_process import PYTHON, environment
from .settings import settings

logger = logging.getLogger("dreamlip_kernels")

# Looked up here, since torch.compile would not trace it. torch 2.10 is the first whose addmm adds 16-bit products to a
# float32 matrix.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
ADDS_SIXTEEN_BIT_PRODUCTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


class Case(NamedTuple):
    """What a call asks of a backend.

    ``sizes`` holds what is known of the op's shape by the letters of its docstring, such as
    ``{"N": 256, "P": 196, "K": 8, "D": 512}``; it is empty where nobody knows yet, and a check then answers for the
    sizes that can run.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: dict[str, int]


_Check = Callable[[Case], str | None]  # why the backend cannot run such a call, or None


def _always(case: Case) -> str | None:
    return None


def _triton(case: Case) -> str | None:
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if not ADDS_SIXTEEN_BIT_PRODUCTS:
        return f"it needs torch 2.10 or later, this is {torch.__version__}"
    if case.dtype == torch.float64:
        return "it computes in float32 or less; float64 needs backend='torch'"
    if case.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 in the environment for Triton's interpreter"
    return None


def _raw(case: Case) -> str | None:
    """Fused pooling is of unit patches; ``raw=1`` among the sizes says that a call pools them as they are."""
    return (
        "it pools patches of unit length, and normalize_patches=False asks for them as they are"
        if (case.sizes.get("raw"))
        else None
    )


def _triton_pool(case: Case) -> str | None:
    if (why := _raw(case) or _triton(case)) is not None or case.sizes.get("K", 0) <= 32:
        return why
    return f"it takes K up to 32 sub-captions, got K={case.sizes['K']}"


def _cuda(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "it runs on CUDA tensors"
    if case.dtype == torch.float64:
        return "it computes in float32 or less; float64 needs backend='torch'"
    return extension.why_not_on(case.device)


def _cuda_pool(case: Case) -> str | None:
    if (why := _raw(case) or _cuda(case)) is not None or not case.sizes:
        return why
    p, k, d = case.sizes["P"], case.sizes["K"], case.sizes["D"]
    return extension.why_not_pool(case.device, p, k, d, case.dtype.itemsize)


def _cpp(case: Case, build: bool = False) -> str | None:
    if (why := _raw(case)) is not None:
        return why
    if case.device.type != "cpu":
        return "it runs on CPU tensors"
    return extension.why_not("cpu", build)


# For each op, its backends in the order in which "auto" takes them where there is no verdict on the device,
# with the test that says whether one can run. cpp comes first since it has been timed on many CPUs;
# triton and cuda come after torch: what no one has qualified on a device does not run there.
_BACKENDS: dict[str, dict[str, _Check]] = {
    "bidirectional_logsumexp": {"torch": _always, "triton": _triton, "cuda": _cuda},
    "group_patches": {"cpp": _cpp, "torch": _always, "triton": _triton_pool, "cuda": _cuda_pool},
    "sigmoid_pairs": {"torch": _always, "triton": _triton},
}
COMMAND = "python -m dreamlip_kernels qualify"
_pinned: dict[str, str] = {}
_announced: set[tuple[str, ...]] = set()


def backends(op: str) -> tuple[str, ...]:
    """The names of the backends of ``op``."""
    return tuple(_BACKENDS[op])


def ops() -> tuple[str, ...]:
    """The names of the ops."""
    return tuple(_BACKENDS)


def requested(fn: str, op: str, own: str | None, shorthand: str) -> Any:
    """The backend that a caller with one name for several ops asks of ``op``: its ``own`` name, else the shorthand
    where ``op`` has it, else "auto".

    Raises:
        ValueError: no op has a backend of that name, or ``op`` has none of its own name.
    """
    if own is not None:
        if own not in ("auto", *_BACKENDS[op]):
            raise ValueError(f"{fn}: {op} has no backend {own!r}; choose from {['auto', *_BACKENDS[op]]}")
        return own
    names = {name for checks in _BACKENDS.values() for name in checks}
    if shorthand not in {"auto", *names}:
        raise ValueError(f"{fn}: unknown backend={shorthand!r}; choose from {['auto', *sorted(names)]}")
    return shorthand if shorthand in _BACKENDS[op] else "auto"


def pin(op: str, backend: str | None) -> None:
    """From now on "auto" takes ``backend`` for ``op`` in this process wherever it can run; None takes the pin out.
    What a resumed run needs.
    """
    if backend is None:
        _pinned.pop(op, None)
    elif backend in _BACKENDS[op]:
        _pinned[op] = backend
    else:
        raise ValueError(f"{op}: unknown backend={backend!r}; choose from {list(_BACKENDS[op])}")


def select(op: str, x: Tensor, requested: str = "auto", **sizes: int) -> str:
    """The name of the backend that runs ``op`` on tensors like ``x``.

    Args:
        sizes: the op's shape by the letters of its docstring: M, C, K, D of ``bidirectional_logsumexp``;
            N, P, K, D of ``group_patches``, and raw=1 where its patches are pooled as they are.

    Raises:
        ValueError: no such backend for this op.  RuntimeError: the requested backend cannot run here,
                                                  or not at these sizes.
    """
    checks, case = _BACKENDS[op], Case(x.device, x.dtype, sizes)
    if requested != "auto":
        if requested not in checks:
            raise ValueError(f"{op}: unknown backend={requested!r}; choose from {['auto', *checks]}")
        if why := _check_and_build(checks[requested], case):
            raise RuntimeError(f"{op}: backend={requested!r} cannot run: {why}. Use backend='auto'")
        return requested
    names, reason = _order(op, case)
    skipped = []
    for backend in names:
        if (why := _check_and_build(checks[backend], case)) is None:
            _announce(op, case.device, backend, [reason, *skipped])
            return backend
        skipped.append(f"{backend}: {why}")
    raise RuntimeError(f"{op}: no backend can run on {case.device.type}: {'; '.join(skipped)}")


def _order(op: str, case: Case) -> tuple[tuple[str, ...], str]:
    """The backends of ``op`` in the order in which "auto" tries them, and what decided it."""
    rest = tuple(_BACKENDS[op])
    if op in _pinned:
        return (_pinned[op], *rest), "pinned"
    under_autocast = case.device.type != "meta" and torch.is_autocast_enabled(case.device.type)
    float32 = "fp16" if under_autocast else settings.float32
    plan = _plan(op, case.device, case.dtype, float32, torch.compiler.is_compiling())
    if not plan:
        return rest, ""
    sizes = case.sizes or {"M": 2**31}  # not known yet: what is best for large calls
    similarities = 1
    for letter, size in sizes.items():
        similarities = similarities if letter == "D" else similarities * size
    names = verdicts.order(plan, sizes.get("D", plan[0][0]), similarities)
    return tuple(name for name in names if name in _BACKENDS[op]), "by its verdict"


def _plan(op: str, device: torch.device, dtype: torch.dtype, float32: str, compiling: bool) -> verdicts.Plan:
    when = os.environ.get("DREAMLIP_AUTO", "")
    if when not in ("", "first-use") and ("DREAMLIP_AUTO", when) not in _announced:
        _announced.add(("DREAMLIP_AUTO", when))
        logger.warning("DREAMLIP_AUTO=%s means nothing: it is first-use, or not set", when)
    if when == "first-use" and not compiling and verdicts.record(device) is None:
        _qualify_now(device)
    return verdicts.plan(op, device, dtype, float32)


# torch.compile then calls it while tracing and keeps what it returns. What torch.compiler.assume_constant_result does,
# which would import all of dynamo.
_plan._dynamo_marked_constant = True


def _qualify_now(device: torch.device) -> None:
    """In a process of its own, once; whatever comes of it, this process continues."""
    if ("first-use", str(device)) in _announced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    _announced.add(("first-use", str(device)))
    logger.warning("DREAMLIP_AUTO=first-use: qualifying the backends on %s, once (a minute or two)", device)
    words = [*PYTHON, *COMMAND.split()[1:], "--device", str(device), "--reuse"]
    outcome = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if outcome.returncode:
        last = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
        logger.warning("%s failed (%s): torch code runs", " ".join(words), last)
    verdicts.forget()


def _check_and_build(check: _Check, case: Case) -> str | None:
    """The check before a use: what only needs compiling is compiled now."""
    return _cpp(case, build=True) if check is _cpp else check(case)


def why_not(op: str, backend: str, x: Tensor, **sizes: int) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors like ``x`` (at these sizes, see ``select``), or None."""
    return _BACKENDS[op][backend](Case(x.device, x.dtype, sizes))


def why(op: str, x: Tensor, requested: str = "auto", **sizes: int) -> str:
    """Why ``select`` takes the backend it takes, in a few words."""
    if requested != "auto":
        return "requested"
    case = Case(x.device, x.dtype, sizes)
    names, reason = _order(op, case)
    skipped = []
    for backend in names:
        if (problem := _BACKENDS[op][backend](case)) is None:
            break
        skipped.append(f"{backend}: {problem}")
    return "; ".join(["auto", *filter(None, [reason]), *skipped]) if reason or skipped else "auto, the first in order"


def _announce(op: str, device: torch.device, backend: str, notes: list[str]) -> None:
    if torch.compiler.is_compiling() or (op, str(device), backend) in _announced:
        return
    _announced.add((op, str(device), backend))
    reason = "; ".join(filter(None, notes))
    logger.info("%s: backend %s on %s%s", op, backend, device, f" ({reason})" if reason else "")
    if device.type == "cuda" and verdicts.record(device) is None and ("command", str(device)) not in _announced:
        _announced.add(("command", str(device)))
        logger.warning(
            "no verdict on %s: torch code runs. `%s` finds out, once, which kernels are right and faster there",
            torch.cuda.get_device_name(device),
            COMMAND,
        )
