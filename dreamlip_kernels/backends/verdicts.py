"""What qualification found on a device, and what "auto" makes of it.

    JSON (the cache folder, or measured/ in this package) -> Record -> plan: from so many similarities on,
    these backends in this order

A similarity is one dot product of width D that the op computes: M * C * K of ``bidirectional_logsumexp``,
N * P * K of ``group_patches``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import cache, identity

logger = logging.getLogger("dreamlip_kernels")

FORMAT = 1
# A backend takes torch's place where it needs at most this share of its time: less is within what clocks and caches do.
FASTER = 0.95
MEASURED = Path(__file__).parent / "measured"
# (width, ((from so many similarities, backends in order), ...)), ...: plain tuples, since torch.compile reads them
# while it traces.
Plan = tuple[tuple[int, tuple[tuple[int, tuple[str, ...]], ...]], ...]


@dataclass(frozen=True)
class Timing:
    """Forward and backward of one call with masks, in milliseconds: the backend, torch code, and what the run's copy
    and matrix rates allow at best.
    """

    shape: str
    width: int
    similarities: int
    ms: float
    torch_ms: float | None
    """None where torch code found no memory."""
    floor_ms: float

    @property
    def faster(self) -> bool:
        """Whether the backend takes torch's place at this shape."""
        return self.torch_ms is None or self.ms <= FASTER * self.torch_ms


@dataclass(frozen=True)
class Verdict:
    """What was found of one op, backend and dtype class; ``why`` is empty where it is right, else what went wrong."""

    op: str
    backend: str
    dtype: str
    why: str = ""
    error: float = 0.0
    """The largest error met, as a share of what is allowed."""
    cases: int = 0
    timings: tuple[Timing, ...] = ()
    timed: str = ""
    """Why it was not timed, where it was not."""
    report: str = ""
    """What a report of the failure should contain."""

    @property
    def status(self) -> str:
        """One line: from which shape on it is used, or why it is not."""
        if self.why:
            return f"not qualified: {self.why}"
        if not self.timings:
            return f"right, not used: {self.timed or 'not timed'}"
        faster = [t for t in self.timings if t.faster]
        if not faster:
            return "right, not used: slower than torch code"
        starts = {width: self._faster_from(width) for width in sorted({t.width for t in self.timings})}
        if not all(starts.values()):
            return f"qualified at {', '.join(f'{t.shape} D={t.width}' for t in faster)}"
        shapes = set(starts.values())
        if len(shapes) == 1:
            first = shapes.pop()
            return "qualified" if first == self._by_size(next(iter(starts)))[0].shape else f"qualified from {first} on"
        return "qualified from " + ", ".join(f"{shape} on (D={width})" for width, shape in starts.items())

    def _by_size(self, width: int) -> list[Timing]:
        return sorted((t for t in self.timings if t.width == width), key=lambda t: t.similarities)

    def _faster_from(self, width: int) -> str | None:
        """The smallest shape from which on it beats torch code, or None where it is slower at the largest."""
        first = None
        for t in reversed(self._by_size(width)):
            if not t.faster:
                break
            first = t.shape
        return first


