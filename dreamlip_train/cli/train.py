"""The ``train`` command: recipe, file and flags to one config."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from dreamlip_train.cli.name_value import TABLES
from dreamlip_train.cli.usage import closest, first_line, say
from dreamlip_train.config.presets import PRESETS, apply_preset
from dreamlip_train.config.recipes import RECIPES
from dreamlip_train.config.renamed import refuse_renamed_flags
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import read_config
from dreamlip_train.config.validation import validate
from dreamlip_train.jobs.atomic_json import read_json_object
from dreamlip_train.jobs.user_error import UserError


@dataclass
class TrainOptions:
    """Train a recipe. Order of precedence: recipe, --config, flags, --deepspeed-config."""

    run_dir: str
    """Folder of the run: config.toml, metrics.jsonl, log.txt, checkpoints/, and at the end summary.json and
    pictures.
    """
    settings: Annotated[Config, tyro.conf.arg(name="")]
    resume: str = "auto"
    """"auto" resumes from the newest whole checkpoint of the run folder, or starts. "never" insists on a new folder.
    A path starts from that checkpoint.
    """
    accept_changes: bool = False
    """Resume from a checkpoint although settings of the recipe (data draws, loss, optimizer) differ from its own."""
    config: str | None = None
    """TOML file with any of the settings below; a run's own config.toml is one."""
    deepspeed_config: str | None = None
    """JSON file merged last over the DeepSpeed config."""


def train(arguments: list[str], program: str) -> None:
    """Train a recipe: train RECIPE --run-dir DIR [--section.field value ...]"""
    recipes = "\n".join(f"  {name:<20} {first_line(recipe)}" for name, recipe in RECIPES.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        say(
            f"usage: {program} RECIPE --run-dir DIR [options]\n\nrecipes:\n{recipes}\n\nEvery setting: "
            f"{program} RECIPE --help"
        )
        sys.exit(0 if arguments else 2)
    name = arguments[0].replace("-", "_")
    if name not in RECIPES:
        raise UserError(f"{arguments[0]}: no such recipe; did you mean {closest(name, RECIPES)}?")
    refuse_renamed_flags(arguments)
    base = RECIPES[name]()
    file = _value_of("--config", arguments)
    if file is not None:
        base = read_config(file, base)
    preset = _value_of("--loss.preset", arguments)
    if preset in PRESETS:  # else tyro says what there is
        base = apply_preset(base, preset)
    options = tyro.cli(
        TrainOptions,
        args=arguments[1:],
        default=TrainOptions(run_dir=tyro.MISSING, settings=base),
        prog=f"{program} {arguments[0]}",
        registry=TABLES,
    )
    config = options.settings
    if options.deepspeed_config is not None:
        config.deepspeed.config = read_json_object(options.deepspeed_config, "--deepspeed-config")
    validate(config)
    from dreamlip_train.training import run

    run.train(config, options.run_dir, options.resume, options.accept_changes)


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of ``--flag VALUE`` or ``--flag=VALUE``, before the full parser runs: its defaults depend on it."""
    for position, word in enumerate(arguments):
        if word == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return None
