"""What the grouping loss finds, form by form: ``python benchmarks/grouping/forms.py FOLDER --form conditioned``.

FOLDER is one of ``dreamlip-train prepare scenes``, or of photographs.py beside this file. Small towers are trained on
it for a minute or two on one thread, from memory and without checkpoints, and held-out pictures are asked where their
sub-captions look: a line of JSON a seed.
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import dreamlip_kernels as dk
from dreamlip_train.captions.columns import SubCaption, caption_pool
from dreamlip_train.captions.sampling import sample_sub_captions
from dreamlip_train.config.recipes import demo
from dreamlip_train.config.schema import Config, DataConfig
from dreamlip_train.data.images import decode_image, decode_labels, resize_center_crop
from dreamlip_train.evaluation.retrieval.recall import retrieval
from dreamlip_train.evaluation.segmentation.localization import localization, mask_to_regions
from dreamlip_train.model.build import build_model
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.packing import pack_captions
from dreamlip_train.training.engine.muon import Muon
from dreamlip_train.training.engine.optimizer import parameter_groups

LONG, MARGIN = "longIB_captions", 4  # pixels that a training crop may move

Split = tuple[Tensor, list[list[SubCaption]], list[str]]
Form = Literal["none", "image", "batch", "conditioned", "attention-stopped", "text-stopped"]


@dataclass
class Options:
    """One run a seed."""

    folder: tyro.conf.Positional[Path]
    form: Form = "conditioned"
    """"none": no grouping. "image", "batch", "conditioned": loss.contrast. The others are "image" with a part of the
    gradients cut: "attention-stopped" at the weights that pool the patches, "text-stopped" at the captions.
    """
    own_values: int = 0
    """model.own_value_blocks: last blocks of the image tower in which patches take their own values."""
    layers: int = 2
    """Blocks of the image tower."""
    weight: float = 1.0
    warm_up: int = 0
    """Steps in which the weight grows from 0."""
    towers: Literal["small", "demo"] = "small"
    """"small" is the demo's towers two thirds as wide, with half the MLP."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """optim.optimizer: "muon" at the demo's rates, "adamw" at 3e-3."""
    steps: int = 500
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    every: int = 0
    """Scores on the way every so many steps; 0 scores at the end."""


def main(options: Options) -> None:
    config = _recipe(options)
    size = config.model.config["vision_cfg"]["image_size"]
    training, held_out = _split(options.folder / "train", size + MARGIN), _split(options.folder / "val", size)
    for seed in options.seeds:
        torch.manual_seed(seed)
        train(options, config, training, held_out, seed)


def train(options: Options, config: Config, training: Split, held_out: Split, seed: int) -> None:
    """One run; its scores are printed."""
    start = time.process_time()
    model = build_model(config.model, seed)
    images, pools, _ = training
    words = _Words(model, [part.text for pool in pools + held_out[1] for part in pool])
    kind = Muon if options.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(parameter_groups(model, config.optim), betas=(0.9, 0.98), fused=True)
    rng, warm_up = random.Random(seed), config.optim.warmup_steps
    for step in range(1, options.steps + 1):
        rate = min(1, step / warm_up) * (1 + math.cos(math.pi * max(0, step - warm_up) / (options.steps - warm_up))) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * rate * group["lr_scale"]
        batch = _batch(model, words, images, pools, config.data, options.batch, rng)
        losses = _losses(model, options, *batch)
        share = min(1.0, step / options.warm_up) if options.warm_up else 1.0
        optimizer.zero_grad()
        (losses["contrastive"] + share * options.weight * losses["grouping"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == options.steps or (options.every and step % options.every == 0):
            report = {"seed": seed, "step": step}
            report |= {name: float(loss.detach()) for name, loss in losses.items()}
            report |= scores(model, words, options.folder / "val", held_out) | {"cpu_s": time.process_time() - start}
            print(json.dumps({name: round(value, 2) for name, value in report.items()}), flush=True)


def _recipe(options: Options) -> Config:
    config = demo()
    config.model.own_value_blocks, config.optim.optimizer = options.own_values, options.optimizer
    if options.optimizer == "adamw":
        config.optim.lr = 3e-3
    config.model.config["vision_cfg"]["layers"] = options.layers
    if options.towers == "small":
        config.model.config["vision_cfg"] |= {"width": 64, "head_width": 32, "mlp_ratio": 2.0}
        config.model.config["text_cfg"]["width"] = 64
    return config


class _Words:
    """The captions' tokens, and an embedding of those tokens alone: AdamW would spend a fifth of a step on the rest."""

    def __init__(self, model: DreamLIP, texts: list[str]) -> None:
        rows = {text: model.tokenize([text])[0] for text in dict.fromkeys(texts)}
        used = torch.stack(list(rows.values())).unique()  # sorted: a caption's end remains its largest token
        self.rows = {text: torch.searchsorted(used, row) for text, row in rows.items()}
        model.clip.token_embedding = nn.Embedding.from_pretrained(model.clip.token_embedding.weight[used], freeze=False)

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.stack([self.rows[text] for text in texts])


