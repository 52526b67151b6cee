"""csrc's CUDA kernels compiled for the CPU, every thread of a block a fiber (tests/csrc/emulate.h): needs g++ and the
headers of CUDA, no nvcc and no GPU.
"""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from once import once

ROOT = Path(__file__).parents[3]
_TOOLKITS = [
    os.environ.get("CUDA_HOME", ""),
    "/usr/local/cuda",
    *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True)),
]
CUDA = next((path for path in _TOOLKITS if path and Path(path, "include/cuda_bf16.h").is_file()), None)
needs_emulation = pytest.mark.skipif(
    CUDA is None or shutil.which("g++") is None,
    reason="needs g++ and CUDA's headers (CUDA_HOME) to compile the kernels",
)


@cache
def emulated(name: str) -> ctypes.CDLL:
    """tests/csrc/NAME.cpp as a library, compiled once a run."""
    includes = ["-I", ROOT / "csrc", "-I", ROOT / "tests/csrc", "-isystem", Path(CUDA, "include")]
    # Where a distribution's g++ fortifies by itself, a jump to another stack ends the program.
    options = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
    command = ["g++", *options, *includes, ROOT / f"tests/csrc/{name}.cpp"]
    library = once(f"emulated {name}", ".so", lambda target: subprocess.run([*command, "-o", target], check=True))
    return ctypes.CDLL(str(library))
