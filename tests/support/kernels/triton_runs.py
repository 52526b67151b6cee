"""A test of the Triton backend where that cannot run: skipped, with the reason."""

import pytest
import torch

from dreamlip_kernels.backends import dispatch


def require_triton() -> None:
    """Skip the test, or the module that is being collected, without Triton or with a torch older than its kernels."""
    pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")
    if not dispatch._TORCH_SUFFICES:
        pytest.skip(f"the Triton kernels need torch 2.10, this is {torch.__version__}", allow_module_level=True)
