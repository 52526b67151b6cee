"""The tables people read: what can run here and why not, and what qualification found."""

from __future__ import annotations

import torch

from . import dispatch, extension, verdicts
from .verdicts import Record


def explain() -> str:
    """A table of every op and backend: whether it can run on each device type here, and why not;
    then the verdicts on these devices.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    rows: list[tuple[str, ...]] = [("op", "backend", "device", "runs", "why not")]
    for op in dispatch.ops():
        for backend in dispatch.backends(op):
            for device in devices[:2]:
                why = dispatch.why_not(op, backend, torch.empty(0, device=device))
                rows.append((op, backend, device.type, "no" if why else "yes", why or ""))
    parts = ["\n".join([*columns(rows), extension.describe()])]
    seen = set()
    for device in devices:
        record = verdicts.record(device)
        if record is None:
            parts.append(
                f"{device}: no verdict; `{dispatch.COMMAND} --device {device}` measures what is right and faster"
            )
        elif record.path not in seen:
            seen.add(record.path)
            parts.append(table(record))
    return "\n\n".join(parts)


def table(record: Record) -> str:
    """Verdicts, errors and times of one device, with date and file."""
    head = ("op", "backend", "features", "error", "shape", "time", "torch code", "floor", "verdict")
    rows: list[tuple[str, ...]] = [head]
    for v in record.verdicts:
        about = (v.op, v.backend, v.dtype, f"{v.error:.0%} of allowed" if v.cases else "-")
        first = v.timings[0] if v.timings else None
        rows.append((*about, *(_times(first) if first else ("-",) * 4), v.status))
        rows += [("", "", "", "", *_times(t), "") for t in v.timings[1:]]
    lines = [f"{record.identity['device']}, qualified on {record.date} in {record.seconds:.0f} s: {record.path}"]
    lines += [_libraries(record), _rates(record), "", *columns(rows)]
    for kernel, by_width in record.tiles.items():
        lines += [f"tile of {kernel} bytes at width {width}: {tuple(tile)}" for width, tile in by_width.items()]
    return "\n".join([*lines, *(f"\nplease report:\n{v.report}" for v in record.verdicts if v.report)])


def _times(t: verdicts.Timing) -> tuple[str, ...]:
    torch_code = "out of memory" if t.torch_ms is None else f"{t.torch_ms:.2f} ms"
    return f"{t.shape} D={t.width}", f"{t.ms:.2f} ms", torch_code, f"{t.floor_ms / t.ms:.0%}"


def _libraries(record: Record) -> str:
    what = record.identity
    words = [f"driver {what['driver']}" if what["driver"] else "", f"torch {what['torch']}"]
    words += [f"CUDA {what['cuda']}" if what["cuda"] else "", f"Triton {what['triton']}" if what["triton"] else ""]
    return ", ".join([*filter(None, words), f"dreamlip {what['package']}, kernel sources {what['sources']}"])


def _rates(record: Record) -> str:
    rates = record.rates
    if not rates:
        return "nothing was timed"
    products, copies = rates["flops"] / 1e12, rates["bytes"] / 1e9
    return f"matrix products {products:.3g} TFLOP/s, copies {copies:.0f} GB/s; times are forward + backward, with masks"


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows as lines with aligned columns."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
