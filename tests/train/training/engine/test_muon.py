"""Muon against the singular value decomposition, against torch's own, and in the engine against a plain loop."""

import pytest
import torch
from tiny import STEPS, batch, run_steps, tiny_config, tiny_engine

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.config.validation import validate
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.training.engine.muon import Muon, orthogonal
from dreamlip_train.training.engine.optimizer import learning_rate, parameter_groups


def muon_config(**changes):
    config = tiny_config(0, **changes)
    config.optim.optimizer, config.optim.muon_lr_scale = "muon", 3.0
    return config


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e12])
def test_orthogonal_keeps_the_singular_vectors_and_evens_out_the_values(shape, size):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    seen = u.mT @ orthogonal(matrix * size) @ vt.mT
    assert torch.allclose(seen, torch.diag(seen.diagonal()), atol=1e-10), "no vector is mixed with another"
    large = values > 0.1 * values.max()
    assert seen.diagonal()[large].min() > 0.65 and seen.diagonal().max() < 1.25
    assert large.sum() >= 9
    assert torch.equal(orthogonal(matrix * 0), matrix * 0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
def test_a_step_is_that_of_torchs_own_but_for_its_bfloat16():
    weights = [torch.randn(shape) for shape in ((12, 30), (30, 12))]
    ours, theirs = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    first = Muon([{"params": ours, "matrices": 1, **options}])
    second = torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.clone()
        before = [a.detach().clone() for a in ours]
        first.step()
        second.step()
        for old, a, b in zip(before, ours, theirs, strict=True):
            assert (a - b).norm() < 0.03 * (a - old).norm()
            with torch.no_grad():
                b.copy_(a)


def test_blocks_move_by_muon_and_all_else_by_adamw():
    config = muon_config()
    model = build_model(config.model, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config.optim)
    matrices = {names[id(p)]: group["matrices"] for group in groups if "matrices" in group for p in group["params"]}
    assert len(matrices) == 4 * 4  # four weights per block, two blocks per tower
    assert all("resblocks" in name and name.endswith("weight") for name in matrices)
    assert {name for name, count in matrices.items() if count == 3} == {n for n in matrices if "in_proj" in n}
    assert set(matrices.values()) == {1, 3}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_the_engine_follows_a_plain_loop():
    config = muon_config()
    model, loss_fn = build_model(config.model, config.train.seed), DreamLIPLoss()
    groups = parameter_groups(model, config.optim)
    adamw = torch.optim.AdamW([group for group in groups if "matrices" not in group], betas=(0.9, 0.98), eps=1e-8)
    weights = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    momentum, losses = [torch.zeros_like(p) for p in weights], []
    for step in range(STEPS):
        data, lr = batch(step), learning_rate(step, STEPS, config.optim)
        loss = loss_fn(**model(data["images"], data["text"]), text_mask=data["text_mask"])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        with torch.no_grad():
            for p, m in zip(weights, momentum, strict=True):
                m.copy_(0.95 * m + 0.05 * p.grad)
                parts = (0.05 * p.grad + 0.95 * m).split(p.shape[1] if p.shape[0] == 3 * p.shape[1] else len(p))
                update = torch.cat([orthogonal(part) * 0.2 * max(part.shape) ** 0.5 for part in parts])
                p -= 3 * lr * (update + config.optim.weight_decay * p)
        losses.append(loss.item())
    assert run_steps(tiny_engine(config), config, 0, STEPS) == pytest.approx(losses, rel=2e-6, abs=0)
    assert losses[-1] < losses[0]


def test_towers_without_blocks_have_nothing_to_move():
    config = muon_config()
    model = build_model(config.model, 0)
    model.clip.visual.transformer, model.clip.transformer = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"optim\.optimizer: got 'muon'; no tower"):
        parameter_groups(model, config.optim)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_moves_nothing_is_refused(scale):
    config = muon_config()
    config.optim.muon_lr_scale = scale
    with pytest.raises(UserError, match=r"optim\.muon_lr_scale: got"):
        validate(config)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (0, "bf16")])
def test_where_the_optimizer_sees_no_matrices_it_is_refused(stage, precision):
    config = muon_config(precision=precision)
    config.deepspeed.zero_stage = stage
    with pytest.raises(UserError, match=r"optim\.optimizer: got 'muon'; .*zero_stage=0"):
        validate(config)
