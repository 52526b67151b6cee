"""`qualify --tune`: the fastest tile of a short list goes into the verdict, and the kernels take it before their
table's.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import dreamlip_kernels as dk
from dreamlip_kernels.backends import tuned_tiles, verdicts
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops.logsumexp import logsumexp_tiles
from dreamlip_kernels.ops.logsumexp.logsumexp_tiles import Blocks, blocks_for
from dreamlip_kernels.qualification import tune

CUDA = torch.device("cuda", 0)
FAST = (128, 256, 64, 8, 3)


@pytest.fixture(autouse=True)
def from_the_verdict():
    yield
    tuned_tiles.take_tiles(None)


def test_the_fastest_candidate_that_runs_wins_at_each_width():
    asked = []

    def run_jobs(jobs, workers, limit_s, progress):
        asked.append((workers, [job["kind"] for job in jobs]))
        answers = []
        for job in jobs:
            broken = tuple(job["tile"]) == (256, 128, 64, 8, 3)  # does not compile
            fast = tuple(job["tile"]) == FAST and job["width"] == 768
            ms = 1.0 if fast else 2.0 + job["tile"][0] / 1000
            answers.append(
                {"why": "out of resource: shared memory", "report": ""} if broken or job["bytes"] == 4 else {"ms": ms}
            )
        return answers

    tiles = tune.tune(CUDA, (512, 768), 14, 60.0, SimpleNamespace(run=run_jobs))
    assert tiles == {
        "exp_sums 2": {"512": [64, 128, 32, 8, 3], "768": list(FAST)},
        "gradient_tile 2": {"512": [64, 128, 64, 8, 2], "768": list(FAST)},
    }
    (many, compiled), (one, timed) = asked
    assert (many, one) == (14, 1) and set(compiled) == {"compile_tile"} and set(timed) == {"time_tile"}
    assert len(compiled) == 18 and len(timed) == 2 * 10, "what did not compile is not timed"


@pytest.mark.parametrize("kernel, size", tune.CANDIDATES)
def test_every_candidate_is_a_tile_and_the_tables_are_among_them(kernel, size):
    candidates = tune.CANDIDATES[kernel, size]
    assert len(set(candidates)) == len(candidates) and all(Blocks(*tile) for tile in candidates)
    for (name, element, _), by_width in logsumexp_tiles.TABLE.items():
        if (name, element) == (kernel, size):
            assert set(by_width.values()) <= set(candidates), (name, element)


def test_a_tile_of_the_verdict_comes_before_the_table(monkeypatch):
    table = blocks_for("exp_sums", 2, 90, 512)
    record = SimpleNamespace(
        identity={"capability": "9.0"}, tiles={"exp_sums 2": {"512": list(FAST), "768": [64, 128, 64, 8, 3]}}
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(verdicts, "record", lambda device: record)
    assert blocks_for("exp_sums", 2, 90, 512) == blocks_for("exp_sums", 2, 90, 100) == Blocks(*FAST)
    assert blocks_for("exp_sums", 2, 90, 1024) == Blocks(64, 128, 64, 8, 3)
    assert blocks_for("exp_sums", 2, 80, 512) == logsumexp_tiles.TABLE["exp_sums", 2, 8][512], (
        "tuned for another device"
    )
    assert blocks_for("exp_sums", 4, 90, 512) == logsumexp_tiles.TABLE["exp_sums", 4, 9][512], "no such entry"
    tuned_tiles.take_tiles({})
    assert blocks_for("exp_sums", 2, 90, 512) == table, "a worker tests what it is told to"


def test_a_worker_times_a_step_with_the_tile_in_force(monkeypatch):
    used, resident = [], []

    def loss(image, text, scale, text_mask, backend):
        assert 0 < text_mask.sum() < text_mask.numel(), "training always has a mask, which costs registers"
        used.append((backend, len(image), image.dtype, torch.is_grad_enabled(), blocks_for("gradient_tile", 2, 90, 8)))
        resident.append(settings.resident)
        return dk.multi_positive_contrastive_loss(image, text, scale, backend="torch")

    monkeypatch.setattr(tune, "multi_positive_contrastive_loss", loss)
    monkeypatch.setattr(tune, "N", 512)
    job = {"kernel": "gradient_tile", "bytes": 2, "tile": list(FAST), "width": 8}
    assert tune.try_tile(job | {"kind": "compile_tile"}, torch.device("cpu")) == {}
    assert used == [("triton", 512, torch.float16, True, Blocks(*FAST))]
    assert tune.try_tile(job | {"kind": "time_tile", "kernel": "exp_sums", "bytes": 4}, torch.device("cpu"))["ms"] > 0
    assert used[-1][2:4] == (torch.float32, False)
    assert resident[0] and not resident[-1] and settings.resident, "the tiles of exp_sums are timed where it runs"


def test_the_file_keeps_the_tiles():
    identity = {"device": "x", "capability": "9.0"}
    record = verdicts.Record(identity, "today", 1.0, (512,), {}, (), {"exp_sums 2": {"512": list(FAST)}})
    assert verdicts.Record.from_json(record.to_json(), "") == record
    assert dataclasses.replace(record, tiles={}) != record
