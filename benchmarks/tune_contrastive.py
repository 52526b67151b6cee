"""Find the tiles of the contrastive Triton kernels on this machine's GPU: ``python benchmarks/tune_contrastive.py [--width 512] [--dtype float16]``.

Every candidate that compiles without spilling is timed at N = C = 8192, K = 4, without masks; the table ends with the lines to put into
dreamlip_kernels/ops/logsumexp_tiles.py, so that no user's first step has to search.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
import triton

from dreamlip_kernels.ops import logsumexp_kernels, logsumexp_tiles, logsumexp_triton
from dreamlip_kernels.ops.logsumexp_tiles import Blocks

N, K = 8192, 4


def candidates(element_bytes: int) -> Iterator[Blocks]:
    """Tiles whose accumulator and load pipeline could fit a processor."""
    depths = (32, 64, 128) if element_bytes == 2 else (16, 32, 64)
    for m, c, d, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), depths, (4, 8), (2, 3, 4)):
        pipeline = (m + c) * d * element_bytes * stages
        if pipeline <= 220 * 1024 and 32 <= m * c // (32 * warps) <= 128:
            yield Blocks(m, c, d, warps, stages)


def milliseconds(step: Callable[[], object]) -> float:
    """Median of 15 by device events, after 3 to warm up."""
    for _ in range(3):
        step()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(15)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def spills(kernel: triton.runtime.JITFunction) -> int:
    """Spilled registers of what was compiled last for ``kernel``: of the usual variant, not of the exact one that runs when a flag says so."""
    (compiled, *_) = kernel.device_caches[torch.cuda.current_device()]
    return min((built.n_spills or 0 for built in compiled.values()), default=0)


def steps(width: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], tuple[str, int, int]]]:
    """Of each kernel, a step that launches it as training does, and its key in the table."""
    if dtype == torch.float32:
        logsumexp_triton.settings.float32 = "torch"
    x = torch.nn.functional.normalize(torch.randn(N, width, device="cuda"), dim=-1).to(dtype)
    y = torch.nn.functional.normalize(torch.randn(K, N, width, device="cuda"), dim=-1).to(dtype)
    operands = logsumexp_triton.Operands(x, y, torch.tensor(14.3, device="cuda"), None, None)
    flag = torch.zeros((), dtype=torch.int32, device="cuda")
    rows, cols = (torch.rand(3, N, device="cuda") for _ in range(2))
    workspace = operands.x.new_empty(N * N)

    def gradients() -> None:
        for slot in range(K):
            logsumexp_triton._gradient(operands, flag, None, None, rows, cols, workspace, slot, 0, 0, N, N, 0)

    arch = logsumexp_triton._arch(x)
    place = (operands.x.element_size(), arch // 10 if arch // 10 in (8, 9, 10) else 8)
    return {
        "exp_sums": (lambda: logsumexp_triton._sums(operands, None, None), ("exp_sums", *place)),
        "gradient_tile": (gradients, ("gradient_tile", *place)),
    }


def compile_all(width: int, dtype: torch.dtype) -> None:
    """Run every candidate once, in as many processes as there are cores: Triton's cache on disk then has what the timing below needs."""
    begin = time.perf_counter()
    todo = [
        (name, blocks, width, dtype) for blocks in candidates(dtype.itemsize) for name in ("exp_sums", "gradient_tile")
    ]
    with ProcessPoolExecutor(
        max(1, (os.cpu_count() or 1) - 1), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        list(pool.map(compile_one, todo))
    print(f"{len(todo)} candidates compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def compile_one(job: tuple[str, Blocks, int, torch.dtype]) -> None:
    """One candidate, whose failure is reported when it is its turn to be timed."""
    name, blocks, width, dtype = job
    with contextlib.suppress(Exception):
        step, key = steps(width, dtype)[name]
        logsumexp_tiles.TABLE[key] = {width: blocks}
        step()
        torch.cuda.synchronize()


def tune(name: str, step: Callable[[], object], key: tuple[str, int, int], width: int) -> None:
    """Time every candidate of kernel ``name`` in ``step`` and print them, fastest first."""
    kept, kernel, found = logsumexp_tiles.TABLE[key], getattr(logsumexp_kernels, name), []
    for blocks in candidates(key[1]):
        logsumexp_tiles.TABLE[key] = {width: blocks}
        kernel.device_caches.clear()
        try:
            step()
            torch.cuda.synchronize()
            if spilled := spills(kernel):
                print(f"{name} {tuple(blocks)}: {spilled} spilled registers", flush=True)
                continue
            found.append((milliseconds(step), blocks))
        except Exception as error:  # too much shared memory, or nothing the compiler can make
            print(f"{name} {tuple(blocks)}: {str(error).splitlines()[0][:100]}", flush=True)
    logsumexp_tiles.TABLE[key] = kept
    for ms, blocks in sorted(found)[:10]:
        print(f"{name:14} {tuple(blocks)!s:26} {ms:8.3f} ms   {2 * N * N * K * width / ms / 1e9:6.0f} TFLOP/s")
    if found:
        best = min(found)[1]
        print(
            f"    {key!r}: {{{width}: Blocks({', '.join(map(str, best))})}},  # {torch.cuda.get_device_name()}, {min(found)[0]:.3f} ms",
            flush=True,
        )


def main() -> None:
    """Parse the arguments, tune both kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="float32 is tuned as three TF32 products",
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "tune_contrastive: needs a CUDA device\n")
    dtype = getattr(torch, given.dtype)
    compile_all(given.width, dtype)
    for name, (step, key) in steps(given.width, dtype).items():
        tune(name, step, key, given.width)


if __name__ == "__main__":
    main()
