"""A machine whose backends are those of fake_backends, without a verdict on it."""

import fake_backends
import pytest

from dreamlip_kernels.backends import cache, dispatch, verdicts


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    fake_backends.install(monkeypatch)
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_records", {})
    monkeypatch.setattr(verdicts, "_plans", {})
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(dispatch, "_announced", set())
    return tmp_path
