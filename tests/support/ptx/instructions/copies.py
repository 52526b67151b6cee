"""Asynchronous copies of threads, cp.async (PTX ISA section 9.7.9.25.3).

A copy lands at the wait that covers it, never before: until then its destination is NaN, so that who does not wait
reads NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..machine.errors import BadOperand, Misaligned
from ..machine.memory import COPY
from ..machine.program import Immediate
from ..machine.table import executes
from .arithmetic import count


@dataclass
class _Copies:
    """Copies under way: the threads, where from (global) and to (a position in all blocks' shared memory), how many
    bytes, in which of a thread's groups.
    """

    lanes: np.ndarray
    source: np.ndarray
    place: np.ndarray
    bytes: np.ndarray  # read; the rest of ``size`` becomes zero
    group: np.ndarray
    size: int

    def some(self, mask: np.ndarray) -> _Copies:
        fields = (self.lanes, self.source, self.place, self.bytes, self.group)
        return _Copies(*(values[mask] for values in fields), self.size)


class ThreadCopies:
    """What each thread has under way."""

    def __init__(self, wave):
        self.wave = wave
        self.pending: list[_Copies] = []
        self.committed = np.zeros(wave.lanes, np.int64)

    def land(self, lanes: np.ndarray, left: int) -> None:
        """All but the latest ``left`` groups of these threads."""
        waiting = np.zeros(self.wave.lanes, bool)
        waiting[lanes] = True
        rest = []
        for copies in self.pending:
            now = waiting[copies.lanes] & (copies.group < self.committed[copies.lanes] - left)
            if now.any():
                self._land(copies.some(now))
                copies = copies.some(~now)
            if len(copies.lanes):
                rest.append(copies)
        self.pending = rest

    def _land(self, copies: _Copies) -> None:
        size = copies.size
        data = np.zeros((len(copies.lanes), size // 4), np.uint32)
        whole = copies.bytes == size
        if whole.any():
            data[whole] = self.wave.memory.load(copies.source[whole], 4, size // 4)
        for lane in np.nonzero((copies.bytes > 0) & ~whole)[0]:
            part = np.zeros(size, np.uint8)
            part[: copies.bytes[lane]] = [
                self.wave.memory.load(copies.source[lane : lane + 1] + i, 1, 1)[0, 0] for i in range(copies.bytes[lane])
            ]
            data[lane] = part.view(np.uint32)
        self.wave.shared.put(copies.place[:, None] // 4 + np.arange(size // 4), data, COPY)


@executes("cp", r"\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::\w+)?")
def copy(threads, operands, form, name):
    """9.7.9.25.3.1: 4, 8 or 16 bytes from global to shared memory; of a source size below that, the rest is zero."""
    if len(operands) not in (3, 4) or type(operands[2]) is not Immediate:
        raise BadOperand(f"{len(operands)} operands")
    size, wave = operands[2].value, threads.wave
    if size not in (4, 8, 16):
        raise BadOperand(f"cp.async of {size} bytes")
    lanes, source = threads.lanes, threads.address(operands[1])
    amount = threads.each(operands[3], "u32").astype(np.int64) if len(operands) == 4 else np.full(len(lanes), size)
    if (amount > size).any():
        raise BadOperand(f"cp.async of {amount.max()} of {size} bytes")
    place = wave.shared.places(wave.block[lanes], threads.address(operands[0]), size, "asynchronous copy")
    reads = amount > 0
    if reads.any():
        if (source[reads] % size).any():
            raise Misaligned(f"cp.async of {size} bytes from an address that is no multiple of it")
        full = amount == size
        if full.any():
            wave.memory.check_load(source[full], size)
    wave.shared.views[4][place[:, None] // 4 + np.arange(size // 4)] = 0xFFFFFFFF
    state = wave.keep(ThreadCopies)
    state.pending.append(_Copies(lanes, source, place, amount, state.committed[lanes], size))


@executes("cp", r"\.async\.commit_group")
def commit(threads, operands, form, name):
    """9.7.9.25.3.2: all copies since the last commit become a group."""
    threads.wave.keep(ThreadCopies).committed[threads.lanes] += 1


@executes("cp", r"\.async\.wait_group", r"\.async\.wait_all")
def wait(threads, operands, form, name):
    """9.7.9.25.3.3: until at most n groups of the thread are under way; wait_all, until nothing is."""
    state = threads.wave.keep(ThreadCopies)
    if form[0].endswith("wait_all"):
        state.committed[threads.lanes] += 1
        return state.land(threads.lanes, 0)
    count(operands, 1)
    state.land(threads.lanes, operands[0].value)
