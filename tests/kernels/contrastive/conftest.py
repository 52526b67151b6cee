"""Where the Triton kernels are interpreted, and how."""

import pytest
import torch
from launch_counts import NothingLaunched

from dreamlip_kernels.backends.settings import settings


@pytest.fixture
def interpreted(monkeypatch):
    """On the CPU; float32 features as the kernels' 16-bit code multiplies them, unless a test says otherwise."""
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled; test_contrastive_gpu.py runs them there")
    monkeypatch.setattr(settings, "float32", "fp16")


@pytest.fixture
def counted(monkeypatch):
    """Everything but the kernels and cuBLAS runs, with a device's tiles; the list of those launches."""
    from dreamlip_kernels.ops.logsumexp import logsumexp_gradient_triton, logsumexp_triton, operands_triton
    from dreamlip_kernels.ops.logsumexp.logsumexp_tiles import blocks_for
    from dreamlip_kernels.ops.logsumexp.operands_triton import TritonOperands

    launches = []
    for module, kernels in (
        (logsumexp_triton, ("exp_sums", "finish_sums")),
        (logsumexp_gradient_triton, ("gradient_tile", "finish_gradient")),
        (operands_triton, ("vectors",)),
    ):
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, NothingLaunched(kernel, launches))
    for product in ("matmul", "accumulate"):  # on a CPU they would widen their operands first
        monkeypatch.setattr(logsumexp_gradient_triton, product, lambda a, b, out, p=product: launches.append(p))
    monkeypatch.setattr(
        TritonOperands, "blocks", lambda self, kernel: blocks_for(kernel, self.x.element_size(), 90, self.x.shape[1])
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return launches
