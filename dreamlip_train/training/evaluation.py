"""The evaluation of a run on its way and at its end, by all ranks: held-out loss, retrieval and localization, and
zero-shot classification where that is configured.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreamlip_train.config.schema import Config, EvalConfig
from dreamlip_train.evaluation.held_out import HeldOutLoss, evaluate
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP, logit_multiplier
from dreamlip_train.training.step import dreamlip_loss


def check_zero_shot(eval: EvalConfig) -> None:
    """Raise UserError where the first evaluation, maybe days later, could not classify."""
    if eval.zero_shot and importlib.util.find_spec("clip_benchmark") is None:
        raise UserError("eval.zero_shot: needs clip_benchmark; pip install 'dreamlip[benchmark]'")
    if eval.zero_shot and "{" not in eval.zero_shot_root and not Path(eval.zero_shot_root).is_dir():
        raise UserError(f"eval.zero_shot_root: no folder {eval.zero_shot_root!r}; give that of the data sets")


def evaluate_run(
    model: DreamLIP, config: Config, device: torch.device, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """What ``held_out.evaluate`` returns with the run's loss, and "zero_shot" by data set. The same on every rank.
    Collective.

    Raises:
        StoppedError: ``should_stop`` said so, on any rank.
    """
    report: dict[str, Any] = {}
    if config.data.val_shards:
        report = evaluate(
            model,
            config.data,
            config.eval,
            device,
            **config.selection(),
            should_stop=should_stop,
            loss=_held_out_loss(model, config),
            distributed=True,
        )
    if config.eval.zero_shot:
        from dreamlip_train.evaluation.classification.zero_shot import evaluate_zero_shot

        report["zero_shot"] = evaluate_zero_shot(
            model,
            config.eval.zero_shot,
            config.eval.zero_shot_root,
            device,
            batch_size=config.eval.batch_size,
            distributed=True,
            should_stop=should_stop,
        )
    return report


def headline(report: dict[str, Any]) -> str:
    """An evaluation in a few words."""
    parts = []
    if "retrieval" in report:
        recall = report["retrieval"]["long_caption"]
        t2i, i2t = recall["t2i"]["r_at_1"], recall["i2t"]["r_at_1"]
        parts.append(f"held-out R@1 by long caption: text to image {t2i:.1f}, image to text {i2t:.1f}")
    if "held_out_loss" in report:
        parts.append(f"loss {report['held_out_loss']['loss']:.3f}")
    for name, scores in report.get("zero_shot", {}).items():
        parts.append(f"{name} {scores['acc1']:.1f}" if "acc1" in scores else f"{name}: {scores.get('error', scores)}")
    return ", ".join(parts)


def _held_out_loss(model: DreamLIP, config: Config) -> HeldOutLoss:
    loss_fn = dreamlip_loss(config.loss, _own_group())
    grouped = config.loss.grouping_weight > 0

    def loss(images: Tensor, patches: Tensor | None, texts: Tensor, mask: Tensor) -> dict[str, Tensor]:
        local, bias = model.logit_scale_local, model.logit_bias
        return loss_fn(
            images,
            texts,
            logit_multiplier(model.clip.logit_scale),
            None if bias is None else bias.float().sum(),
            output_dict=True,
            patch_features=patches if grouped else None,
            text_mask=mask,
            logit_scale_local=None if local is None else logit_multiplier(local),
        )

    return loss


@functools.cache
def _own_group() -> dist.ProcessGroup | None:
    """A group of this rank alone, so that the loss of a batch which one rank evaluates waits for no other. Collective,
    once.
    """
    own: Any = dist.new_subgroups(group_size=1)[0] if dist.get_world_size() > 1 else None
    return own
