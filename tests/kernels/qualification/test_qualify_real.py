"""Qualification of the real backends: of the grouping's C++ kernels against torch code here, of all that a GPU has
there.
"""

import pytest
import torch
from triton_runs import require_triton

import dreamlip_kernels as dk
from dreamlip_kernels.backends import cache, dispatch, explain, verdicts
from dreamlip_kernels.qualification import measure
from dreamlip_kernels.qualification.cases import grouping_cases


@pytest.fixture(autouse=True)
def no_verdict(monkeypatch, tmp_path):
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", str(tmp_path))
    for name in ("_records", "_plans"):
        monkeypatch.setattr(verdicts, name, {})
    monkeypatch.setattr(cache, "_memory", {})


def test_the_groupings_cpp_kernels_are_right_and_timed(monkeypatch):
    monkeypatch.setattr(measure, "SUBJECTS", (grouping_cases,))
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    monkeypatch.setattr(measure, "_workers", lambda device: 2)
    record = dk.qualify("cpu", widths=(64,))
    assert [(v.backend, v.dtype) for v in record.verdicts] == [("cpp", dtype) for dtype in grouping_cases.DTYPES]
    for verdict in record.verdicts:
        assert not verdict.why and verdict.cases == 8 and 0 < verdict.error <= 1, verdict
        assert [t.shape for t in verdict.timings] == ["N=8 P=196 K=8", "N=64 P=196 K=8"]
        assert all(t.floor_ms > 0 and t.ms > 0 and t.torch_ms for t in verdict.timings)
    assert record.rates["flops"] > 1e8 and record.rates["bytes"] > 1e8
    order, why = dispatch._order("group_patches", dispatch.Case(torch.device("cpu"), torch.float32, {}))
    assert why == "by its verdict" and order[-1] == "torch"
    assert record.identity["device"] in explain.table(record)


@pytest.mark.slow
def test_the_whole_path_on_a_cpu_with_tritons_interpreter():
    require_triton()
    record = dk.qualify("cpu", widths=(64,))
    about = {(v.op, v.backend, v.dtype) for v in record.verdicts}
    assert ("bidirectional_logsumexp", "triton", "float32 as float16") in about and (
        "group_patches",
        "cpp",
        "bfloat16",
    ) in about
    for verdict in record.verdicts:
        assert not verdict.why, verdict
        assert verdict.backend != "triton" or verdict.status == "right, not used: run by Triton's interpreter"
    assert dispatch.select("bidirectional_logsumexp", torch.ones(1)) == "torch"


@pytest.mark.gpu
def test_every_backend_of_a_gpu_is_right_or_says_why_not():
    record = dk.qualify("cuda")
    print(explain.table(record))
    ends = [v for v in record.verdicts if any(word in v.why for word in ("killed", "hangs", "out of memory"))]
    assert not ends, ends
    assert record.seconds < 180
    for dtype in ("bfloat16", "float16", "float32 as float16"):
        [verdict] = [
            v for v in record.verdicts if (v.op, v.backend, v.dtype) == ("bidirectional_logsumexp", "triton", dtype)
        ]
        assert not verdict.why, verdict
        assert verdict.timings[-1].faster, "at N=16384 by far"
    x = torch.ones(1, device="cuda", dtype=torch.bfloat16)
    assert dispatch.select("bidirectional_logsumexp", x, M=32768, C=32768, K=8, D=512) == "triton"
