"""The training step: this trainer's against the loop people run today, same towers, same batch, same run.

make bench        or        pytest benchmarks/bench_train_step.py --benchmark-only --benchmark-group-by=func,param:model

today     open_clip's own towers on captions padded to 77, its ClipLoss on each of the K slots, eager patch grouping,
          AdamW as open_clip makes it
ours      captions packed, the fused losses, fused AdamW
settings  the step of ours with one setting changed: what each of them is worth
Caption lengths are those measured on human sub-captions (tests/support/inputs/caption_lengths.py).
float32 on a CPU, bfloat16 autocast on a GPU.
"""

import pytest
import torch
from caption_lengths import HUMAN, captions
from shapes import DEVICE

from dreamlip_kernels import DreamLIPLoss, reference

K = 8
SETTINGS = {
    "shipped": {},
    "compiled": {"compile": True},
    "captions cropped": {"pack_captions": False},
    "grad checkpointing": {"grad_checkpointing": True},
    "other precision": {"other_precision": True},  # bfloat16 autocast on a CPU, float32 on a GPU
}
BATCH = 16 if DEVICE == "cpu" else 512
MODELS = ["ViT-B-32", "ViT-B-16"]


@pytest.fixture(scope="module", params=MODELS)
def dreamlip(request):
    pytest.importorskip("open_clip", reason="the train extra is not installed")
    from dreamlip_train.config.schema import ModelConfig
    from dreamlip_train.model.build import build_model

    return build_model(ModelConfig(name=request.param), seed=0).to(DEVICE)


def batch():
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    return {"images": images, "text": captions(BATCH * K, HUMAN).view(BATCH, K, 77)}


def to_device(host_batch, pack=True):
    from dreamlip_train.training.step import move_batch

    return move_batch(host_batch, torch.device(DEVICE), pack)


def autocast(other=False):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=(DEVICE == "cuda") != other)


@pytest.mark.parametrize("captions_as", ["padded", "cropped", "packed"])
def test_text_tower(run, dreamlip, captions_as):
    if dreamlip.grid != (7, 7):
        pytest.skip("the text tower of ViT-B/32 once more")
    host_batch = batch()
    tokens = host_batch if captions_as == "padded" else to_device(host_batch, captions_as == "packed")
    text = tokens["text"].to(DEVICE)

    def step():
        with autocast():
            features = (
                dreamlip._text_features(text.flatten(0, 1))
                if isinstance(text, torch.Tensor)
                else dreamlip._packed_text_features(text.tokens, text.positions, text.captions, text.ends)
            )
        features.square().sum().backward()
        dreamlip.zero_grad()

    run(step, rounds=3, images=BATCH)


@pytest.mark.parametrize("loop", ["today", "ours"])
def test_train_step(run, dreamlip, loop):
    optimizer = torch.optim.AdamW(dreamlip.parameters(), lr=1e-5, fused=loop == "ours" or None)
    host_batch = batch()
    clip_loss, dreamlip_loss = pytest.importorskip("open_clip").loss.ClipLoss(), DreamLIPLoss()
    from dreamlip_train.model.packing import RowAttention

    for block in dreamlip.clip.transformer.resblocks:  # open_clip's own attention for today's loop
        block.attn.__class__ = torch.nn.MultiheadAttention if loop == "today" else RowAttention

    def today():
        images, text = host_batch["images"].to(DEVICE), host_batch["text"].to(DEVICE)
        with autocast():  # the losses too, as in open_clip's loop
            features = dreamlip(images, text)
            image, texts = features["image_features"], features["text_features"]
            loss = sum(clip_loss(image, texts[:, k], features["logit_scale"]) for k in range(K)) / K
            return loss + reference.subcaption_grouping_loss(
                features["patch_features"], texts, features["logit_scale_local"]
            )

    def ours():
        ready = to_device(host_batch)
        with autocast():
            features = dreamlip(ready["images"], ready["text"])
        return dreamlip_loss(**features)

    def step():
        (today if loop == "today" else ours)().backward()
        optimizer.step()
        optimizer.zero_grad()

    run(step, rounds=3, images=BATCH)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS[:1] if DEVICE == "cpu" else MODELS[1:])
def test_setting(run, model, setting):
    pytest.importorskip("open_clip", reason="the train extra is not installed")
    from dreamlip_train.config.schema import ModelConfig
    from dreamlip_train.model.build import build_model

    options = SETTINGS[setting]
    dreamlip = build_model(ModelConfig(name=model), seed=0).to(DEVICE)
    if "grad_checkpointing" in options:
        dreamlip.clip.set_grad_checkpointing()
    if "compile" in options:
        dreamlip.compile_towers()
    optimizer = torch.optim.AdamW(dreamlip.parameters(), lr=1e-5, fused=True)
    host_batch, loss_fn = batch(), DreamLIPLoss()

    def step():
        ready = to_device(host_batch, options.get("pack_captions", True))
        with autocast(options.get("other_precision", False)):
            features = dreamlip(ready["images"], ready["text"])
        loss_fn(**features).backward()
        optimizer.step()
        optimizer.zero_grad()

    run(step, rounds=3, images=BATCH, warmup=1)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("model", MODELS[:1] if DEVICE == "cpu" else MODELS[1:])
def test_gradient_caching(run, model, chunks):
    """train.chunk_size through the real engine: a whole step in one pass, and in four chunks that go through the towers
    twice.
    """
    pytest.importorskip("deepspeed", reason="the train extra is not installed")
    from dreamlip_train.config.run_schema import TrainConfig
    from dreamlip_train.config.schema import Config, ModelConfig
    from dreamlip_train.model.build import build_model
    from dreamlip_train.training.distributed import init_distributed
    from dreamlip_train.training.engine.engine import build_engine
    from dreamlip_train.training.grad_cache import cached_train_step, split_batch
    from dreamlip_train.training.step import train_step

    config = Config(
        model=ModelConfig(name=model),
        train=TrainConfig(
            global_batch_size=BATCH,
            chunk_size=BATCH // chunks,
            precision="fp32" if DEVICE == "cpu" else "amp_bf16",
        ),
    )
    engine = build_engine(build_model(config.model, seed=0), config, init_distributed())
    host_batch, loss_fn = batch() | {"text_mask": torch.ones(BATCH, K, dtype=torch.bool)}, DreamLIPLoss()

    def step():
        if chunks > 1:
            cached_train_step(engine, loss_fn, [to_device(chunk) for chunk in split_batch(host_batch, chunks)], lr=1e-5)
        else:
            train_step(engine, loss_fn, to_device(host_batch), lr=1e-5)

    run(step, rounds=3, images=BATCH, warmup=1)


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_step(run, dreamlip, fused):
    """optim.fused, by itself: in a whole step it is a few per cent."""
    optimizer = torch.optim.AdamW(dreamlip.parameters(), lr=1e-5, fused=fused)
    for parameter in dreamlip.parameters():
        parameter.grad = torch.randn_like(parameter)
    run(optimizer.step)
    dreamlip.zero_grad()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_patch_embedding(run, dreamlip, layout):
    """train.channels_last, by itself: pixels as the loader has them, normalized, through the first layer,
    forward and backward.
    """
    images = batch()["images"].contiguous(memory_format=torch.channels_last).to(DEVICE)
    conv = dreamlip.clip.visual.conv1

    def step():
        with autocast():
            conv((images / 255.0).to(conv.weight.dtype, memory_format=layout)).float().square().sum().backward()
        conv.zero_grad()

    run(step)
