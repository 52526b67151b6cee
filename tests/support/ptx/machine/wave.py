"""What an instruction works on: the blocks of a grid that run together, their registers, and the threads that execute
it.

All threads of a wave are lanes of numpy arrays; an instruction is executed for all threads that are at it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import BadOperand, Divergence
from .memory import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, BlockMemory, GlobalMemory
from .program import Address, Immediate, Name, Program, Register, Vector

WARP = 32
TYPES = {"pred": np.dtype(bool)}
TYPES |= {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "bf16": np.dtype("u2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
STORED = {1: np.dtype(bool), 8: TYPES["b8"], 16: TYPES["b16"], 32: TYPES["b32"], 64: TYPES["b64"]}


class Wave:
    """Blocks ``first`` .. of a launch's grid (in x, y, z order), all of whose threads are lanes here."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: np.ndarray,
        places: dict[str, int],
        tensor_maps: dict[int, Any],
        grid: tuple[int, int, int],
        first: int,
        blocks: int,
        threads: int,
        shared_bytes: int,
    ):
        self.program, self.memory, self.tensor_maps = program, memory, tensor_maps
        self.parameters, self.places = parameters, places
        self.blocks, self.threads, self.lanes = blocks, threads, blocks * threads
        self.registers: list[np.ndarray | None] = [None] * len(program.widths)
        self.shared = BlockMemory(blocks, program.static_shared + shared_bytes, "shared memory")
        self.local = BlockMemory(self.lanes, program.local_bytes, "local memory")
        lane = np.arange(self.lanes)
        self.block = lane // threads  # of each lane
        self.thread = lane % threads
        number = first + self.block
        x, y, z = grid
        special = {"%tid.x": self.thread, "%ntid.x": threads, "%laneid": lane % WARP, "%warpid": self.thread // WARP}
        special |= {"%ctaid.x": number % x, "%ctaid.y": number // x % y, "%ctaid.z": number // (x * y)}
        special |= {"%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "%cluster_ctarank": 0}
        special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        self.special = {name: np.broadcast_to(value, lane.shape).astype(np.uint32) for name, value in special.items()}
        self.state: dict[type, Any] = {}
        self.unfenced_products = (
            0  # operands of products that cp.async wrote, without the fence that makes them visible
        )

    def keep(self, kind: type) -> Any:
        """What a family of instructions remembers of this wave, made at its first use."""
        if kind not in self.state:
            self.state[kind] = kind(self)
        return self.state[kind]

    def register(self, register: Register) -> np.ndarray:
        """All lanes of a register; all bits set (NaN) before anything is written."""
        values = self.registers[register.slot]
        if values is None:
            kind = STORED[register.width]
            values = np.zeros(self.lanes, kind) if register.width == 1 else np.full(self.lanes, -1).astype(kind)
            self.registers[register.slot] = values
        return values

    def variable(self, name: str, kind: np.dtype) -> np.generic:
        """The address of a variable in its own state space; of a parameter or local variable, in the generic one."""
        program = self.program
        if name in program.shared:
            return kind.type(program.shared[name][0])
        if name in program.local:
            return kind.type(program.local[name])
        if name in self.places:
            return kind.type(PARAMETER_WINDOW + self.places[name])
        raise BadOperand(f"unknown name {name!r}")


class Threads:
    """The lanes, in ascending order, that execute an instruction;
    ``everyone`` spares the indexing where it is all of the wave.
    """

    def __init__(self, wave: Wave, lanes: np.ndarray):
        self.wave, self.lanes = wave, lanes
        self.everyone = len(lanes) == wave.lanes

    def subset(self, mask: np.ndarray) -> Threads:
        return Threads(self.wave, self.lanes[mask])

    def read(self, operand: Any, kind: str) -> np.ndarray:
        """The operand's bits as that PTX type, one for each thread;
        a wider register is cut, a narrower one extended with zeros.
        """
        want = TYPES[kind]
        if type(operand) is Register:
            values = self.wave.register(operand)
            if not self.everyone:
                values = values[self.lanes]
            if want.kind == "b":
                return values
            if values.itemsize == want.itemsize:
                return values.view(want)
            return values.astype(f"u{want.itemsize}").view(want)
        if type(operand) is Immediate:
            if want.kind == "b":
                return np.bool_(operand.value)
            if isinstance(operand.value, float):
                return want.type(operand.value)
            bits = operand.value & (1 << 8 * want.itemsize) - 1
            return np.dtype(f"u{want.itemsize}").type(bits).view(want)
        if type(operand) is Name:
            if operand.text in self.wave.special:
                return self.wave.special[operand.text][self.lanes].astype(want)
            return self.wave.variable(operand.text, want)
        raise BadOperand(f"{operand} is no value")

    def each(self, operand: Any, kind: str) -> np.ndarray:
        """As ``read``, and an array even of a constant."""
        return np.broadcast_to(self.read(operand, kind), self.lanes.shape)

    def write(self, operand: Any, values: np.ndarray) -> None:
        """Signed values are extended with their sign where the register is wider, others with zeros."""
        if type(operand) is not Register:
            if operand == Name("_"):
                return
            raise BadOperand(f"{operand} is no register to write to")
        target, values = self.wave.register(operand), np.asarray(values)
        if target.dtype != values.dtype and operand.width != 1:
            if values.itemsize > target.itemsize:
                raise BadOperand(f"{8 * values.itemsize} bits do not fit a register of {operand.width}")
            if values.itemsize < target.itemsize:
                values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{target.itemsize}")
            values = values.view(target.dtype)
        if self.everyone:
            target[:] = values
        else:
            target[self.lanes] = values

    def address(self, operand: Address, kind: str = "s64") -> np.ndarray:
        """base + offset for each thread, as int64."""
        if type(operand) is not Address:
            raise BadOperand(f"{operand} is no address")
        wide = type(operand.base) is Register and operand.base.width == 64
        base = self.each(operand.base, "u64" if wide or type(operand.base) is not Register else "u32")
        return base.astype(np.int64) + operand.offset

    def warps(self, values: np.ndarray | None = None) -> np.ndarray:
        """Values [warps, 32] (the lanes' numbers, if none are given) of whole warps;
        an instruction that wants those met fewer threads else.
        """
        lanes = self.lanes
        if (
            len(lanes) % WARP
            or (lanes.reshape(-1, WARP)[:, 0] % WARP).any()
            or (np.diff(lanes.reshape(-1, WARP)) != 1).any()
        ):
            raise Divergence("not all threads of a warp arrive together")
        return (lanes if values is None else np.broadcast_to(values, lanes.shape)).reshape(-1, WARP)

    def fragments(self, vector: Any, kind: str = "b32") -> np.ndarray:
        """The registers of a vector for whole warps: [warps, 32, registers]."""
        items = vector.items if type(vector) is Vector else (vector,)
        return np.stack([self.warps(self.read(item, kind)) for item in items], -1)


Handler = Callable[[Threads, Any, Any], None]
SPACES = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local", PARAMETER_WINDOW: "param"}
