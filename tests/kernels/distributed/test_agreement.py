"""Ranks that disagree about shapes or options are told on every rank; those that agree are not asked again."""

import datetime
import os

import pytest
import torch.distributed as dist
from rank_cases import IDS, global_case
from ranks import join, spawn

import dreamlip_kernels as dk
from dreamlip_kernels.distributed import agreement


def unequal_worker(rank, world, port, mode):
    os.environ["DREAMLIP_CHECK"] = mode
    join(rank, world, port)
    image, text, patches, mask = (t[: 4 - (rank == 1)] for t in global_case())
    with pytest.raises(ValueError, match=r"N \(images a rank\) must be the same on every rank, got \[4, 3, 4\]"):
        dk.multi_positive_contrastive_loss(image, text, 3.0)
    with pytest.raises(ValueError, match="must be the same on every rank"):
        dk.subcaption_grouping_loss(patches, text, 3.0)
    image, text, patches, mask = global_case()
    with pytest.raises(ValueError, match="text_mask"):
        dk.multi_positive_contrastive_loss(image, text, 3.0, text_mask=mask if rank == 0 else None)
    with pytest.raises(ValueError, match="image_ids"):
        dk.multi_positive_contrastive_loss(image, text, 3.0, image_ids=IDS if rank == 0 else None)
    with pytest.raises(ValueError, match="label_smoothing"):
        dk.multi_positive_sigmoid_loss(image, text, 3.0, label_smoothing=0.1 * rank)
    with pytest.raises(ValueError, match="same_image"):
        same_image = "ignore" if rank else "positive"
        dk.multi_positive_contrastive_loss(image, text, 3.0, image_ids=IDS, same_image=same_image)
    with pytest.raises(ValueError, match=f"rank {rank} of 3"):
        dk.DreamLIPLoss(rank=rank, world_size=7)
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["shapes", "always"])
def test_unequal_batches_raise_on_every_rank(mode):
    """A rank with a smaller batch: an error everywhere, not a hang."""
    spawn(unequal_worker, 3, mode)


def remembering_worker(rank, world, port):
    """Shapes are compared when they are new, each step of known ones issues its own collectives alone;
    a rank with new ones alone says so.
    """
    join(rank, world, port)
    compared = []
    for name in ("_by_store", "_by_collective"):
        real = getattr(agreement, name)
        setattr(agreement, name, lambda *args, n=name, real=real: compared.append(n) or real(*args))
    image, text, patches, _ = global_case()

    def step(n):
        dk.multi_positive_contrastive_loss(image[:n], text[:n], 3.0)
        dk.subcaption_grouping_loss(patches[:n], text[:n], 3.0)

    for n, expected in ((6, 2), (6, 2), (4, 4), (6, 4), (4, 4)):
        step(n)
        assert compared == ["_by_store"] * expected
    os.environ["DREAMLIP_CHECK"] = "always"
    step(6)
    assert compared[4:] == ["_by_collective"] * 2
    os.environ["DREAMLIP_CHECK"] = "never"
    step(5)
    assert len(compared) == 6
    os.environ["DREAMLIP_CHECK"] = "sometimes"
    with pytest.raises(ValueError, match="DREAMLIP_CHECK must be one of"):
        step(6)
    os.environ["DREAMLIP_CHECK"] = "shapes"
    agreement.LONGEST_WAIT = datetime.timedelta(seconds=1)
    if rank == 1:
        with pytest.raises(
            RuntimeError, match=r"rank 1 met new shapes, .*'N \(images a rank\)': 3.* and ranks \[0\] did not"
        ):
            step(3)
    dist.barrier()
    dist.destroy_process_group()


def test_known_shapes_are_not_compared_again():
    spawn(remembering_worker, 2)
