"""The join itself: staged tables x staged shards, by value, in DuckDB within bounded memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.user_error import UserError

ROWS_PER_GROUP = 20_000


def match(state: Path, memory_limit: str) -> dict[str, Any]:
    """Join ``state``/tables/*.parquet and ``state``/shards/*.parquet by value into ``state``/joined.parquet (shard,
    position, captions; sorted); the report.

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


# A table that names a picture twice gives it the captions of its first row.
_FIRSTS = """
    CREATE TEMP TABLE firsts AS
    SELECT value, source, min(row) AS row, count(*) AS times FROM captions GROUP BY value, source
"""
_MATCHED = """
    CREATE TEMP TABLE matched AS
    SELECT s.shard, s.position, f.source, f.row FROM samples s JOIN firsts f USING (value)
"""
_JOINED = """
    SELECT m.shard, m.position, m.source, c.captions
    FROM matched m JOIN captions c ON m.source = c.source AND m.row = c.row
    ORDER BY m.shard, m.position, m.source
"""
_COUNTS = {
    "rows": "SELECT count(*) FROM captions",
    "rows_unmatched": "SELECT count(*) FROM firsts f ANTI JOIN samples s USING (value)",
    "rows_duplicate": "SELECT coalesce(sum(times - 1), 0)::BIGINT FROM firsts",
    "samples": "SELECT count(*) FROM samples",
    "samples_matched": "SELECT count(*) FROM (SELECT DISTINCT shard, position FROM matched)",
    "samples_sharing_a_value": """
        SELECT coalesce(sum(n), 0)::BIGINT
        FROM (SELECT count(*) AS n FROM samples GROUP BY value HAVING n > 1)
    """,
}
_EXAMPLES = {
    "rows": "SELECT f.value FROM firsts f ANTI JOIN samples s USING (value) LIMIT 3",
    "samples": "SELECT s.value FROM samples s ANTI JOIN firsts f USING (value) LIMIT 3",
    "duplicates": "SELECT value FROM firsts WHERE times > 1 LIMIT 3",
}


def _match(state: Path, spill: Path, memory_limit: str) -> dict[str, Any]:
    import duckdb

    with duckdb.connect(
        config={"memory_limit": memory_limit, "temp_directory": str(spill), "preserve_insertion_order": False}
    ) as db:
        for view, folder in (("captions", "tables"), ("samples", "shards")):
            db.execute(f"CREATE VIEW {view} AS SELECT * FROM read_parquet('{_quoted(state / folder)}/*.parquet')")
        db.execute(_FIRSTS)
        db.execute(_MATCHED)
        with atomic_write(state / "joined.parquet") as partial:
            options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROWS_PER_GROUP}"
            db.execute(f"COPY ({_JOINED}) TO '{_quoted(partial)}' ({options})")
        report: dict[str, Any] = {name: int(db.execute(query).fetchall()[0][0]) for name, query in _COUNTS.items()}
        report["examples"] = {
            name: [value for (value,) in db.execute(query).fetchall()] for name, query in _EXAMPLES.items()
        }
    report["samples_unmatched"] = report["samples"] - report["samples_matched"]
    return report


def _quoted(path: Path) -> str:
    return str(path.resolve()).replace("'", "''")
