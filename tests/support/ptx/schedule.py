"""Which threads run when (PTX ISA sections 3.1, "A Set of SIMT Multiprocessors", 9.7.12, "Control Flow Instructions",
and 9.7.13.1, "bar").

Threads are run in parties of warps. Within a party those at the earliest instruction run, together, so that threads
that took different branches meet again
where the branches do. A party runs until all of it waits, then the next one does:
in each order the first warps are as far ahead of the last as barriers
let them be, and data that a barrier should have guarded is not there yet, or not there any more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .instructions.arithmetic import count
from .instructions.exchange import _members
from .instructions.tensor_copies import Barriers
from .machine.errors import BadOperand, Deadlock, PtxError
from .machine.memory import FENCED
from .machine.table import executes, lookup
from .machine.wave import WARP, Threads, Wave

LONGEST = 2_000_000  # instructions of a wave, some thirty times those of the longest kernel of the tests


@dataclass(frozen=True)
class Schedule:
    """``parties`` gives, for a number of warps a block, the warps of each party in the order in which they run."""

    name: str
    parties: Callable[[int], list[list[int]]]

    def __repr__(self):
        return self.name


TOGETHER = Schedule("together", lambda warps: [list(range(warps))])
FIRST_AHEAD = Schedule("first warp ahead", lambda warps: [[warp] for warp in range(warps)])
LAST_AHEAD = Schedule("last warp ahead", lambda warps: [[warp] for warp in reversed(range(warps))])


def shuffled(seed: int) -> Schedule:
    """Warps ahead of one another in a random order."""
    return Schedule(f"order {seed}", lambda warps: [[warp] for warp in random.Random(seed).sample(range(warps), warps)])


class Scheduler:
    """Runs a wave from the kernel's first instruction to the exit of every thread."""

    def __init__(self, wave: Wave, schedule: Schedule):
        self.wave, self.code = wave, wave.program.code
        warp = wave.thread // WARP
        parties = schedule.parties(wave.threads // WARP)
        self.ready = [{0: np.nonzero(np.isin(warp, members))[0]} for members in parties]
        self.polling: list[list[tuple[int, np.ndarray]]] = [[] for _ in parties]
        self.arrived: dict[
            tuple[int, int], list[tuple[int, int, np.ndarray]]
        ] = {}  # (block, barrier) -> (party, next, lanes)
        self.present: dict[tuple[int, int], int] = {}  # how many threads have arrived
        self.executed = 0

    def run(self) -> None:
        while any(self.ready) or any(self.polling) or self.arrived:
            before = self.executed
            for party in range(len(self.ready)):
                self._run_party(party)
            if self.executed == before:
                raise Deadlock(self._waiting())

    def _run_party(self, party: int) -> None:
        for position, lanes in self.polling[party]:
            self._meet(party, position, lanes)
        self.polling[party] = []
        while self.ready[party]:
            position = min(self.ready[party])
            self._run_from(party, position, self.ready[party].pop(position))

    def _meet(self, party: int, position: int, lanes: np.ndarray) -> None:
        """These lanes go on at that instruction, with those that are there already."""
        if not len(lanes):
            return
        there = self.ready[party].get(position)
        self.ready[party][position] = lanes if there is None else np.sort(np.concatenate([there, lanes]))

    def _run_from(self, party: int, position: int, lanes: np.ndarray) -> None:
        threads = Threads(self.wave, lanes)
        if position == len(self.code):
            raise BadOperand(f"{self.wave.program.name} ends without ret")
        stop = min(self.ready[party], default=len(self.code))
        while True:
            if position >= stop:
                return self._meet(party, position, threads.lanes)
            instruction = self.code[position]
            try:
                active = threads
                if instruction.guard is not None:
                    register, wanted = instruction.guard
                    holds = threads.read(register, "pred") == wanted
                    if not holds.all():
                        active = threads.subset(holds) if holds.any() else None
                head = instruction.parts[0]
                if head in _CONTROL:
                    rest = threads.lanes[~holds] if active is not threads else threads.lanes[:0]
                    if not _CONTROL[head](self, party, position, instruction, active, rest):
                        return None
                    threads, position = self._next
                    stop = min(self.ready[party], default=len(self.code))
                    continue
                if active is not None:
                    function, form = lookup(instruction.opcode)
                    function(active, instruction.operands, form, head)
            except PtxError as error:
                raise _placed(error, instruction, self.wave, threads) from error
            self.executed += 1
            position += 1

    def _count(self) -> None:
        self.executed += 1
        if self.executed > LONGEST:
            raise Deadlock(f"no end after {self.executed} instructions")

    def _go(self, threads: Threads, position: int) -> bool:
        self._count()
        self._next = threads, position
        return True

    def _branch(self, party, position, instruction, active, rest) -> bool:
        """bra, 9.7.12.3: threads whose guard holds go to the label."""
        if instruction.opcode not in ("bra", "bra.uni"):
            lookup(instruction.opcode)
        if active is None:
            return self._go(Threads(self.wave, rest), position + 1)
        if not len(rest):
            return self._go(active, instruction.target)
        self._count()
        self._meet(party, position + 1, rest)
        self._meet(party, instruction.target, active.lanes)
        return False

    def _indexed_branch(self, party, position, instruction, active, rest) -> bool:
        """brx.idx, 9.7.12.4: to the label of a table that the index names."""
        self._count()
        self._meet(party, position + 1, rest)
        if active is not None:
            index = active.each(instruction.operands[0], "u32")
            for value in np.unique(index):
                if value >= len(instruction.targets):
                    raise BadOperand(f"index {value} of {len(instruction.targets)} labels")
                self._meet(party, instruction.targets[value], active.lanes[index == value])
        return False

    def _return(self, party, position, instruction, active, rest) -> bool:
        """ret and exit, 9.7.12.6 and .7: of a kernel both end the thread."""
        self._count()
        self._meet(party, position + 1, rest)
        return False

    def _barrier(self, party, position, instruction, active, rest) -> bool:
        """bar and barrier, 9.7.13.1: the threads wait until as many of their block are there as the barrier expects,
        all of it if it does not say.
        """
        parts = set(instruction.parts[1:]) - {"cta", "aligned"}
        if parts not in ({"sync"}, {"arrive"}, {"warp", "sync"}):
            lookup(instruction.opcode)
        if active is None:
            return self._go(Threads(self.wave, rest), position + 1)
        if "warp" in parts:
            _members(active, instruction.operands[0])
            return self._go(Threads(self.wave, np.sort(np.concatenate([active.lanes, rest]))), position + 1)
        numbers = active.each(instruction.operands[0], "u32")
        needs = (
            active.each(instruction.operands[1], "u32")
            if len(instruction.operands) > 1
            else np.full(len(numbers), self.wave.threads)
        )
        if active.everyone and not self.arrived and (needs == self.wave.threads).all() and "sync" in parts:
            return self._go(active, position + 1)
        self._count()
        self._meet(party, position + 1, rest)
        blocks = self.wave.block[active.lanes]
        for block in np.unique(blocks):
            mask = blocks == block
            key, need, lanes = (int(block), int(numbers[mask][0])), int(needs[mask][0]), active.lanes[mask]
            there = self.arrived.setdefault(key, [])
            there.append((party, position + 1, lanes if "sync" in parts else lanes[:0]))
            self.present[key] = self.present.get(key, 0) + len(lanes)
            if "arrive" in parts:
                self._meet(party, position + 1, lanes)
            if self.present[key] > need:
                raise BadOperand(f"{self.present[key]} threads at barrier {key[1]}, which expects {need}")
            if self.present[key] == need:
                for entry in self.arrived.pop(key):
                    self._meet(*entry)
                del self.present[key]
        return False

    def _message_barrier(self, party, position, instruction, active, rest) -> bool:
        """mbarrier.try_wait and test_wait, 9.7.13.15.16: true where the phase of that parity is over.
        The thread waits here until it is, instead of asking again.
        """
        if instruction.parts[1] not in ("try_wait", "test_wait"):
            if active is not None:
                function, form = lookup(instruction.opcode)
                function(active, instruction.operands, form, instruction.parts[0])
            lanes = rest if active is None else np.sort(np.concatenate([active.lanes, rest]))
            return self._go(Threads(self.wave, lanes), position + 1)
        if "parity" not in instruction.parts:
            lookup(instruction.opcode)
        self._meet(party, position + 1, rest)
        if active is None:
            self._count()
            return False
        barriers, block = self.wave.keep(Barriers), self.wave.block[active.lanes]
        if len(instruction.operands) not in (3, 4):
            count(instruction.operands, 3)
        keys = np.stack(
            [block, active.address(instruction.operands[1]), active.each(instruction.operands[2], "u32") & 1], -1
        )
        unique, place = np.unique(keys, axis=0, return_inverse=True)
        passed = np.array([barriers.passed(*map(int, key)) for key in unique])[place.ravel()]
        if passed.any():
            self._count()
            through = active.subset(passed)
            through.write(instruction.operands[0], np.ones(len(through.lanes), bool))
            self._meet(party, position + 1, through.lanes)
        if not passed.all():
            self.polling[party].append((position, active.lanes[~passed]))
        return False

    def _waiting(self) -> str:
        """Who waits for what, for the message."""
        lines = []
        for (block, number), entries in self.arrived.items():
            lines.append(
                f"block {block}: {self.present[block, number]} threads wait at barrier {number}, the first at line "
                f"{self.code[entries[0][1] - 1].line}"
            )
        for waits in self.polling:
            for position, lanes in waits:
                instruction = self.code[position]
                lines.append(f"{len(lanes)} threads wait at line {instruction.line}: {instruction.text}")
        return "; ".join(lines)


_CONTROL = {
    "bra": Scheduler._branch,
    "brx": Scheduler._indexed_branch,
    "ret": Scheduler._return,
    "exit": Scheduler._return,
    "bar": Scheduler._barrier,
    "barrier": Scheduler._barrier,
    "mbarrier": Scheduler._message_barrier,
}


def _placed(error: PtxError, instruction, wave: Wave, threads: Threads) -> PtxError:
    """The error with the place where it happened."""
    lane = threads.lanes[0]
    where = f"line {instruction.line}, block {wave.block[lane]}, threads from {wave.thread[lane]}"
    return type(error)(f"{error} [{where}: {instruction.text[:200]}]")


@executes("fence", r"\.proxy\.async(\.shared::cta)?(\.global)?")
def fence_proxy(threads, operands, form, name):
    """9.7.13.4: what these threads' blocks wrote to shared memory is visible to tensor cores and tensor copies."""
    shared = threads.wave.shared
    words = shared.unfenced.reshape(threads.wave.blocks, -1)
    words[np.unique(threads.wave.block[threads.lanes])] = FENCED


@executes("fence", r"(\.(sc|acq_rel|acquire|release|mbarrier_init|cta|cluster|gpu|sys))+")
@executes("membar", r"\.(cta|gl|sys)")
@executes("setmaxnreg", r"\.(inc|dec)\.sync\.aligned\.u32")
@executes("griddepcontrol", r"\.(wait|launch_dependents)")
@executes("nanosleep", r"\.u32")
def nothing(threads, operands, form, name):
    """Order among threads, which here is that of execution, and hints."""
