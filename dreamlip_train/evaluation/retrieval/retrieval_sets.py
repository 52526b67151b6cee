"""Flickr30k, COCO and alike: images with several captions each, in the layouts they come in, and the recall of a model
on them (the paper's Table 1).

Karpathy's json + image folder      {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}
COCO's captions json + image folder {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
clip_benchmark's webdataset folder  FOLDER/test/{0.tar, .., nshards.txt}, KEY.jpg + KEY.txt with a caption a line
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard
from dreamlip_train.evaluation import defaults
from dreamlip_train.evaluation.features import eval_mode
from dreamlip_train.evaluation.pictures import model_picture
from dreamlip_train.evaluation.retrieval.recall import retrieval, retrieval_chance
from dreamlip_train.evaluation.set_files import require_all
from dreamlip_train.jobs.atomic_json import read_json
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP


@dataclass(frozen=True)
class RetrievalItem:
    """An image, as a file or as bytes, and its captions."""

    name: str
    captions: list[str]
    data: bytes | None = None

    def picture(self, size: int) -> Tensor:
        """[3, size, size] uint8, the middle of the picture; a UserError names one that is damaged."""
        return model_picture(Path(self.name) if self.data is None else self.data, size, "--images", self.name)


def read_set(annotations: str | Path, images: str | Path = "", split: str = defaults.SPLIT) -> Iterator[RetrievalItem]:
    """The images of a retrieval set, with all their captions; the layout is recognized.

    Args:
        annotations: a json file, or a clip_benchmark folder.
        images: the folder of the json's images.
        split: of a Karpathy json or a clip_benchmark folder.
    Raises:
        UserError: no such file, another layout, an unknown split, captions of images that are not listed, or images
            that are missing (they are named).
    """
    path = Path(annotations)
    if path.is_dir():
        return _webdataset(path, split)
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--annotations: {str(path)!r} can't be read as json: {error}") from error
    folder = Path(images)
    if not images or not folder.is_dir():
        raise UserError(f"--images: no folder {str(images)!r}; give the folder of the images that {path.name} names")
    try:
        if isinstance(content, dict) and isinstance(content.get("annotations"), list):
            items = _coco(content, folder, path)
        elif isinstance(content, dict) and content.get("images") and "sentences" in content["images"][0]:
            items = _karpathy(content, folder, split)
        else:
            raise KeyError("images")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--annotations: {str(path)!r} is neither Karpathy's json "
            f'("images" with "sentences") nor COCO\'s ("images" and "annotations"): {error!r}'
        ) from error
    missing = [item.name for item in items if not Path(item.name).is_file()]
    require_all(missing, "--images", f"{len(items)} images")
    return iter(items)


def _karpathy(content: dict[str, Any], folder: Path, split: str) -> list[RetrievalItem]:
    splits = sorted({entry["split"] for entry in content["images"]})
    if split not in splits:
        raise UserError(f"--split: got {split!r}; the json has {', '.join(splits)}")
    items = []
    for entry in content["images"]:
        if entry["split"] == split:
            places = (folder / entry.get("filepath", "") / entry["filename"], folder / entry["filename"])
            place = next((place for place in places if place.is_file()), places[0])
            items.append(RetrievalItem(str(place), [sentence["raw"] for sentence in entry["sentences"]]))
    return items


def _coco(content: dict[str, Any], folder: Path, path: Path) -> list[RetrievalItem]:
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    orphans = captions.keys() - {entry["id"] for entry in content["images"]}
    if orphans:
        raise UserError(
            f"--annotations: {str(path)!r} has captions of {len(orphans)} images that it does not list, "
            f"such as image_id {min(orphans)}"
        )
    return [
        RetrievalItem(str(folder / entry["file_name"]), captions[entry["id"]])
        for entry in content["images"]
        if captions[entry["id"]]
    ]


def _webdataset(folder: Path, split: str) -> Iterator[RetrievalItem]:
    shards = sorted((folder / split).glob("*.tar"), key=lambda shard: (len(shard.name), shard.name))
    if not shards:
        raise UserError(
            f"--annotations: {str(folder / split)!r} has no .tar files; give clip_benchmark's folder and its --split"
        )

    def read() -> Iterator[RetrievalItem]:
        for shard in shards:
            try:
                for sample in read_shard(str(shard)):
                    if image_of(sample) is None or "txt" not in sample:
                        raise UserError(
                            f"--annotations: {shard}: {sample['key']} has members {sorted(set(sample) - {'key'})}; "
                            "it needs an image and a .txt"
                        )
                    lines = sample["txt"].decode("utf-8", errors="replace").splitlines()
                    yield RetrievalItem(
                        f"{shard}: {sample['key']}", [line for line in lines if line.strip()], image_of(sample)
                    )
            except ShardError as error:
                raise UserError(f"--annotations: {shard}: {error}; fetch it again") from error

    return read()


def evaluate_retrieval(
    model: DreamLIP,
    items: Iterator[RetrievalItem],
    device: torch.device | str,
    *,
    captions_per_image: int = defaults.CAPTIONS_PER_IMAGE,
    batch_size: int = defaults.BATCH_SIZE,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways; an image counts when any of its captions is among its k nearest.

    Args:
        captions_per_image: the first so many captions of each image, as is usual on COCO, where some have six or seven;
            0 takes all.
    Returns:
        {"t2i", "i2t", "chance", "images", "captions"}, as ``evaluate.retrieval``.
    Raises:
        UserError: an image is damaged, or there is none.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    owner: list[int] = []
    total = length_hint(items) or None  # a folder of tars is as long as it is
    with eval_mode(model), torch.no_grad(), Progress("retrieval", total, "images") as progress:
        while batch := list(islice(items, batch_size)):
            captions = [one.captions[: captions_per_image or None] for one in batch]
            first = sum(map(len, images))
            owner += [first + row for row, texts in enumerate(captions) for _ in texts]
            images.append(
                model.encode_images(torch.stack([one.picture(model.image_size) for one in batch]).to(device))[0]
                .float()
                .cpu()
            )
            tokens = model.tokenize([caption for texts in captions for caption in texts])
            texts += [model.encode_texts(part.to(device)).float().cpu() for part in tokens.split(4 * batch_size)]
            progress.advance(len(batch), f"{len(owner):,} captions")
    if not owner:
        raise UserError("--annotations: no image with a caption")
    image_ND, text_MD, owner_M = (
        part.to(device) for part in (torch.cat(images), torch.cat(texts), torch.tensor(owner))
    )
    scores = retrieval(image_ND, text_MD, owner_M)
    return scores | {
        "chance": retrieval_chance(owner_M, len(image_ND)),
        "images": len(image_ND),
        "captions": len(text_MD),
    }


def format_retrieval(result: dict[str, Any]) -> str:
    """The six numbers and chance, as text to read."""
    lines = [
        f"{result['images']} images, {result['captions']} captions",
        f"{'retrieval, % (chance)':<22}" + "".join(f"{name:>16}" for name in ("R@1", "R@5", "R@10")),
    ]
    for way, label in (("i2t", "image to text"), ("t2i", "text to image")):
        cells = [f"{result[way][f'r_at_{k}']:.1f} ({result['chance'][way][f'r_at_{k}']:.1f})" for k in (1, 5, 10)]
        lines.append(f"{label:<22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
