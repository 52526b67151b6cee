"""The DeepSpeed engine against plain torch, at every ZeRO stage and precision, and what happens to values that are not
finite.
"""

import math

import pytest
import torch
from tiny import STEPS, batch, run_steps, tiny_config, tiny_engine, tiny_model

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.config.run_schema import DeepSpeedConfig, OptimConfig
from dreamlip_train.config.schema import Config
from dreamlip_train.model.build import build_model
from dreamlip_train.training.engine.deepspeed_config import check_deepspeed_config, deepspeed_config
from dreamlip_train.training.engine.engine import evaluation_model
from dreamlip_train.training.engine.optimizer import learning_rate, parameter_groups
from dreamlip_train.training.step import move_batch, train_step


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_follows_plain_torch(stage, torch_losses):
    config = tiny_config(stage)
    assert run_steps(tiny_engine(config), config, 0, STEPS) == pytest.approx(torch_losses, rel=1e-6, abs=0)
    assert torch_losses[-1] < torch_losses[0]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "amp_bf16"), (1, "amp_bf16"), (3, "amp_bf16"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_16_bit_precisions_stay_near_fp32(stage, precision, torch_losses):
    config = tiny_config(stage, precision)
    assert run_steps(tiny_engine(config), config, 0, 4) == pytest.approx(torch_losses[:4], abs=0.1)


def test_bf16_without_zero_takes_no_hidden_first_step():
    """DeepSpeed's bf16 ZeRO-0 optimizer steps once with zero gradients to allocate its state:
    weights decayed once more, Adam's bias correction began at 2.
    """
    first_losses = []
    for stage in (0, 1):
        config = tiny_config(stage, "bf16")
        first_losses.append(run_steps(tiny_engine(config), config, 0, 3))
    assert first_losses[0] == pytest.approx(first_losses[1], abs=2e-3)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "amp_bf16"), (3, "fp32")])
def test_values_that_are_not_finite_leave_the_weights_alone(stage, precision):
    config = tiny_config(stage, precision)
    engine = tiny_engine(config)
    loss_fn = DreamLIPLoss()
    run_steps(engine, config, 0, 2)
    good = move_batch(batch(2), engine.device)
    with evaluation_model(engine, config.model) as model:
        before = {name: p.clone() for name, p in model.named_parameters()}

    bad_pixel = {**good, "images": good["images"].float() / 255}
    bad_pixel["images"][3, 0, 0, 0] = math.nan
    backward_ran = []

    def watched(**features):
        features["image_features"].register_hook(backward_ran.append)
        return loss_fn(**features)

    result = train_step(engine, watched, bad_pixel, 1e-3)
    assert not backward_ran  # skipped before it could poison anything
    assert not result.applied and not math.isfinite(float(sum(result.losses.values())))

    def blow_up(**features):
        losses = loss_fn(**features)
        features["image_features"].register_hook(lambda grad: grad * math.inf)
        return losses

    result = train_step(engine, blow_up, good, 1e-3)
    assert not result.applied and math.isfinite(float(sum(result.losses.values())))
    with evaluation_model(engine, config.model) as model:
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert run_steps(engine, config, 2, 4)[1] > 0  # and training goes on


@pytest.mark.parametrize("stage", [1, 3])
def test_logit_scale_stays_bounded_and_returns(stage):
    config = tiny_config(stage)
    config.model = tiny_model(init_temperature=0.01)
    engine = tiny_engine(config)
    data = move_batch(batch(0), engine.device)
    multipliers = []
    for sign in (-1,) * 4 + (1,) * 8:
        result = train_step(
            engine, lambda sign=sign, **f: {"loss": sign * f["logit_scale"] + 0 * f["image_features"].sum()}, data, 0.01
        )
        multipliers.append(result.scales["logit_scale"].item())
    assert max(multipliers) <= 100.001
    assert multipliers[-1] < 97


def test_gradient_norm_is_reported_alike():
    norms = []
    for stage in (0, 2, 3):
        config = tiny_config(stage)
        engine = tiny_engine(config)
        norms.append(train_step(engine, DreamLIPLoss(), move_batch(batch(0), engine.device), 1e-3).grad_norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_without_grouping_no_patch_features_are_made():
    config = tiny_config()
    config.model = tiny_model(local_logit_scale=False)
    engine = tiny_engine(config)
    loss_fn = DreamLIPLoss(grouping_weight=0)
    result = train_step(engine, loss_fn, move_batch(batch(0), engine.device), 1e-3, patches=False)
    assert set(result.losses) == {"contrastive_loss"} and set(result.scales) == {"logit_scale"}


def test_learning_rate_is_linear_then_cosine():
    optim = OptimConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [learning_rate(step, 12, optim) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55) and rates[12] == pytest.approx(0.1)
    assert learning_rate(0, 10, OptimConfig(lr=1.0, warmup_steps=0)) == 1.0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.55, 10: 0.1}),
        ("constant", {1: 1.0, 6: 1.0, 8: 0.55, 10: 0.1}),
        ("wsd", {1: 1.0, 6: 1.0, 7: 0.55, 10: 0.1}),
    ],
)
def test_the_other_schedules(schedule, rates):
    cooldown = 0 if schedule == "linear" else 4
    optim = OptimConfig(lr=1.0, warmup_steps=2, final_lr_fraction=0.1, schedule=schedule, cooldown_steps=cooldown)
    assert {step: learning_rate(step, 10, optim) for step in rates} == pytest.approx(rates)
    constant = OptimConfig(lr=1.0, warmup_steps=0, schedule="constant")
    assert [learning_rate(step, 10, constant) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]


