"""``prepare join``: published captions x the image shards one has, by URL, key, path or a column, out of core.

    caption tables --read row by row-->  .join/tables/NNN.parquet  (row, value, captions)      \\
    image shards   --read once-------->  .join/shards/NAME.parquet (position, key, value)       >-- DuckDB -->  .join/joined.parquet, sorted by shard
    image shards + their part of joined.parquet  ------------------------------------------------------------>  OUTPUT/NAME.tar, manifest.json

Every arrow leaves a file that appears when it is whole, so a killed run goes on where it stopped. The originals are only read.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.captions.table import ALIASES, IMAGE_COLUMN, SUFFIXES, read_rows
from dreamlip_train.data.shard_names import list_shards
from dreamlip_train.data.shards import MANIFEST
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.job_folder import claim_output
from dreamlip_train.jobs.map_tasks import map_tasks
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import RunError, UserError
from dreamlip_train.prepare.join_shards import index_shard, rewrite_shard
from dreamlip_train.prepare.url_keys import normal_path, normal_url

STATE = ".join"
_ROWS_A_GROUP = 20_000
_NORMAL = {"url": normal_url, "path": normal_path}


def join_captions(
    captions: str,
    shards: str,
    output: str | Path,
    *,
    on: str = "url",
    table_column: str = "",
    columns: dict[str, str] | None = None,
    matched_only: bool = False,
    memory_limit: str = "3GB",
    ray_address: str = "",
) -> dict[str, Any]:
    """Write ``output``/NAME.tar for every image shard, its samples' json carrying every caption the tables have for them; return the report.

    Args:
        captions: tables: a file, folder or glob, several joined with "::". Where two tables give a sample the same column, the first does; where a
            table names a picture twice, its first row does.
        shards: image shards, as data.shards.
        on: "url", "path" or "key", or the name of a json field of the samples. URLs and paths are compared in one spelling (url_keys.py).
        table_column: the tables' column that is compared; by default "Image Path" for url and path, else the name ``on``.
        columns: {column in the shards: column in the tables} of further or differently named captions.
        matched_only: leave samples out that no table knows.
        memory_limit: of the join; it spills to ``output``/.join beyond.
        ray_address: run on this Ray cluster.
    Raises:
        UserError: nothing matches, a table lacks the columns, or ``output`` belongs to another join.  RunError: the disk is full.
    """
    output, columns = Path(output), columns or {}
    column = table_column or (IMAGE_COLUMN if on in _NORMAL else on)
    tables, shard_paths = _tables(captions), list_shards(shards, field="--shards")
    names = [os.path.basename(shard) for shard in shard_paths]
    if len(set(names)) < len(names):
        raise UserError(
            f"--shards: two shards are both called {Counter(names).most_common(1)[0][0]!r}; join the folders one at a time"
        )
    if any(Path(shard).resolve().parent == output.resolve() for shard in shard_paths):
        raise UserError(
            f"--output: {str(output)!r} is the folder of the shards, which are not to be changed; give another"
        )
    state = _claim(
        output, tables, shard_paths, {"on": on, "column": column, "columns": columns, "matched_only": matched_only}
    )
    try:
        report = _join(tables, shard_paths, state, on, column, columns, memory_limit, ray_address)
        counts, listed = Statistics(), {}
        work = partial(
            rewrite_shard,
            joined=state / "joined.parquet",
            output=output,
            state=state / "written",
            matched_only=matched_only,
        )
        with Progress(f"write {output}") as progress:
            for name, entry, found in map_tasks(work, list(enumerate(shard_paths)), ray_address=ray_address):
                counts.merge(Statistics(found))
                if entry["samples"]:
                    listed[name] = entry
                progress.update(f"{len(listed)} of {len(shard_paths)} shards, {counts.samples} samples")
    except OSError as error:
        free = shutil.disk_usage(output).free / 1e9
        raise RunError(
            f"--output: {error} ({free:.2f} GB free). Finished shards are kept; make room and give the same command again"
        ) from error
    for reason, entry in report.pop("bad").items():
        found_bad = counts.bad.setdefault(reason, {"count": 0, "examples": []})
        found_bad["count"] += entry["count"]
        found_bad["examples"] += entry["examples"]
    manifest = {"format": 1, **counts.summary(), "shards": dict(sorted(listed.items())), "join": report}
    write_json(output / MANIFEST, manifest)
    return manifest


def _tables(captions: str) -> list[Path]:
    found: list[Path] = []
    for part in captions.split("::"):
        if Path(part).is_dir():
            matches = sorted(path for path in Path(part).rglob("*") if path.suffix.lower() in SUFFIXES)
        else:
            matches = [Path(name) for name in sorted(glob.glob(part))]
        if not matches:
            raise UserError(f"--captions: {part!r} matches no table ({', '.join(SUFFIXES)})")
        found += matches
    return found


def _claim(output: Path, tables: list[Path], shards: list[str], settings: dict[str, Any]) -> Path:
    """Make the output's state folder, or check that it is of the same join."""
    files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in tables]
    state = claim_output(
        output, STATE, {"tables": files, "shards": shards, **settings}, "the join of other tables, shards or settings"
    )
    for folder in ("tables", "shards", "written"):
        (state / folder).mkdir(exist_ok=True)
    return state


