"""group_patches by the executed PTX of csrc/'s CUDA kernels, planned as csrc plans a launch."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from functools import cache

import torch
from once import once
from torch import Tensor

from ..compilation.compile import ROOT, compile_cuda
from ..execution import execute
from ..schedule import TOGETHER, Schedule

ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}
NORMALIZATIONS = ("minmax", "softmax", "none")


@cache
def _planner() -> ctypes.CDLL:
    source = str(ROOT / "tests/support/ptx/csrc/plan.cpp")
    command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source]
    library = once("plan", ".so", lambda target: subprocess.run([*command, "-o", str(target)], check=True))
    return ctypes.CDLL(str(library))


class Device:
    """csrc's kernels on a device of that capability with ``limit`` bytes of shared memory a block, in ``blocks``
    blocks.
    """

    def __init__(
        self,
        capability: int,
        *,
        limit: int = 99 * 1024,
        blocks: int = 2,
        schedule: Schedule = TOGETHER,
        mutate: Callable[[str], str] = str,
    ):
        self.capability, self.limit, self.blocks, self.schedule, self.mutate = (
            capability,
            limit,
            blocks,
            schedule,
            mutate,
        )

    def group_patches(
        self,
        patches: Tensor,
        texts: Tensor,
        *,
        threshold: float | None = None,
        normalization: str = "minmax",
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """patches [N, P, D], texts [N, K, D] contiguous, K up to 16 -> pooled [N, K, D], differentiable."""
        options = -1e38 if threshold is None else threshold, NORMALIZATIONS.index(normalization)
        return _GroupPatches.apply(self, patches, texts, *options, patch_mask)

    def launch(
        self, kernel: str, patches: Tensor, texts: Tensor, threshold: float, normalization: int, *tensors
    ) -> None:
        """``kernel``, "forward_kernel" or "backward_kernel", on all images."""
        (n, p, d), k = patches.shape, texts.shape[1]
        tiles = 1 if k <= 8 else 2
        flags = f"-DELEMENT={ELEMENTS[patches.dtype]}", f"-DTILES={tiles}"
        text = self.mutate(compile_cuda("tests/support/ptx/csrc/pool.cu", self.capability, *flags))
        name = re.search(rf"\.entry\s+(\w*{kernel}\w*)", text)[1]
        planner = _planner()
        shape = ctypes.create_string_buffer(planner.shape_bytes())
        sizes = (ctypes.c_long * 6)(n, p, k, d, patches.element_size(), normalization)
        backward = kernel == "backward_kernel"
        shared = planner.plan(sizes, ctypes.c_double(threshold), self.limit, int(backward), shape)
        assert shared <= self.limit, f"needs {shared} bytes of shared memory"
        arguments = [bytes(shape), patches, texts, *tensors]
        grid = (min(n, self.blocks), 1, 1)
        execute(text, arguments, grid, shared_bytes=shared, kernel=name, threads=256, schedule=self.schedule)


class _GroupPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device, patches, texts, threshold, normalization, mask):
        n, p, _ = patches.shape
        pooled = torch.empty_like(texts)
        s, inv = torch.empty(n, texts.shape[1], p), torch.empty(n, p)
        ctx.call = device, threshold, normalization
        ctx.save_for_backward(patches, texts, s, inv, mask)
        device.launch("forward_kernel", patches, texts, threshold, normalization, mask, pooled, s, inv)
        return pooled

    @staticmethod
    def backward(ctx, upstream):
        patches, texts, s, inv, mask = ctx.saved_tensors
        device, *options = ctx.call
        dx, dt = torch.empty_like(patches), torch.empty_like(texts)
        device.launch("backward_kernel", patches, texts, *options, upstream.contiguous(), mask, s, inv, dx, dt)
        return None, dx, dt, None, None, None
