"""Find the tiles of the contrastive Triton kernels on this machine's GPU: ``python benchmarks/tune_contrastive.py
[--width 512] [--dtype float16]``.

Every candidate that compiles without spilling is timed at N = C = 8192, K = 4, with a mask of captions, as training has
it; the table ends with the lines to put into dreamlip_kernels/ops/logsumexp/logsumexp_tiles.py, so that no first step
has to search."""

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

from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.backends.tuned_tiles import take_tiles
from dreamlip_kernels.ops.logsumexp import (
    logsumexp_gradient_triton,
    logsumexp_tiles,
    logsumexp_triton,
)
from dreamlip_kernels.ops.logsumexp.kernels import gradient_kernels, sums_kernels
from dreamlip_kernels.ops.logsumexp.logsumexp_tiles import Blocks
from dreamlip_kernels.ops.logsumexp.operands_triton import TritonOperands, arch
from dreamlip_kernels.ops.rectangle import Rectangle, Upstream

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
    """The most registers that a variant of ``kernel`` spills, of those compiled last.

    The exact one, which runs when a flag says so, apart.
    """
    (variants, *_) = kernel.device_caches[torch.cuda.current_device()]
    always_run = [variant for variant in variants.values() if not variant.src.constants.get(_exact_place(kernel))]
    return max((variant.n_spills or 0 for variant in always_run), default=0)


def _exact_place(kernel: triton.runtime.JITFunction) -> tuple[int] | None:
    """Where the compiled constants have EXACT."""
    return (kernel.arg_names.index("EXACT"),) if "EXACT" in kernel.arg_names else None


def steps(
    width: int, dtype: torch.dtype, device: str = "cuda"
) -> dict[str, tuple[Callable[[], object], tuple[str, int, int]]]:
    """Of each kernel, a step that launches it as training does, and its key in the table."""
    settings.workspace_bytes = 2**31  # all four slots at once
    settings.resident = False  # its tile is fixed
    take_tiles({})  # those of the table, whatever a verdict on this device holds
    x = torch.nn.functional.normalize(torch.randn(N, width, device=device), dim=-1).to(dtype)
    y = torch.nn.functional.normalize(torch.randn(K, N, width, device=device), dim=-1).to(dtype)
    y_mask = torch.rand(K, N, device=device) > 0.2
    rectangle = Rectangle(x, y, torch.tensor(14.3, device=device), None, y_mask, float32="torch")
    operands = TritonOperands(rectangle)
    row, col = (torch.full((K, N), 10.0, device=device) for _ in range(2))
    upstream = Upstream(row, col, torch.rand_like(row), torch.rand_like(col))
    passes = logsumexp_gradient_triton.Passes(rectangle, upstream, needs_x=True, needs_y=True)
    workspace = operands.x.new_empty(N * K * N)

    def gradients() -> None:
        passes.use(operands.blocks("gradient_tile"))
        passes.gradient(workspace, K * N, (0, K), slice(0, N), (0, N))

    major = arch(x) // 10 if x.is_cuda and arch(x) // 10 in (8, 9, 10) else 8
    place = (operands.x.element_size(), major)
    return {
        "exp_sums": (
            lambda: logsumexp_triton._partial_sums(operands, N, None, y_mask, (None, None)),
            ("exp_sums", *place),
        ),
        "gradient_tile": (gradients, ("gradient_tile", *place)),
    }


def compile_all(width: int, dtype: torch.dtype) -> None:
    """Run every candidate once, in as many processes as there are cores: Triton's cache on disk then has what the
    timing below needs.
    """
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
    module = sums_kernels if name == "exp_sums" else gradient_kernels
    entry_before, kernel, times = logsumexp_tiles.TABLE[key], getattr(module, name), []
    for blocks in candidates(key[1]):
        logsumexp_tiles.TABLE[key] = {width: blocks}
        kernel.device_caches.clear()
        try:
            step()
            torch.cuda.synchronize()
            if spilled := spills(kernel):
                print(f"{name} {tuple(blocks)}: {spilled} spilled registers", flush=True)
                continue
            times.append((milliseconds(step), blocks))
        except Exception as error:  # too much shared memory, or nothing the compiler can make
            print(f"{name} {tuple(blocks)}: {str(error).splitlines()[0][:100]}", flush=True)
    logsumexp_tiles.TABLE[key] = entry_before
    for ms, blocks in sorted(times)[:10]:
        print(f"{name:14} {tuple(blocks)!s:26} {ms:8.3f} ms   {2 * N * N * K * width / ms / 1e9:6.0f} TFLOP/s")
    if times:
        best = min(times)[1]
        entry = f"{key!r}: {{{width}: Blocks({', '.join(map(str, best))})}}"
        print(f"    {entry},  # {torch.cuda.get_device_name()}, {min(times)[0]:.3f} ms", flush=True)


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
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "tune_contrastive: needs a CUDA device\n")
    dtype = getattr(torch, options.dtype)
    compile_all(options.width, dtype)
    for name, (step, key) in steps(options.width, dtype).items():
        tune(name, step, key, options.width)


if __name__ == "__main__":
    main()
