"""``torch.ops.dreamlip_csrc`` of bidirectional_logsumexp as the executed PTX of csrc/'s CUDA kernels, launched as
csrc/logsumexp.cu launches them."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..compilation.compile import compile_cuda
from ..execution import Struct, execute
from ..schedule import TOGETHER, Schedule
from .pool import ELEMENTS

TILE, THREADS = 128, 128
SHARED_BYTES = 3 * 2 * TILE * 64 + 2 * TILE * 4  # LogitTiles::kSharedBytes


class ExecutedOps:
    """The ops on a device of that capability; ``mutate(kernel, ptx)`` gives the PTX to execute in place of nvcc's."""

    def __init__(
        self, capability: int, *, schedule: Schedule = TOGETHER, mutate: Callable[[str, str], str] | None = None
    ):
        self.capability, self.schedule, self.mutate = capability, schedule, mutate
        self.calls: list[str] = []

    def logsumexp_sums(self, *arguments):
        *tensors, first_tile, band_rows, row, col = arguments
        bands = Struct("<3i", first_tile, row.shape[1], band_rows)
        grid = (len(col), row.shape[1], row.shape[0])
        self._launch("exp_sums", grid, _rectangle(*tensors), _exponent(*tensors), bands, row, col)

    def logsumexp_finish(self, *arguments):
        *tensors, parts, columns, out = arguments
        sums = Struct("<Qi4x2q", parts, parts.shape[1], parts.stride(1), parts.stride(0))
        grid = (-(-out.shape[1] // TILE), len(out), 1)
        self._launch("finish", grid, _rectangle(*tensors), _exponent(*tensors), sums, columns, out)

    def logsumexp_pairs(self, *arguments):
        x, *tensors, diagonal, out = arguments
        first, stop = max(0, -diagonal), min(out.shape[1], len(x) - diagonal)
        if first < stop:
            grid = (-(-(stop - first) // TILE), len(out), 1)
            self._launch("pairs", grid, _rectangle(x, *tensors), _exponent(x, *tensors), diagonal, first, out)

    def logsumexp_gradient(self, *arguments):
        *tensors, flag, rows, cols, first_row, first_col, first_slot, diagonal, g = arguments
        coefficients = Struct("<2Q4q", rows, cols, *rows.stride()[:2], *cols.stride()[:2])
        corner = (first_row, g.shape[1], first_col, g.shape[2], first_slot, g.shape[0])
        crossed = (0 if diagonal is None else diagonal, diagonal is not None)
        chunk = Struct("<6i2qi?3x", *corner, g.stride(1), g.stride(0), *crossed)
        grid = (-(-g.shape[1] // TILE) * -(-g.shape[2] // TILE), len(g), 1)
        self._launch("gradient", grid, _rectangle(*tensors), coefficients, chunk, _exponent(*tensors), flag, g)

    def _launch(self, kernel: str, grid: tuple[int, int, int], rectangle: Struct, *arguments) -> None:
        self.calls.append(kernel)
        flag = f"-DELEMENT={ELEMENTS[rectangle.fields[0].dtype]}"
        text = compile_cuda("tests/support/ptx/csrc/logsumexp.cu", self.capability, flag)
        text = self.mutate(kernel, text) if self.mutate else text
        name = re.search(rf"\.entry\s+(\w*{kernel}_kernel\w*)", text)[1]
        execute(
            text,
            [rectangle, *arguments],
            grid,
            shared_bytes=SHARED_BYTES,
            kernel=name,
            threads=THREADS,
            schedule=self.schedule,
        )


def _rectangle(x: Tensor, y: Tensor, *tensors: Tensor | None) -> Struct:
    """The first eight arguments of an op as csrc's Rectangle."""
    (m, d), (k, c, _) = x.shape, y.shape
    *labels, _, _ = tensors
    return Struct("<6Q4i3q", x, y, *labels, m, c, k, d, x.stride(0), *y.stride()[:2])


def _exponent(*tensors: Tensor | None) -> Struct:
    *_, scale, multiplier = tensors
    assert scale.dtype == multiplier.dtype == torch.float32
    return Struct("<2Q", scale, multiplier)