def _join(
    tables: list[Path],
    shards: list[str],
    state: Path,
    on: str,
    column: str,
    columns: dict[str, str],
    memory_limit: str,
    ray_address: str,
) -> dict[str, Any]:
    """Make ``state``/joined.parquet; return the report of matches."""
    known = state / "report.json"
    if known.exists() and (state / "joined.parquet").exists():
        return json.loads(known.read_text(encoding="utf-8"))
    bad, sources = Statistics(), Counter()
    stage = partial(stage_table, state=state / "tables", on=on, column=column, columns=columns)
    with Progress("read tables") as progress:
        for number, (found_bad, found_sources) in enumerate(
            map_tasks(stage, list(enumerate(tables)), ray_address=ray_address), 1
        ):
            bad.merge(Statistics(found_bad))
            sources.update(found_sources)
            progress.update(f"{number} of {len(tables)}")
    index = partial(index_shard, state=state / "shards", on=on)
    with Progress("read shards") as progress:
        for number, found_bad in enumerate(map_tasks(index, list(enumerate(shards)), ray_address=ray_address), 1):
            bad.merge(Statistics(found_bad))
            progress.update(f"{number} of {len(shards)}")
    report = match(state, memory_limit)
    if report["samples_matched"] == 0:
        shutil.rmtree(state)  # nothing is worth keeping, and the next attempt, with other settings, may use the folder
        raise UserError(
            f"--on {on}: none of {report['samples']} samples matches any of {report['rows']} rows. Samples have {report['examples']['samples']}, the "
            f"tables' column {column!r} has {report['examples']['rows']}; choose --on or --table-column so that the two agree"
        )
    report |= {"rows_by_source": dict(sources), "bad": bad.bad}
    write_json(known, report)
    return report


