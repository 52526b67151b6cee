"""Which tile of a short list is the fastest for each Triton kernel of the contrast on a device.

every candidate compiled, in processes side by side -> each one timed, one after another -> {kernel and element: {width:
tile}}
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from ..backends.settings import settings
from ..backends.tuned_tiles import Tiles, take_tiles
from ..contrastive import multi_positive_contrastive_loss
from .cases.contrast_cases import clip_like
from .journal import Journal
from .speed import milliseconds

logger = logging.getLogger("dreamlip_kernels")

N, K = 8192, 4
COMPILED_N = 512  # compiled code is the same at both sizes
# (rows, columns, depth, warps, stages) by bytes of an operand's element: those of the tables of every architecture,
# and the fastest on an H100. One that does not compile for a device, or does not fit it, is left out there.
CANDIDATES = {
    ("exp_sums", 2): (
        (64, 128, 32, 8, 3),
        (64, 128, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
    ),
    ("gradient_tile", 2): (
        (128, 128, 32, 8, 3),
        (64, 128, 64, 8, 2),
        (128, 128, 64, 8, 2),
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
    ),
    ("exp_sums", 4): ((64, 64, 16, 8, 3), (64, 64, 32, 4, 3), (64, 128, 32, 8, 3)),
    ("gradient_tile", 4): ((64, 64, 32, 8, 3), (128, 64, 32, 8, 2), (64, 128, 32, 8, 3)),
}


def tune(device: torch.device, widths: tuple[int, ...], workers: int, limit_s: float, journal: Journal) -> Tiles:
    """The fastest tile of each kernel, element size and width; kernels of which no candidate runs are left out."""
    jobs: list[dict[str, Any]] = [
        {"kernel": kernel, "bytes": size, "tile": list(tile), "width": width, "device": str(device), "tiles": {}}
        for (kernel, size), tiles in CANDIDATES.items()
        for width in widths
        for tile in tiles
    ]
    tile_jobs = [job | {"name": f"{job['kernel']} {job['bytes']} {tuple(job['tile'])}"} for job in jobs]
    # Width is no part of the compiled code.
    first = [job | {"kind": "compile_tile"} for job in tile_jobs if job["width"] == widths[0]]
    compilations = journal.run(first, workers, limit_s, logger.info)
    unfit = {job["name"] for job, answer in zip(first, compilations, strict=True) if "why" in answer}
    jobs = [job | {"kind": "time_tile"} for job in tile_jobs if job["name"] not in unfit]
    timings = journal.run(jobs, 1, limit_s, logger.info)
    best: dict[tuple[str, int], tuple[float, list[int]]] = {}
    for job, answer in zip(jobs, timings, strict=True):
        place = (f"{job['kernel']} {job['bytes']}", job["width"])
        if "ms" in answer and answer["ms"] < best.get(place, (float("inf"), []))[0]:
            best[place] = (answer["ms"], job["tile"])
    tiles: Tiles = {}
    for (kernel, width), (ms, tile) in best.items():
        logger.info("%s bytes, D=%d: %s, %.3f ms", kernel, width, tuple(tile), ms)
        tiles.setdefault(kernel, {})[str(width)] = tile
    return tiles


def try_tile(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The time of a step with the job's tile for its kernel, or only a small step, for its compiled code."""
    size = COMPILED_N if job["kind"] == "compile_tile" else N
    dtype = torch.float32 if job["bytes"] == 4 else torch.float16
    image, text = (v.to(device, dtype) for v in clip_like(512, K, job["width"], seed=0))
    image, text = image.repeat(size // 512, 1).requires_grad_(), text.repeat(size // 512, 1, 1).requires_grad_()
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    mask = (torch.arange(size * K, device=device) % 10 != 3).view(size, K)  # training always has one

    def step() -> object:
        # exp_sums is all that forward does; backward adds gradient_tile to it.
        with torch.no_grad() if job["kernel"] == "exp_sums" else contextlib.nullcontext():
            loss = multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend="triton")
        return None if job["kernel"] == "exp_sums" else torch.autograd.grad(loss, (image, text, scale))

    take_tiles({f"{job['kernel']} {job['bytes']}": {str(job["width"]): job["tile"]}})
    settings.resident = job["kernel"] != "exp_sums"
    try:
        if job["kind"] == "compile_tile":
            step()
            return {}
        return {"ms": milliseconds(step, device)}
    finally:
        settings.resident = True
