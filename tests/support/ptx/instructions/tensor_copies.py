"""Copies of boxes of a tensor, and the barriers that count them (PTX ISA sections 9.7.9.27, "Tensor Copy", 9.7.13.15,
"mbarrier", and 5.5, "Tensors").

A copy lands at a wait for its barrier, never before, and one at a time:
a barrier that expects too few bytes lets its waiters go before the rest is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ..machine.errors import BadOperand, Misaligned
from ..machine.table import executes
from .arithmetic import count

SWIZZLES = (0, 32, 64, 128)  # bytes, by the driver's number


def swizzled(places: np.ndarray, span: int) -> np.ndarray:
    """Where byte ``places`` of shared memory go: 16-byte chunks permuted by the 128-byte row that they are in (section
    5.5.7, "Swizzling Modes").
    """
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    return places ^ ((places >> 7 & mask) << 4)


class TensorMap:
    """What cuTensorMapEncodeTiled would be given: a tensor, the box that one copy moves, and how the box lies in
    shared memory. Dimensions are outermost first.
    """

    def __init__(self, tensor: torch.Tensor, shape: list[int], strides: list[int], box: list[int], swizzle: int):
        size = tensor.element_size()
        self.box, self.span = tuple(box), SWIZZLES[swizzle]
        if tensor.data_ptr() % 16 or any(stride * size % 16 for stride in strides[:-1]) or strides[-1] != 1:
            raise Misaligned(f"a tensor map needs rows at multiples of 16 bytes, got strides {strides} of {size} bytes")
        if max(box) > 256 or (self.span and box[-1] * size > self.span):
            raise BadOperand(
                f"a box of {box} elements of {size} bytes does not fit a tensor map of swizzle {self.span}"
            )
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
        self.array = torch.as_strided(tensor.detach(), shape, strides).view(integers).numpy()

    def fetch(self, corner: list[int]) -> np.ndarray:
        """The bytes of the box [rows, bytes of a row] whose first element is ``corner``; zeros outside the tensor."""
        box = np.zeros(self.box, self.array.dtype)
        inside = [
            slice(max(0, c), max(0, c, min(n, c + b)))
            for c, n, b in zip(corner, self.array.shape, self.box, strict=True)
        ]
        piece = self.array[tuple(inside)]
        if piece.size:
            starts = (max(0, -c) for c in corner)
            box[tuple(slice(s, s + n) for s, n in zip(starts, piece.shape, strict=True))] = piece
        return box.reshape(-1, self.box[-1]).view(np.uint8)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.array.itemsize


@dataclass
class Barrier:
    """An mbarrier object: the phase's parity, arrivals and bytes still expected in it, and copies that will bring
    those.
    """

    expected: int
    arrivals: int
    phase: int = 0
    bytes: int = 0
    copies: list[tuple[int, int, TensorMap, list[int]]] = field(default_factory=list)  # (block, place, map, corner)

    def arrive(self, times: int = 1) -> None:
        self.arrivals -= times
        if self.arrivals < 0:
            raise BadOperand(f"more arrivals at a barrier than the {self.expected} it was made for")
        self.complete()

    def complete(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.phase ^= 1
            self.arrivals = self.expected


class Barriers:
    """All of a wave, by block and address."""

    def __init__(self, wave):
        self.wave = wave
        self.all: dict[tuple[int, int], Barrier] = {}

    def each(self, threads, operand):
        """(block, address, barrier) of each thread, one after the other."""
        for lane, address in zip(threads.lanes, threads.address(operand), strict=True):
            key = int(self.wave.block[lane]), int(address)
            if key not in self.all:
                raise BadOperand(f"no barrier was made at byte {key[1]} of shared memory")
            yield (*key, self.all[key])

    def passed(self, block: int, address: int, parity: int) -> bool:
        """Whether the phase of that parity is over, after as many copies have landed as that takes."""
        if (block, address) not in self.all:
            raise BadOperand(f"no barrier was made at byte {address} of shared memory")
        barrier = self.all[block, address]
        while barrier.phase == parity and barrier.copies:
            self._land(barrier, *barrier.copies.pop(0))
        return barrier.phase != parity

    def _land(self, barrier: Barrier, block: int, place: int, tensor_map: TensorMap, corner: list[int]) -> None:
        rows = tensor_map.fetch(corner)
        places = swizzled(place + np.arange(rows.size), tensor_map.span)
        self.wave.shared.views[1][block * self.wave.shared.stride + places] = rows.ravel()
        barrier.bytes -= rows.size
        barrier.complete()


@executes("mbarrier", r"\.init(\.shared(::cta)?)?\.b64")
def make(threads, operands, form, name):
    """9.7.13.15.9: a barrier of so many arrivals a phase."""
    count(operands, 2)
    barriers = threads.wave.keep(Barriers)
    arrivals = threads.each(operands[1], "u32")
    for lane, address, expected in zip(threads.lanes, threads.address(operands[0]), arrivals, strict=True):
        if address % 8:
            raise Misaligned(f"an mbarrier at byte {address}, which is no multiple of 8")
        barriers.all[int(threads.wave.block[lane]), int(address)] = Barrier(int(expected), int(expected))


@executes("mbarrier", r"\.inval(\.shared(::cta)?)?\.b64")
def invalidate(threads, operands, form, name):
    """9.7.13.15.10."""
    count(operands, 1)
    barriers = threads.wave.keep(Barriers)
    for block, address, barrier in list(barriers.each(threads, operands[0])):
        if barrier.copies:
            raise BadOperand("a barrier is invalidated while copies are under way")
        del barriers.all[block, address]


@executes("mbarrier", r"\.arrive(?P<expect>\.expect_tx)?(\.release)?(\.cta)?(\.shared(::cta)?)?\.b64")
@executes("mbarrier", r"(?P<expect>\.expect_tx)(\.relaxed)?(\.cta)?(\.shared(::cta)?)?\.b64")
def arrive(threads, operands, form, name):
    """9.7.13.15.11 and .13: bytes are added to what the phase expects, then the thread arrives."""
    arrives = ".arrive" in form[0]
    operands = operands[1:] if arrives else operands
    number = threads.each(operands[1], "u32") if len(operands) > 1 else np.ones(len(threads.lanes), np.uint32)
    for (_, _, barrier), value in zip(threads.wave.keep(Barriers).each(threads, operands[0]), number, strict=True):
        if form["expect"]:
            barrier.bytes += int(value)
        if arrives:
            barrier.arrive(1 if form["expect"] else int(value))


@executes(
    "cp",
    r"\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.shared::(cluster|cta)\.global(\.tile)?"
    r"\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?",
)
def copy_box(threads, operands, form, name):
    """9.7.9.27.1.2: a box of a tensor to shared memory; its bytes count at the barrier when it has landed."""
    if len(operands) not in (3, 4):
        raise BadOperand(f"{len(operands)} operands")
    wave = threads.wave
    coordinates = operands[1].coordinates.items
    count(coordinates, int(form["rank"]))
    corners = np.stack([threads.each(item, "s32") for item in coordinates][::-1], -1)
    maps, places = threads.address(operands[1]), threads.address(operands[0])
    barriers = wave.keep(Barriers).each(threads, operands[2])
    for (block, _, barrier), which, place, corner in zip(barriers, maps, places, corners, strict=True):
        if int(which) not in wave.tensor_maps:
            raise BadOperand("the address of the tensor map is that of no parameter")
        tensor_map = wave.tensor_maps[int(which)]
        count(tensor_map.box, int(form["rank"]))
        if place % 128:
            raise Misaligned(f"a box copied to byte {place} of shared memory, which is no multiple of 128")
        start = wave.shared.places(np.array([block]), np.array([place]), tensor_map.bytes, "box copied")[0]
        wave.shared.views[1][start : start + tensor_map.bytes] = 0xFF
        barrier.copies.append((block, int(place), tensor_map, [int(c) for c in corner]))
