"""prepare: users' files to shards, restartable, every bad row counted and named; existing shards validated and
indexed."""

import csv
import json
import multiprocessing
import os
import signal
import tarfile
import time

import pyarrow
import pyarrow.parquet
import pytest
from photos import PHOTOS, write_photos
from shard_files import jpeg, sample, tokenize, write_tar

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.folder import prepare_folder


def count_tokens(text):
    return len(text.split()) + 2


def table(folder, rows, name="captions.csv", header=None):
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header or ["Image Path", *CAPTION_COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(image, text="A dog runs. The sea is blue."):
    return {"Image Path": image, "raw_caption": f"raw {image}", "longSV_captions": text}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "deep" / "x.jpg").write_bytes(jpeg(11))
    return folder


def members(shard):
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_what_is_no_picture_file_is_not_waited_for_and_not_read(images, tmp_path):
    """A named pipe was read for ever, and a file of any size into memory."""
    os.mkfifo(images / "pipe.jpg")
    (images / "giant.jpg").touch()
    os.truncate(images / "giant.jpg", 2**40)
    captions = table(tmp_path, [row(name) for name in ("0.jpg", "pipe.jpg", "giant.jpg")])
    bad = prepare_folder(captions, images, tmp_path / "out")["bad"]
    assert "pipe.jpg is no regular file" in bad["image not found"]["examples"][0]
    assert "1,099,511,627,776 bytes are more than" in bad["damaged image"]["examples"][0]