def _split(folder: Path, size: int) -> Split:
    """Pictures, their sub-captions and their names."""
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["Image Path"] for row in rows]
    images = [resize_center_crop(decode_image((folder / "images" / name).read_bytes()), size) for name in names]
    return torch.stack(images), [caption_pool(row, demo().data.caption_sources) for row in rows], names


def _batch(
    model: DreamLIP,
    words: _Words,
    images: Tensor,
    pools: list[list[SubCaption]],
    data: DataConfig,
    count: int,
    rng: random.Random,
) -> tuple[Any, ...]:
    """A training step's crops, packed captions and their mask."""
    size, k = model.image_size, data.num_sub_captions
    crops, tokens, mask = [], torch.zeros(count, k, model.context_length, dtype=torch.long), torch.zeros(count, k)
    tokens[:, :, 0] = 1  # an absent caption is one token, the largest of its row
    for slot, index in enumerate(rng.sample(range(len(pools)), count)):
        top, left = rng.randint(0, MARGIN), rng.randint(0, MARGIN)
        crops.append(images[index, :, top : top + size, left : left + size])
        texts = sample_sub_captions(pools[index], k, rng, source_weights=data.source_weights)
        tokens[slot, : len(texts)] = words(texts)
        mask[slot, : len(texts)] = 1
    return torch.stack(crops), pack_captions(tokens), mask.bool()


def _losses(model: DreamLIP, options: Options, images: Tensor, text: Any, mask: Tensor) -> dict[str, Tensor]:
    features = model(images, text, options.form != "none")
    image_ND, text_NKD = features["image_features"], features["text_features"]
    contrastive = dk.multi_positive_contrastive_loss(image_ND, text_NKD, features["logit_scale"], text_mask=mask)
    if options.form == "none":
        return {"contrastive": contrastive, "grouping": torch.zeros(())}
    patch_NPD, scale = features["patch_features"], features["logit_scale_local"]
    if options.form == "attention-stopped":
        grouping = _within_image_attention_stopped(patch_NPD, text_NKD, scale, mask)
    else:
        contrast: Any = "image" if options.form == "text-stopped" else options.form
        grouping = dk.subcaption_grouping_loss(
            patch_NPD,
            text_NKD.detach() if options.form == "text-stopped" else text_NKD,
            scale,
            text_mask=mask,
            contrast=contrast,
            direction="t2v",
        )
    return {"contrastive": contrastive, "grouping": grouping}


def _within_image_attention_stopped(patch_NPD: Tensor, text_NKD: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        weight_NKP = dk.patch_weights(patch_NPD, text_NKD)
    group_NKD = F.normalize(weight_NKP @ F.normalize(patch_NPD, dim=-1), dim=-1)
    z = scale * group_NKD @ text_NKD.mT  # [N, group, text]
    alone = torch.eye(mask.shape[1], dtype=torch.bool)
    z = z.masked_fill(~((mask[:, :, None] & mask[:, None, :]) | alone), -torch.inf)
    return (z.logsumexp(1) - z.diagonal(dim1=1, dim2=2))[mask].mean()


def scores(model: DreamLIP, words: _Words, folder: Path, held_out: Split) -> dict[str, float]:
    """Of the held-out pictures, in percent: localization at the demo's threshold, how many sub-captions are less
    similar to their region than to the rest, and R@1 by long caption.
    """
    images, pools, names = held_out
    threshold = demo().eval.threshold
    long, weights, regions, inverted = [], [], [], []
    with torch.no_grad():
        image_ND, patch_NPD = model.encode_images(images)
        for name, pool, patch_PD in zip(names, pools, patch_NPD, strict=True):
            text_KD = model.encode_texts(words([part.text for part in pool if part.source == LONG]))
            labels = torch.from_numpy(decode_labels(folder / "masks" / name.replace(".jpg", ".png")))[None].float()
            labels = resize_center_crop(labels, model.image_size, nearest=True)[0]
            region_KP = mask_to_regions(labels, len(text_KD), model.grid)
            similarity_KP = text_KD @ F.normalize(patch_PD, dim=-1).T
            in_view = region_KP.any(1)
            inside = (similarity_KP * region_KP).sum(1) / region_KP.sum(1)
            outside = (similarity_KP * ~region_KP).sum(1) / (~region_KP).sum(1)
            weights.append(dk.patch_weights(patch_PD[None], text_KD[None], threshold=threshold)[0, in_view])
            regions.append(region_KP[in_view])
            inverted.append((inside < outside)[in_view])
            long.append(F.normalize(text_KD.mean(0), dim=0))
    where = localization(torch.cat(weights), torch.cat(regions))
    recall = retrieval(image_ND, torch.stack(long), torch.arange(len(names)), ks=(1,))
    return {name: where[name]["value"] for name in ("pointing", "mass_inside", "miou")} | {
        "chance": where["pointing"]["chance"],
        "inverted": 100 * float(torch.cat(inverted).double().mean()),
        "t2i": recall["t2i"]["r_at_1"],
        "i2t": recall["i2t"]["r_at_1"],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