def stage_table(
    task: tuple[int, Path], *, state: Path, on: str, column: str, columns: dict[str, str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """One caption table to parquet: row number, compared value, captions as json. Returns (what was wrong, rows by source)."""
    import pyarrow
    import pyarrow.parquet

    number, path = task
    final, counts = state / f"{number:05d}.parquet", state / f"{number:05d}.json"
    if final.exists() and counts.exists():
        known = json.loads(counts.read_text(encoding="utf-8"))
        return known["bad"], known["sources"]
    wanted = {name: name for name in CAPTION_COLUMNS} | columns
    taken = {ALIASES.get(name, name) for name in wanted.values()}

    def check(table: Path, names: list[str]) -> None:
        if column not in names or not taken & set(names):
            raise UserError(
                f"--captions: {str(table)!r} needs the column {column!r} and at least one of {', '.join(sorted(taken))}; it has "
                f"{', '.join(map(repr, names))}. --table-column names the compared one, --columns NAME=THEIRS maps captions"
            )

    bad, sources = Statistics(), Counter()
    schema = pyarrow.schema(
        [
            ("source", pyarrow.int32()),
            ("row", pyarrow.int64()),
            ("value", pyarrow.string()),
            ("captions", pyarrow.string()),
        ]
    )
    normal = _NORMAL.get(on, str.strip)
    partial_path = final.with_name(final.name + ".partial")
    rows: list[tuple[int, int, str, str]] = []
    with pyarrow.parquet.ParquetWriter(partial_path, schema, compression="zstd") as writer:
        for row_number, row, wrong in _with_replacements(read_rows(path, check), path, bad):
            name = f"{path.name}: row {row_number}"
            if row is None:
                bad.add_bad("malformed row", name, wrong)
                continue
            if wrong:
                bad.add_bad("table cell repaired or left out", name, wrong)
            value = normal(str(row.get(column, "")))
            found = {ours: row[theirs] for ours, theirs in wanted.items() if row.get(theirs)}
            if not value or not found:
                bad.add_bad("no captions" if value else f"no {column}", name, value)
                continue
            sources.update(found.keys())  # a dict would add its values
            rows.append((number, row_number, value, json.dumps(found, ensure_ascii=False, default=str)))
            if len(rows) == _ROWS_A_GROUP:
                writer.write_table(_as_table(rows, schema))
                rows = []
        writer.write_table(_as_table(rows, schema))
    write_json(counts, {"bad": bad.state, "sources": sources})
    os.replace(partial_path, final)
    return bad.state, dict(sources)


def _with_replacements(rows: Iterator[Any], path: Path, bad: Statistics) -> Iterator[Any]:
    """The rows; those in which undecodable bytes were replaced are counted, and kept."""
    for number, row, wrong in rows:
        if row is not None and any(isinstance(cell, str) and "\ufffd" in cell for cell in row.values()):
            bad.add_bad("not UTF-8 (bytes replaced)", f"{path.name}: row {number}")
        yield number, row, wrong


def _as_table(rows: list[tuple[int, int, str, str]], schema: Any) -> Any:
    import pyarrow

    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in schema]
    # A lone surrogate (half of an escaped character in a JSON table) has no UTF-8.
    texts = [[text.encode("utf-8", "replace").decode() for text in column] for column in columns[2:]]
    return pyarrow.table(
        [pyarrow.array(column, field.type) for column, field in zip([*columns[:2], *texts], schema, strict=True)],
        schema=schema,
    )


def match(state: Path, memory_limit: str = "3GB") -> dict[str, Any]:
    """Join ``state``/tables/*.parquet and ``state``/shards/*.parquet by value into ``state``/joined.parquet (shard, position, captions; sorted); the report.

    Small keys are joined first; the captions are fetched for what matched and sorted in bounded memory.
    """
    import duckdb

    spill = state / "spill"
    shutil.rmtree(spill, ignore_errors=True)
    try:
        return _match(state, spill, memory_limit)
    except duckdb.IOException as error:
        raise OSError(str(error)) from error
    except (duckdb.OutOfMemoryException, duckdb.ParserException, duckdb.InvalidInputException) as error:
        raise UserError(
            f"--memory-limit: got {memory_limit!r}: {str(error).splitlines()[0]}; give more, such as 3GB"
        ) from error
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def _match(state: Path, spill: Path, memory_limit: str) -> dict[str, Any]:
    import duckdb

    with duckdb.connect(
        config={"memory_limit": memory_limit, "temp_directory": str(spill), "preserve_insertion_order": False}
    ) as db:
        db.execute(f"CREATE VIEW captions AS SELECT * FROM read_parquet('{_quoted(state / 'tables')}/*.parquet')")
        db.execute(f"CREATE VIEW samples AS SELECT * FROM read_parquet('{_quoted(state / 'shards')}/*.parquet')")
        db.execute(
            "CREATE TEMP TABLE firsts AS SELECT value, source, min(row) AS row, count(*) AS times FROM captions GROUP BY value, source"
        )
        db.execute(
            "CREATE TEMP TABLE matched AS SELECT s.shard, s.position, f.source, f.row FROM samples s JOIN firsts f USING (value)"
        )
        partial_path = state / "joined.parquet.partial"
        db.execute(
            "COPY (SELECT m.shard, m.position, m.source, c.captions FROM matched m JOIN captions c ON m.source = c.source AND m.row = c.row "
            f"ORDER BY m.shard, m.position, m.source) TO '{_quoted(partial_path)}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROWS_A_GROUP})"
        )
        report = {
            "rows": _one(db, "SELECT count(*) FROM captions"),
            "rows_unmatched": _one(db, "SELECT count(*) FROM firsts f ANTI JOIN samples s USING (value)"),
            "rows_duplicate": _one(db, "SELECT coalesce(sum(times - 1), 0)::BIGINT FROM firsts"),
            "samples": _one(db, "SELECT count(*) FROM samples"),
            "samples_matched": _one(db, "SELECT count(*) FROM (SELECT DISTINCT shard, position FROM matched)"),
            "samples_sharing_a_value": _one(
                db,
                "SELECT coalesce(sum(n), 0)::BIGINT FROM (SELECT count(*) AS n FROM samples GROUP BY value HAVING n > 1)",
            ),
            "examples": {
                "rows": [
                    row[0]
                    for row in db.execute(
                        "SELECT f.value FROM firsts f ANTI JOIN samples s USING (value) LIMIT 3"
                    ).fetchall()
                ],
                "samples": [
                    row[0]
                    for row in db.execute(
                        "SELECT s.value FROM samples s ANTI JOIN firsts f USING (value) LIMIT 3"
                    ).fetchall()
                ],
                "duplicates": [
                    row[0] for row in db.execute("SELECT value FROM firsts WHERE times > 1 LIMIT 3").fetchall()
                ],
            },
        }
    report["samples_unmatched"] = report["samples"] - report["samples_matched"]
    os.replace(partial_path, state / "joined.parquet")
    return report


def _quoted(path: Path) -> str:
    return str(path.resolve()).replace("'", "''")


def _one(db: Any, query: str) -> int:
    return int(db.execute(query).fetchone()[0])


def format_join(report: dict[str, Any]) -> str:
    """What ``join_captions`` found, as text to read."""
    shown = report["examples"]
    lines = [f"{report['samples_matched']:>10} of {report['samples']} samples matched"]
    for count, what, examples in (
        (report["samples_unmatched"], "samples that no table knows", shown["samples"]),
        (report["rows_unmatched"], "rows whose picture is in no shard", shown["rows"]),
        (report["rows_duplicate"], "rows that repeat an earlier row's picture (the first counts)", shown["duplicates"]),
        (report["samples_sharing_a_value"], "samples that share a value with another (all get its captions)", []),
    ):
        lines.append(f"{count:>10} {what}" + (f", such as {examples[0]}" if examples and count else ""))
    lines += [f"{count:>10} rows with {source}" for source, count in report["rows_by_source"].items()]
    return "\n".join(lines)
