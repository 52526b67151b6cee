"""The grid of `dreamlip-train ablate`: the paper's ablations (its Tables 6 to 8) as changes to one recipe,
and what each is expected to show.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dreamlip_train.config.recipes import demo
from dreamlip_train.config.schema import Config, LossConfig
from dreamlip_train.config.validation import validate

RAW, SHORT, LONG = "raw_caption", "shortIB_captions", "longIB_captions"


@dataclass(frozen=True)
class Variant:
    """One row of the table: the demo's towers, by AdamW with ``changes`` ({"section.field": value})."""

    name: str
    table: str
    what: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperClaim:
    """``better`` should have the higher ``score`` than ``worse``, as the paper has it for its own worlds."""

    better: str
    worse: str
    score: str
    text: str


def _contrastive_only(sources: tuple[str, ...], k: int, **changes: Any) -> dict[str, Any]:
    without = {"loss.grouping_weight": 0.0, "model.local_logit_scale": False}
    return {"data.caption_sources": sources, "data.num_sub_captions": k} | without | changes


_ALL = (RAW, SHORT, LONG)
_OTHERS = ("shortSV_captions", "longSV_captions", "shortLLA_captions", "longLLA_captions")

_CONDITIONED = {
    "loss.contrast": "conditioned",
    "loss.direction": "t2v",
    "loss.grouping_weight": 1.0,
    "loss.threshold": None,
}

VARIANTS = (
    Variant("raw", "captions", "raw caption only (CLIP)", _contrastive_only((RAW,), 1)),
    Variant("raw-short", "captions", "raw and short", _contrastive_only((RAW, SHORT), 2)),
    Variant(
        "long-direct",
        "captions",
        "raw and the long caption as one text",
        _contrastive_only((RAW, LONG), 2, **{"data.splitter": "whole"}),
    ),
    Variant("long-sampled", "captions", "raw and sentences of the long caption", _contrastive_only((RAW, LONG), 4)),
    Variant("long-short", "captions", "raw, short and sentences", _contrastive_only(_ALL, 4)),
    Variant("full", "captions", "the same and the grouping loss (DreamLIP)"),
    Variant("k1", "K", "K = 1, no grouping loss", _contrastive_only(_ALL, 1)),
    Variant("k2", "K", "K = 2, no grouping loss", _contrastive_only(_ALL, 2)),
    Variant("k8", "K", "K = 8, no grouping loss", _contrastive_only(_ALL, 8)),
    Variant("two-sources", "sources", "captions of two MLLMs", {"data.caption_sources": (*_ALL, *_OTHERS[:2])}),
    Variant("three-sources", "sources", "captions of three MLLMs", {"data.caption_sources": (*_ALL, *_OTHERS)}),
    Variant("sigma-1-over-P", "threshold", "sigma = 1/P", {"loss.threshold": 1 / 64}),
    Variant("sigma-0.75", "threshold", "sigma = 0.75", {"loss.threshold": 0.75}),
    Variant("weight-1", "grouping", "grouping loss at weight 1", {"loss.grouping_weight": 1.0}),
    Variant(
        "contrast-batch", "grouping", "groups contrasted with the whole batch's captions", {"loss.contrast": "batch"}
    ),
    Variant(
        "class-token",
        "image embedding",
        "class token, no grouping loss",
        _contrastive_only(_ALL, 4) | {"model.pool": "tok"},
    ),
    Variant("class-token-full", "image embedding", "class token and the grouping loss", {"model.pool": "tok"}),
    Variant("conditioned", "grouping", "each caption picks its image, weight 1", _CONDITIONED),
    Variant(
        "class-token-conditioned", "image embedding", "class token and the same", _CONDITIONED | {"model.pool": "tok"}
    ),
    Variant(
        "class-token-own-values",
        "image embedding",
        "the same, patches exchanging nothing",
        _CONDITIONED | {"model.pool": "tok", "model.own_value_blocks": 2},
    ),
)

CLAIMS = (
    PaperClaim("raw-short", "raw", "short", "short captions help over raw ones alone"),
    PaperClaim("long-direct", "raw", "long", "a long caption helps even as one text"),
    PaperClaim(
        "long-sampled", "long-direct", "sentence", "sampling sentences beats the long caption as one text, by sentence"
    ),
    PaperClaim(
        "long-sampled", "long-direct", "long", "sampling sentences beats the long caption as one text, by long caption"
    ),
    PaperClaim("long-short", "long-sampled", "long", "short captions help beside sentences"),
    PaperClaim("full", "long-short", "long", "the grouping loss helps retrieval"),
    PaperClaim("full", "long-short", "pointing", "the grouping loss helps localization"),
    PaperClaim("k2", "k1", "long", "K = 2 beats 1"),
    PaperClaim("long-short", "k2", "long", "K = 4 beats 2"),
    PaperClaim("k8", "long-short", "long", "K = 8 beats 4"),
    PaperClaim("two-sources", "full", "long", "two caption sources beat one"),
    PaperClaim("three-sources", "two-sources", "long", "three caption sources beat two"),
    PaperClaim(
        "class-token-full", "class-token", "pointing", "the grouping loss helps localization, with a class token"
    ),
    PaperClaim(
        "contrast-batch", "full", "pointing", "contrast with the whole batch localizes better than within the image"
    ),
    PaperClaim(
        "conditioned", "weight-1", "pointing", "picking the image localizes better than the image's caption, weight 1"
    ),
    PaperClaim("class-token-conditioned", "class-token-full", "pointing", "the same with a class token"),
    PaperClaim(
        "class-token-own-values",
        "class-token-conditioned",
        "pointing",
        "patches that exchange nothing localize better",
    ),
)


def config_of(variant: Variant, *, train: str, val: str, seed: int, steps: int, batch_size: int) -> Config:
    """The whole config of one run: the demo's towers, and AdamW; sub-captions drawn uniformly; room for a long caption
    as one text.
    """
    config = demo()
    config.data = dataclasses.replace(
        config.data,
        shards=train,
        val_shards=val,
        caption_sources=_ALL,
        source_weights={},
        num_sub_captions=4,
        eval_source=LONG,
    )
    config.model.context_length, config.model.own_value_blocks = 77, 0
    # Where no variant says otherwise, as in the table of benchmarks/RESULTS.md: the paper's contrast within the image,
    # at the weight that it bears without a class token.
    config.loss = LossConfig(grouping_weight=0.05, threshold=0.5)
    config.model.config["vision_cfg"]["pool_type"] = "avg"
    config.optim.optimizer, config.optim.lr = "adamw", 3e-3
    config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 10)
    config.train = dataclasses.replace(config.train, seed=seed, steps=steps, global_batch_size=batch_size)
    config.checkpoint = dataclasses.replace(config.checkpoint, every_steps=steps, keep_last=1)
    config.eval.every_steps = 0
    for name, value in variant.changes.items():
        if name == "model.pool":
            config.model.config["vision_cfg"]["pool_type"] = value
        else:
            section, key = name.split(".")
            setattr(getattr(config, section), key, value)
    validate(config)
    return config
