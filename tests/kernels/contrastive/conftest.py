"""Where the Triton kernels are interpreted, and how."""

import pytest
import torch

from dreamlip_kernels.backends.settings import settings


@pytest.fixture
def interpreted(monkeypatch):
    """On the CPU; float32 features as the kernels' 16-bit code multiplies them, unless a test says otherwise."""
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled; test_contrastive_gpu.py runs them there")
    monkeypatch.setattr(settings, "float32", "fp16")
