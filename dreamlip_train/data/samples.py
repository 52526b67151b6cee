"""One raw sample to what a batch or an evaluation needs: its image decoded and cropped, its sub-captions drawn or
split.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreamlip_train.captions.columns import caption_columns, caption_pool, is_too_long, is_whole, split_sub_captions
from dreamlip_train.captions.sampling import sample_sub_captions
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.augment import augment
from dreamlip_train.data.images import ImageError, decode_image, decode_labels, random_resized_crop, resize_center_crop
from dreamlip_train.data.shards.shards import Oversized, image_of, record_of


class BadSample(Exception):
    """A sample that is left out; ``args[0]`` is the reason it is counted under, ``args[1]`` the detail."""


class TrainingSample(NamedTuple):
    """What a batch needs of one sample."""

    key: str
    image: Tensor
    """The crop, uint8 [3, S, S]."""
    sub_captions: list[str]
    """Those drawn, K at most."""
    too_long: int
    """How many captions were too long to be read whole."""


def prepare_sample(sample: dict[str, Any], data: DataConfig, image_size: int, salt: str) -> TrainingSample:
    """A raw sample decoded, cropped and with its sub-captions drawn; ``salt`` and the key seed every draw.

    Raises:
        BadSample: no image, a damaged image, unreadable captions, or none.
    """
    key = sample["key"]
    rng = random.Random(f"{salt}-{key}")
    record = _record(sample)
    pool = caption_pool(record, data.caption_sources, data.splitter)
    sub_captions = sample_sub_captions(
        pool,
        data.num_sub_captions,
        rng,
        sampling=data.sampling,
        source_weights=data.source_weights,
        merged_num=data.merged_num,
    )
    if not sub_captions:
        raise BadSample("no captions", f"none in {', '.join(data.caption_sources) or 'any caption column'}")
    image = random_resized_crop(_image(sample), image_size, data.crop_scale, rng, data.crop_ratio)
    image = augment(image, data, rng)
    too_long = sum(is_too_long(record.get(source)) for source in data.caption_sources or caption_columns(record))
    return TrainingSample(key, image, sub_captions, too_long)


def val_sample(sample: dict[str, Any], data: DataConfig, image_size: int) -> dict[str, Any]:
    """What ``validation.val_samples`` yields for one raw sample.

    Raises:
        BadSample: no image, a damaged image or mask, or unreadable captions.
    """
    record = _record(sample)
    longs = [column for column in caption_columns(record) if not is_whole(column)]
    candidates = (split_sub_captions(record.get(source), data.splitter) for source in (data.eval_source, *longs))
    raw = split_sub_captions(record.get("raw_caption"), data.splitter)
    mask = None
    if "mask.png" in sample:
        mask = resize_center_crop(_mask(sample["mask.png"]), image_size, nearest=True)[0]
    return {
        "key": sample["key"],
        "image": resize_center_crop(_image(sample), image_size),
        "sentences": next((sentences for sentences in candidates if sentences), []),
        "raw": " ".join(raw) or None,
        "mask": mask,
    }


def _record(sample: dict[str, Any]) -> dict[str, Any]:
    try:
        return record_of(sample)
    except ValueError as error:
        raise BadSample("unreadable captions", str(error)) from error


def _image(sample: dict[str, Any]) -> Tensor:
    data = image_of(sample)
    if data is None:
        raise BadSample("no image", f"members {sorted(set(sample) - {'key'})}")
    if isinstance(data, Oversized):
        raise BadSample("image too large", f"{data.size:,} bytes are more than data.max_member_mb, or it is sparse")
    try:
        return decode_image(data)
    except ImageError as error:
        raise BadSample("damaged image", str(error)) from error


def _mask(data: bytes) -> Tensor:
    """[1, H, W] uint8 region labels."""
    try:
        return torch.from_numpy(decode_labels(data).astype(np.uint8))[None]
    except ImageError as error:
        raise BadSample("damaged mask", str(error)) from error
