"""``dreamlip-train doctor --qualify``: the kernels are measured first, then the verdict is part of what is printed."""

import pytest
import torch

import dreamlip_kernels
from dreamlip_kernels.backends import cache, identity, verdicts
from dreamlip_train import cli

CPU = torch.device("cpu")


@pytest.fixture
def no_verdict(monkeypatch, tmp_path):
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", str(tmp_path))
    for name in ("_records", "_plans"):
        monkeypatch.setattr(verdicts, name, {})
    monkeypatch.setattr(cache, "_memory", {})


def test_doctor_measures_when_asked_and_shows_verdict_date_and_file(no_verdict, monkeypatch, capsys):
    times = (verdicts.Timing("N=64 P=196 K=8", 512, 64 * 196 * 8, ms=41.5, torch_ms=180.0, floor_ms=12.5),)
    found = verdicts.Verdict("group_patches", "cpp", "float32", error=0.07, cases=12, timings=times)
    record = verdicts.Record(
        identity.identity(CPU), "2026-01-02", 9.0, (512,), {"flops": 1e12, "bytes": 1e10}, (found,), {}
    )
    measured = []
    monkeypatch.setattr(dreamlip_kernels, "qualify", lambda: measured.append(verdicts.store(CPU, record)))
    cli.main(["doctor"])
    assert (
        "cpu: no verdict; `python -m dreamlip_kernels qualify --device cpu`" in capsys.readouterr().out and not measured
    )
    verdicts.forget()
    cli.main(["doctor", "--qualify"])
    printed = capsys.readouterr().out
    for words in (
        "qualified on 2026-01-02",
        measured[0].path,
        "7% of allowed",
        "41.50 ms",
        "180.00 ms",
        "30%",
        "qualified",
    ):
        assert words in printed, words


def test_a_device_that_cannot_be_used_is_an_error_without_a_traceback(no_verdict, monkeypatch, capsys):
    def fail():
        raise RuntimeError("qualify: cuda:0 cannot be used: busy")

    monkeypatch.setattr(dreamlip_kernels, "qualify", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--qualify"])
    assert stopped.value.code and "cuda:0 cannot be used: busy" in capsys.readouterr().err
