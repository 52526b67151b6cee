"""The paper's and the release's forms of the grouping loss as settings; docs/math.md, section 6, says what differs and
why ours is another one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dreamlip_train.config.schema import Config

_CONTRAST = {"loss.pairs": "softmax", "loss.negatives": "slot", "loss.positives": "mean", "loss.label_smoothing": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},
    "paper": {
        **_CONTRAST,
        "loss.normalization": "none",
        "loss.normalize_patches": False,
        "loss.contrast": "image",
        "loss.direction": "t2v",
        "model.local_logit_scale": False,
    },
    "release": {
        **_CONTRAST,
        "loss.normalization": "minmax",
        "loss.normalize_patches": True,
        "loss.threshold": 0.0,
        "loss.contrast": "batch",
        "loss.direction": "both",
        "model.local_logit_scale": True,
    },
}


def apply_preset(config: Config, name: str) -> Config:
    """A copy of ``config`` with loss.preset ``name`` and the settings it stands for."""
    sections: dict[str, dict[str, Any]] = {"loss": {"preset": name}, "model": {}}
    for field, value in settings_of(config, name).items():
        section, key = field.split(".")
        sections[section][key] = value
    parts = {section: dataclasses.replace(getattr(config, section), **own) for section, own in sections.items()}
    return dataclasses.replace(config, **parts)


def settings_of(config: Config, name: str) -> dict[str, Any]:
    """What a preset sets; without a grouping loss there is no temperature of its own."""
    settings = dict(PRESETS.get(name, {}))
    if config.loss.grouping_weight == 0 and "model.local_logit_scale" in settings:
        settings["model.local_logit_scale"] = False
    return settings
