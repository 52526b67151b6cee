"""The global batch belongs to the recipe: ranks share it evenly or are refused, fewer ranks take it in chunks."""

import pytest

from dreamlip_train.config.batch import chunks_per_rank, images_per_rank
from dreamlip_train.config.recipes import RECIPES
from dreamlip_train.config.run_schema import TrainConfig
from dreamlip_train.config.schema import Config, LossConfig


@pytest.mark.parametrize(("ranks", "images", "chunks"), [(1, 6144, 8), (4, 1536, 2), (8, 768, 1), (32, 192, 1)])
def test_any_world_trains_the_recipes_batch(ranks, images, chunks):
    """The documented launch on 4 nodes of 8 once trained 24,576 images per step at the learning rate of 6144."""
    config = RECIPES["cc12m_vitb16"]()
    assert (images_per_rank(config, ranks), chunks_per_rank(config, ranks)) == (images, chunks)


def test_chunks_are_at_most_the_chunk_size():
    config = Config(train=TrainConfig(global_batch_size=10, chunk_size=4))
    assert chunks_per_rank(config, 1) == 3 and chunks_per_rank(config, 5) == 1


def test_a_world_that_does_not_divide_it_is_told_the_nearest():
    config = Config(train=TrainConfig(global_batch_size=1024))
    with pytest.raises(
        ValueError, match=r"train.global_batch_size: got 1024; 12 ranks .* run 8 or 16 ranks, .*1020 or 1032"
    ):
        images_per_rank(config, 12)
    with pytest.raises(ValueError, match="2 ranks can't share it evenly; run 1 ranks, or train.global_batch_size=2 "):
        images_per_rank(Config(train=TrainConfig(global_batch_size=1)), 2)


CACHING = TrainConfig(global_batch_size=8, chunk_size=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(train=CACHING, loss=LossConfig(contrast="batch", direction="t2v")), "has both directions"),
    ],
)
def test_caching_that_cannot_run_is_refused_where_it_is_needed(config, message):
    assert images_per_rank(config, 4) == 2  # no chunks there
    with pytest.raises(ValueError, match=f"train.chunk_size: got 2; .*{message}"):
        images_per_rank(config, 2)
