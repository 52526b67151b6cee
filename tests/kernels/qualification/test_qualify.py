"""Qualification proves itself on backends that are right, slow, wrong, and that end their process:
each has the verdict it must have.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_backends
import pytest
import torch
from forked_worker import Popen

import dreamlip_kernels as dk
from dreamlip_kernels.backends import cache, dispatch, explain, identity, verdicts
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.qualification import check, measure
from dreamlip_kernels.qualification.cases import contrast_cases

CPU = torch.device("cpu")


def test_every_kind_of_backend_has_its_verdict(fakes):
    record = measure.qualify("cpu", widths=(8,))
    found = {v.backend: v for v in record.verdicts}
    assert set(found) == set(fake_backends.BACKENDS) - {"torch"}
    assert found["right"].status == "qualified" and 0 <= found["right"].error <= 1 and found["right"].cases == 1
    assert found["level"].status == "qualified from N=1000 on"
    assert found["slow"].status == "right, not used: slower than torch code"
    for backend, words in {
        "wrong": "output 0: error",
        "unwritten": "NaN in value 0: an element that nobody wrote",
        "overrun": "a write beyond the end of a buffer (new_empty (5, 8) torch.float32)",
        "reader": "NaN in value 0",
        "random": "not the same bits at a repeat",
        "crash": "killed by SIGSEGV, in: D=8",
        "hang": "hangs: no answer in 12 s, in: D=8",
        "memory": "out of memory",
        "raises": "RuntimeError: no kernel image is available",
    }.items():
        assert found[backend].status.startswith(f"not qualified: {words}"), (backend, found[backend].status)
        assert not found[backend].timings
        assert f"backend='{backend}', float32 features" in found[backend].report
    assert "in twice" in found["crash"].report and "in twice" in found["hang"].report, "the report says where"

    # What auto makes of it: at a size, the fastest of what is right and beats torch code;
    # with what cannot run left out.
    x = torch.ones(1)
    assert dispatch.select("twice", x, N=10, D=8) == "right"
    assert dispatch.select("twice", x, N=3, D=8) == "right", "below the smallest size timed, its order"
    order, _ = dispatch._order("twice", dispatch.Case(CPU, torch.float32, {"N": 5000, "D": 512}))
    assert set(order) == {"right", "level", "torch"} and order[-1] == "torch"
    assert dispatch.select("twice", x.double(), N=10, D=8) == "torch", "a dtype without a verdict"
    # What a user is shown.
    for text in (dk.explain(), explain.table(record)):
        for words in (
            "qualified from N=1000 on",
            "killed by SIGSEGV",
            record.date,
            record.path,
            "please report",
            "TFLOP/s",
        ):
            assert words in text
    # The file is the record, and the next process reads it.
    assert json.loads(Path(record.path).read_text())["format"] == verdicts.FORMAT
    verdicts.forget()
    assert verdicts.record(CPU) == record
    assert measure.qualify("cpu", reuse=True) == record


def test_the_opposed_case_leaves_float32s_range():
    """It is there for the exact kernels, which only run where a sum is below 2^-82 with the largest possible term at
    2^106.
    """
    cases = contrast_cases.cases("torch", "float32", CPU, (512,))
    case = next(case for case in cases if "opposed" in case.name)
    for seed in range(3):
        x, y, scale = (v.double() for v in case.draw(seed))
        largest = (scale * torch.einsum("md,kcd->kmc", x, y)).amax() * 1.4427
        assert largest + 10 - (scale * 1.4427 - 106) < -82, "with a thousand terms of that size"


def test_two_processes_at_once_measure_once(fakes):
    run = [sys.executable, fake_backends.__file__, "qualify"]
    with (fakes / "errors").open("a") as errors:
        both = [Popen(run, stderr=errors, env=dict(os.environ)) for _ in range(2)]
    outs = [process.stdout.read() for process in both]
    assert [process.wait(timeout=60) for process in both] == [0, 0], (fakes / "errors").read_text()
    assert outs[0] == outs[1] and "'qualified'" in outs[0], "the one that waited read what the other wrote"
    assert len(list((fakes / "cache").glob("*.json"))) == 1


def stored(record=None):
    return cache.folders()[0] / identity.file_name(CPU)


def a_record(**changes):
    timing = verdicts.Timing("N=10", 8, 10, ms=1.0, torch_ms=2.0, floor_ms=0.1)
    right = verdicts.Verdict("twice", "right", "float32", error=0.5, cases=1, timings=(timing,))
    about = dict(identity=identity.identity(CPU), date="2026-01-01", seconds=1.0, widths=(8,), rates={}, tiles={})
    return verdicts.Record(**about | {"verdicts": (right,)} | changes)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 999}', "[" * 100000, "\x00\xff"]
)
def test_a_file_that_is_not_a_verdict_is_taken_for_absent(fakes, caplog, content):
    stored().parent.mkdir()
    stored().write_bytes(content.encode("latin-1"))
    assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "torch"
    assert str(stored()) in caplog.text
    verdicts.store(CPU, a_record())
    verdicts.forget()
    assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "right"


def test_a_verdict_on_another_machine_is_not_read(fakes, caplog):
    foreign = a_record(identity={**identity.identity(CPU), "driver": "999"})
    stored().parent.mkdir()
    stored().write_text(json.dumps(foreign.to_json()))
    assert verdicts.record(CPU) is None and "another device or version" in caplog.text


def test_where_nothing_can_be_written_the_verdict_stays_in_memory(fakes, monkeypatch, caplog):
    monkeypatch.setattr(cache, "folders", lambda: [Path("/dev/null/cache"), Path("/dev/null/tmp")])
    with cache.lock("x"):
        record = verdicts.store(CPU, a_record())
        verdicts.store(CPU, a_record())
    assert record.path == "memory" and caplog.text.count("kept in memory") == 1
    verdicts.forget()
    assert verdicts.record(CPU) == record


def test_a_home_that_is_read_only_gives_way_to_a_temporary_folder(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folders", lambda: [Path("/dev/null/cache"), tmp_path / "mine"])
    record = verdicts.store(CPU, a_record())
    assert record.path == str(tmp_path / "mine" / identity.file_name(CPU))
    verdicts.forget()
    assert verdicts.record(CPU) == record


def test_a_shipped_verdict_counts_for_the_same_device_kernels_and_triton(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "MEASURED", tmp_path)
    elsewhere = {**identity.identity(CPU), "driver": "1", "torch": "2.99", "package": "9"}
    (tmp_path / "a.json").write_text(json.dumps(a_record(identity=elsewhere).to_json()))
    assert verdicts.record(CPU).path == str(tmp_path / "a.json")
    verdicts.forget()
    (tmp_path / "a.json").write_text(json.dumps(a_record(identity={**elsewhere, "sources": "other"}).to_json()))
    assert verdicts.record(CPU) is None


def test_every_shipped_verdict_can_be_read():
    for path in verdicts.MEASURED.glob("*.json"):
        assert verdicts.Record.from_json(json.loads(path.read_text()), str(path)).verdicts


def test_first_use_qualifies_once_and_never_while_compiling(fakes, monkeypatch):
    calls = []
    monkeypatch.setenv("DREAMLIP_AUTO", "first-use")
    monkeypatch.setattr(
        dispatch.subprocess,
        "run",
        lambda words, **_: calls.append(words) or subprocess.CompletedProcess(words, 1, "", "broken"),
    )
    dispatch._plan("twice", CPU, torch.float32, "torch", True)
    assert not calls
    for _ in range(2):
        assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "torch"
    assert len(calls) == 1 and calls[0][2:] == ["-m", "dreamlip_kernels", "qualify", "--device", "cpu", "--reuse"]


def test_compiled_code_reads_the_verdict_at_every_size(monkeypatch, tmp_path):
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(verdicts, "_records", {})
    monkeypatch.setattr(verdicts, "_plans", {})
    times = [verdicts.Timing(f"N={n}", 8, n * 9 * 3, ms, 1.0, 0.1) for n, ms in ((2, 2.0), (16, 0.5))]
    verdicts.store(CPU, a_record(verdicts=(verdicts.Verdict("group_patches", "cpp", "float32", timings=tuple(times)),)))
    used = []

    def note(graph_module, _):
        used.extend(node.args[-1] for node in graph_module.graph.nodes if "group_patches" in str(node.target))
        return graph_module.forward

    monkeypatch.setattr(dispatch, "_check_and_build", lambda check, case: None)
    compiled = torch.compile(lambda p, t: dk.group_patches(p, t), fullgraph=True, backend=note, dynamic=True)
    for n in (3, 40):
        compiled(torch.ones(n, 9, 8), torch.ones(n, 3, 8))
    assert used == ["torch", "cpp"], "from 16 images on"


def test_float32_features_multiplied_as_float16_have_a_verdict_of_their_own(monkeypatch):
    """torch's precision, ``configure`` and autocast each decide which kernels float32 features meet."""
    classes = lambda: verdicts.dtype_class("bidirectional_logsumexp", torch.float32, settings.float32)  # noqa: E731
    assert classes() == "float32"
    monkeypatch.setattr(settings, "float32", "fp16")
    assert classes() == "float32 as float16"
    assert verdicts.dtype_class("group_patches", torch.float32, "fp16") == "float32"
    monkeypatch.setattr(settings, "float32", "torch")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert classes() == "float32 as float16"
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(dispatch, "_plan", lambda op, device, dtype, float32, compiling: asked.append(float32) or ())
    dispatch.select("bidirectional_logsumexp", torch.ones(1))
    with torch.autocast("cpu", torch.bfloat16):
        dispatch.select("bidirectional_logsumexp", torch.ones(1))
    assert asked == ["torch", "fp16"]


