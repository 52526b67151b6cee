"""``prepare join``: published captions x the image shards one has, by URL, key, path or a column, out of core.

    caption tables --read row by row-->  .join/tables/NNN.parquet  (row, value, captions)     \\
    image shards   --read once-------->  .join/shards/NAME.parquet (position, key, value)      >-- DuckDB -->
    .join/joined.parquet, sorted by shard; image shards + their part of it -->  OUTPUT/NAME.tar, manifest.json

Every arrow leaves a file that appears when it is whole, so a killed run resumes. The originals are only read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dreamlip_train.captions.cells import IMAGE_COLUMN
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.data.shards.manifest_writer import Manifest
from dreamlip_train.data.shards.shard_names import address, list_shards
from dreamlip_train.jobs.job_folder import job_folder, make_once
from dreamlip_train.jobs.map_tasks import map_tasks
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.join.match import match
from dreamlip_train.prepare.join.shards import index_shard, rewrite_shard
from dreamlip_train.prepare.join.tables import NORMAL, check_table, find_tables, stage_table
from dreamlip_train.prepare.options import JoinOptions
from dreamlip_train.prepare.output_names import require_another_folder, require_distinct_names

STATE = ".join"


def join_captions(
    captions: str,
    shards: str,
    output: str | Path,
    *,
    on: str = JoinOptions.on,
    table_column: str = JoinOptions.table_column,
    columns: dict[str, str] | None = None,
    matched_only: bool = JoinOptions.matched_only,
    memory_limit: str = JoinOptions.memory_limit,
    ray: str = JoinOptions.ray,
) -> dict[str, Any]:
    """Write ``output``/NAME.tar for every image shard, its samples' json carrying every caption that the tables have.

    Args:
        captions: tables: a file, folder or glob, several joined with "::". Where two tables give a sample the same
            column, the first does; where a table names a picture twice, its first row does.
        shards: image shards, as data.shards.
        on: "url", "path" or "key", or the name of a json field of the samples. URLs and paths are compared in one
            spelling (url_keys.py).
        table_column: the tables' column that is compared; by default "Image Path" for url and path, else ``on``.
        columns: {column in the shards: column in the tables} of further or differently named captions.
        matched_only: leave samples out that no table knows.
        memory_limit: of the join; it spills to ``output``/.join beyond.
        ray: address of the Ray cluster to run on.
    Returns:
        the manifest, its "join" what matched.
    Raises:
        UserError: nothing matches, a table lacks the columns, or ``output`` belongs to another join or process.
        RunError: the disk is full.
    """
    output, columns = Path(output), columns or {}
    column = table_column or (IMAGE_COLUMN if on in NORMAL else on)
    tables, shard_paths = find_tables(captions), list_shards(shards, field="--shards")
    try:
        str(output.resolve()).encode("utf-8")
    except UnicodeEncodeError as error:  # DuckDB's and pyarrow's files
        raise UserError(f"--output: the name of {str(output)!r} is not UTF-8; give another folder") from error
    require_distinct_names(shard_paths, "--shards", "join the folders one at a time")
    require_another_folder(shard_paths, output, "--output")
    for table in tables:
        check_table(table, column, columns)
    files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in tables]
    settings = {"on": on, "column": column, "columns": columns, "matched_only": matched_only}
    job = {"tables": files, "shards": [address(shard) for shard in shard_paths], **settings}
    with job_folder(output, STATE, job, "the join of other tables, shards or settings") as state:
        for folder in ("tables", "shards", "written"):
            (state / folder).mkdir(exist_ok=True)
        report = make_once(
            state / "joined.parquet",
            state / "report.json",
            lambda: _match_all(tables, shard_paths, state, on, column, columns, memory_limit, ray),
        )
        manifest = _write_all(shard_paths, output, state, matched_only, ray)
        manifest.total.merge(Statistics(report.pop("counts")))
        manifest.further["join"] = report
        return manifest.write(output)


def _match_all(
    tables: list[Path],
    shards: Sequence[str],
    state: Path,
    on: str,
    column: str,
    columns: dict[str, str],
    memory_limit: str,
    ray_address: str,
) -> dict[str, Any]:
    """Make ``state``/joined.parquet; return the report of matches."""
    bad, sources, lines = Statistics(), Counter(), 0
    stage = partial(stage_table, state=state / "tables", on=on, column=column, columns=columns)
    with Progress("read tables", len(tables), "tables") as progress:
        notes = map_tasks(stage, list(enumerate(tables)), ray_address=ray_address)
        for note in notes:
            bad.merge(Statistics(note["counts"]))
            sources.update(note["sources"])
            lines += note["lines"] or 0
            progress.advance()
    index = partial(index_shard, state=state / "shards", on=on)
    with Progress("read shards", len(shards), "shards") as progress:
        notes = map_tasks(index, list(enumerate(shards)), ray_address=ray_address)
        for note in notes:
            bad.merge(Statistics(note["counts"]))
            progress.advance()
    with Progress("match"):
        report = match(state, memory_limit)
    if report["samples_matched"] == 0:
        examples = report["examples"]
        raise UserError(
            f"--on {on}: none of {report['samples']} samples matches any of {report['rows']} rows. Samples have "
            f"{examples['samples']}, the tables' column {column!r} has {examples['rows']}; "
            "choose --on or --table-column "
            "so that the two agree"
        )
    return report | {"lines": lines, "rows_by_source": dict(sources), "counts": bad.state}


def _write_all(shards: Sequence[str], output: Path, state: Path, matched_only: bool, ray_address: str) -> Manifest:
    """Every shard's copy."""
    manifest = Manifest()
    work = partial(
        rewrite_shard,
        matches=state / "joined.parquet",
        output=output,
        state=state / "written",
        matched_only=matched_only,
    )
    with Progress(f"write {output}", len(shards), "shards") as progress:
        for name, note in map_tasks(work, list(enumerate(shards)), ray_address=ray_address):
            manifest.add(name, note)
            progress.advance(text=f"{manifest.total.samples:,} samples")
    return manifest


def format_join(report: dict[str, Any]) -> str:
    """What ``join_captions`` found, as text to read."""
    examples = report["examples"]
    lines = [f"{report['rows']:>10} rows to compare on {report['lines']} lines of text"] if report["lines"] else []
    lines += [f"{report['samples_matched']:>10} of {report['samples']} samples matched"]
    for count, what, some in (
        (report["samples_unmatched"], "samples that no table knows", examples["samples"]),
        (report["rows_unmatched"], "rows whose picture is in no shard", examples["rows"]),
        (
            report["rows_duplicate"],
            "rows that repeat an earlier row's picture (the first counts)",
            examples["duplicates"],
        ),
        (report["samples_sharing_a_value"], "samples that share a value with another (all get its captions)", []),
    ):
        lines.append(f"{count:>10} {what}" + (f", such as {some[0]}" if some and count else ""))
    lines += [f"{count:>10} rows with {source}" for source, count in report["rows_by_source"].items()]
    return "\n".join(lines)
