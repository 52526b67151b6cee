"""Groups of like length: the features and gradients of the padded tower, the fewest padded tokens, and no more groups than pay."""

from itertools import combinations

import pytest
import torch
from caption_lengths import HUMAN, MACHINE, captions
from tiny import run_steps, tiny_config, tiny_engine, tiny_model

from dreamlip_train.config import EngineConfig
from dreamlip_train.engine import move_batch, text_buckets
from dreamlip_train.model import build_model
from dreamlip_train.text_buckets import SMALLEST, length_buckets


@pytest.mark.parametrize("shares", [HUMAN, MACHINE])
def test_the_padded_towers_features_and_gradients(shares):
    model = build_model(tiny_model(context_length=77), seed=1)
    tokens = captions(40 * 8, shares).view(40, 8, 77)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    upstream = torch.randn(40, 8, 32)
    results = []
    for most in (0, 4):
        batch = move_batch({"text": tokens}, torch.device("cpu"), most) if most else {"text": tokens, "buckets": None}
        assert most == 0 or len(batch["buckets"].groups) >= 3
        features = model(images, batch["text"], patches=False, buckets=batch["buckets"])["text_features"]
        names = [
            name
            for name, p in model.named_parameters()
            if name.startswith(("clip.transformer", "clip.token", "clip.positional", "clip.ln_final"))
        ]
        weights = [p for name, p in model.named_parameters() if name in names]
        results.append((features.detach(), torch.autograd.grad(features, weights, upstream)))
    (padded, padded_grads), (grouped, grouped_grads) = results
    torch.testing.assert_close(grouped, padded, atol=1e-5, rtol=0)
    for got, expected in zip(grouped_grads, padded_grads, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("shares, saved", [(HUMAN, 2.2), (MACHINE, 2.6)])
def test_the_towers_work_follows_the_tokens(shares, saved):
    """Token positions computed: of a context of 77, of the longest caption, of four groups."""
    tokens = captions(2048, shares)
    buckets = length_buckets(tokens, 4)
    computed = sum(len(rows) * length for rows, length in buckets.groups)
    assert tokens.numel() / computed >= saved
    assert sorted(torch.cat([rows for rows, _ in buckets.groups]).tolist()) == list(range(2048))
    for rows, length in buckets.groups:
        assert len(rows) >= SMALLEST and int(tokens[rows].argmax(dim=-1).max()) < length
    assert torch.equal(torch.cat([rows for rows, _ in buckets.groups])[buckets.inverse], torch.arange(2048))


def test_no_other_choice_of_groups_computes_less():
    tokens = captions(300, HUMAN, seed=3)
    rounded = ((tokens.argmax(dim=-1) + 1 + 7) // 8 * 8).clamp(max=77).tolist()
    lengths = sorted(set(rounded))
    best = len(rounded) * lengths[-1]
    for size in range(1, 3):
        for inner in combinations(lengths[:-1], size):
            bounds = [*inner, lengths[-1]]
            members = [[x for x in rounded if low < x <= high] for low, high in zip([0, *bounds], bounds, strict=False)]
            if min(map(len, members)) >= SMALLEST:
                best = min(best, sum(len(part) * bound for part, bound in zip(members, bounds, strict=True)))
    found = length_buckets(tokens, 3)
    longest = max(rounded)
    assert sum(len(rows) * (min(longest, -(-length // 8) * 8) if length != 77 else 77) for rows, length in found.groups) == best


def test_one_group_where_more_do_not_pay():
    assert length_buckets(captions(SMALLEST, HUMAN), 4) is None, "too few captions"
    same = captions(500, (0, 0, 100.0, 0, 0, 0, 0, 0))
    assert length_buckets(same, 4) is None, "all of like length"
    assert length_buckets(captions(500, HUMAN), 1) is None
    assert length_buckets(torch.zeros(0, 77, dtype=torch.long), 4) is None
    given = ({}, {"zero_stage": 3}, {"compile": True}, {"text_buckets": 2})
    assert [text_buckets(EngineConfig(**change)) for change in given] == [4, 1, 4, 2]


def test_a_compiled_tower_takes_any_groups():
    """Dynamo's part of torch.compile: after the first step no number of captions and no length is traced again."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (build_model(tiny_model(context_length=77), seed=0) for _ in range(2))
    compiled.compile_towers(backend="eager")
    graphs, seen = [], set()
    for step in range(4):
        tokens = captions(96, HUMAN, seed=step).view(12, 8, 77)
        images, buckets = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), length_buckets(tokens, 4)
        seen |= {(len(rows), length) for rows, length in buckets.groups}
        ours, theirs = compiled(images, tokens, True, buckets), plain(images, tokens, True, buckets)
        for name in ("image_features", "patch_features", "text_features"):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(seen) > 8 and graphs == [2, 2, 2, 2]


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_uncompiled_one():
    """What engine.compile builds, with the compiler behind it, under ZeRO-1; its kernels round otherwise."""
    losses = [run_steps(tiny_engine(config), config, 0, 5) for config in (tiny_config(1), tiny_config(1, compile=True))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
