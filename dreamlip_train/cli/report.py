"""The ``report`` and ``plot`` commands: runs as a page and as curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dreamlip_train.cli.usage import PROGRAM, require_picture, require_writable, say
from dreamlip_train.jobs.user_error import UserError


@dataclass
class ReportOptions:
    """One self-contained HTML page about a run."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    output: str = ""
    """The page; empty means report.html in the run folder."""
    examples: int = 6
    """Retrieval examples of each kind."""
    results: tuple[str, ...] = ()
    """Files or folders that `eval --output` wrote elsewhere; those in the run folder and its eval* are found."""


def report(arguments: list[str], program: str) -> None:
    """A run as one HTML page: curves, tables beside the paper's, grouping maps, retrieval right and wrong: RUN"""
    options = tyro.cli(ReportOptions, args=arguments, prog=program)
    require_writable(options.output)
    from dreamlip_train.reporting.html_report import write_report

    say(f"wrote {write_report(options.run, options.output, examples=options.examples, results=options.results)}")


@dataclass
class PlotOptions:
    """Draw the curves of one or several runs over one another."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    output: str = "runs.png"
    """Where to write the picture."""


def plot(arguments: list[str], program: str) -> None:
    """Compare runs: curves of RUN... over one another, as a PNG"""
    options = tyro.cli(PlotOptions, args=arguments, prog=program)
    if not options.runs:
        raise UserError("RUN...: give at least one run folder")
    require_picture(options.output)
    paths = [Path(run) / "metrics.jsonl" for run in options.runs]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"RUN...: no file {missing[0]}; give run folders of `{PROGRAM} train`")
    from dreamlip_train.reporting.curves import plot_runs

    plot_runs(dict(zip(_distinct(options.runs), paths, strict=True)), options.output)
    say(f"wrote {options.output}")


def _distinct(runs: tuple[str, ...]) -> list[str]:
    """The folders' names where those differ, else the paths as given."""
    names = [Path(run).absolute().name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)
