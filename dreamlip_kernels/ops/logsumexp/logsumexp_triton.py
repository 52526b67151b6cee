"""Forward of the Triton backend of bidirectional_logsumexp: one pass over the pairs.

    exp_sums      a band of rows x one column tile: both sums of exp2(z - offset), partial; on Hopper exp_sums_resident
    finish_sums   their totals' logarithms, by running maxima where a sum left float32's range; the positives' logits

A fixed exponent offset in place of running maxima makes row and column sums plain adds (docs/math.md, section 5).

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...backends.settings import settings
from ..dense import dense
from ..rectangle import Rectangle, add_own_pairs
from .kernels.finish_kernels import finish_sums
from .kernels.sums_kernels import exp_sums
from .logsumexp_tiles import FINISH
from .operands_triton import TritonOperands, arch

_Images = tuple[Tensor | None, Tensor | None]  # the numbers of images of rows and of columns
PROGRAMS = 4 * 132  # of exp_sums at least, where there are rows enough: four for each processor of an H100


def forward(rectangle: Rectangle, paired: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row [K, M], col [K, C], with ``paired`` the logits of the pairs (j, j) [K, C].

    Nothing saved (``keep`` is the torch backend's).
    """
    m, c, k, _ = rectangle.sizes
    empty = rectangle.scale.new_empty
    row, col, pos, saved_pairs = empty(k, m), empty(k, c), empty((k, c) if paired else (0, 0)), empty(0, 0, 0)
    if m == 0 or c == 0 or k == 0:
        return row.fill_(-torch.inf), col.fill_(-torch.inf), pos, saved_pairs
    operands = TritonOperands(rectangle)
    x_mask, y_mask = operands.x_mask, operands.y_mask
    images = dense(rectangle.x_images), dense(rectangle.y_images)
    row_parts, column_parts = _partial_sums(operands, c, x_mask, y_mask, images)
    x, y = operands.x, operands.y
    rows = _Side(x, 0, x.stride(0), m, x_mask, 0, images[0])
    columns = _Side(y, y.stride(0), y.stride(1), c, y_mask, c, images[1])
    _finish(operands, rows, columns, row_parts, row, None)
    _finish(operands, columns, rows, column_parts.transpose(0, 1), col, pos if paired else None)
    if paired and rectangle.x_images is not None:
        add_own_pairs(rectangle, row, col, pos)
    return row, col, pos, saved_pairs


class _SumsKernel(NamedTuple):
    """A kernel for both sums: its tile, how many sums over rows a band writes, rows of a band at most,
    and its launch.
    """

    block_m: int
    block_c: int
    parts: int
    band_rows: int
    launch: Callable[[int, int, Tensor, Tensor], None]  # first column tile, rows of a band, row sums, column sums


