"""What every run inside the tests' own process costs for nothing."""

import pytest

from dreamlip_train.model.tokenizer import count_tokens
from dreamlip_train.training.engine import deepspeed_config


@pytest.fixture(scope="session", autouse=True)
def small_buckets():
    """DeepSpeed allocates a bucket at every step, and every torch.empty of the tests is filled with NaN: 100 MB a step,
    where the tiny model's gradients are 7 MB.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_config, "BUCKET_ELEMENTS", 2_000_000)
        yield


@pytest.fixture(scope="session", autouse=True)
def tokenizer_is_there():
    """Each of the many forked workers of prepare would build it: a tenth of a second."""
    count_tokens("")


@pytest.fixture
def undrawn(monkeypatch):
    """Runs without their pictures at the end, which take longer than their steps."""
    from dreamlip_train.training import summary

    monkeypatch.setattr(summary, "_draw", lambda *_: None)
