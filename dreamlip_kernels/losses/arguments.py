"""What every loss takes of open_clip's constructors: the place of this process in its world."""

from __future__ import annotations

from torch import nn

from ..distributed.collectives import Group, rank_and_size


def check_world(name: str, rank: int, world_size: int, use_horovod: bool, group: Group) -> None:
    """Raise ValueError unless rank and world_size are torch.distributed's own, or the defaults of one process."""
    if use_horovod:
        raise ValueError(f"{name}: use_horovod=True is not supported; use torch.distributed")
    actual_rank, actual_size = rank_and_size(group)
    if (world_size, rank) != (1, 0) and (world_size, rank) != (actual_size, actual_rank):
        raise ValueError(
            f"{name}: rank={rank}, world_size={world_size} were given, but torch.distributed says rank {actual_rank} "
            f"of {actual_size}; "
            "initialize the process group first"
        )


class ClipLossArguments(nn.Module):
    """Takes ClipLoss's constructor arguments: the collectives here need none of them, but a wrong world is an error."""

    def __init__(
        self,
        local_loss: bool,
        gather_with_grad: bool,
        cache_labels: bool,
        rank: int,
        world_size: int,
        use_horovod: bool,
        group: Group,
    ) -> None:
        super().__init__()
        check_world(type(self).__name__, rank, world_size, use_horovod, group)
        self.group = group
