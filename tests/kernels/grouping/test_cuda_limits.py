"""What a device must have for the CUDA kernels is asked before anything runs: its capability, its shared memory.
No GPU is needed to ask.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from dreamlip_kernels.backends import dispatch, extension

H100, CONSUMER = ((9, 0), 227 * 1024), ((8, 9), 99 * 1024)


@pytest.fixture
def device(monkeypatch):
    """Sets what the GPU would be; the kernels count as built for it."""

    def there_is(capability, shared_bytes):
        monkeypatch.setattr(extension, "_state", {"module": None, "cuda": "13.0"})
        monkeypatch.setattr(extension, "_device_limits", lambda index: (capability, shared_bytes))

    return there_is


def why_not(shape, dtype):
    sizes = dict(zip("NPKD", (64, *shape), strict=True))
    return dispatch._BACKENDS["group_patches"]["cuda"](dispatch.Case(torch.device("cuda", 0), dtype, sizes))


def test_python_and_cpp_ask_for_the_same_bytes():
    cpp = pytest.importorskip("dreamlip_kernels._C").patch_pool_shared_bytes
    sizes = itertools.product((1, 15, 33, 196, 1370, 5000), (1, 8, 9, 16, 40), (1, 8, 100, 512, 1536), (2, 4))
    assert all(cpp(*size) == extension.patch_pool_shared_bytes(*size) for size in sizes)


def test_shapes_that_fit_no_tile_are_refused_with_the_numbers(device):
    device(*H100)
    assert why_not((1024, 8, 512), torch.float32) is None and why_not((1369, 8, 1536), torch.bfloat16) is None
    assert why_not((2048, 8, 512), torch.bfloat16) == (
        "P=2048, K=8, D=512 needs 238336 of 232448 bytes of shared memory a block"
    )
    device(*CONSUMER)
    assert why_not((196, 8, 512), torch.float32) is None
    assert "of 101376 bytes" in why_not((1024, 16, 1024), torch.bfloat16)


def test_a_gpu_before_ampere_is_refused(device):
    device((7, 5), 64 * 1024)
    assert "compute capability 8.0 (Ampere) or later, this GPU has 7.5" in why_not((49, 8, 512), torch.float16)


def test_the_question_is_traced(monkeypatch):
    """Compiled code asks too, whole graphs included."""
    monkeypatch.setattr(extension, "_state", {"module": None, "cuda": "13.0"})
    properties = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=H100[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def fn(x):
        return x + 1 if why_not((196, 8, x.shape[0]), torch.float32) is None else x

    x = torch.zeros(512)
    assert torch.equal(torch.compile(fn, fullgraph=True, backend="eager")(x), x + 1)
