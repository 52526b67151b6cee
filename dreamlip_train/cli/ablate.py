"""The ``ablate`` command."""

from __future__ import annotations

import tyro

from dreamlip_train.ablation.options import AblationOptions
from dreamlip_train.cli.usage import say


def ablate(arguments: list[str], program: str) -> None:
    """The paper's ablations in miniature, on the built-in scenes: --output DIR"""
    options = tyro.cli(AblationOptions, args=arguments, prog=program)
    from dreamlip_train.ablation import run

    say(run.format_ablation(run.ablate(options)))
