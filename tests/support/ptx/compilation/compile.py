"""Kernels as PTX: Triton's, by a worker process kept for the session, and csrc's, by nvcc."""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from once import once, run_folder

from .stand_ins import Compiled

ROOT = Path(__file__).parents[4]


@cache
def _worker() -> subprocess.Popen:
    """The process that compiles, without Triton's interpreter and with a cache that ends with this run."""
    paths = [str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(run_folder() / "ptx"), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "ptx.compilation.compile_worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    @atexit.register
    def stop():
        process.stdin.close()
        process.wait()

    return process


@cache
def _ask(request: bytes) -> Compiled:
    process = _worker()
    process.stdin.write(request)
    process.stdin.flush()
    reply = pickle.load(process.stdout)
    if isinstance(reply, str):
        raise RuntimeError(f"compiling {pickle.loads(request)[1]} failed:\n{reply}")
    return reply


def compile_triton(module: str, name: str, capability: int, arguments: tuple, options: dict) -> Compiled:
    """The PTX of ``module.name`` as a launch with such arguments on such a device would compile it;
    the same request is compiled once a run.
    """
    return _ask(pickle.dumps((module, name, capability, arguments, options)))


def nvcc() -> str | None:
    """The toolkit's compiler: that of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin/nvcc").is_file():
        return str(Path(home, "bin/nvcc"))
    return shutil.which("nvcc")


@cache
def compile_cuda(source: str, capability: int, *flags: str) -> str:
    """The PTX of a .cu file (its path from the repository's root), compiled once a run for each device."""
    options = ["-ptx", "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=compute_{capability}", *flags]
    command = [nvcc(), *options, "-I", str(ROOT / "csrc"), str(ROOT / source)]

    def make(target: Path) -> None:
        run = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"nvcc failed on {source}:\n{run.stderr}")

    return once(" ".join(command), ".ptx", make).read_text()
