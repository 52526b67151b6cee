"""What every backend of bidirectional_logsumexp promises, on the CPU; test_contrastive_gpu.py runs the same on a
device.
"""

import contrast_promises as promises
import pytest
import torch
from triton_runs import require_triton

from dreamlip_kernels.backends.settings import settings

# numpy warns of what makes the kernels compute exactly; that is among what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("check", promises.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_promise(monkeypatch, backend, check):
    if backend == "triton":
        require_triton()
        if torch.cuda.is_available():
            pytest.skip("with a CUDA device the kernels are compiled; test_contrastive_gpu.py runs them there")
        if check is promises.nothing_in_bfloat16_behind_a_mask:
            pytest.skip("the interpreter's products of bfloat16 are wrong")
    monkeypatch.setattr(settings, "float32", "fp16")
    check(backend, torch.device("cpu"))
