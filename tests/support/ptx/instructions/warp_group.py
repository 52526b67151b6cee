"""Asynchronous products of a warp group (PTX ISA section 9.7.15, "Asynchronous Warpgroup Level Matrix
Multiply-Accumulate Instructions").

A warp of the group makes 16 of the 64 rows. A product is made at the wait that covers it, never before, and until then
its accumulators are NaN; what it
reads of shared memory must be the same at its issue and at its wait, and be visible to the asynchronous proxy:
a thread's
store without a fence between is an error. cp.async without one is counted instead:
the manual wants the fence there too,
Triton 3.6 places none (triton-lang/triton#10537), and an H100's results were right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..machine.errors import AsyncHazard, BadOperand, Misaligned, OutOfBounds
from ..machine.memory import COPY, STORE
from ..machine.numbers import toward_zero
from ..machine.program import Register, Vector
from ..machine.table import executes
from ..machine.wave import WARP
from .arithmetic import count
from .tensor_copies import swizzled
from .tensor_core import VALUES, accumulator_places, rows_of_a


@dataclass
class Descriptor:
    """A matrix in shared memory, section 9.7.15.5.1.2: start, the two byte offsets between blocks of it, and the
    swizzle's span in bytes.
    """

    start: int
    leading: int
    stride: int
    span: int

    @classmethod
    def decode(cls, bits: int) -> Descriptor:
        if bits & (0x3 << 14 | 0x3 << 30 | 0x7 << 46 | 0x3FF << 52):
            raise BadOperand(f"matrix descriptor {bits:#018x}: reserved bits are set")
        if bits >> 49 & 7:
            raise BadOperand(f"matrix descriptor {bits:#018x}: a base offset, which the executor does not know")
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        span = (0, 128, 64, 32)[bits >> 62]
        if span and start % (8 * span) >= span:
            raise Misaligned(
                f"matrix descriptor {bits:#018x}: its start {start} is not in the first row of a swizzled block"
            )
        return cls(start, leading, stride, span)

    def places(self, rows: np.ndarray, k: int, item: int, transposed: bool) -> np.ndarray:
        """Bytes of the elements [rows, k]: 8 rows of a swizzle's span each make a block (tables and figures of section
        9.7.15.5.1).
        """
        r, c = rows[:, None], np.arange(k)[None, :]
        if transposed:
            if not self.span:
                raise BadOperand("a transposed matrix without swizzle, which the executor does not know")
            across = self.span // item
            at = r // across * self.leading + c // 8 * self.stride + c % 8 * self.span + r % across * item
        elif self.span:
            at = r // 8 * self.stride + r % 8 * self.span + c * item
        else:
            at = r // 8 * self.stride + c * item // 16 * self.leading + r % 8 * 16 + c * item % 16
        return swizzled(self.start + at, self.span)


@dataclass
class _Matrix:
    """An operand in shared memory: the bits of its elements when the product was issued, and where they are."""

    block: int
    indices: np.ndarray
    bits: np.ndarray


@dataclass
class _Product:
    warps: np.ndarray  # [w]
    targets: tuple[Register, ...]
    kind: str
    keep: np.ndarray  # [w] whether the accumulators count
    group: np.ndarray  # [w]
    a: list  # of each warp: its registers [32, r], or the matrix of its 16 rows
    b: list[_Matrix]
    sign: float


class Products:
    """What each warp has under way."""

    def __init__(self, wave):
        warps = wave.lanes // WARP
        self.wave = wave
        self.pending: list[_Product] = []
        self.committed = np.zeros(warps, np.int64)
        self.fenced = np.zeros(warps, bool)
        self.sums: dict[tuple[int, ...], np.ndarray] = {}  # accumulators under way, by their registers: [warps, 32, r]

    def matrix(self, block: int, bits: int, rows: np.ndarray, k: int, kind: str, transposed: bool) -> _Matrix:
        shared, item = self.wave.shared, VALUES[kind][0] // 8
        places = Descriptor.decode(bits).places(rows, k, item, transposed)
        if places.max() + item > shared.size:
            raise OutOfBounds(
                f"a matrix that reaches byte {places.max()} of shared memory, which has {shared.size} bytes"
            )
        indices = (block * shared.stride + places) // item
        writers = shared.unfenced[indices * item // 4]
        if (writers == STORE).any():
            raise AsyncHazard("a product reads shared memory that threads wrote, without fence.proxy.async between")
        self.wave.unfenced_products += bool((writers == COPY).any())
        return _Matrix(block, indices, shared.views[item][indices])

    def values(self, matrix: _Matrix, kind: str) -> np.ndarray:
        """The operand's elements [rows, k], if nothing has changed since the issue."""
        bits, value = VALUES[kind]
        if not np.array_equal(self.wave.shared.views[bits // 8][matrix.indices], matrix.bits):
            raise AsyncHazard("shared memory that a product reads changed between its issue and its wait")
        return value(matrix.bits)

    def _rows(self, a: _Matrix | np.ndarray, kind: str) -> np.ndarray:
        """A warp's 16 rows of the operand A, from shared memory or from its registers."""
        return self.values(a, kind) if isinstance(a, _Matrix) else rows_of_a(a[None], kind)[0]

    def busy(self, slots: tuple[int, ...], warps: np.ndarray) -> np.ndarray:
        """Which of the warps have a product of these accumulators under way."""
        busy = np.zeros(len(self.committed), bool)
        for product in self.pending:
            if tuple(r.slot for r in product.targets) == slots:
                busy[product.warps] = True
        return busy[warps]

    def issue(self, threads, product: _Product) -> None:
        slots, warps = tuple(r.slot for r in product.targets), product.warps
        busy = self.busy(slots, warps)
        if not (self.fenced[warps] | busy).all():
            raise AsyncHazard("no wgmma.fence between the last access to the registers and this product")
        if slots not in self.sums:
            self.sums[slots] = np.full((len(self.committed), WARP, len(slots)), np.nan, np.float32)
        if not busy.all():
            fresh = threads.subset(np.repeat(~busy, WARP))
            self.sums[slots][warps[~busy]] = fresh.fragments(Vector(product.targets), "f32")
            for register in product.targets:
                fresh.write(register, np.float32(np.nan))
        self.pending.append(product)

    def land(self, lanes: np.ndarray, left: int) -> None:
        """All but the latest ``left`` groups of these warps, in order."""
        waiting = np.zeros(len(self.committed), bool)
        waiting[lanes // WARP] = True
        done, rest = [], []
        for product in self.pending:
            now = waiting[product.warps] & (product.group < self.committed[product.warps] - left)
            if now.any():
                done.append(_part(product, now))
                self._make(done[-1])
            if not now.all():
                rest.append(_part(product, ~now))
        self.pending = rest
        self.fenced[np.nonzero(waiting)[0]] = False
        for slots, product in {tuple(r.slot for r in p.targets): p for p in done}.items():
            over = product.warps[~self.busy(slots, product.warps)]
            places = (over[:, None] * WARP + np.arange(WARP)).ravel()
            values = self.sums[slots][over].reshape(len(places), len(slots))
            for column, register in enumerate(product.targets):
                self.wave.register(register)[places] = np.ascontiguousarray(values[:, column]).view(np.uint32)

    def _make(self, product: _Product) -> None:
        slots = tuple(r.slot for r in product.targets)
        rows, columns = accumulator_places(len(slots))
        together: dict[int, list[int]] = {}
        for number, matrix in enumerate(product.b):
            together.setdefault(id(matrix), []).append(number)
        for numbers in together.values():
            b = self.values(product.b[numbers[0]], product.kind).astype(np.float64)
            a = np.stack([self._rows(product.a[i], product.kind) for i in numbers])
            sums = self.sums[slots][product.warps[numbers]]
            c = np.empty((len(numbers), 16, len(b)), np.float64)
            c[:, rows, columns] = np.where(product.keep[numbers][:, None, None], sums, 0)
            d = toward_zero(c + product.sign * (a.astype(np.float64) @ b.T))
            self.sums[slots][product.warps[numbers]] = d[:, rows, columns]


def _part(product: _Product, mask: np.ndarray) -> _Product:
    if mask.all():
        return product
    numbers = np.nonzero(mask)[0]
    return _Product(
        product.warps[mask],
        product.targets,
        product.kind,
        product.keep[mask],
        product.group[mask],
        [product.a[i] for i in numbers],
        [product.b[i] for i in numbers],
        product.sign,
    )


@executes("wgmma", r"\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>8|16)\.f32\.(?P<type>bf16|f16|tf32)\.(?P=type)")
def product(threads, operands, form, name):
    """9.7.15.5.2: d [64, n] = a [64, k] b [k, n] + d, a from registers or shared memory, b from shared memory."""
    kind, n, k = form["type"], int(form["n"]), int(form["k"])
    wave, in_registers = threads.wave, type(operands[1]) is Vector
    transposes = [] if kind == "tf32" else operands[6:]
    count(operands, 6 if kind == "tf32" else 7 if in_registers else 8)
    count(operands[0].items, n // 2)
    transposed = [bool(t.value) for t in transposes]
    transposed_b = transposed[-1] if transposed else False
    state = wave.keep(Products)
    warps = threads.warps()[:, 0] // WARP
    first = threads.warps()[:, 0]
    blocks = wave.block[first]
    b_bits = threads.each(operands[2], "u64")[::WARP]
    made: dict[tuple, _Matrix] = {}

    def shared_matrix(block, bits, rows, flipped):
        key = (int(block), int(bits), int(rows[0]), len(rows))
        if key not in made:
            made[key] = state.matrix(int(block), int(bits), rows, k, kind, flipped)
        return made[key]

    b = [shared_matrix(block, bits, np.arange(n), transposed_b) for block, bits in zip(blocks, b_bits, strict=True)]
    if in_registers:
        a = list(threads.fragments(operands[1]))
    else:
        a_bits = threads.each(operands[1], "u64")[::WARP]
        starts = wave.thread[first] // WARP % 4 * 16
        a = [
            shared_matrix(blocks[i], a_bits[i], starts[i] + np.arange(16), transposed[0] if transposed else False)
            for i in range(len(warps))
        ]
    keep = threads.each(operands[3], "pred")[::WARP].copy()
    sign = float(np.prod([threads.read(operand, "s32") for operand in operands[4:6]]))
    state.issue(threads, _Product(warps, operands[0].items, kind, keep, state.committed[warps].copy(), a, b, sign))


@executes("wgmma", r"\.fence\.sync\.aligned")
def fence(threads, operands, form, name):
    """9.7.15.7.1: registers that were accessed before may be a product's from here on."""
    threads.wave.keep(Products).fenced[threads.warps()[:, 0] // WARP] = True


@executes("wgmma", r"\.commit_group\.sync\.aligned")
def commit(threads, operands, form, name):
    """9.7.15.7.2: all products since the last commit become a group."""
    threads.wave.keep(Products).committed[threads.warps()[:, 0] // WARP] += 1


@executes("wgmma", r"\.wait_group\.sync\.aligned")
def wait(threads, operands, form, name):
    """9.7.15.7.3: until at most n groups are under way."""
    count(operands, 1)
    threads.warps()
    threads.wave.keep(Products).land(threads.lanes, operands[0].value)
