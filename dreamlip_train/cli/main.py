"""The command line, ``dreamlip-train COMMAND``. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dreamlip_train.cli import evaluate, prepare
from dreamlip_train.config.recipes import RECIPES
from dreamlip_train.config.renamed import refuse_renamed_flags
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import read_config
from dreamlip_train.config.validation import validate
from dreamlip_train.jobs.user_error import RunError, UserError

PROGRAM = "dreamlip-train"


def main(arguments: list[str] | None = None) -> None:
    """Run one command. A UserError or RunError prints as one message and exits with 2; anything else keeps its traceback."""
    arguments = _without_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, RunError, ValueError, RuntimeError) as error:
        if not isinstance(error, UserError | RunError) and not _raised_in(error, _NOT_CONVERTED):
            raise
        rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1" else ""
        print(f"{rank}{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The words without the ``--local_rank=N`` or ``--local_rank N`` that launchers put before them; LOCAL_RANK says the same."""
    while arguments and arguments[0].replace("-", "_").startswith("__local_rank"):
        arguments = arguments[1:] if "=" in arguments[0] else arguments[2:]
    return arguments


# Packages that raise plain ValueError and RuntimeError where they mean UserError and RunError: each leaves this list when it is converted.
_NOT_CONVERTED = (
    "dreamlip_kernels",
    "dreamlip_train.ablation",
    "dreamlip_train.cli",
    "dreamlip_train.evaluation",
    "dreamlip_train.prepare",
    "dreamlip_train.reporting",
)


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether the innermost frame of an error is in one of ``packages``."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith(packages)


def _dispatch(arguments: list[str]) -> None:
    """Walk COMMANDS along the first words and hand the rest to the command found there."""
    words: list[str] = []
    found: Any = COMMANDS
    while isinstance(found, dict):
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage(words, found))
            sys.exit(0 if arguments else 2)
        word = arguments.pop(0)
        if word not in found:
            close = difflib.get_close_matches(word, found, n=3) or list(found)
            raise ValueError(f"{' '.join([*words, ''])}{word}: no such command; did you mean {', '.join(close)}?")
        words.append(word)
        found = found[word]
    found(arguments, f"{PROGRAM} {' '.join(words)}")


def _usage(words: list[str], commands: dict[str, Any]) -> str:
    """The commands below ``words``, one line each."""
    lines = [f"usage: {' '.join([PROGRAM, *words])} COMMAND ...", ""]
    for name, command in commands.items():
        if isinstance(command, dict):
            lines += [f"  {name + ' ' + sub:<20} {_first_line(inner)}" for sub, inner in command.items()]
        else:
            lines.append(f"  {name:<20} {_first_line(command)}")
    return "\n".join([*lines, "", "Each takes --help."])


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").strip().split("\n")[0]


@dataclass
class TrainOptions:
    """Train a recipe. Order of precedence: recipe, --config, flags, --deepspeed-config."""

    run_dir: str
    """Folder of the run: config.toml, metrics.jsonl, log.txt, checkpoints/, and at the end summary.json and pictures."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    resume: str = "auto"
    """"auto" goes on from the newest whole checkpoint of the run folder, or starts. "never" insists on a new folder. A path starts from that checkpoint."""
    accept_changes: bool = False
    """Go on from a checkpoint although settings of the recipe (data draws, loss, optimizer) differ from its own."""
    config: str | None = None
    """TOML file with any of the settings below; a run's own config.toml is one."""
    deepspeed_config: str | None = None
    """JSON file merged last over the DeepSpeed config."""


