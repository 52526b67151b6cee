"""The join itself: staged tables x staged shards, by value, in DuckDB within bounded memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.user_error import UserError

ROWS_PER_GROUP = 20_000


def match(state: Path, memory_limit: str = "3GB") -> dict[str, Any]:
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


def _match(state: Path, spill: Path, memory_limit: str) -> dict[str, Any]:
    import duckdb

    with duckdb.connect(
        config={"memory_limit": memory_limit, "temp_directory": str(spill), "preserve_insertion_order": False}
    ) as db:
        db.execute(f"CREATE VIEW captions AS SELECT * FROM read_parquet('{_quoted(state / 'tables')}/*.parquet')")
        db.execute(f"CREATE VIEW samples AS SELECT * FROM read_parquet('{_quoted(state / 'shards')}/*.parquet')")
        db.execute(
            "CREATE TEMP TABLE firsts AS SELECT value, source, min(row) AS row, count(*) AS times FROM captions GROUP "
            "BY value, source"
        )
        db.execute(
            "CREATE TEMP TABLE matched AS SELECT s.shard, s.position, f.source, f.row FROM samples s JOIN firsts f "
            "USING (value)"
        )
        partial_path = state / "joined.parquet.partial"
        db.execute(
            "COPY (SELECT m.shard, m.position, m.source, c.captions FROM matched m JOIN captions c ON m.source = "
            "c.source AND m.row = c.row "
            f"ORDER BY m.shard, m.position, m.source) TO '{_quoted(partial_path)}' (FORMAT parquet, COMPRESSION zstd, "
            f"ROW_GROUP_SIZE {ROWS_PER_GROUP})"
        )
        report = {
            "rows": _one(db, "SELECT count(*) FROM captions"),
            "rows_unmatched": _one(db, "SELECT count(*) FROM firsts f ANTI JOIN samples s USING (value)"),
            "rows_duplicate": _one(db, "SELECT coalesce(sum(times - 1), 0)::BIGINT FROM firsts"),
            "samples": _one(db, "SELECT count(*) FROM samples"),
            "samples_matched": _one(db, "SELECT count(*) FROM (SELECT DISTINCT shard, position FROM matched)"),
            "samples_sharing_a_value": _one(
                db,
                "SELECT coalesce(sum(n), 0)::BIGINT FROM (SELECT count(*) AS n FROM samples GROUP BY value HAVING n > "
                "1)",
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
