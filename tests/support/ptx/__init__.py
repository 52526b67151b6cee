"""An executor of PTX: the compiled GPU code run on a CPU, with numpy, for tests.

    machine/        program  text -> instructions          wave     blocks, registers, threads
                    table    opcode -> function            memory   global with bounds, shared that begins as NaN
                    numbers  bfloat16, TF32, rounding      errors   what an executed kernel may do wrong
    instructions/   the functions, a family of instructions per file
    schedule        which threads run when, branches, barriers
    execution       a launch: parameters, grid
    compilation/    Triton's kernels and csrc's as PTX
    launches        what the shipped Triton launchers launch
    csrc/           what csrc's launchers launch
    cases, contrast_cases, specialized_kernel: inputs of the tests

Section numbers are those of the PTX ISA manual, version 9.1. What it shows:
that the code computes the right thing, in any order of warps, reads nothing before it is
there, and touches nothing that isn't its own. What it can't show:
races within a warp, the memory model beyond barriers and proxies, the driver's tensor maps,
occupancy, and time.
"""

from .compilation.compile import compile_cuda, nvcc
from .execution import execute
from .instructions.tensor_copies import TensorMap
from .launches import Launch, device
from .machine.errors import (
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
from .schedule import FIRST_AHEAD, LAST_AHEAD, TOGETHER, Schedule, shuffled

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
