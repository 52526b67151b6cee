"""prepare join: captions meet the pictures they belong to, whatever the tables look like; killed runs go on;
originals stay as they are.
"""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from shard_files import jpeg, tokenize, write_tar
from tiny import clean_environment

from dreamlip_train import cli
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.table import Table
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.data.shards.shards import read_shard
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.join.join import join_captions
from dreamlip_train.prepare.url_keys import normal_path, normal_url

COLUMNS = ["raw_caption", "shortSV_captions", "longSV_captions"]


def url(i):
    return f"http://images.example.com/set%20one/{i:04d}.jpg"


def caption(i):
    return f"Long {i}. It has two sentences."


@pytest.fixture
def shards(tmp_path) -> Path:
    """3 shards of 10 samples as img2dataset makes them; sample i has url i, and a key of its own."""
    for shard in range(3):
        members = []
        for i in range(10 * shard, 10 * shard + 10):
            record = {"url": url(i), "width": 40, "caption": None, "key": f"{i:09d}", "number": f"n{i}"}
            members += [(f"{i:09d}.jpg", jpeg(i)), (f"{i:09d}.json", json.dumps(record).encode())]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
    return tmp_path / "in"


def write_csv(path, rows, header=(IMAGE_COLUMN, *COLUMNS), **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **options)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def rows(numbers):
    return [(url(i), f"raw {i}", f"short {i}", caption(i)) for i in numbers]


def records(folder) -> dict[str, dict]:
    return {
        sample["key"]: json.loads(sample["json"])
        for shard in sorted(Path(folder).glob("*.tar"))
        for sample in read_shard(str(shard))
    }


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.tar")}


def test_captions_meet_their_pictures_and_the_report_counts_both_sides(tmp_path, shards, capsys):
    table = write_csv(tmp_path / "c.csv", [*rows(range(5, 40)), *rows([7, 7])][::-1])
    before = digests(shards)
    cli.main(["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")])
    found = records(tmp_path / "out")
    assert len(found) == 30 and digests(shards) == before
    for key, record in found.items():
        i = int(key)
        assert record.get("longSV_captions") == (caption(i) if i >= 5 else None)
        assert (record["url"], record["width"]) == (url(i), 40)  # what was there is there still
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    report = manifest["join"]
    assert (report["samples"], report["samples_matched"], report["samples_unmatched"]) == (30, 25, 5)
    assert (report["rows"], report["rows_unmatched"], report["rows_duplicate"]) == (37, 10, 2)
    assert report["rows_by_source"] == dict.fromkeys(COLUMNS, 37)
    assert manifest["shards"]["00001.tar"]["samples"] == 10 and manifest["bad"]["no captions"]["count"] == 5
    printed = capsys.readouterr().out
    assert (
        "25 of 30 samples matched" in printed
        and "10 rows whose picture is in no shard, such as images.example.com/set one/" in printed
    )
    loader = train_loader(
        DataConfig(shards=str(tmp_path / "out"), num_workers=0, num_sub_captions=3),
        image_size=16,
        tokenize=tokenize,
        batch_size=5,
    )
    assert len(list(loader.epoch(0))) == 6


