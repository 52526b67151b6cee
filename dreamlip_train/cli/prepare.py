"""The ``prepare`` commands and ``recaption``: their options, and the call each makes."""

from __future__ import annotations

import json
import shlex
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dreamlip_train.captions.columns import Splitter
from dreamlip_train.captions.formats.files import SUFFIXES, kind_of
from dreamlip_train.captions.formats.layouts import parse_columns
from dreamlip_train.cli.usage import require_picture, require_writable, say
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.options import FolderOptions, JoinOptions, RecaptionOptions, ScenesOptions


def prepare_scenes(arguments: list[str], program: str) -> None:
    """Render the built-in demo world: --output DIR"""
    options = tyro.cli(ScenesOptions, args=arguments, prog=program)
    from dreamlip_train.prepare.scenes import scenes

    scenes.prepare_scenes(**vars(options))


@dataclass
class UrlsOptions:
    """Write the URLs and captions of a table as the parquet file that img2dataset downloads from."""

    captions: tyro.conf.Positional[str]
    """CSV, TSV, parquet, JSON or JSON lines with URLs and captions."""
    output: str
    """The .parquet file."""
    columns: tuple[str, ...] = ()
    """What the table calls them, as OURS=THEIRS words: --columns url=URL long=re_caption raw=alt."""


def prepare_urls(arguments: list[str], program: str) -> None:
    """A caption table as what img2dataset downloads: TABLE --output urls.parquet"""
    options = tyro.cli(UrlsOptions, args=arguments, prog=program)
    require_writable(options.output)
    from dreamlip_train.prepare.url_list import write_url_list

    counts = write_url_list(options.captions, options.output, parse_columns(options.columns))
    names = counts.pop("columns")
    say(f"wrote {options.output}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    say(f"img2dataset: --url_col url --save_additional_columns {shlex.quote(json.dumps(names))}")


def prepare_folder(arguments: list[str], program: str) -> None:
    """A caption table and a folder of images into shards: --captions FILE --images DIR --output DIR"""
    options = tyro.cli(FolderOptions, args=arguments, prog=program)
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.prepare import folder

    settings: dict[str, Any] = vars(options) | {"columns": parse_columns(options.columns)}
    folder.prepare_folder(**settings, count_tokens=count_tokens)


def prepare_join(arguments: list[str], program: str) -> None:
    """Caption tables x existing image shards: --captions TABLES --shards PATTERN --on url --output DIR"""
    options = tyro.cli(JoinOptions, args=arguments, prog=program)
    from dreamlip_train.captions.statistics import format_summary
    from dreamlip_train.prepare.join.join import format_join, join_captions

    settings: dict[str, Any] = vars(options) | {"columns": parse_columns(options.columns)}
    manifest = join_captions(**settings)
    say(format_join(manifest["join"]))
    say(format_summary(options.output, manifest))


@dataclass
class ValidateOptions:
    """Check existing shards and index them in manifest.json; exit with 1 when anything was found.
    The shards are not touched.
    """

    pattern: tyro.conf.Positional[str]
    """Shards: a folder, a glob or a brace pattern. Or a caption table: what it is taken for, and its rows."""
    columns: tuple[str, ...] = ()
    """Of a table: what it calls our columns, as OURS=THEIRS words."""
    fix: str = ""
    """Also write repaired copies of the shards into this folder: without what can't be used, captions stored as
    characters put together again.
    """
    crop: int = 224
    """Count images whose shorter side is smaller than this."""
    allow_pipe: bool = False
    """Permit "pipe:" URLs, which run shell commands."""


def prepare_validate(arguments: list[str], program: str) -> None:
    """Check, index and repair shards (img2dataset, FLAIR, open_clip), or say what a table is: PATTERN [--fix DIR]"""
    options = tyro.cli(ValidateOptions, args=arguments, prog=program)
    if kind_of(Path(options.pattern)) and Path(options.pattern).is_file():
        from dreamlip_train.prepare.validate_table import format_table, validate_table

        result = validate_table(Path(options.pattern), parse_columns(options.columns))
        say(format_table(options.pattern, result))
        sys.exit(1 if result["bad"] else 0)
    if options.columns:
        raise UserError(f"--columns: {options.pattern!r} is no table by its name ({', '.join(SUFFIXES)})")
    if _is_some_other_file(Path(options.pattern)):
        raise UserError(f"PATTERN: {options.pattern!r} is no tar; if it is a table, name it {', '.join(SUFFIXES)}")
    from dreamlip_train.captions.statistics import format_summary
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.prepare.validate import validate_shards

    result = validate_shards(
        options.pattern, count_tokens=count_tokens, allow_pipe=options.allow_pipe, crop=options.crop, fix=options.fix
    )
    say(format_summary(options.pattern, result))
    if options.fix:
        say(f"repaired copies are in {options.fix}")
    sys.exit(1 if result["bad"] else 0)


def _is_some_other_file(path: Path) -> bool:
    """Whether a file is neither called a shard nor one."""
    return path.is_file() and path.suffix != ".tar" and not tarfile.is_tarfile(path)


@dataclass
class StatsOptions:
    """Sub-captions and tokens per caption, by source, as a table and a picture: the paper's Figure 3 from your data."""

    pattern: tyro.conf.Positional[str]
    """Shards: a folder, a glob or a brace pattern."""
    output: str = "captions.png"
    """Where to write the picture."""
    max_shards: int = 0
    """Read so many shards, evenly spread; 0 reads all."""
    splitter: Splitter = "sentence"
    """How long captions are split: "sentence", or the release's "official"."""


def prepare_stats(arguments: list[str], program: str) -> None:
    """Sub-captions and tokens by source, as a table and a PNG: PATTERN --output captions.png"""
    options = tyro.cli(StatsOptions, args=arguments, prog=program)
    require_picture(options.output)
    if options.max_shards < 0:
        raise UserError(f"--max-shards: got {options.max_shards}; give a number of shards, or 0 for all")
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.reporting.caption_histograms import caption_histograms, format_histograms, plot_histograms

    histograms = caption_histograms(
        options.pattern, count_tokens, max_shards=options.max_shards, splitter=options.splitter
    )
    say(format_histograms(histograms))
    plot_histograms(histograms, options.output)
    say(f"wrote {options.output}")


@dataclass(kw_only=True)
class _RecaptionCommand(RecaptionOptions):
    __doc__ = RecaptionOptions.__doc__
    shards: tyro.conf.Positional[str]
    """Image shards: a folder, glob or brace pattern. They are only read."""


def recaption(arguments: list[str], program: str) -> None:
    """New captions from a multimodal model: PATTERN --output DIR --model MODEL [--endpoint URL]"""
    options = tyro.cli(_RecaptionCommand, args=arguments, prog=program)
    from dreamlip_train.prepare.recaption.recaption import format_counts, recaption_shards

    say(format_counts(recaption_shards(options)))


COMMANDS = {
    "scenes": prepare_scenes,
    "urls": prepare_urls,
    "folder": prepare_folder,
    "join": prepare_join,
    "validate": prepare_validate,
    "stats": prepare_stats,
}
