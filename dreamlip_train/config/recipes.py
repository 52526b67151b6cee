"""Named training recipes: each returns a whole Config, every number with its source.

The paper (DreamLIP, ECCV 2024) gives the models, 224 px, context 77, 32 epochs, temperature 0.07 and K = 10,
but no batch size, learning rate, decay or loss weights. Those are FLAIR's (CVPR 2025), trained on the same captions,
so the large recipes are reconstructions. Batch sizes are global, and those of FLAIR's paper:
its scripts have 1536 on YFCC15M and 1024 on the merged set. eps of the merged set is its script's.
Gradient clipping is ours.
"""

from __future__ import annotations

from collections.abc import Callable

from dreamlip_train.config.run_schema import (
    CheckpointConfig,
    DeepSpeedConfig,
    LoggingConfig,
    OptimConfig,
    TrainConfig,
)
from dreamlip_train.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
)

# The paper's main tables train on the raw caption and ShareGPT4V's short and long ones.
_PAPER_SOURCES = ("raw_caption", "shortSV_captions", "longSV_captions")
_ALL_SOURCES = (
    "raw_caption",
    *(f"{kind}{mllm}_captions" for mllm in ("IB", "LLA", "SV") for kind in ("short", "long")),
)


def demo() -> Config:
    """A small ViT on the built-in scenes: minutes on two CPU cores."""
    # Measured on the scenes: two layers learn faster than four, a width of 96 faster than 128 (and at a higher rate), a
    # fixed sine-cosine position embedding much faster than a learned one (which starts too weak to say where a color
    # is), twice as many steps of 64 images as of 128 better at the same cost, Muon's 400 steps better than AdamW's 900.
    # A class token, because the mean of the patches as the image's embedding is as well served by patches that tell of
    # everything but themselves: colors then light the complement of their object. Patches keep to themselves in both
    # blocks: what they may exchange they use to tell of the picture instead of their place. The grouping asks which
    # image a sub-caption is of: within the image it falls to nearly 0 by itself on patches that ignore the picture
    # (benchmarks/RESULTS.md). Vague raw and short captions, drawn as often as sentences, hide the objects behind the
    # background. One MLLM's captions, as in the paper's main tables: the shortest wording, half the text to read.
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "width": 96,
        "layers": 2,
        "head_width": 16,
        "pos_embed_type": "sin_cos_2d",
    }
    return Config(
        data=DataConfig(
            shards="data/demo/shards/train",
            val_shards="data/demo/shards/val",
            num_sub_captions=4,
            caption_sources=("raw_caption", "shortIB_captions", "longIB_captions"),
            source_weights={"raw_caption": 0.2, "shortIB_captions": 0.3},
            eval_source="longIB_captions",
            num_workers=1,
        ),
        model=ModelConfig(
            name="demo",
            config={"embed_dim": 128, "vision_cfg": vision, "text_cfg": {"width": 96, "heads": 4, "layers": 1}},
            context_length=32,
            own_value_blocks=2,
        ),
        # Torch code pools: a run of minutes must not begin by compiling C++ for one.
        loss=LossConfig(contrast="conditioned", direction="t2v", grouping_backend="torch"),
        optim=OptimConfig(optimizer="muon", muon_lr_scale=10.0, lr=1e-3, warmup_steps=40, weight_decay=0.05),
        train=TrainConfig(global_batch_size=64, steps=400, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=200, keep_last=2),
        logging=LoggingConfig(every_steps=20),
        # On one rank ZeRO-1 is copies of 5 million weights, most of them a vocabulary's: a fifth of a step on a CPU.
        deepspeed=DeepSpeedConfig(zero_stage=0),
        eval=EvalConfig(every_steps=200, batch_size=100, threshold=0.8),  # at 0.5 the background is lit too
    )


def cc3m_vitb32() -> Config:
    """ViT-B/32 on CC3M: global batch 1024."""
    return _large("ViT-B-32", global_batch_size=1024, weight_decay=0.5)


def cc3m_vitb16() -> Config:
    """ViT-B/16 on CC3M: global batch 1024."""
    return _large("ViT-B-16", global_batch_size=1024, weight_decay=0.5)


def cc12m_vitb32() -> Config:
    """ViT-B/32 on CC12M: global batch 6144."""
    return _large("ViT-B-32", global_batch_size=6144, weight_decay=0.5)


def cc12m_vitb16() -> Config:
    """ViT-B/16 on CC12M: global batch 6144."""
    return _large("ViT-B-16", global_batch_size=6144, weight_decay=0.5)


def yfcc15m_vitb32() -> Config:
    """ViT-B/32 on YFCC15M: global batch 6144."""
    return _large("ViT-B-32", global_batch_size=6144, weight_decay=0.5)


def yfcc15m_vitb16() -> Config:
    """ViT-B/16 on YFCC15M: global batch 6144."""
    return _large("ViT-B-16", global_batch_size=6144, weight_decay=0.5)


def merged30m_vitb32() -> Config:
    """ViT-B/32 on CC3M + CC12M + YFCC15M: global batch 6144."""
    return _merged("ViT-B-32")


def merged30m_vitb16() -> Config:
    """ViT-B/16 on CC3M + CC12M + YFCC15M: global batch 6144."""
    return _merged("ViT-B-16")


