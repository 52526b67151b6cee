"""Backend choice: an explicit request works or raises, "auto" says once what it took and why, explain() tells it
all.
"""

import logging
import subprocess
import sys
import time

import pytest
import torch

import dreamlip_kernels as dk
from dreamlip_kernels.backends import dispatch


@pytest.fixture
def a_backend_that_cannot_run(monkeypatch):
    checks = {"fast": lambda case: "it needs a moon", **dispatch._BACKENDS["group_patches"]}
    monkeypatch.setitem(dispatch._BACKENDS, "group_patches", checks)
    monkeypatch.setattr(dispatch, "_announced", set())


def test_auto_says_once_what_it_took_and_why(a_backend_that_cannot_run, caplog):
    x = torch.zeros(1)
    with caplog.at_level(logging.INFO, logger="dreamlip_kernels"):
        assert dispatch.select("group_patches", x) == dispatch.select("group_patches", x)
    assert len(caplog.records) == 1
    assert "fast: it needs a moon" in caplog.text


def test_an_explicit_request_works_or_raises(a_backend_that_cannot_run):
    assert dispatch.select("group_patches", torch.zeros(1), "torch") == "torch"
    with pytest.raises(RuntimeError, match="backend='fast' cannot run: it needs a moon"):
        dispatch.select("group_patches", torch.zeros(1), "fast")
    with pytest.raises(ValueError, match="unknown backend='slow'"):
        dispatch.select("group_patches", torch.zeros(1), "slow")


def test_a_torch_too_old_for_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "ADDS_SIXTEEN_BIT_PRODUCTS", False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it needs torch 2.10 or later, this is 2"):
        dispatch.select("bidirectional_logsumexp", torch.zeros(1), "triton")


def test_a_backend_may_refuse_sizes(monkeypatch):
    """A tile that does not fit a processor's shared memory is known before the launch, and "auto" goes on to the
    next.
    """
    small = lambda case: f"P={case.sizes['P']} is too many" if case.sizes.get("P", 0) > 100 else None  # noqa: E731
    monkeypatch.setitem(dispatch._BACKENDS, "group_patches", {"small": small, **dispatch._BACKENDS["group_patches"]})
    x = torch.zeros(1)
    assert dispatch.select("group_patches", x) == dispatch.select("group_patches", x, N=1, P=50, K=1, D=8) == "small"
    assert dispatch.select("group_patches", x, N=1, P=101, K=1, D=8) in ("cpp", "torch")
    assert dispatch.why_not("group_patches", "small", x, P=101) == "P=101 is too many"
    with pytest.raises(RuntimeError, match="cannot run: P=101 is too many"):
        dispatch.select("group_patches", x, "small", P=101)


def test_the_ops_tell_their_sizes(monkeypatch):
    cases = []
    for op in ("bidirectional_logsumexp", "group_patches"):
        monkeypatch.setitem(dispatch._BACKENDS, op, {"torch": lambda case: cases.append(case.sizes)})
    dk.bidirectional_logsumexp(torch.zeros(5, 8), torch.zeros(2, 3, 8), 1.0)
    dk.multi_positive_contrastive_loss(torch.zeros(5, 8), torch.zeros(5, 2, 8), 1.0)
    dk.group_patches(torch.ones(2, 9, 8), torch.ones(2, 3, 8))
    assert cases == [dict(M=5, C=3, K=2, D=8), dict(M=5, C=5, K=2, D=8), dict(N=2, P=9, K=3, D=8)]


def test_explain_lists_every_op_and_reason(a_backend_that_cannot_run):
    table = dk.explain()
    for word in ("bidirectional_logsumexp", "group_patches", "torch", "fast", "it needs a moon"):
        assert word in table


def test_import_needs_torch_alone_and_no_time_of_its_own():
    """Nothing beyond torch's own imports is loaded, and the package adds less than a fifth of a second to them."""
    script = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import dreamlip_kernels;"
        "print(time.perf_counter() - start);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(m for m in new if m not in "
        "sys.stdlib_module_names))"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    whole = time.perf_counter() - started
    assert eval(out[1]) in (["dreamlip_kernels"], ["dreamlip_kernels", "torch"])
    assert float(out[0]) < max(0.2, whole / 5)
