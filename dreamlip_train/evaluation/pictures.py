"""Pictures of an evaluation: one that can't be read is an error that names it; a number over a part is another."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dreamlip_train.data.images import ImageError, decode_image, resize_center_crop
from dreamlip_train.jobs.user_error import UserError


def read_picture(source: Path | bytes, option: str, name: str = "") -> Tensor:
    """[3, H, W] uint8 of a picture's file or bytes.

    Args:
        option: the argument the picture comes from, such as "--images".
        name: what the picture is called, where it comes as bytes.
    Raises:
        UserError: it is missing or damaged (it is named).
    """
    try:
        return decode_image(source if isinstance(source, bytes) else source.read_bytes())
    except (ImageError, OSError) as error:
        raise UserError(f"{option}: {name or source}: {error}; fetch it again") from error


def model_picture(source: Path | bytes, size: int, option: str, name: str = "") -> Tensor:
    """``read_picture``, the middle of it: [3, size, size] uint8, as open_clip evaluates."""
    return resize_center_crop(read_picture(source, option, name), size)