def _train(arguments: list[str], program: str) -> None:
    """Train a recipe: train RECIPE --run-dir DIR [--section.field value ...]"""
    recipes = "\n".join(f"  {name:<20} {_first_line(recipe)}" for name, recipe in RECIPES.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: {program} RECIPE --run-dir DIR [options]\n\nrecipes:\n{recipes}\n\nEvery setting: {program} RECIPE --help"
        )
        sys.exit(0 if arguments else 2)
    name = arguments[0].replace("-", "_")
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3) or list(RECIPES)
        raise ValueError(f"{arguments[0]}: no such recipe; did you mean {', '.join(close)}?")
    refuse_renamed_flags(arguments)
    base = RECIPES[name]()
    file = _value_of("--config", arguments)
    if file is not None:
        base = read_config(file, base)
    options = tyro.cli(
        TrainOptions,
        args=arguments[1:],
        default=TrainOptions(run_dir=tyro.MISSING, settings=base),
        prog=f"{program} {arguments[0]}",
    )
    config = options.settings
    if options.deepspeed_config is not None:
        config.deepspeed.config = _read_json(options.deepspeed_config)
    validate(config)
    from dreamlip_train.training.run import train

    train(config, options.run_dir, options.resume, options.accept_changes)


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of ``--flag VALUE`` or ``--flag=VALUE``, before the full parser runs: its defaults depend on it."""
    for position, word in enumerate(arguments):
        if word == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return None


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed-config: cannot read {path!r}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed-config: {path!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--deepspeed-config: {path!r} must hold a JSON object, got {type(content).__name__}")
    return content


def _doctor(arguments: list[str], program: str) -> None:
    """What this machine can run, and with a PATTERN whether those shards are sound"""

    def doctor(pattern: tyro.conf.Positional[str] = "") -> None:
        """Versions, devices and kernel backends of this machine; with a PATTERN also a check of those shards."""
        from dreamlip_train.monitoring.environment import examine

        with contextlib.suppress(BrokenPipeError):
            print(examine(pattern))

    tyro.cli(doctor, args=arguments, prog=program)


@dataclass
class PlotOptions:
    """Draw the curves of one or several runs over one another."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    output: str = "runs.png"
    """Where to write the picture."""


def _plot(arguments: list[str], program: str) -> None:
    """Compare runs: curves of RUN... over one another, as a PNG"""
    options = tyro.cli(PlotOptions, args=arguments, prog=program)
    if not options.runs:
        raise ValueError("RUN...: give at least one run folder")
    paths = [Path(run) / "metrics.jsonl" for run in options.runs]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"RUN...: no file {missing[0]}; give run folders of `{PROGRAM} train`")
    from dreamlip_train.reporting.curves import plot_runs

    plot_runs(dict(zip(_distinct(options.runs), paths, strict=True)), options.output)
    print(f"wrote {options.output}")


def _distinct(runs: tuple[str, ...]) -> list[str]:
    """The folders' names where those differ, else the paths as given."""
    names = [Path(run).absolute().name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)


@dataclass
class RecaptionOptions:
    """Write new long and short captions with a multimodal model. Started again, or on several machines at once, it shares the shards and goes on."""

    shards: tyro.conf.Positional[str]
    """Image shards: a folder, glob or brace pattern. They are only read."""
    output: str
    """Folder for the new shards, which keep their names."""
    model: str
    """A Hugging Face image-text-to-text model (a folder or a name), or with --endpoint the name under which the server serves one."""
    name: str = "LLA"
    """Captions go to the columns short{name}_captions and long{name}_captions: IB, SV, LLA, or your own."""
    endpoint: str = ""
    """Base URL of an OpenAI-compatible server, such as vLLM's http://host:8000/v1; empty runs the model here. OPENAI_API_KEY is its key."""
    long_prompt: str = "Describe the image in detail."
    """Asks for the long caption; empty leaves it out."""
    short_prompt: str = "Describe the image in one sentence."
    """Asks for the short caption; empty leaves it out."""
    max_tokens: int = 256
    """Length of a long caption; a short one gets a quarter of it."""
    batch_size: int = 16
    """Images a forward pass, or requests under way at once."""
    timeout: float = 120.0
    """Seconds a request may take."""
    retries: int = 5
    """Further attempts at an image, the pauses doubling from one second."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of the images could not be captioned."""
    stale_minutes: float = 30.0
    """A shard whose worker has not been heard of for so long is taken over."""
    ray: str = ""
    """Run on the Ray cluster at this address ("auto": this machine's); all nodes must see the same files."""


def _recaption(arguments: list[str], program: str) -> None:
    """New captions from a multimodal model: PATTERN --output DIR --model MODEL [--endpoint URL]"""
    options = tyro.cli(RecaptionOptions, args=arguments, prog=program)
    from dreamlip_train.prepare.recaption import format_counts, recaption_shards

    given = dataclasses.asdict(options)
    print(
        format_counts(recaption_shards(given.pop("shards"), given.pop("output"), ray_address=given.pop("ray"), **given))
    )


