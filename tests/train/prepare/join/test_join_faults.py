"""prepare join where something fails: kills, full disks, other jobs' folders, inputs that can't be joined."""

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import forked
import pytest
from caption_tables import COLUMNS, digests, rows, write_csv
from shard_files import records
from warm import Command

from dreamlip_train import cli
from dreamlip_train.jobs.job_folder import job_folder
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.join.join import join_captions


def test_a_killed_join_goes_on_and_gives_the_same(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    join_captions(str(table), str(shards), tmp_path / "whole")
    words = ["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")]
    for wanted in ("tables/00000.parquet", "joined.parquet", "written/00000.tar.json"):
        process = Command(words, tmp_path / "out.txt", session=True)
        while not (tmp_path / "out" / ".join" / wanted).exists() and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    first = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    cli.main(words)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == first  # not done again
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == json.loads(
        (tmp_path / "whole/manifest.json").read_text()
    )


ERRORS = {
    "no match": (
        lambda t, s: (write_csv(t / "c.csv", [("http://other.com/x.jpg", "r", "s", "l")]), {}),
        "--on url: none of 30 samples matches any of 1 rows.*other.com/x.jpg",
    ),
    "no table": (lambda t, s: (t / "none.csv", {}), "--captions: .* matches no table"),
    "columns": (
        lambda t, s: (write_csv(t / "c.csv", [("x", "y")], header=("a", "b")), {}),
        "needs the column 'Image Path' .* it has 'a', 'b'",
    ),
    "delimiter": (
        lambda t, s: (write_csv(t / "c.csv", rows([1]), delimiter=";"), {}),
        "read as separated by ',', but its header .* has ';'",
    ),
    "empty": (lambda t, s: ((t / "c.csv").write_text("") or t / "c.csv", {}), "is empty"),
    "no rows": (lambda t, s: (write_csv(t / "c.csv", []), {}), "none of 30 samples matches any of 0 rows"),
    "same folder": (
        lambda t, s: (write_csv(t / "c.csv", rows([1])), {"output": s}),
        "--output: .* is the folder of the shards",
    ),
    "no ray": (
        lambda t, s: (write_csv(t / "c.csv", rows([1])), {"ray": "127.0.0.1:1"}),
        "--ray: no cluster at '127.0.0.1:1'",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_can_not_be_joined_is_said(tmp_path, shards, error):
    make, message = ERRORS[error]
    table, changes = make(tmp_path, shards)
    with pytest.raises(ValueError, match=message):
        join_captions(str(table), str(shards), changes.pop("output", tmp_path / "out"), **changes)


def test_after_no_match_another_choice_may_use_the_folder(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", [(f"{i:09d}", f"raw {i}") for i in range(4)], header=("key", "raw_caption"))
    with pytest.raises(ValueError, match="--on url: none of"):
        join_captions(str(table), str(shards), tmp_path / "out", table_column="key")
    assert join_captions(str(table), str(shards), tmp_path / "out", on="key")["join"]["samples_matched"] == 4


@pytest.mark.parametrize("limit", ["nonsense", "1KB"])
def test_a_memory_limit_that_is_none_or_too_small_is_named(tmp_path, shards, limit):
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    with pytest.raises(ValueError, match=f"--memory-limit: got '{limit}': .*give more, such as 3GB"):
        join_captions(str(table), str(shards), tmp_path / "out", memory_limit=limit)


def on_a_full_disk(words: list[str], size: int) -> tuple[int, str]:
    """The command's exit code and what it says, in a process that may write no file of more bytes."""
    reader, writer = os.pipe()

    def fill() -> None:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = forked.start(words, Path(os.devnull), fill)
    os.close(writer)
    with os.fdopen(reader) as printed:
        said = printed.read()
    return forked.ended(process), said


def test_a_disk_that_fills_up_in_the_join_itself_says_what_to_do(tmp_path, shards):
    """DuckDB's errors are not OSErrors."""
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    join_captions(str(table), str(shards), tmp_path / "out")
    for name in ("joined.parquet", "report.json"):
        (tmp_path / "out" / ".join" / name).unlink()
    words = ["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")]
    code, said = on_a_full_disk(words, 100)
    assert code == 2 and "make room and give the same command again" in said, said[-2000:]
    cli.main(words)


def test_another_join_into_the_same_folder_is_refused(tmp_path, shards):
    join_captions(str(write_csv(tmp_path / "c.csv", rows(range(30)))), str(shards), tmp_path / "out")
    with pytest.raises(ValueError, match="--output: .* holds the join of other tables"):
        join_captions(str(write_csv(tmp_path / "d.csv", rows(range(30)))), str(shards), tmp_path / "out")


def test_a_full_disk_names_what_to_do_and_keeps_what_is_done(tmp_path, shards):
    """In a process of its own, which may write no file over 60 kB: the tables fit, a shard does not."""
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    words = ["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")]
    code, said = on_a_full_disk(words, 15000)
    assert code == 2 and "make room and give the same command again" in said, said[-2000:]
    assert not list((tmp_path / "out").glob("*.tar*"))
    cli.main(words)
    assert len(records(tmp_path / "out")) == 30


def test_a_wrong_column_claims_nothing(tmp_path, shards):
    """The failed attempt once kept the output folder, and came with a traceback of a worker."""
    table = write_csv(tmp_path / "c.csv", rows(range(10)), header=("picture", *COLUMNS))
    with pytest.raises(UserError, match="needs the column 'Image Path'"):
        join_captions(str(table), str(shards), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert join_captions(str(table), str(shards), tmp_path / "out", table_column="picture")["samples"] == 10


def test_two_joins_do_not_write_one_folder(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", rows(range(10)))
    fork = multiprocessing.get_context("fork")
    held = fork.Event()

    def hold():
        with job_folder(tmp_path / "out", ".join", {}, ""):
            held.set()
            time.sleep(60)

    other = fork.Process(target=hold)
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(UserError, match="--output: .* is in use by process"):
            join_captions(str(table), str(shards), tmp_path / "out")
    finally:
        other.kill()
        other.join()
    assert join_captions(str(table), str(shards), tmp_path / "out")["samples"] == 10
