"""The ``prepare`` commands and ``recaption``: their options, and the call each makes."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field

import tyro

from dreamlip_train.cli.usage import require_writable
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.options import RecaptionOptions


@dataclass
class ScenesOptions:
    """Render the built-in demo world: pictures, masks and DreamLIP's caption columns."""

    output: str
    """Folder for train/ and val/, each with images/, masks/ and captions.csv."""
    num_train: int = 6000
    """Training scenes."""
    num_val: int = 200
    """Held-out scenes."""
    seed: int = 0
    """Another seed, another world."""


def prepare_scenes(arguments: list[str], program: str) -> None:
    """Render the built-in demo world: --output DIR"""
    options = tyro.cli(ScenesOptions, args=arguments, prog=program)
    from dreamlip_train.prepare.scenes import scenes

    scenes.prepare_scenes(options.output, options.num_train, options.num_val, options.seed)


@dataclass
class UrlsOptions:
    """Write the URLs and captions of a table as the parquet file that img2dataset downloads from."""

    captions: tyro.conf.Positional[str]
    """CSV, TSV, parquet, JSON or JSON lines with "Image Path" and DreamLIP's caption columns."""
    output: str
    """The .parquet file."""


def prepare_urls(arguments: list[str], program: str) -> None:
    """A caption table as what img2dataset downloads: TABLE --output urls.parquet"""
    options = tyro.cli(UrlsOptions, args=arguments, prog=program)
    require_writable(options.output)
    from dreamlip_train.prepare.url_list import write_url_list

    counts = write_url_list(options.captions, options.output)
    print(f"wrote {options.output}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


@dataclass
class FolderOptions:
    """Turn a caption table and a folder of images into shards and a manifest.json. A killed run goes on where it
    stopped.
    """

    captions: str
    """CSV, TSV, parquet, JSON or JSON lines with "Image Path" and DreamLIP's caption columns."""
    images: str
    """Folder of images, searched in depth."""
    output: str
    """Folder for the shards."""
    masks: str | None = None
    """Folder of label maps STEM.png: value j is the region that sentence j of each long caption describes."""
    shard_size: int = 1000
    """Rows a shard."""


def prepare_folder(arguments: list[str], program: str) -> None:
    """A caption table and a folder of images into shards: --captions FILE --images DIR --output DIR"""
    options = tyro.cli(FolderOptions, args=arguments, prog=program)
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.prepare import folder as prepare

    prepare.prepare_folder(
        options.captions,
        options.images,
        options.output,
        masks=options.masks,
        shard_size=options.shard_size,
        count_tokens=count_tokens,
    )


@dataclass
class JoinOptions:
    """Join caption tables to existing image shards: new shards whose json carries every caption.
    A killed run goes on where it stopped.
    """

    captions: str
    """Tables (CSV, TSV, parquet, JSON, JSON lines): a file, folder or glob, several joined with "::";
    the first that knows a caption gives it.
    """
    shards: str
    """Image shards: a folder, glob or brace pattern. They are only read."""
    output: str
    """Folder for the new shards, which keep their names."""
    on: str = "url"
    """What joins them: "url", "path" or "key", or the name of a json field of the samples and column of the tables."""
    table_column: str = ""
    """The tables' column that is compared, if it is called otherwise ("Image Path" for url and path)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Captions under other names, as OURS THEIRS pairs: --columns longSV_captions caption_long raw_caption alt."""
    matched_only: bool = False
    """Leave out samples that no table knows."""
    memory_limit: str = "3GB"
    """Memory of the join, which goes to disk beyond it."""
    ray: str = ""
    """Run on the Ray cluster at this address ("auto": this machine's); all nodes must see the same files."""


def prepare_join(arguments: list[str], program: str) -> None:
    """Caption tables x existing image shards: --captions TABLES --shards PATTERN --on url --output DIR"""
    options = tyro.cli(JoinOptions, args=arguments, prog=program)
    from dreamlip_train.captions.statistics import format_summary
    from dreamlip_train.prepare.join.join import format_join, join_captions

    given = dataclasses.asdict(options)
    manifest = join_captions(
        given.pop("captions"), given.pop("shards"), given.pop("output"), ray_address=given.pop("ray"), **given
    )
    print(format_join(manifest["join"]))
    print(format_summary(options.output, manifest))


@dataclass
class ValidateOptions:
    """Check existing shards and index them in manifest.json; exit with 1 when anything was found.
    The shards are not touched.
    """

    pattern: tyro.conf.Positional[str]
    """Shards: a folder, a glob or a brace pattern."""
    fix: str = ""
    """Also write repaired copies of the shards into this folder: without what can't be used, captions stored as
    characters put together again.
    """
    crop: int = 224
    """Count images whose shorter side is smaller than this."""
    allow_pipe: bool = False
    """Permit "pipe:" URLs, which run shell commands."""


def prepare_validate(arguments: list[str], program: str) -> None:
    """Check, index and repair existing shards (img2dataset, FLAIR, open_clip): PATTERN [--fix DIR]"""
    options = tyro.cli(ValidateOptions, args=arguments, prog=program)
    from dreamlip_train.captions.statistics import format_summary
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.prepare.validate import validate_shards

    checked = validate_shards(
        options.pattern, count_tokens=count_tokens, allow_pipe=options.allow_pipe, crop=options.crop, fix=options.fix
    )
    print(format_summary(options.pattern, checked))
    if options.fix:
        print(f"repaired copies are in {options.fix}")
    sys.exit(1 if checked["bad"] else 0)


@dataclass
class StatsOptions:
    """Sub-captions and tokens a caption, by source, as a table and a picture: the paper's Figure 3 from your data."""

    pattern: tyro.conf.Positional[str]
    """Shards: a folder, a glob or a brace pattern."""
    output: str = "captions.png"
    """Where to write the picture."""
    max_shards: int = 0
    """Read so many shards, evenly spread; 0 reads all."""
    splitter: str = "sentence"
    """How long captions are split: "sentence", or the release's "official"."""


def prepare_stats(arguments: list[str], program: str) -> None:
    """Sub-captions and tokens by source, as a table and a PNG: PATTERN --output captions.png"""
    options = tyro.cli(StatsOptions, args=arguments, prog=program)
    require_writable(options.output)
    if options.max_shards < 0:
        raise UserError(f"--max-shards: got {options.max_shards}; give a number of shards, or 0 for all")
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.reporting.caption_histograms import caption_histograms, format_histograms, plot_histograms

    histograms = caption_histograms(
        options.pattern, count_tokens, max_shards=options.max_shards, splitter=options.splitter
    )
    print(format_histograms(histograms))
    plot_histograms(histograms, options.output)
    print(f"wrote {options.output}")


@dataclass(kw_only=True)
class _RecaptionCommand(RecaptionOptions):
    __doc__ = RecaptionOptions.__doc__
    shards: tyro.conf.Positional[str]
    """Image shards: a folder, glob or brace pattern. They are only read."""


def recaption(arguments: list[str], program: str) -> None:
    """New captions from a multimodal model: PATTERN --output DIR --model MODEL [--endpoint URL]"""
    options = tyro.cli(_RecaptionCommand, args=arguments, prog=program)
    from dreamlip_train.prepare.recaption.recaption import format_counts, recaption_shards

    print(format_counts(recaption_shards(options)))


COMMANDS = {
    "scenes": prepare_scenes,
    "urls": prepare_urls,
    "folder": prepare_folder,
    "join": prepare_join,
    "validate": prepare_validate,
    "stats": prepare_stats,
}
