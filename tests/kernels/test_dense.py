"""What kernels read as dense is dense."""

import pytest
import torch

from dreamlip_kernels.ops.dense import ALIGNMENT, dense

BASE = torch.arange(24 * 16, dtype=torch.float32).view(24, 16)


@pytest.mark.parametrize(
    "v", [BASE.T, BASE[:, 0], BASE[1:, 3:], BASE[0].expand(5, 16), BASE.view(-1)[1:], BASE[:, ::2]]
)
def test_dense_and_aligned_whatever_the_strides(v):
    out = dense(v)
    assert torch.equal(out, v) and out.is_contiguous() and out.data_ptr() % ALIGNMENT == 0


def test_no_copy_of_what_is_dense():
    assert dense(BASE).data_ptr() == BASE.data_ptr()
    assert dense(None) is None