def test_matched_only_leaves_the_others_out(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", rows(range(12, 15)))
    manifest = join_captions(str(table), str(shards), tmp_path / "out", matched_only=True)
    assert sorted(records(tmp_path / "out")) == [f"{i:09d}" for i in (12, 13, 14)]
    assert list(manifest["shards"]) == ["00001.tar"] and not manifest["bad"]


SPELLINGS = {
    "scheme": "https://images.example.com/set%20one/0003.jpg",
    "escaping": "http://images.example.com/set one/0003.jpg",
    "host": "HTTP://Images.Example.COM:80/set%20one/0003.jpg#top",
    "blanks": "  http://images.example.com/set%20one/0003.jpg \t",
    "no scheme": "images.example.com/set%20one/0003.jpg",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_url_in_other_spellings(tmp_path, shards, spelling):
    table = write_csv(tmp_path / "c.csv", [(SPELLINGS[spelling], "raw", "short", "Long.")])
    assert join_captions(str(table), str(shards), tmp_path / "out")["join"]["samples_matched"] == 1
    assert records(tmp_path / "out")["000000003"]["raw_caption"] == "raw"


def test_urls_that_differ_stay_apart():
    assert (
        normal_url("http://a.com/x?id=1&amp;b=2")
        == normal_url("https://a.com/x?id=1&b=2")
        != normal_url("http://a.com/x?id=2&b=2")
    )
    assert normal_url("http://a.com/X.jpg") != normal_url("http://a.com/x.jpg")  # paths have case
    assert (
        normal_url("http://[broken")
        and normal_path("./a\\b.JPG") == normal_path("a/b.png") == "a/b"
        and normal_path(".hidden") == ".hidden"
    )


@pytest.mark.parametrize(
    ("on", "column", "value"),
    [("key", "key", "{:09d}"), ("number", "number", "n{}"), ("path", IMAGE_COLUMN, "./{:09d}.jpeg")],
)
def test_by_key_path_or_any_column(tmp_path, shards, on, column, value):
    table = write_csv(
        tmp_path / "c.csv", [(value.format(i), f"raw {i}") for i in range(4)], header=(column, "raw_caption")
    )
    assert join_captions(str(table), str(shards), tmp_path / "out", on=on)["join"]["samples_matched"] == 4
    assert records(tmp_path / "out")["000000002"]["raw_caption"] == "raw 2"


def test_of_a_picture_named_twice_the_first_row_counts(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", [(url(1), f"raw {n}", "", "") for n in ("first", "second", "a third")])
    assert join_captions(str(table), str(shards), tmp_path / "out")["join"]["rows_duplicate"] == 2
    assert records(tmp_path / "out")["000000001"]["raw_caption"] == "raw first"


def test_several_tables_complete_each_other_and_the_first_wins(tmp_path, shards):
    first = write_csv(
        tmp_path / "a.csv",
        [(url(1), "raw of a", "Long of a.")],
        header=(IMAGE_COLUMN, "raw_caption", "longSV_captions"),
    )
    second = write_csv(
        tmp_path / "b.csv",
        [(url(1), "raw of b", "Long of b.")],
        header=(IMAGE_COLUMN, "raw_caption", "longIB_captions"),
    )
    join_captions(f"{first}::{second}", str(shards), tmp_path / "out")
    record = records(tmp_path / "out")["000000001"]
    assert (record["raw_caption"], record["longSV_captions"], record["longIB_captions"]) == (
        "raw of a",
        "Long of a.",
        "Long of b.",
    )


def test_every_format_and_the_json_names(tmp_path, shards):
    renamed = {
        "ImagePath": url(0),
        "RawCaption": "raw",
        "IBCaptionShort": "s",
        "LLACaptionLong": "Long. One.",
        "SVCaptionLong": None,
    }
    (tmp_path / "list.json").write_text(json.dumps([renamed, {**renamed, "ImagePath": url(1)}, "no record"]))
    (tmp_path / "by_key.json").write_text(json.dumps({"000000002": {IMAGE_COLUMN: url(2), "raw_caption": "raw"}}))
    (tmp_path / "lines.jsonl").write_text(
        json.dumps(renamed | {"ImagePath": url(3)})
        + "\n{broken\n\n"
        + json.dumps(renamed | {"ImagePath": url(4)})
        + "\n"
    )
    pyarrow.parquet.write_table(
        pyarrow.table({IMAGE_COLUMN: [url(5), None], "longSV_captions": [["One.", "Two."], ["x"]]}),
        tmp_path / "p.parquet",
    )
    write_csv(tmp_path / "t.tsv", [(url(6), "raw", "", "")], delimiter="\t")
    names = ("list.json", "by_key.json", "lines.jsonl", "p.parquet", "t.tsv")
    manifest = join_captions("::".join(str(tmp_path / name) for name in names), str(shards), tmp_path / "out")
    assert manifest["join"]["samples_matched"] == 7
    found = records(tmp_path / "out")
    assert found["000000000"]["shortIB_captions"] == "s" and found["000000001"]["longLLA_captions"] == "Long. One."
    assert found["000000005"]["longSV_captions"] == ["One.", "Two."]
    assert {reason: entry["count"] for reason, entry in manifest["bad"].items() if "captions" not in reason} == {
        "malformed row": 2,
        "no Image Path": 1,
    }


def test_columns_under_other_names(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", [(url(1), "an alt text", "Mine. Two.")], header=("link", "alt", "mine"))
    words = [
        "--captions",
        str(table),
        "--shards",
        str(shards),
        "--output",
        str(tmp_path / "out"),
        "--table-column",
        "link",
    ]
    cli.main(["prepare", "join", *words, "--columns", "raw_caption", "alt", "longMine_captions", "mine"])
    record = records(tmp_path / "out")["000000001"]
    assert (record["raw_caption"], record["longMine_captions"]) == ("an alt text", "Mine. Two.")


def test_dirty_tables_cost_only_their_dirty_rows(tmp_path, shards):
    good = write_csv(
        tmp_path / "c.csv", [(url(0), 'He said "yes",\nthen left.', "s", "x" * 2**20 + ". End.")]
    ).read_bytes()
    lines = [
        b"\xef\xbb\xbf" + good,  # a BOM, a newline and quotes in a cell, a caption of 1 MB
        url(1).encode() + b",nul \0 byte,s,Long.\r\n",
        url(2).encode() + b",not utf-8 \xff\xfe,s,Long.\r\n",
        b"too,few\r\n",
        url(3).encode() + b",raw,s,Long.\r\n",
        b'unclosed,"quote,s,' + b"z" * (17 * 2**20) + b"\r\n",
        url(4).encode() + b",raw,s,Long.\r\n",
    ]
    (tmp_path / "c.csv").write_bytes(b"".join(lines))
    manifest = join_captions(str(tmp_path / "c.csv"), str(shards), tmp_path / "out")
    found = records(tmp_path / "out")
    assert (
        found["000000000"]["raw_caption"] == 'He said "yes",\nthen left.'
        and len(found["000000000"]["longSV_captions"]) > 2**20
    )
    assert found["000000001"]["raw_caption"] == "nul  byte" and "\ufffd" in found["000000002"]["raw_caption"]
    assert all("raw_caption" in found[f"{i:09d}"] for i in range(5))
    bad = manifest["bad"]
    assert (
        bad["malformed row"]["count"] == 2
        and "c.csv: row 4: line 6: 2 fields, the header has 4" in bad["malformed row"]["examples"][0]
    )
    assert "field larger than field limit" in bad["malformed row"]["examples"][1]
    assert bad["not UTF-8 (bytes replaced)"]["examples"] == ["c.csv: row 3"]


def test_damaged_shards_give_what_they_have(tmp_path, shards):
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 2 + 700])
    (shards / "00002.tar").write_bytes(b"<html>404</html>")
    manifest = join_captions(str(write_csv(tmp_path / "c.csv", rows(range(30)))), str(shards), tmp_path / "out")
    assert 10 < manifest["join"]["samples_matched"] < 20 and "00002.tar" not in manifest["shards"]
    assert "00001.tar" in manifest["bad"]["shard could not be read to its end"]["examples"][0]
    assert len(records(tmp_path / "out")) == manifest["join"]["samples_matched"]


def test_a_killed_join_goes_on_and_gives_the_same(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    join_captions(str(table), str(shards), tmp_path / "whole")
    words = ["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")]
    for wanted in ("tables/00000.parquet", "joined.parquet", "written/00000.tar.json"):
        process = subprocess.Popen(
            [sys.executable, "-m", "dreamlip_train", *words], env=clean_environment(), start_new_session=True
        )
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


def test_a_disk_that_fills_up_in_the_join_itself_says_what_to_do(tmp_path, shards):
    """DuckDB's errors are not OSErrors."""
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    join_captions(str(table), str(shards), tmp_path / "out")
    for name in ("joined.parquet", "report.json"):
        (tmp_path / "out" / ".join" / name).unlink()
    words = ["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")]
    code = "import resource; from dreamlip_train import cli; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); cli.main({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and "make room and give the same command again" in done.stderr, done.stderr[-2000:]
    cli.main(words)


def test_another_join_into_the_same_folder_is_refused(tmp_path, shards):
    join_captions(str(write_csv(tmp_path / "c.csv", rows(range(30)))), str(shards), tmp_path / "out")
    with pytest.raises(ValueError, match="--output: .* holds the join of other tables"):
        join_captions(str(write_csv(tmp_path / "d.csv", rows(range(30)))), str(shards), tmp_path / "out")


def test_a_full_disk_names_what_to_do_and_keeps_what_is_done(tmp_path, shards):
    """In a process of its own, which may write no file over 60 kB: the tables fit, a shard does not."""
    table = write_csv(tmp_path / "c.csv", rows(range(30)))
    words = ["prepare", "join", "--captions", str(table), "--shards", str(shards), "--output", str(tmp_path / "out")]
    code = "import resource; from dreamlip_train import cli; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000)); cli.main({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and "make room and give the same command again" in done.stderr, done.stderr[-2000:]
    assert not list((tmp_path / "out").glob("*.tar*"))
    cli.main(words)
    assert len(records(tmp_path / "out")) == 30


def test_rows_are_numbered_and_named(tmp_path):
    table = write_csv(
        tmp_path / "c.csv", [(url(1), "a"), (url(2),), (url(3), "c")], header=(IMAGE_COLUMN, "raw_caption")
    )
    assert [(number, bool(row)) for number, row, _ in Table(table)] == [(1, True), (2, False), (3, True)]


def test_a_wrong_column_claims_nothing(tmp_path, shards):
    """The failed attempt once kept the output folder, and came with a traceback of a worker."""
    table = write_csv(tmp_path / "c.csv", rows(range(10)), header=("picture", *COLUMNS))
    with pytest.raises(UserError, match="needs the column 'Image Path'"):
        join_captions(str(table), str(shards), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert join_captions(str(table), str(shards), tmp_path / "out", table_column="picture")["samples"] == 10


def test_two_joins_do_not_write_one_folder(tmp_path, shards):
    table = write_csv(tmp_path / "c.csv", rows(range(10)))
    code = "import sys, time; from pathlib import Path; from dreamlip_train.jobs.job_folder import job_folder\n"
    code += f"with job_folder(Path({str(tmp_path / 'out')!r}), '.join', {{}}, ''):\n"
    code += "    print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], env=clean_environment(), stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            with pytest.raises(UserError, match="--output: .* is in use by process"):
                join_captions(str(table), str(shards), tmp_path / "out")
        finally:
            other.kill()
    assert join_captions(str(table), str(shards), tmp_path / "out")["samples"] == 10