def _partial_sums(
    operands: TritonOperands, c: int, x_mask: Tensor | None, y_mask: Tensor | None, images: _Images
) -> tuple[Tensor, Tensor]:
    """Sums of exp2(z - offset), [K, tiles, M] over columns and [parts, K, C] over rows.

    tiles is 1 where the workspace is small.
    """
    x, m, k = operands.x, len(operands.x), len(operands.y)
    kernel = _resident(operands, x_mask, y_mask, images) or _tiled(operands, c, x_mask, y_mask, images)
    tiles, row_tiles = triton.cdiv(c, kernel.block_c), triton.cdiv(m, kernel.block_m)
    bands = max(triton.cdiv(PROGRAMS, tiles * k), triton.cdiv(m, kernel.band_rows))
    band_rows = triton.cdiv(row_tiles, min(row_tiles, bands)) * kernel.block_m
    columns = x.new_empty(triton.cdiv(m, band_rows) * kernel.parts, k, c, dtype=torch.float32)
    per_launch = min(tiles, max(1, settings.workspace_bytes // (4 * k * m)))
    rows = x.new_empty(k * per_launch * m, dtype=torch.float32)
    total = None if per_launch == tiles else x.new_zeros(k, 1, m, dtype=torch.float32)
    for first in range(0, tiles, per_launch):
        count = min(per_launch, tiles - first)
        part = rows[: k * count * m].view(k, count, m)
        kernel.launch(first, band_rows, part, columns)
        if total is not None:
            total += part.sum(1, keepdim=True)
    return part if total is None else total, columns


def _tiled(
    operands: TritonOperands, c: int, x_mask: Tensor | None, y_mask: Tensor | None, images: _Images
) -> _SumsKernel:
    """exp_sums, which takes everything."""
    (m, d), blocks = operands.x.shape, operands.blocks("exp_sums")
    arguments = operands.arguments(blocks) | dict(
        x_mask_ptr=x_mask,
        y_mask_ptr=y_mask,
        x_images_ptr=images[0],
        y_images_ptr=images[1],
        MASK_COLUMNS=y_mask is not None or c % blocks.c != 0,
    )

    def launch(first: int, band_rows: int, rows: Tensor, columns: Tensor) -> None:
        k, count, _ = rows.shape
        exp_sums[(count, len(columns), k)](
            row_ptr=rows,
            col_ptr=columns,
            M=m,
            C=c,
            D=d,
            first_tile=first,
            row_tiles_stride=count,
            band_rows=band_rows,
            **arguments,
        )

    return _SumsKernel(blocks.m, blocks.c, 1, m, launch)


def _resident(
    operands: TritonOperands, x_mask: Tensor | None, y_mask: Tensor | None, images: _Images
) -> _SumsKernel | None:
    """exp_sums_resident, where device, features and Triton are such that it can run; it compares no images."""
    x, y = operands.x, operands.y
    if (
        images[0] is not None
        or not settings.resident
        or not x.is_cuda
        or arch(x) != 90
        or (module := _gluon()) is None
        or not module.takes(x, y, 90)
    ):
        return None

    def launch(first: int, band_rows: int, rows: Tensor, columns: Tensor) -> None:
        module.launch(x, y, operands.scale, operands.slope, x_mask, y_mask, first, band_rows, rows, columns)

    return _SumsKernel(module.BLOCK_M, module.BLOCK_C, module.COLUMN_PARTS, module.BAND_ROWS, launch)


@cache
def _gluon() -> ModuleType | None:
    """logsumexp_resident_triton, or None with a Triton that has no Gluon, or another one."""
    try:
        from . import logsumexp_resident_triton
    except (ImportError, AttributeError):
        return None
    return logsumexp_resident_triton


class _Side(NamedTuple):
    """The rows or the columns of a rectangle, as finish_sums reads them: the slots' strides are 0 for what all
    share.
    """

    features: Tensor
    stride_k: int
    stride: int
    count: int
    mask: Tensor | None
    mask_k: int
    images: Tensor | None


def _finish(
    operands: TritonOperands, ours: _Side, others: _Side, parts: Tensor, out: Tensor, pos: Tensor | None
) -> None:
    """Write the log-sum-exps [K, count] of our side over the others from parts [K, parts, count], and the positives'
    logits.
    """
    rows, columns, warps, stages = FINISH[operands.x.element_size()]
    any_mask = ours.mask if ours.mask is not None else others.mask
    finish_sums[(triton.cdiv(ours.count, rows), len(out))](
        part_ptr=parts,
        q_ptr=ours.features,
        k_ptr=others.features,
        q_mask_ptr=any_mask if ours.mask is None else ours.mask,
        k_mask_ptr=any_mask if others.mask is None else others.mask,
        q_images_ptr=ours.images,
        k_images_ptr=others.images,
        scale_ptr=operands.scale,
        slope_ptr=operands.slope,
        out_ptr=out,
        pos_ptr=out if pos is None else pos,
        R=ours.count,
        S=others.count,
        D=operands.x.shape[1],
        stride_qk=ours.stride_k,
        stride_qr=ours.stride,
        stride_kk=others.stride_k,
        stride_ks=others.stride,
        parts=parts.shape[1],
        part_stride=parts.stride(1),
        part_slot_stride=parts.stride(0),
        q_mask_k=ours.mask_k,
        k_mask_k=others.mask_k,
        has_q_mask=int(ours.mask is not None),
        has_k_mask=int(others.mask is not None),
        paired=int(pos is not None),
        BLOCK_R=rows,
        BLOCK_S=columns,
        BLOCK_D=operands.blocks("exp_sums").d,
        BLOCK_PARTS=16,
        num_warps=warps,
        num_stages=stages,
    )