def captioners_cc3m_vitb16() -> Config:
    """ViT-B/16 on CC3M with the captions of all three MLLMs: the paper's Table 7, last row."""
    config = cc3m_vitb16()
    config.data.caption_sources = _ALL_SOURCES  # how the paper shares the draws among them is not published
    return config


def laion_coyo_vitb16() -> Config:
    """ViT-B/16 on the recaptioned LAION-49M and COYO-24M, or subsets of them: raw and long captions, global batch
    6144.
    """
    # Neither the paper nor FLAIR trains on these: the settings are those of the merged set, the next in size.
    config = _large("ViT-B-16", global_batch_size=6144, weight_decay=0.2, eps=1e-6)
    config.data.caption_sources = ("raw_caption", "longSV_captions")  # there are no short ones
    config.data.mixture = {name: f"shards/{name}" for name in ("laion49m", "coyo24m")}
    return config


def clip_cc3m_vitb16() -> Config:
    """Baseline: CLIP on CC3M's raw captions, on this trainer."""
    return _without_grouping(cc3m_vitb16(), sources=("raw_caption",), k=1)


def laclip_cc3m_vitb16() -> Config:
    """Baseline: one caption per image and step, drawn from raw, short and sentences (LaCLIP's text augmentation;
    Fan et al., 2023).
    """
    return _without_grouping(cc3m_vitb16(), sources=_PAPER_SOURCES, k=1)


def stablerep_cc3m_vitb16() -> Config:
    """Baseline: K captions as positives of one softmax over all captions of the batch (StableRep's multi-positive loss;
    Tian et al., 2023).
    """
    config = _without_grouping(cc3m_vitb16(), sources=_PAPER_SOURCES, k=10)
    config.loss.negatives = "all"
    return config


def sigmoid_cc3m_vitb16() -> Config:
    """Baseline: every image-caption pair a question of its own, K positives an image (FLAIR's global loss;
    Xiao et al., 2025).
    """
    config = _without_grouping(cc3m_vitb16(), sources=_PAPER_SOURCES, k=10)
    config.loss.pairs = "sigmoid"
    config.model.init_temperature, config.model.init_logit_bias = 0.1, -10.0  # SigLIP, and open_clip's --siglip
    return config


def _without_grouping(config: Config, *, sources: tuple[str, ...], k: int) -> Config:
    """The recipe with the contrastive loss alone: nothing else differs, so that rows compare."""
    config.data.caption_sources, config.data.num_sub_captions = sources, k
    config.loss.grouping_weight, config.model.local_logit_scale = 0.0, False
    return config


def _merged(model: str) -> Config:
    config = _large(model, global_batch_size=6144, weight_decay=0.2, eps=1e-6)
    # In proportion to their sizes: every sample once an epoch, and each step has all three sets.
    config.data.mixture = {name: f"shards/{name}" for name in ("cc3m", "cc12m", "yfcc15m")}
    return config


def _large(model: str, *, global_batch_size: int, weight_decay: float, eps: float = 1e-8) -> Config:
    return Config(
        data=DataConfig(
            num_sub_captions=10,  # paper: K = 10
            sampling="uniform",  # paper, eq. 4 (the released code draws the raw caption first: "raw_first")
            caption_sources=_PAPER_SOURCES,
            crop_scale=(0.9, 1.0),  # DreamLIP's released default
            num_workers=8,
            shuffle_buffer=5000,
        ),
        model=ModelConfig(name=model, context_length=77, init_temperature=0.07),  # paper
        # Ours: sigma = 1 / number of patches (the paper gives neither sigma nor the loss weights, so 1 and 1), and the
        # contrast over images (contrast="image" is the paper's): the one that localizes at weight 1 with a class token
        # (benchmarks/RESULTS.md: towers of two blocks, 1000 steps; three seeds each on photographs and on scenes).
        # It finds twice as much where patches exchange nothing in any block, and no more where they exchange nothing in
        # the last alone. Without exchange in twelve blocks a patch knows its own pixels only; how many would do nobody
        # has measured, and recall on photographs fell with them: model.own_value_blocks stays 0.
        loss=LossConfig(contrast="conditioned", direction="t2v"),
        optim=OptimConfig(
            lr=5e-4,
            beta1=0.9,
            beta2=0.98,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=2000,
            final_lr_fraction=0.0,  # FLAIR
        ),
        train=TrainConfig(
            global_batch_size=global_batch_size,
            chunk_size=global_batch_size // 8,  # on 8 ranks a rank's whole share; on fewer, gradient caching
            epochs=32,  # paper and FLAIR
            precision="amp_bf16",
            grad_checkpointing=global_batch_size > 2048,
        ),
        deepspeed=DeepSpeedConfig(zero_stage=1),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        cc3m_vitb32,
        cc3m_vitb16,
        cc12m_vitb32,
        cc12m_vitb16,
        yfcc15m_vitb32,
        yfcc15m_vitb16,
        merged30m_vitb32,
        merged30m_vitb16,
        captioners_cc3m_vitb16,
        laion_coyo_vitb16,
        clip_cc3m_vitb16,
        laclip_cc3m_vitb16,
        stablerep_cc3m_vitb16,
        sigmoid_cc3m_vitb16,
    )
}
