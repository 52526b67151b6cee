"""Matrix loads, stores and products of a warp (PTX ISA section 9.7.14, "Warp Level Matrix Multiply-Accumulate
Instructions").

The manual leaves open how a product's sum is rounded. Here it is as measured on V100 to H100 (Fasi, Higham, Mikaitis,
Pranesh: Numerical behavior of NVIDIA
tensor cores, 2021): the products of one instruction and the accumulator are added, and the sum is cut to float32,
toward zero. To nearest, errors of long
sums of three TF32 products would come out several times too small.
"""

from __future__ import annotations

import numpy as np

from ..machine.errors import Misaligned
from ..machine.numbers import bfloat16_value, float16_value, tf32_value, toward_zero
from ..machine.program import Vector
from ..machine.table import executes
from ..machine.wave import WARP
from .arithmetic import count

VALUES = {"bf16": (16, bfloat16_value), "f16": (16, float16_value), "tf32": (32, tf32_value)}
_GROUP, _MEMBER = np.arange(WARP) // 4, np.arange(WARP) % 4  # groupID and threadID_in_group of the manual's figures


def accumulate(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c + a @ b of one instruction."""
    return toward_zero(c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64))


def unpacked(registers: np.ndarray, kind: str) -> np.ndarray:
    """32-bit registers [..., r] -> values [..., r, per register], the low half first."""
    bits, value = VALUES[kind]
    if bits == 32:
        return value(registers)[..., None]
    return value(np.stack([registers & np.uint32(0xFFFF), registers >> np.uint32(16)], -1).astype(np.uint16))


def rows_of_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """Registers [warps, 32, r] of the operand A -> its matrix [warps, 16, k] (figures of m16n8k8 and m16n8k16)."""
    values = unpacked(registers, kind)
    warps, _, count_, each = values.shape
    matrix = np.empty((warps, 16, 8 * each * count_ // 4 if count_ > 1 else 4 * each), np.float32)
    for register in range(count_):
        for element in range(each):
            column = each * _MEMBER + 4 * each * (register >> 1) + element
            matrix[:, _GROUP + 8 * (register & 1), column] = values[:, :, register, element]
    return matrix


def columns_of_b(registers: np.ndarray, kind: str) -> np.ndarray:
    """Registers [warps, 32, r] of the operand B -> its matrix [warps, k, 8]."""
    values = unpacked(registers, kind)
    warps, _, count_, each = values.shape
    matrix = np.empty((warps, 4 * each * count_, 8), np.float32)
    for register in range(count_):
        for element in range(each):
            matrix[:, each * _MEMBER + 4 * each * register + element, _GROUP] = values[:, :, register, element]
    return matrix


def accumulator_places(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [32, registers] of each thread's accumulators in a matrix of 16 rows:
    pairs of columns, rows r and r + 8, 8 columns further.
    """
    register = np.arange(registers)[None, :]
    rows = _GROUP[:, None] + 8 * (register >> 1 & 1)
    return rows, 8 * (register // 4) + 2 * _MEMBER[:, None] + (register & 1)


@executes("mma", r"\.sync\.aligned\.m16n8k(?P<k>8|16)\.row\.col\.f32\.(?P<type>bf16|f16|tf32)\.(?P=type)\.f32")
def mma(threads, operands, form, name):
    """9.7.14.5.14: d [16, 8] = a [16, k] b [k, 8] + c, float32 sums."""
    count(operands, 4)
    kind, k = form["type"], int(form["k"])
    a = rows_of_a(threads.fragments(operands[1]), kind)
    b = columns_of_b(threads.fragments(operands[2]), kind)
    if a.shape[2] != k or b.shape[1] != k:
        count(operands[1].items, k * 16 * VALUES[kind][0] // 1024)
        count(operands[2].items, k * 8 * VALUES[kind][0] // 1024)
    rows, columns = accumulator_places(4)
    c = np.empty((len(a), 16, 8), np.float32)
    c[:, rows, columns] = threads.fragments(operands[3], "f32")
    d = accumulate(c, a, b)[:, rows, columns]
    for place, register in enumerate(operands[0].items):
        threads.write(register, np.ascontiguousarray(d[:, :, place]).ravel())


_MATRICES = r"\.sync\.aligned\.m8n8\.x(?P<count>1|2|4)(?P<trans>\.trans)?\.shared(::cta)?\.b16"


def _matrix_places(threads, address, matrices):
    """Positions [warps, matrices, 8 rows, 8] of 16-bit elements; the rows' addresses come from lanes 8 i to 8 i + 7."""
    wave = threads.wave
    addresses = threads.warps(threads.address(address))[:, : 8 * matrices]
    blocks = threads.warps(wave.block[threads.lanes])[:, : 8 * matrices]
    if (addresses % 16).any():
        raise Misaligned("a row of a matrix at an address that is no multiple of 16")
    places = wave.shared.places(blocks.ravel(), addresses.ravel(), 16, "matrix row") // 2
    return places.reshape(len(addresses), matrices, 8, 1) + np.arange(8)


@executes("ldmatrix", _MATRICES)
def load_matrix(threads, operands, form, name):
    """9.7.14.5.15: 8 x 8 matrices of 16 bits; a thread gets two neighbors of a row, or of a column with .trans."""
    count(operands, 2)
    matrices = int(form["count"])
    values = threads.wave.shared.views[2][_matrix_places(threads, operands[1], matrices)].astype(np.uint32)
    if form["trans"]:
        values = values.swapaxes(2, 3)
    pairs = values[..., 0::2] | values[..., 1::2] << np.uint32(16)  # [warps, matrices, 8, 4]
    targets = operands[0].items if type(operands[0]) is Vector else (operands[0],)
    count(targets, matrices)
    for place, register in enumerate(targets):
        threads.write(register, pairs[:, place].ravel())


@executes("stmatrix", _MATRICES)
def store_matrix(threads, operands, form, name):
    """9.7.14.5.16: the reverse of ldmatrix."""
    count(operands, 2)
    matrices = int(form["count"])
    pairs = threads.fragments(operands[1]).swapaxes(1, 2).reshape(-1, matrices, 8, 4)
    values = (
        np.stack([pairs & np.uint32(0xFFFF), pairs >> np.uint32(16)], -1).astype(np.uint16).reshape(-1, matrices, 8, 8)
    )
    if form["trans"]:
        values = values.swapaxes(2, 3)
    threads.wave.shared.put(_matrix_places(threads, operands[0], matrices), values)
