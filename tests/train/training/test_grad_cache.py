"""Gradient caching: the one-pass step's losses and weights at any chunk, on one rank and on two;
patch dropout replayed; what it can't do refused.
"""

import copy
import math

import pytest
import torch
from tiny import GLOBAL_BATCH, STEPS, TOWERS, batch, tiny_config, tiny_engine, tiny_model

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.model.build import build_model
from dreamlip_train.training.engine.engine import evaluation_model
from dreamlip_train.training.engine.optimizer import learning_rate
from dreamlip_train.training.grad_cache import _features, cached_train_step, split_batch
from dreamlip_train.training.step import move_batch, train_step

LOSSES = {
    "both": {},
    "contrastive": {"grouping_weight": 0.0},
    "grouping": {"mpcl_weight": 0.0},
    "one softmax": {"negatives": "all", "positives": "logsum"},
    "sigmoid": {"pairs": "sigmoid"},
    "over the batch": {"contrast": "batch"},
    "raw over the batch": {"contrast": "batch", "normalize_patches": False, "mpcl_weight": 0.0},
}


def run(stage: int, chunk: int, options: dict, steps: int = 6, rank: int = 0, world_size: int = 1):
    """Losses of ``steps`` steps and the weights after them."""
    config = tiny_config(stage, chunk_size=chunk)
    config.model.init_logit_bias = -2.0 if options.get("pairs") == "sigmoid" else None
    engine, loss_fn, losses = tiny_engine(config), DreamLIPLoss(**options), []
    patches = loss_fn.grouping_weight > 0
    for step in range(steps):
        data, lr = batch(step, rank, world_size), learning_rate(step, STEPS, config.optim)
        if chunk:
            result = cached_train_step(
                engine,
                loss_fn,
                [
                    move_batch(part, engine.device)
                    for part in split_batch(data, -(-GLOBAL_BATCH // world_size // chunk))
                ],
                lr,
                patches=patches,
            )
        else:
            result = train_step(engine, loss_fn, move_batch(data, engine.device), lr, patches=patches)
        assert result.applied
        losses.append({name: float(value) for name, value in result.losses.items()} | {"grad_norm": result.grad_norm})
    # A key's bias shifts all logits of a softmax alike: its gradient is rounding, which Adam makes into steps of full
    # size.
    with evaluation_model(engine, config.model) as model:
        return losses, [p.detach().clone() for name, p in model.named_parameters() if not name.endswith("in_proj_bias")]


@pytest.fixture(scope="module")
def one_pass():
    return {name: run(1, 0, options) for name, options in LOSSES.items()}


@pytest.mark.parametrize(
    ("stage", "chunk", "loss"),
    [
        (1, 2, "both"),
        (2, 4, "both"),
        (1, 1, "both"),
        (1, 4, "contrastive"),
        (2, 2, "grouping"),
        (1, 2, "one softmax"),
        (1, 4, "sigmoid"),
        (0, 2, "both"),
        (3, 2, "both"),
        (1, 2, "over the batch"),
        (3, 4, "raw over the batch"),
    ],
)
def test_it_is_the_one_pass_step(one_pass, stage, chunk, loss):
    losses, weights = run(stage, chunk, LOSSES[loss])
    expected_losses, expected = one_pass[loss]
    for got, want in zip(losses, expected_losses, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-5 if name == "grad_norm" else 1e-6, abs=1e-6), name
    for got, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_plain_accumulation_would_be_another_loss(one_pass):
    """What caching is for: the mean of the chunks' own losses has fewer negatives."""
    config = tiny_config(1)
    engine, data = tiny_engine(config), batch(0)
    parts = [engine.module(part["images"], part["text"]) for part in split_batch(data, 4)]
    masks = [part["text_mask"] for part in split_batch(data, 4)]
    loss_fn = DreamLIPLoss(grouping_weight=0.0)
    own = [
        loss_fn(part["image_features"], part["text_features"], part["logit_scale"], text_mask=m).item()
        for part, m in zip(parts, masks, strict=True)
    ]
    assert sum(own) / len(own) < 0.6 * one_pass["contrastive"][0][0]["contrastive_loss"]


def test_patch_dropout_drops_the_same_patches_in_both_passes():
    towers = copy.deepcopy(TOWERS)
    towers["vision_cfg"]["patch_dropout"] = 0.5
    config = tiny_config(1, chunk_size=4)
    config.model = tiny_model(config=towers)
    engine = tiny_engine(config)
    assert engine.module.training
    loss_fn, chunks = (
        DreamLIPLoss(grouping_weight=0.0),
        [move_batch(part, engine.device) for part in split_batch(batch(3), 2)],
    )
    model = build_model(config.model, config.train.seed)  # the same weights, every chunk's graph kept
    torch.manual_seed(5)
    outs = [model(chunk["images"], chunk["text"], False) for chunk in chunks]
    loss = loss_fn(
        torch.cat([out["image_features"] for out in outs]),
        torch.cat([out["text_features"] for out in outs]),
        outs[0]["logit_scale"],
        text_mask=torch.cat([chunk["text_mask"] for chunk in chunks]),
    )
    norm = float(
        torch.linalg.vector_norm(
            torch.stack(
                [
                    g.norm()
                    for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                    if g is not None
                ]
            )
        )
    )
    torch.manual_seed(5)
    result = cached_train_step(engine, loss_fn, chunks, 1e-3, patches=False)
    assert float(result.losses["contrastive_loss"]) == pytest.approx(
        loss.item(), rel=1e-6
    ) and result.grad_norm == pytest.approx(norm, rel=1e-5)
    after = torch.rand(1)
    torch.manual_seed(5)
    _features(engine, loss_fn, chunks, False)
    assert torch.equal(torch.rand(1), after), "the random stream goes on as if there had been one pass"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_leaves_the_weights_and_the_next_step_alone(stage):
    config = tiny_config(stage, chunk_size=4)
    engine, loss_fn = tiny_engine(config), DreamLIPLoss()
    before = [p.detach().clone() for p in engine.module.parameters()]
    data = batch(0)
    bad = data | {"images": data["images"].float() / 255}
    bad["images"][5, 0, 0, 0] = math.nan
    chunks = lambda given: [move_batch(part, engine.device) for part in split_batch(given, 2)]  # noqa: E731
    result = cached_train_step(engine, loss_fn, chunks(bad), 1e-3)
    assert not result.applied and all(
        torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True)
    )
    assert cached_train_step(engine, loss_fn, chunks(data), 1e-3).applied
    assert any(not torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))


