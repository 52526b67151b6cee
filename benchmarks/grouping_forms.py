"""What the grouping loss finds in the demo's world, form by form: ``python benchmarks/grouping_forms.py SCENES``.

SCENES is a folder of ``dreamlip-train prepare scenes``. The demo's towers are trained on it for a few minutes on one
thread, from memory and without checkpoints, and held-out scenes are asked where their sub-captions look.
"""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import dreamlip_kernels as dk
from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.sampling import sample_sub_captions
from dreamlip_train.config.recipes import demo
from dreamlip_train.data.images import decode_image, decode_labels, resize_center_crop
from dreamlip_train.evaluation.retrieval.recall import retrieval
from dreamlip_train.evaluation.segmentation.localization import localization, mask_to_regions
from dreamlip_train.model.build import build_model
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.packing import pack_captions

LONG, MARGIN = "longIB_captions", 4  # pixels that a training crop may move


@dataclass
class Options:
    """One run."""

    scenes: tyro.conf.Positional[Path]
    contrast: Literal["image", "batch", "conditioned"] = "conditioned"
    direction: Literal["both", "t2v"] = "t2v"
    weight: float = 1.0
    threshold: float | None = None
    pool: Literal["tok", "avg"] = "tok"
    candidates: int = 4
    steps: int = 160
    batch: int = 128
    seed: int = 0


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    config = demo()
    config.model.config["vision_cfg"]["pool_type"] = options.pool
    model = build_model(config.model, options.seed)
    images, rows = _split(options.scenes / "train", model.image_size + MARGIN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(1, options.steps + 1):
        rate = min(1, step / 40) * (1 + math.cos(math.pi * max(0, step - 40) / max(1, options.steps - 40))) / 2
        optimizer.param_groups[0]["lr"] = config.optim.lr * rate
        losses = _losses(model, options, *_batch(model, images, rows, config.data, options.batch, rng))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(options, {name: round(float(loss.detach()), 3) for name, loss in losses.items()})
    print({name: round(value, 1) for name, value in scores(model, options.scenes / "val").items()})


def _split(folder: Path, size: int) -> tuple[Tensor, list[dict[str, str]]]:
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = [folder / "images" / row["Image Path"] for row in rows]
    return torch.stack([resize_center_crop(decode_image(path.read_bytes()), size) for path in paths]), rows


def _batch(model: DreamLIP, images: Tensor, rows: Any, data: Any, count: int, rng: random.Random) -> tuple[Any, ...]:
    """A training step's crops, packed captions and their mask."""
    size, k = model.image_size, data.num_sub_captions
    crops, tokens, mask = [], torch.zeros(count, k, model.context_length, dtype=torch.long), torch.zeros(count, k)
    tokens[:, :, 0] = 1  # an absent caption is one token, the largest of its row
    for slot, index in enumerate(rng.sample(range(len(rows)), count)):
        top, left = rng.randint(0, MARGIN), rng.randint(0, MARGIN)
        crops.append(images[index, :, top : top + size, left : left + size])
        pool = caption_pool(rows[index], data.caption_sources, data.splitter)
        texts = sample_sub_captions(pool, k, rng, source_weights=data.source_weights)
        tokens[slot, : len(texts)] = model.tokenize(texts)
        mask[slot, : len(texts)] = 1
    return torch.stack(crops), pack_captions(tokens), mask.bool()


def _losses(model: DreamLIP, options: Options, images: Tensor, text: Any, mask: Tensor) -> dict[str, Tensor]:
    loss = dk.DreamLIPLoss(
        grouping_weight=options.weight,
        contrast=options.contrast,
        direction=options.direction,
        threshold=options.threshold,
        candidates=options.candidates,
    )
    return loss(**model(images, text, patches=options.weight > 0), text_mask=mask, output_dict=True)


def scores(model: DreamLIP, folder: Path) -> dict[str, float]:
    """Of the held-out scenes, in percent: localization at a threshold of 0.5, how many sub-captions are less similar to
    their region than to the rest, and R@1 by long caption.
    """
    images, rows = _split(folder, model.image_size)
    long, weights, regions, inverted = [], [], [], []
    with torch.no_grad():
        image_ND, patch_NPD = model.encode_images(images)
        for row, patch_PD in zip(rows, patch_NPD, strict=True):
            text_KD = model.encode_texts(model.tokenize([part.text for part in caption_pool(row, (LONG,), "sentence")]))
            mask = decode_labels(folder / "masks" / row["Image Path"].replace(".jpg", ".png"))
            mask = resize_center_crop(torch.from_numpy(mask)[None].float(), model.image_size, nearest=True)[0]
            region_KP = mask_to_regions(mask, len(text_KD), model.grid)
            similarity_KP = text_KD @ nn.functional.normalize(patch_PD, dim=-1).T
            inside = (similarity_KP * region_KP).sum(1) / region_KP.sum(1)
            outside = (similarity_KP * ~region_KP).sum(1) / (~region_KP).sum(1)
            weights.append(dk.patch_weights(patch_PD[None], text_KD[None], threshold=0.5)[0])
            regions.append(region_KP)
            inverted.append(inside < outside)
            long.append(nn.functional.normalize(text_KD.mean(0), dim=0))
    found = localization(torch.cat(weights), torch.cat(regions))
    recall = retrieval(image_ND, torch.stack(long), torch.arange(len(rows)), ks=(1,))
    return {name: found[name]["value"] for name in ("pointing", "mass_inside", "miou")} | {
        "inverted": 100 * float(torch.cat(inverted).double().mean()),
        "t2i": recall["t2i"]["r_at_1"],
        "i2t": recall["i2t"]["r_at_1"],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
