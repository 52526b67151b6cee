"""prepare urls: what img2dataset reads, from a table whose captions have line breaks."""

import csv
import json
import shlex

import pyarrow.parquet
import pytest

from dreamlip_train import cli
from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.data.shards.shards import record_of
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.url_list import write_url_list


def test_rows_with_line_breaks_become_rows(tmp_path, capsys):
    """img2dataset's own reader of CSV took each line of a caption for a row: "Expected 8 columns, got 3"."""
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", "raw_caption", "longSV_captions", "note"])
        writer.writerow(["http://h/1.jpg", "a dog", "A dog.\nIt runs, fast.", "x"])
        writer.writerow(["local/2.jpg", "a cat", "", ""])
        writer.writerow(["https://h/3.jpg", "", "A tree.", ""])
    cli.main(["prepare", "urls", str(tmp_path / "c.csv"), "--output", str(tmp_path / "urls.parquet")])
    assert "2 rows, 1 without a URL, 0 malformed" in capsys.readouterr().out
    rows = pyarrow.parquet.read_table(tmp_path / "urls.parquet").to_pylist()
    assert [row["url"] for row in rows] == ["http://h/1.jpg", "https://h/3.jpg"]
    assert rows[0]["longSV_captions"] == "A dog.\nIt runs, fast." and rows[1]["raw_caption"] is None


def test_a_list_comes_back_as_a_list_from_the_shards_that_img2dataset_makes(tmp_path):
    """Its columns are strings: a list's JSON was trained on as one caption, brackets and all."""
    cells = ["A dog, old.", 'It says "wuff".']
    (tmp_path / "c.jsonl").write_text(json.dumps({"Image Path": "http://h/1.jpg", "longSV_captions": cells}) + "\n")
    write_url_list(tmp_path / "c.jsonl", tmp_path / "u.parquet")
    (row,) = pyarrow.parquet.read_table(tmp_path / "u.parquet").to_pylist()
    record = record_of({"key": "0", "json": json.dumps(row | {"caption": None, "status": "success"}).encode()})
    assert record["longSV_captions"] == cells and record["url"] == "http://h/1.jpg"
    assert [one.text for one in caption_pool(record)] == cells


def test_the_command_for_img2dataset_can_be_pasted(tmp_path, capsys):
    name = "long'; touch x; '_captions"
    (tmp_path / "c.json").write_text(json.dumps([{"Image Path": "http://h/1.jpg", name: "A dog."}]))
    cli.main(["prepare", "urls", str(tmp_path / "c.json"), "--output", str(tmp_path / "u.parquet")])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(words[-1]) == [name]


def test_a_table_without_urls_writes_nothing(tmp_path):
    (tmp_path / "c.csv").write_text("Image Path,raw_caption\n1.jpg,a dog\n")
    with pytest.raises(UserError, match="no row of .* has a URL"):
        write_url_list(tmp_path / "c.csv", tmp_path / "u.parquet")
    with pytest.raises(UserError, match=r"ends in \.parquet"):
        write_url_list(tmp_path / "c.csv", tmp_path / "u.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]