def test_real_photographs_from_table_to_batch(tmp_path):
    captions, photos = write_photos(tmp_path / "in")
    manifest = prepare_folder(captions, photos, tmp_path / "out", count_tokens=count_tokens)
    count = manifest["samples"]
    assert 4 <= count <= len(PHOTOS) and not manifest["bad"]
    described = manifest["captions"]["longSV_captions"]
    assert (
        described["samples"] == count
        and 2 <= described["sentences_mean"] <= 5
        and described["tokens_mean"] > described["sentence_tokens_mean"]
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    first = members(tmp_path / "out" / "00000.tar")
    assert first["000000000.jpg"] == (photos / "astronaut.jpg").read_bytes(), "images are copied as they are"
    config = DataConfig(shards=str(tmp_path / "out"), num_sub_captions=4, num_workers=0)
    made = train_loader(config, image_size=64, tokenize=tokenize, batch_size=count)
    (batch,) = made.epoch(0)
    assert batch["images"].shape == (count, 3, 64, 64) and batch["text_mask"].all() and made.bad.total == 0


def test_images_are_found_by_path_url_name_or_stem(tmp_path, images):
    rows = [
        row("0.jpg"),
        row("http://host/a/b/1.jpg?w=3"),
        row("elsewhere/2.jpg"),
        row("3.png"),
        row("deep/x.jpg"),
        row("4"),
    ]
    manifest = prepare_folder(table(tmp_path, rows), images, tmp_path / "out")
    assert manifest["samples"] == 6, manifest["bad"]


def test_bad_rows_are_counted_and_named_and_the_rest_is_kept(tmp_path, images):
    (images / "8.jpg").write_bytes(jpeg(8)[:300])
    (images / "deep" / "9.jpg").write_bytes(jpeg(9))
    rows = [
        row("0.jpg"),
        row("0.jpg"),
        row("missing.jpg"),
        row("8.jpg"),
        row("9.jpg"),
        {"Image Path": "1.jpg"},
        row("2.jpg", "nan"),
        {"Image Path": "", "raw_caption": "x"},
    ]
    rows[6]["raw_caption"] = ""
    path = table(tmp_path, rows)
    with path.open("a") as file:
        file.write("too,few\r\n")
    manifest = prepare_folder(path, images, tmp_path / "out")
    assert manifest["samples"] == 1 + 1  # 0.jpg, and 9.jpg: its relative path is exact
    bad = {reason: (entry["count"], entry["examples"][0]) for reason, entry in manifest["bad"].items()}
    assert bad["duplicate image"] == (1, "row 2: duplicate image '0.jpg'")
    assert bad["image not found"][0] == 2 and "row 3" in bad["image not found"][1]
    assert bad["damaged image"][0] == 1 and "8.jpg" in bad["damaged image"][1]
    assert bad["no captions"][0] == 2 and "row 6" in bad["no captions"][1]
    assert bad["malformed row"][0] == 1 and "2 fields, the header has 8" in bad["malformed row"][1]


def test_an_ambiguous_name_is_not_guessed(tmp_path, images):
    (images / "deep" / "y.jpg").write_bytes(jpeg(1))
    (images / "other").mkdir()
    (images / "other" / "y.jpg").write_bytes(jpeg(2))
    manifest = prepare_folder(table(tmp_path, [row("0.jpg"), row("http://h/y.jpg")]), images, tmp_path / "out")
    assert "matches 2 images" in manifest["bad"]["image not found"]["examples"][0]


def test_dirty_tables_are_read(tmp_path, images):
    """A byte-order mark, quotes, newlines inside a cell, NULs, bytes that are no UTF-8, further columns."""
    header = "\ufeff" + ",".join(["Image Path", *CAPTION_COLUMNS, "license"]) + "\r\n"
    cells = ["0.jpg", '"a ""quoted"" word"', "", '"First line.\nSecond line."', "", "", "", "", "CC0"]
    data = header.encode() + ",".join(cells).encode() + b"\r\n" + b"1.jpg,caf\xe9\0 scene,,,,,,,\r\n"
    path = tmp_path / "captions.csv"
    path.write_bytes(data)
    assert prepare_folder(path, images, tmp_path / "out")["samples"] == 2
    tar = members(tmp_path / "out" / "00000.tar")
    first, second = (json.loads(tar[f"00000000{i}.json"]) for i in (0, 1))
    assert (
        first["raw_caption"] == 'a "quoted" word'
        and first["longIB_captions"] == "First line.\nSecond line."
        and first["license"] == "CC0"
    )
    assert second["raw_caption"].startswith("caf") and "\0" not in second["raw_caption"]


def test_parquet_equals_csv(tmp_path, images):
    rows = [row(f"{i}.jpg") for i in range(5)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**r, "shortIB_captions": None} for r in rows]), tmp_path / "t.parquet"
    )
    prepare_folder(tmp_path / "t.parquet", images, tmp_path / "a")
    prepare_folder(table(tmp_path, rows), images, tmp_path / "b")
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()


def test_masks_travel(tmp_path, images):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "1.png").write_bytes(b"png bytes")
    manifest = prepare_folder(
        table(tmp_path, [row("0.jpg"), row("1.jpg")]), images, tmp_path / "out", masks=tmp_path / "masks"
    )
    assert manifest["masks"] == 1
    assert members(tmp_path / "out" / "00000.tar")["000000001.mask.png"] == b"png bytes"


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.tar")} | {
        "manifest": (folder / "manifest.json").read_bytes()
    }


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(300):
        (images / f"{i}.jpg").write_bytes(jpeg(i, 300))
    captions = table(tmp_path, [row(f"{i}.jpg") for i in range(300)])
    job = dict(shard_size=10)
    prepare_folder(captions, images, tmp_path / "whole", **job)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: (os.setpgrp(), prepare_folder(captions, images, tmp_path / "killed", **job))
    )
    process.start()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.tar"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.tar")}
    assert 4 <= len(finished) < 30 and not (tmp_path / "killed" / "manifest.json").exists(), (
        "killed too late to show anything"
    )
    prepare_folder(captions, images, tmp_path / "killed", **job)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    kept = [name for name, stamp in finished.items() if (tmp_path / "killed" / name).stat().st_mtime_ns == stamp]
    assert len(kept) >= len(finished) - 2, "finished shards are not written again"


