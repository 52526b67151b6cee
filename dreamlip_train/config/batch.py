"""The global batch over ranks: each rank's share of it, and the chunks of gradient caching that a share goes through
the towers in.
"""

from __future__ import annotations

from dreamlip_train.config.schema import Config
from dreamlip_train.config.validation import refuse


def images_per_rank(config: Config, ranks: int) -> int:
    """A rank's even share of train.global_batch_size.

    Raises:
        UserError: ``ranks`` does not divide it (the nearest numbers that do are named), or gradient caching is needed
            and can't run.
    """
    size = config.train.global_batch_size
    if size % ranks:
        fewer = next(number for number in range(ranks, 0, -1) if size % number == 0)
        more = next((number for number in range(ranks, size + 1) if size % number == 0), fewer)
        worlds = " or ".join(str(number) for number in sorted({fewer, more}))
        below, above = size // ranks * ranks, (size // ranks + 1) * ranks
        sizes = " or ".join(str(number) for number in (below, above) if number)
        what_to_do = (
            f"{ranks} ranks can't share it evenly; run {worlds} ranks, "
            f"or train.global_batch_size={sizes} (another recipe)"
        )
        refuse("train.global_batch_size", size, what_to_do)
    if chunks_per_rank(config, ranks) > 1:
        _check_caching(config, size // ranks)
    return size // ranks


def chunks_per_rank(config: Config, ranks: int) -> int:
    """Chunks of at most train.chunk_size images that a rank's share is taken in; 1 is no gradient caching."""
    images, chunk = config.train.global_batch_size // ranks, config.train.chunk_size
    return -(-images // chunk) if chunk else 1


def _check_caching(config: Config, images: int) -> None:
    if config.loss.grouping_weight > 0 and config.loss.contrast == "batch" and config.loss.direction != "both":
        what_to_do = (
            f'{images} images per rank need gradient caching, in which loss.contrast="batch" has both directions; '
            'give loss.direction="both", or 0 to take them at once'
        )
        refuse("train.chunk_size", config.train.chunk_size, what_to_do)
