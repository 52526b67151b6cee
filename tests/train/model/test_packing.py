"""Packed captions: every token once and in place, the features and gradients of the padded tower,
hardly a position wasted.
"""

import pytest
import torch
from caption_lengths import HUMAN, MACHINE, captions
from tiny import run_steps, tiny_config, tiny_engine, tiny_model
from torch import nn

from dreamlip_train.model.build import build_model
from dreamlip_train.model.packing import RowAttention, pack_captions, row_mask
from dreamlip_train.training.step import move_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("shares", [HUMAN, MACHINE])
def test_the_padded_towers_features_and_gradients(shares, pack):
    model = build_model(tiny_model(context_length=77), seed=1)
    tokens = captions(40 * 8, shares).view(40, 8, 77)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    upstream = torch.randn(40, 8, 32)
    weights = [
        p
        for name, p in model.named_parameters()
        if not name.startswith(("clip.visual", "local_proj", "clip.logit", "logit"))
    ]
    assert len(weights) > 10
    results = []
    for text in (tokens, move_batch({"text": tokens}, CPU, pack)["text"]):
        features = model(images, text, patches=False)["text_features"]
        results.append((features.detach(), torch.autograd.grad(features, weights, upstream)))
    (padded, padded_grads), (packed, packed_grads) = results
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    for got, expected in zip(packed_grads, padded_grads, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("context", [77, 32, 248])
@pytest.mark.parametrize("count", [0, 1, 2, 37, 500])
def test_every_token_of_every_caption_stands_once_in_order(count, context):
    tokens = captions(count, HUMAN, context=context, seed=count) if count else torch.zeros(0, context, dtype=torch.long)
    packed = pack_captions(tokens)
    assert packed.tokens.shape[1] % 16 == 0 and context <= packed.tokens.shape[1] < context + 16
    flat = [part.flatten() for part in (packed.tokens, packed.positions, packed.captions)]
    for i, row in enumerate(tokens):
        size = int(row.argmax()) + 1
        places = (flat[2] == i).nonzero().flatten()
        assert places.tolist() == list(range(int(places[0]), int(places[0]) + size)), "not in one piece"
        assert places[0] // packed.tokens.shape[1] == places[-1] // packed.tokens.shape[1], "over the end of a row"
        assert torch.equal(flat[0][places], row[:size]) and torch.equal(flat[1][places], torch.arange(size))
        assert packed.ends[i] == places[-1]
    assert int((flat[2] >= 0).sum()) == sum(int(row.argmax()) + 1 for row in tokens)


@pytest.mark.parametrize("shares", [HUMAN, MACHINE])
@pytest.mark.parametrize("count, filled", [(128, 0.96), (4096, 0.98)])
def test_hardly_a_position_is_wasted(shares, count, filled):
    tokens = captions(count, shares)
    packed = pack_captions(tokens)
    assert int((tokens.argmax(dim=-1) + 1).sum()) >= filled * packed.tokens.numel()


def test_a_caption_sees_itself_up_to_now_and_nothing_else():
    mask = row_mask(torch.tensor([[4, 4, 0, 0, 0, -1], [1, 1, 1, 1, 1, 1]]), torch.float32)
    seen = [
        ["X.....", "XX....", "..X...", "..XX..", "..XXX.", ".....X"],
        ["X" + "." * 5, *("X" * i + "." * (6 - i) for i in range(2, 7))],
    ]
    assert ["".join("X" if v == 0 else "." for v in row) for row in mask[0, 0].tolist()] == seen[0]
    assert ["".join("X" if v == 0 else "." for v in row) for row in mask[1, 0].tolist()] == seen[1]
    assert mask.isneginf().sum() + (mask == 0).sum() == mask.numel()


def test_row_attention_is_multihead_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x, mask = torch.randn(3, 6, 32), torch.full((6, 6), -torch.inf).triu(1)
    expected = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
    attention.__class__ = RowAttention
    for given in (mask, mask.expand(3, 1, 6, 6)):
        torch.testing.assert_close(attention(x, x, x, attn_mask=given)[0], expected)


def test_a_compiled_tower_takes_any_number_of_rows():
    """Dynamo's part of torch.compile: one graph a tower, and after the first step nothing is traced again."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (build_model(tiny_model(context_length=77), seed=0) for _ in range(2))
    compiled.compile_towers(backend="eager")
    graphs, seen = [], set()
    for step in range(6):
        tokens = captions(96, HUMAN, seed=step).view(12, 8, 77)
        images, packed = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), pack_captions(tokens)
        seen.add(len(packed.tokens))
        ours, theirs = compiled(images, packed), plain(images, packed)
        for name in ("image_features", "patch_features", "text_features"):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(seen) >= 3 and graphs == [2] * 6


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_uncompiled_one():
    """What train.compile builds, with the compiler behind it, under ZeRO-1; its kernels round otherwise."""
    losses = [run_steps(tiny_engine(config), config, 0, 5) for config in (tiny_config(1), tiny_config(1, compile=True))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
