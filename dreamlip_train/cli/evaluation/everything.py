"""``eval all``: every benchmark that is there, its results kept as they come, and the tables they belong into."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tyro

from dreamlip_train.cli.evaluation.benchmarks import Benchmark, benchmarks
from dreamlip_train.cli.evaluation.options import EvalOptions, load
from dreamlip_train.cli.usage import closest, say
from dreamlip_train.jobs.atomic_json import read_json, write_json
from dreamlip_train.jobs.user_error import RunError, UserError


@dataclass(kw_only=True)
class AllOptions(EvalOptions):
    """Every benchmark below a folder; finished results are kept, so the same command resumes after a break."""

    command: ClassVar[str] = "all"

    root: str
    """Folder of the data sets (docs/evaluation.md says where each is expected); what is not there is listed."""
    only: tuple[str, ...] = ()
    """Run these benchmarks alone; a beginning such as "segment" names several."""
    output: str = ""
    """Folder of the results, NAME.json each; empty means eval/ in the run folder, where `report` finds them."""


def all_(arguments: list[str], program: str) -> None:
    """Every benchmark that lies below DIR, with the paper's rows beside; resumes where it stopped: RUN --root DIR"""
    options = tyro.cli(AllOptions, args=arguments, prog=program)
    if options.batch_size < 1:
        raise UserError(f"--batch-size: got {options.batch_size}; give at least 1")
    if not Path(options.root).is_dir():
        raise UserError(f"--root: no folder {options.root!r}; give the folder that the data sets are in")
    selected = _selected(list(benchmarks(Path(options.root))), options.only)
    folder = _results_folder(options)
    there = [one for one in selected if one.there]
    missing = [one for one in selected if not one.there]
    say(f"{len(there)} of {len(selected)} benchmarks are below {options.root}; results go to {folder}")
    errors = _run_all(options, there, folder) if there else {}
    _print_tables(folder)
    if missing:
        say(f"\nnot below {options.root}:")
        say("\n".join(f"  {one.name:<24}{one.source}" for one in missing))
    if errors:
        reasons = "".join(f"\n  {name}: {why}" for name, why in errors.items())
        raise UserError(f"--root: {len(errors)} of {len(there)} benchmarks that are there could not be read:{reasons}")
    if not there:
        raise UserError(f"--root: {options.root!r} has none of the {len(selected)} benchmarks; see the list")


def _selected(all_benchmarks: list[Benchmark], only: tuple[str, ...]) -> list[Benchmark]:
    names = [one.name for one in all_benchmarks]
    for word in only:
        if not any(name.startswith(word) for name in names):
            raise UserError(f"--only: no benchmark is called {word!r}; did you mean {closest(word, names)}?")
    return [one for one in all_benchmarks if not only or one.name.startswith(only)]


def _results_folder(options: AllOptions) -> Path:
    checkpoint = Path(options.checkpoint)
    if options.output:
        folder = Path(options.output)
    elif checkpoint.is_file():
        raise UserError("--output: say which folder the results of a weights file go to")
    elif checkpoint.parent.name == "checkpoints":  # RUN/checkpoints/step-NNNNNNNN
        folder = checkpoint.parent.parent / f"eval-{checkpoint.name}"
    else:
        folder = checkpoint / "eval"
    if not checkpoint.exists():
        raise UserError(f"no file or folder {str(checkpoint)!r}; give a run folder, a checkpoint or an open_clip file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {str(folder)!r}: {error.strerror}") from error
    return folder


def _run_all(options: AllOptions, there: list[Benchmark], folder: Path) -> dict[str, str]:
    """Score what is not finished; {benchmark: why it could not be read}."""
    parts: list[Any] = []

    def model() -> list[Any]:  # loaded for the first benchmark that needs it
        if not parts:
            parts.extend(load(options))
        return parts

    of, failures = _weights_of(options), {}
    for number, one in enumerate(there, 1):
        common = {"checkpoint": options.checkpoint, "model": options.model, "weights": options.weights}
        evaluation = json.loads(
            json.dumps({"command": one.options.command, **common, **one.settings, "weights_of": of})
        )
        file = folder / f"{one.name}.json"
        if _is_finished(file, evaluation):
            say(f"[{number}/{len(there)}] {one.name}: kept from before")
            continue
        say(f"[{number}/{len(there)}] {one.name}")
        try:
            score, show = one.job(one.options(**common, batch_size=_batch_size(one, options), **one.settings))
            scores = score(*model())
        except UserError as error:
            failures[one.name] = str(error)
            say(f"  not read: {error}")
            continue
        say(show(scores))
        errors = [row["error"] for row in scores.values() if isinstance(row, dict) and "error" in row]
        if errors:
            failures[one.name] = errors[0]
        else:
            try:
                write_json(file, {"evaluation": evaluation} | scores)
            except OSError as error:
                raise RunError(
                    f"--output: {file} can't be written: {error.strerror}. What is finished is kept; make room and "
                    "give the same command again"
                ) from error
    return failures


def _batch_size(one: Benchmark, options: AllOptions) -> int:
    """Segmentation counts windows, four to an image or more."""
    return min(options.batch_size, one.options.batch_size)


def _is_finished(file: Path, settings: dict[str, Any]) -> bool:
    try:
        return read_json(file)["evaluation"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _weights_of(options: AllOptions) -> dict[str, str]:
    """What tells these weights from others that come to lie at the same place."""
    from dreamlip_train.checkpoint.files import MANIFEST_DIGEST, find_checkpoint

    path = Path(options.checkpoint)
    if path.is_file():
        with path.open("rb") as weights:
            return {"sha256": hashlib.file_digest(weights, "sha256").hexdigest()}
    checkpoint = find_checkpoint(path)
    return {"checkpoint": checkpoint.name, "manifest": (checkpoint / MANIFEST_DIGEST).read_text().strip()}


def _print_tables(folder: Path) -> None:
    from dreamlip_train.evaluation.comparison import comparisons, format_comparison, read_results

    for one in comparisons(read_results(sorted(folder.glob("*.json")))):
        if one.measured:
            say("\n" + format_comparison(one))