def test_a_pinned_backend_is_what_auto_takes(fakes):
    verdicts.store(CPU, a_record())
    dispatch.pin("twice", "slow")
    try:
        assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "slow"
        assert dispatch.why("twice", torch.ones(1)) == "auto; pinned"
    finally:
        dispatch.pin("twice", None)
    assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "right"
    with pytest.raises(ValueError, match="unknown backend='quick'"):
        dispatch.pin("twice", "quick")


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"widths": (0,)}, {"widths": ("512",)}])
def test_widths_are_positive_integers(wrong):
    with pytest.raises(ValueError, match="widths must be positive integers"):
        dk.qualify("cpu", **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "meta"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(RuntimeError, match=f"device='{device}' cannot be used; torch sees cpu"):
        dk.qualify(device)


def test_the_command_line(fakes, tmp_path):
    """The whole way as a user goes it, in a folder with files that have the names of modules."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    verdicts.store(CPU, a_record())
    run = [sys.executable, "-P", "-m", "dreamlip_kernels"]
    there = dict(cwd=tmp_path, env=os.environ | {"DREAMLIP_AUTO": "first-use"}, capture_output=True, text=True)
    out = subprocess.run([*run, "qualify", "--device", "cpu", "--reuse", "--output", "copy.json"], **there)
    assert out.returncode == 0 and "qualified on 2026-01-01" in out.stdout, out.stderr
    assert json.loads((tmp_path / "copy.json").read_text())["verdicts"]
    assert "qualified on 2026-01-01" in subprocess.run([*run, "explain"], **there).stdout
    refused = subprocess.run([*run, "qualify", "--device", "cpu", "--widths", "-1"], **there)
    assert refused.returncode == 1 and refused.stderr.strip() == "qualify: widths must be positive integers, got (-1,)"


def test_a_status_says_from_which_size_on_and_names_widths_only_where_they_differ():
    def status(*times):
        timings = [verdicts.Timing(f"N={n}", d, n, ms, torch_ms=1.0, floor_ms=0.1) for n, d, ms in times]
        return verdicts.Verdict("op", "fused", "float32", timings=tuple(timings)).status

    both = lambda small, large: status(*((n, d, ms) for d in (512, 768) for n, ms in ((1, small), (2, large))))  # noqa: E731
    assert both(0.5, 0.5) == "qualified"
    assert both(2.0, 0.5) == "qualified from N=2 on"
    assert both(2.0, 2.0) == both(0.96, 1.0) == "right, not used: slower than torch code"
    assert both(0.5, 2.0) == "qualified at N=1 D=512, N=1 D=768"
    assert (
        status((1, 512, 2.0), (2, 512, 0.5), (1, 768, 0.5), (2, 768, 0.5))
        == "qualified from N=2 on (D=512), N=1 on (D=768)"
    )


def test_a_number_left_over_where_terms_cancel_may_be_off_by_what_rounding_moves_a_logit():
    """On an H100 a mean of 5,555 float32 losses was refused for an error of 2.7e-6 at scale 100, a fifth of an ulp of a
    logit: eager's was luck.
    """
    gold = torch.tensor(0.0486, dtype=torch.float64)
    draws = [[gold + 2.7e-6, gold + 1.21e-7, gold]]
    with pytest.raises(check.Wrong, match="error 2.7e-06, allowed 7.28e-07"):
        check._share("output 0", draws, 1e-5, 0.0)
    floor = contrast_cases.resolution("float32", 100.0, 512)
    assert check._share("output 0", draws, 1e-5, floor) < 0.25
    assert contrast_cases.resolution("bfloat16", 100.0, 512) == 0.0
    assert 0.002 < contrast_cases.resolution("float32 as float16", 100.0, 512) < 0.003
