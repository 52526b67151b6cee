"""What of the trainer is another on a CUDA device: attention within packed rows, compiled towers,
batches that travel on a stream of their own.
"""

import pytest
import torch
from caption_lengths import HUMAN, captions

pytest.importorskip("open_clip", reason="the train extra is not installed")
from tiny import TOWERS, tiny_model

from dreamlip_train.model.build import build_model
from dreamlip_train.model.packing import pack_captions
from dreamlip_train.training.prefetch import prefetched
from dreamlip_train.training.step import move_batch

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def text_model():
    """A text tower of CLIP's own width and heads, whose attention takes the kernels that training takes."""
    towers = TOWERS | {"embed_dim": 512, "text_cfg": {"width": 512, "heads": 8, "layers": 3}}
    return build_model(tiny_model(config=towers, context_length=77), seed=0).to(DEVICE)


def features_and_gradient(model, text):
    images = torch.zeros(
        len(text.ends) // 8 if not isinstance(text, torch.Tensor) else len(text),
        3,
        32,
        32,
        dtype=torch.uint8,
        device=DEVICE,
    )
    features = model(images, text, patches=False)["text_features"]
    upstream = torch.linspace(-1, 1, features.numel(), device=DEVICE).view(features.shape)
    weight = model.clip.transformer.resblocks[0].attn.in_proj_weight
    return features.detach(), torch.autograd.grad(features, weight, upstream)[0]


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("amp_bf16", 2e-2)])
def test_packed_captions_have_the_padded_towers_features_and_gradients(precision, tolerance):
    model, tokens = text_model(), captions(400, HUMAN).view(50, 8, 77)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision != "fp32"):
        padded, packed = (features_and_gradient(model, text.to(DEVICE)) for text in (tokens, pack_captions(tokens)))
    for got, expected in zip(packed, padded, strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()


def test_the_compiled_tower_gives_what_the_uncompiled_one_gives():
    plain, compiled = text_model(), text_model()
    compiled.compile_towers()
    for seed in range(3):
        text = pack_captions(captions(400, HUMAN, seed=seed).view(50, 8, 77)).to(DEVICE)
        for got, expected in zip(
            features_and_gradient(compiled, text), features_and_gradient(plain, text), strict=True
        ):
            assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_prefetched_batches_arrive_whole_while_the_device_computes():
    """Each batch is read only after long work of the step's stream, when the next ones have long been copied:
    memory given away too early shows.
    """
    given = [
        torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i in range(30)
    ]
    loaded = (
        {"images": images.pin_memory(), "text": captions(64, HUMAN, seed=i).view(16, 4, 77)}
        for i, images in enumerate(given)
    )
    busy = torch.randn(4096, 4096, device=DEVICE)
    sums = []
    for _, moved in prefetched(loaded, lambda batch: move_batch(batch, DEVICE), DEVICE):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append((moved["images"].long().sum(), moved["text"].tokens.sum()))
        del moved
    expected = [
        (images.long().sum(), pack_captions(captions(64, HUMAN, seed=i)).tokens.sum()) for i, images in enumerate(given)
    ]
    assert [tuple(int(v) for v in pair) for pair in sums] == [tuple(int(v) for v in pair) for pair in expected]