def test_another_job_does_not_touch_what_is_there(tmp_path, images):
    captions = table(tmp_path, [row("0.jpg")])
    prepare_folder(captions, images, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="--output: .* shards of another table, folder or shard size"):
        prepare_folder(captions, images, tmp_path / "out", shard_size=7)
    write_tar(tmp_path / "foreign" / "a.tar", sample("k"))
    with pytest.raises(ValueError, match="that this command did not write"):
        prepare_folder(captions, images, tmp_path / "foreign")
    assert files(tmp_path / "out") == before


BAD_INPUT = {
    "columns": (
        lambda d: table(d, [{"url": "x"}], header=["url", "text"]),
        "needs the column 'Image Path' and at least one of raw.* it has 'url', 'text'",
    ),
    "delimiter": (
        lambda d: (d / "c.csv").write_text("Image Path;raw_caption\n0.jpg;a\n") and d / "c.csv",
        "read as separated by .,., but its header",
    ),
    "empty": (lambda d: (d / "c.csv").write_text("") or d / "c.csv", "is empty"),
    "missing": (lambda d: d / "none.csv", "--captions: no file"),
    "format": (
        lambda d: (d / "c.xls").write_text("x") and d / "c.xls",
        "is none of .csv, .tsv, .parquet, .json, .jsonl",
    ),
    "not parquet": (lambda d: (d / "c.parquet").write_text("x") and d / "c.parquet", "not a readable parquet"),
    "no row": (lambda d: table(d, []), "gave a sample: it has no rows"),
    "no usable row": (lambda d: table(d, [row("missing.jpg")]), "1 x image not found, such as row 1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_tables_are_clear_errors(tmp_path, images, case):
    make, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        prepare_folder(make(tmp_path), images, tmp_path / "out")


def test_no_image_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="--images: no folder"):
        prepare_folder(table(tmp_path, [row("0.jpg")]), tmp_path / "none", tmp_path / "out")


def test_no_two_rows_share_a_file_by_its_name(tmp_path, images):
    """Two URLs that end alike once both got the one file, and val/1.jpg the picture of train/1.jpg."""
    (images / "train").mkdir()
    (images / "train" / "t.jpg").write_bytes(jpeg(20))
    rows = [
        row("http://a/1.jpg"),
        row("http://b/1.jpg"),
        row("2.jpg"),
        row("http://b/2.jpg"),
        row("val/t.jpg"),
        row("set/train/t.jpg"),
        row("http://[abc]/3.jpg"),
    ]
    manifest = prepare_folder(table(tmp_path, rows), images, tmp_path / "out")
    assert manifest["samples"] == 3, manifest["bad"]  # 2.jpg, set/train/t.jpg and 3.jpg, whose URL is none
    examples = manifest["bad"]["image not found"]["examples"]
    assert [example.split(":")[0] for example in examples] == ["row 1", "row 2", "row 4", "row 5"]
    assert "meant by 'http://a/1.jpg' and 'http://b/1.jpg' too" in examples[0]


def test_a_failed_attempt_does_not_keep_the_folder_from_the_corrected_one(tmp_path, images):
    wrong = table(tmp_path, [{"url": "x"}], "wrong.csv", header=["url", "text"])
    with pytest.raises(UserError, match="needs the column"):
        prepare_folder(wrong, images, tmp_path / "out")
    unusable = table(tmp_path, [row("missing.jpg")], "unusable.csv")
    with pytest.raises(UserError, match="no row of"):
        prepare_folder(unusable, images, tmp_path / "out")
    assert prepare_folder(table(tmp_path, [row("0.jpg")]), images, tmp_path / "out")["samples"] == 1


def test_half_a_character_costs_only_itself(tmp_path, images):
    records = [{"Image Path": "0.jpg", "raw_caption": "a \ud83d dog"}, {"Image Path": "1.jpg", "raw_caption": "a cat"}]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(records))
    assert prepare_folder(path, images, tmp_path / "out")["samples"] == 2
