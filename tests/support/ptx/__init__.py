"""An executor of PTX: the compiled GPU code run on a CPU, with numpy, for tests.

    program    text -> instructions            schedule   which threads run when, branches, barriers
    wave       blocks, registers, threads      memory     global memory with bounds, shared memory that begins as NaN
    table      opcode -> function              numbers    bfloat16, TF32, rounding
    arithmetic, movement, exchange, tensor_core, warp_group, copies, tensor_copies:
    the functions, a family of instructions each
    execution  a launch: parameters, grid      launches   what the shipped launchers launch;
    compile, compile_worker, stand_ins serve it

Section numbers are those of the PTX ISA manual, version 9.1. What it shows:
that the code computes the right thing, in any order of warps, reads nothing before it is
there, and touches nothing that isn't its own. What it can't show:
races within a warp, the memory model beyond barriers and proxies, the driver's tensor maps,
occupancy, and time.
"""

from .compile import compile_cuda, nvcc
from .errors import (
    AsyncHazard,
    BadOperand,
    Deadlock,
    Divergence,
    Misaligned,
    OutOfBounds,
    PtxError,
    UnknownInstruction,
    WrongParameters,
)
from .execution import execute
from .launches import Launch, device
from .schedule import FIRST_AHEAD, LAST_AHEAD, TOGETHER, Schedule, shuffled
from .tensor_copies import TensorMap

__all__ = [
    "FIRST_AHEAD",
    "LAST_AHEAD",
    "TOGETHER",
    "AsyncHazard",
    "BadOperand",
    "Deadlock",
    "Divergence",
    "Launch",
    "Misaligned",
    "OutOfBounds",
    "PtxError",
    "Schedule",
    "TensorMap",
    "UnknownInstruction",
    "WrongParameters",
    "compile_cuda",
    "device",
    "execute",
    "nvcc",
    "shuffled",
]
