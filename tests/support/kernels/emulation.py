"""csrc's CUDA kernels compiled for the CPU, every thread of a block a fiber (tests/csrc/emulate.h): needs g++ and the
headers of CUDA, no nvcc and no GPU.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

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
    """tests/csrc/NAME.cpp as a library, compiled once a process."""
    includes = ["-I", ROOT / "csrc", "-I", ROOT / "tests/csrc", "-isystem", Path(CUDA, "include")]
    with tempfile.TemporaryDirectory(prefix="emulated-") as folder:
        target = Path(folder, f"{name}.so")
        command = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", *includes, ROOT / f"tests/csrc/{name}.cpp"]
        subprocess.run([*command, "-o", target], check=True)
        return ctypes.CDLL(str(target))