def test_rates_by_tower_and_layer():
    model = build_model(tiny_model(), seed=0)
    optim = OptimConfig(weight_decay=0.2, vision_lr_scale=0.5, text_lr_scale=2.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in parameter_groups(model, optim) for p in group["params"]}
    named = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert len(scale) == len(named)
    assert named["clip.visual.proj"] == 0.5 and named["clip.text_projection"] == named["clip.ln_final.weight"] == 2.0
    assert named["clip.visual.transformer.resblocks.1.ln_1.weight"] == 0.25
    assert named["clip.transformer.resblocks.0.mlp.c_fc.weight"] == 0.5
    assert named["clip.visual.conv1.weight"] == 0.5 / 8 and named["clip.token_embedding.weight"] == 0.25
    assert named["clip.logit_scale"] == named["logit_scale_local"] == 1.0


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_frozen_tower_stays_and_the_other_learns(stage):
    config = tiny_config(stage)
    config.optim.vision_lr_scale = 0.0
    engine = tiny_engine(config)
    with evaluation_model(engine, config.model) as model:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = run_steps(engine, config, 0, 3)
    with evaluation_model(engine, config.model) as model:
        for name, p in model.named_parameters():
            if name.startswith("clip.visual."):
                assert torch.equal(before[name], p), name
            elif name.startswith("clip.transformer") and name.endswith("c_fc.weight"):
                assert not torch.equal(before[name], p), name
    assert losses[-1] < losses[0]


def test_adamw_is_one_kernel_unless_asked_otherwise(torch_losses):
    for fused in (True, False):
        config = tiny_config(1)
        config.optim.fused = fused
        engine = tiny_engine(config)
        assert engine.optimizer.optimizer.defaults["fused"] is fused
        assert run_steps(engine, config, 0, 5) == pytest.approx(torch_losses[:5], rel=1e-6)


def test_only_matrices_decay():
    model = build_model(tiny_model(), seed=0)
    decayed, plain = parameter_groups(model, OptimConfig(weight_decay=0.2))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names, plain_names = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert decayed["weight_decay"] == 0.2 and plain["weight_decay"] == 0.0
    assert decayed_names | plain_names == set(names.values()) and not decayed_names & plain_names
    assert {"clip.visual.proj", "clip.token_embedding.weight", "clip.positional_embedding"} <= decayed_names
    assert {
        "clip.logit_scale",
        "logit_scale_local",
        "clip.ln_final.weight",
        "clip.visual.class_embedding",
    } <= plain_names
    assert not [name for name in decayed_names if name.endswith("bias") or "ln_" in name]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean zero_optimization"),
        ({"train_batch_size": 4}, "'train_batch_size' is set by train.global_batch_size"),
        ({"gradient_accumulation_steps": 4}, "would shrink its negatives"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is set by the optim section"),
        ({"fp16": {"enabled": True}}, "'fp16' is set by train.precision"),
        ({"zero_optimization": 3}, "zero_optimization must be an object, got 3"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is set by deepspeed.zero_stage"),
    ],
)
def test_deepspeed_settings_are_checked(extra, message):
    with pytest.raises(ValueError, match=f"deepspeed.config: .*{message}"):
        check_deepspeed_config(extra)


def test_deepspeed_settings_are_merged_last():
    config = deepspeed_config(
        Config(
            deepspeed=DeepSpeedConfig(zero_stage=2, config={"zero_optimization": {"reduce_bucket_size": 1000}}),
            optim=OptimConfig(grad_clip_norm=0.5),
        ),
        ranks=1,
    )
    assert (
        config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000} and config["gradient_clipping"] == 0.5
    )


def test_a_key_deepspeed_refuses_is_a_named_error():
    config = tiny_config()
    config.deepspeed.config = {"zero_optimization": {"reduce_bucket": 5}}
    with pytest.raises(ValueError, match=r"(?s)deepspeed.config: DeepSpeed refuses the config.*reduce_bucket"):
        tiny_engine(config)


def test_grad_checkpointing_changes_nothing(torch_losses):
    config = tiny_config(grad_checkpointing=True)
    assert run_steps(tiny_engine(config), config, 0, 3) == pytest.approx(torch_losses[:3], abs=1e-5)
