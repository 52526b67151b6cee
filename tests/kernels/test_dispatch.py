"""Backend choice: an explicit request works or raises, "auto" says once what it took and why, explain() tells it all."""

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
    checks = {"fast": lambda device, dtype: "it needs a moon", **dispatch._BACKENDS["group_patches"]}
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
    monkeypatch.setattr(dispatch, "_TORCH_SUFFICES", False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it needs torch 2.10 or later, this is 2"):
        dispatch.select("bidirectional_logsumexp", torch.zeros(1), "triton")


def test_explain_lists_every_op_and_reason(a_backend_that_cannot_run):
    table = dk.explain()
    for word in ("bidirectional_logsumexp", "group_patches", "torch", "fast", "it needs a moon"):
        assert word in table


def test_import_needs_torch_alone_and_no_time_of_its_own():
    """Nothing beyond torch's own imports is loaded, and the package adds less than a fifth of a second to them."""
    script = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import dreamlip_kernels;"
        "print(time.perf_counter() - start);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(m for m in new if m not in sys.stdlib_module_names))"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    whole = time.perf_counter() - started
    assert eval(out[1]) in (["dreamlip_kernels"], ["dreamlip_kernels", "torch"])
    assert float(out[0]) < max(0.2, whole / 5)