@dataclass
class ExportOptions:
    """Write a trained model as open_clip or transformers load it, and compare what they load with the original."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN of any ZeRO stage and number of ranks, or an open_clip weights file (with --model)."""
    output: str
    """The file (open_clip-file) or new folder to write."""
    to: Literal["open_clip-file", "open_clip-dir", "hf-dir"] = "open_clip-file"
    """open_clip weights file; open_clip folder (local-dir:DIR); transformers' CLIPModel folder (LLaVA's vision tower)."""
    model: str = ""
    """open_clip model name of a weights file."""


def _export(arguments: list[str], program: str) -> None:
    """A trained model for open_clip, clip_benchmark, SAN, transformers and LLaVA: CHECKPOINT --to FORMAT --output PATH"""
    options = tyro.cli(ExportOptions, args=arguments, prog=program)
    from dreamlip_train.checkpoint.export import export_checkpoint

    found = export_checkpoint(options.checkpoint, options.output, options.to, options.model)
    if found["image"] is None:
        print(f"wrote {options.output}; not compared, since transformers is not installed")
    else:
        print(
            f"wrote {options.output}; loaded back, image features differ by {found['image']:.1g}, text features by {found['text']:.1g}"
        )


@dataclass
class ImportOptions:
    """Weights from elsewhere as an open_clip file for --model.pretrained and eval, checked against the model they are said to be."""

    weights: tyro.conf.Positional[str]
    """An open_clip weights file (.pt, .safetensors; DreamLIP's published ones are such), an open_clip folder, or a transformers CLIP folder."""
    output: str
    """The file to write, or with a folder's own model config, the open_clip folder."""
    model: str = ""
    """open_clip model name of a weights file."""


def _import(arguments: list[str], program: str) -> None:
    """open_clip's, DreamLIP's or transformers' weights as a starting point: WEIGHTS --model NAME --output FILE"""
    options = tyro.cli(ImportOptions, args=arguments, prog=program)
    from dreamlip_train.checkpoint.import_weights import import_weights

    print(import_weights(options.weights, options.output, options.model))


@dataclass
class AblateOptions:
    """Train the paper's ablations on the built-in scenes, and write one table and plot. Started again it goes on."""

    output: str
    """Folder for the data, the runs, and ablation.{json,md,png}."""
    only: tuple[str, ...] = ()
    """Variants to run; empty means all."""
    seeds: int = 3
    """Seeds of weights and draws."""
    steps: int = 600
    """Steps a run."""
    batch_size: int = 128
    """Images a step."""
    num_train: int = 6000
    """Training scenes."""
    num_val: int = 400
    """Held-out scenes."""
    jobs: int = 1
    """Runs at a time."""


def _ablate(arguments: list[str], program: str) -> None:
    """The paper's ablations in miniature, on the built-in scenes: --output DIR"""
    options = tyro.cli(AblateOptions, args=arguments, prog=program)
    from dreamlip_train.ablation.run import ablate, format_ablation

    given = dataclasses.asdict(options)
    print(format_ablation(ablate(given.pop("output"), **given)))


@dataclass
class ReportOptions:
    """One self-contained HTML page about a run."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    output: str = ""
    """The page; empty means report.html in the run folder."""
    examples: int = 6
    """Retrieval examples of each kind."""


def _report(arguments: list[str], program: str) -> None:
    """A run as one HTML page: curves, tables beside the paper's, grouping maps, retrieval right and wrong: RUN"""
    options = tyro.cli(ReportOptions, args=arguments, prog=program)
    from dreamlip_train.reporting.html_report import write_report

    print(f"wrote {write_report(options.run, options.output, examples=options.examples)}")


COMMANDS: dict[str, Any] = {
    "prepare": prepare.COMMANDS,
    "recaption": _recaption,
    "train": _train,
    "eval": evaluate.COMMANDS,
    "ablate": _ablate,
    "report": _report,
    "import": _import,
    "export": _export,
    "plot": _plot,
    "doctor": _doctor,
}