@dataclass(frozen=True)
class Record:
    """All verdicts on a device, where they lie and when they were found."""

    identity: dict[str, Any]
    date: str
    seconds: float
    widths: tuple[int, ...]
    rates: dict[str, float]
    verdicts: tuple[Verdict, ...]
    tiles: dict[str, dict[str, list[int]]]
    path: str = ""

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        content = dataclasses.asdict(self)
        del content["path"]
        return {"format": FORMAT, **content}

    @classmethod
    def from_json(cls, content: Any, path: str) -> Record:
        """The record that a file holds.

        Raises:
            ValueError: it is not one, or of another format.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
            fields = {name: content[name] for name in ("identity", "date", "seconds", "rates")}
            verdicts = tuple(
                Verdict(**v | {"timings": tuple(_timing(t) for t in v["timings"])}) for v in content["verdicts"]
            )
            tiles = {
                str(kernel): {str(int(width)): _tile(tile) for width, tile in by_width.items()}
                for kernel, by_width in content["tiles"].items()
            }
            return cls(**fields, widths=tuple(content["widths"]), verdicts=verdicts, tiles=tiles, path=path)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a verdict: {type(error).__name__}: {error}") from error


def _timing(content: dict[str, Any]) -> Timing:
    """A timing whose numbers are numbers: what a file holds is compared at every call of an op."""
    timing = Timing(**content)
    numbers = (timing.ms, 1.0 if timing.torch_ms is None else timing.torch_ms)
    if not all(number > 0 for number in numbers) or not timing.floor_ms >= 0:
        raise ValueError(f"times must be positive, got {content}")
    if not (timing.width > 0 and timing.similarities >= 0):
        raise ValueError(f"sizes must be positive, got {content}")
    return timing


def _tile(content: list[int]) -> list[int]:
    """Rows, columns, depth, warps and stages of a tile."""
    if len(content) != 5 or any(type(number) is not int or number < 1 for number in content):
        raise ValueError(f"a tile is five positive integers, got {content}")
    return content


_records: dict[torch.device, Record | None] = {}
_plans: dict[tuple[torch.device, str, str], Plan] = {}  # made once: every call of an op asks


def record(device: torch.device) -> Record | None:
    """The verdict on ``device``: measured here, else one shipped with this package for the same device,
    kernels and Triton.
    """
    device = indexed(device)
    if device not in _records:
        _records[device] = _stored(device) or _shipped(device)
    return _records[device]


def store(device: torch.device, new: Record) -> Record:
    """Write the record where the next process finds it; this one takes it from now on."""
    device = indexed(device)
    path = cache.write(identity.file_name(device), new.to_json())
    _plans.clear()
    stored_record = _records[device] = dataclasses.replace(new, path=path)
    return stored_record


def forget() -> None:
    """Read the files anew at the next use."""
    _records.clear()
    _plans.clear()


def dtype_class(op: str, dtype: torch.dtype, float32: str) -> str:
    """The dtype as verdicts name it: float32 features that are multiplied as float16 (``float32_products``) meet code
    of their own.
    """
    name = str(dtype).removeprefix("torch.")
    exact = float32 == "torch" and torch.get_float32_matmul_precision() == "highest"
    return name if exact or name != "float32" or op == "group_patches" else "float32 as float16"


def plan(op: str, device: torch.device, dtype: torch.dtype, float32: str) -> Plan:
    """What the verdict says of ``op``: by width and similarities, the backends in the order of their times,
    torch code among them. Empty without one.
    """
    about = (indexed(device), op, dtype_class(op, dtype, float32))
    if about not in _plans:
        current = record(device)
        _plans[about] = () if current is None else make_plan(current, *about[1:])
    return _plans[about]


def make_plan(record: Record, op: str, dtype: str) -> Plan:
    """``plan`` of a record. At each shape that was timed: what is right and beats torch code, fastest first,
    then torch code.
    """
    about = [v for v in record.verdicts if (v.op, v.dtype) == (op, dtype)]
    if not about:
        return ()
    shapes: dict[int, dict[int, list[tuple[float, str]]]] = {}
    for verdict in about:
        for t in verdict.timings:
            faster = shapes.setdefault(t.width, {}).setdefault(t.similarities, [])
            if t.faster and not verdict.why:
                faster.append((t.ms, verdict.backend))
    if not shapes:
        return ((0, ((0, ("torch",)),)),)
    return tuple(
        (width, tuple((size, (*(b for _, b in sorted(sizes[size])), "torch")) for size in sorted(sizes)))
        for width, sizes in sorted(shapes.items())
    )


def order(plan: Plan, width: int, similarities: int) -> tuple[str, ...]:
    """The backends in the order of a plan, at the nearest width and the largest size not above the call's,
    else the smallest.
    """
    near, steps = plan[0]  # loops that torch.compile can trace, where min(key=...) is not one
    for other, its_steps in plan:
        if abs(other - width) < abs(near - width):
            near, steps = other, its_steps
    names = steps[0][1]
    for size, backends in steps:
        if size <= similarities:
            names = backends
    return names


def _stored(device: torch.device) -> Record | None:
    name = identity.file_name(device)
    file = cache.read(name)
    if file is None:
        return None
    content, path = file
    try:
        entry = Record.from_json(content, path)
    except ValueError as error:
        logger.warning("%s is not read: %s; `python -m dreamlip_kernels qualify` writes it anew", path, error)
        return None
    if entry.identity != identity.identity(device):
        logger.warning("%s is about another device or version and is not read", path)
        return None
    return entry


def _shipped(device: torch.device) -> Record | None:
    """A verdict that the maintainers measured: of this device's name and capability, these kernel sources and this
    Triton.
    """
    mine = identity.identity(device)
    for path in sorted(MEASURED.glob("*.json")):
        entry = Record.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
        if all(entry.identity[name] == mine[name] for name in identity.CODE):
            return entry
    return None


def indexed(device: torch.device) -> torch.device:
    """``device`` by its one name: "cuda" with the current index, "cpu" without any."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device