def test_chunks_of_unlike_sizes_are_one_batch(one_pass):
    losses, weights = run(1, 3, {})  # 8 images as 3 + 3 + 2
    assert [got["contrastive_loss"] for got in losses] == pytest.approx(
        [want["contrastive_loss"] for want in one_pass["both"][0]], rel=1e-6
    )
    for got, want in zip(weights, one_pass["both"][1], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_under_zero_0_a_gradient_that_is_not_finite_is_not_applied():
    """Its optimizer would write a NaN into every weight."""
    config = tiny_config(0, chunk_size=4)
    engine, loss_fn = tiny_engine(config), DreamLIPLoss()
    before = [p.detach().clone() for p in engine.module.parameters()]
    chunks = [move_batch(part, engine.device) for part in split_batch(batch(0), 2)]
    hook = engine.module.clip.visual.proj.register_hook(lambda grad: grad * math.inf)
    assert not cached_train_step(engine, loss_fn, chunks, 1e-3).applied
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    result = cached_train_step(engine, loss_fn, chunks, 1e-3)
    assert result.applied and all(torch.isfinite(p).all() for p in engine.module.parameters())
    fresh = tiny_engine(config)
    assert cached_train_step(fresh, loss_fn, chunks, 1e-3).grad_norm == pytest.approx(result.grad_norm, rel=1e-6)
