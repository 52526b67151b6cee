"""What ranking holds: tiles of a fixed size, whatever the number of captions."""

import pytest
import torch
from live_memory import LiveMemory

from dreamlip_train.evaluation.retrieval.recall import retrieval

MB = 2**20


def features(rows, width, seed):
    rows = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def peak(images, texts, width):
    """Bytes beyond the features themselves."""
    owner = torch.arange(texts) % images
    with LiveMemory() as memory:
        found = retrieval(features(images, width, 0), features(texts, width, 1), owner)
    assert 0 < found["t2i"]["r_at_10"] < 20
    return memory.peak - 4 * width * (images + texts)


def test_a_hundred_thousand_captions_fit_two_gigabytes():
    """With features of 512 numbers the texts and as many images are 390 MB; all else stays under 300 MB, for the
    similarities are held by the tile: twice the images hold hardly more.
    """
    small, large = peak(300, 100_000, 8), peak(600, 100_000, 8)
    assert small < 300 * MB and large < 1.2 * small


def test_the_count_counts():
    x = torch.zeros(1000, dtype=torch.float64)
    with LiveMemory() as memory:
        y = x + 1  # 8,000 bytes
        z = y[::2].view(torch.int64)
        del y
        assert memory.alive == 8000
        del z
        assert memory.alive == 0
        sum(x * i for i in range(5))
    assert memory.peak == 8000 * 3
    with pytest.raises(AssertionError), LiveMemory() as memory:
        assert (x[:, None] == x[None, :]).sum() < 0
    assert memory.peak >= 1_000_000
