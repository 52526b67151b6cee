"""prepare join: captions meet the pictures they belong to, whatever the tables look like; killed runs go on;
originals stay as they are."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from caption_tables import COLUMNS, caption, digests, rows, url, write_csv
from shard_files import records, tokenize

from dreamlip_train import cli
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.table import Table
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.prepare.join.join import join_captions
from dreamlip_train.prepare.url_keys import normal_path, normal_url


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
    for odd in (f"http://h/&#{'9' * 5000};", "http://[::1", "http://[v1.x]/", "\0", "\ud800", "\ufdfa" * 30_000):
        assert normal_url(odd)  # 5,000 digits are no number for Python, and normal forms take seconds
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
    """All captions of rows that follow each other, where none is long (Flickr8k's); of others those of the first."""
    rows = [(url(1), f"raw {n}", "", "") for n in ("first", "second")]
    rows += [(url(2), f"raw {n}", "", f"Long {n}.") for n in ("first", "second")]
    table = write_csv(tmp_path / "c.csv", [*rows, (url(1), "raw third", "", "")])
    assert join_captions(str(table), str(shards), tmp_path / "out")["join"]["rows_duplicate"] == 2
    joined = records(tmp_path / "out")
    assert joined["000000001"]["raw_caption"] == ["raw first", "raw second"]
    assert joined["000000002"]["raw_caption"] == "raw first"


def test_rows_of_one_url_with_keys_of_their_own_stay_apart(tmp_path, shards):
    rows = [(url(1), f"00000000{i}", f"raw {i}") for i in (1, 2)]
    table = write_csv(tmp_path / "c.csv", rows, header=(IMAGE_COLUMN, "key", "raw_caption"))
    assert join_captions(str(table), str(shards), tmp_path / "out", on="key")["join"]["samples_matched"] == 2
    joined = records(tmp_path / "out")
    assert [joined[key]["raw_caption"] for _, key, _ in rows] == ["raw 1", "raw 2"]


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


def test_rows_are_numbered_and_named(tmp_path):
    table = write_csv(
        tmp_path / "c.csv", [(url(1), "a"), (url(2),), (url(3), "c")], header=(IMAGE_COLUMN, "raw_caption")
    )
    assert [(number, bool(row)) for number, row, _ in Table(table)] == [(1, True), (2, False), (3, True)]
