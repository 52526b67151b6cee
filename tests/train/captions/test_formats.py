"""The files people bring, each of exactly its layout: what it is told to be, and its rows in our columns."""

import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest
from caption_layouts import LAYOUTS, LONG, PIECES, PUBLISHED
from shard_files import jpeg, sample, write_tar

from dreamlip_train import cli
from dreamlip_train.captions.columns import caption_pool, text_columns
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN, parse_columns
from dreamlip_train.captions.table import Table
from dreamlip_train.data.shards.shards import read_shard, record_of
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.folder import prepare_folder
from dreamlip_train.prepare.join.join import join_captions
from dreamlip_train.prepare.url_list import write_url_list
from dreamlip_train.prepare.validate import validate_shards


def pools(rows):
    found = {}
    for _, row, wrong in rows:
        assert row is not None and not wrong, wrong
        pool = found.setdefault(row[IMAGE_COLUMN], {})
        for piece in caption_pool(row):
            pool.setdefault(piece.source, []).append(piece.text)
    return found


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_is_known_by_its_columns(case, tmp_path, capsys):
    name, content, layout, expected = LAYOUTS[case]
    (tmp_path / name).write_bytes(content)
    table = Table(tmp_path / name)
    assert pools(table) == expected and table.layout == layout
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "validate", str(tmp_path / name)])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and f"{layout}, {len(expected)} rows" in printed and IMAGE_COLUMN in printed


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_parquet_is_known_and_joined(case, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PUBLISHED[case]]), tmp_path / "t.parquet")
    table = Table(tmp_path / "t.parquet")
    assert pools(table) == {"http://h/1.jpg": {"raw_caption": ["bus for sale"], "long_captions": PIECES}}
    assert table.layout == case
    url = json.dumps({"url": "http://h/1.jpg"}).encode()
    write_tar(tmp_path / "in" / "00000.tar", [("0.jpg", jpeg(1)), ("0.json", url)])
    join_captions(str(tmp_path / "t.parquet"), str(tmp_path / "in"), tmp_path / "out")
    (sample,) = read_shard(str(tmp_path / "out" / "00000.tar"))
    assert record_of(sample)["long_captions"] == LONG and record_of(sample)["raw_caption"] == "bus for sale"


def pictures(folder):
    """[(the picture, its record)] of a folder's shards."""
    return [
        (s.get("jpg") or s["png"], record_of(s)) for tar in sorted(folder.glob("*.tar")) for s in read_shard(str(tar))
    ]


def hub_parquet(path, count=5, group=2):
    rows = [{"image": {"bytes": jpeg(i), "path": f"{i % 2}.jpg"}, "caption": LONG, "width": i} for i in range(count)]
    rows[1]["image"] = {"bytes": b"no picture", "path": None}
    rows[2]["image"] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_pictures_inside_a_parquet_file_need_no_folder(tmp_path, kind, capsys):
    path = hub_parquet(tmp_path / "train-00000-of-00001.parquet")
    if kind == "binary":
        table = pyarrow.parquet.read_table(path).to_pylist()
        flat = [{**row, "image": row["image"] and row["image"]["bytes"]} for row in table]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), path, row_group_size=2)
    words = ["--captions", str(path), "--output", str(tmp_path / "out"), "--columns", "image=image", "long=caption"]
    cli.main(["prepare", "folder", *words, "--shard-size", "2"])
    made = pictures(tmp_path / "out")
    assert [picture for picture, _ in made] == [jpeg(i) for i in (0, 3, 4)], "also two of one path"
    assert [record["width"] for _, record in made] == [0, 3, 4] and made[0][1]["long_captions"] == LONG
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {reason: entry["count"] for reason, entry in manifest["bad"].items()} == {
        "damaged image": 1,
        "image not found": 1,
    }
    assert manifest["table"]["rows"] == 5
    with pytest.raises(SystemExit):
        cli.main(["prepare", "validate", str(path), "--columns", "image=image", "long=caption"])
    assert "image -> Image Path, the pictures themselves" in capsys.readouterr().out
    with pytest.raises(UserError, match="--images: the table has no pictures inside"):
        (tmp_path / "t.csv").write_text("Image Path,raw_caption\n1.jpg,a dog\n")
        prepare_folder(tmp_path / "t.csv", None, tmp_path / "none")


def test_a_data_set_of_the_hub_is_streamed(tmp_path):
    """A folder of the hub's layout, which ``datasets`` reads without the network."""
    hub_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    columns = {IMAGE_COLUMN: "image", "long_captions": "caption"}
    manifest = prepare_folder(f"hf:{tmp_path / 'set'}", None, tmp_path / "out", columns=columns, shard_size=2)
    assert [picture for picture, _ in pictures(tmp_path / "out")] == [jpeg(i) for i in (0, 3, 4)]
    assert manifest["samples"] == 3 and manifest["bad"]["malformed row"]["examples"] == ["row 3: no picture"]
    for name in ("hf:", "hf:a:b:c:d", f"hf:{tmp_path / 'none'}", f"hf:{tmp_path / 'set'}:nosplit"):
        with pytest.raises(UserError, match="--captions: "):
            prepare_folder(name, None, tmp_path / "none", columns=columns)


def test_columns_under_any_name(tmp_path):
    """SynthCI and others: `prepare folder` knew DreamLIP's names alone."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "t.tsv").write_text(f"file\tcaption\traw_caption\tdense\n1.jpg\ta bus\tnot this\t{LONG}\n")
    columns = parse_columns(["image=file", "raw=caption", "longQwen=dense"])
    assert columns == parse_columns(["image", "file", "raw", "caption", "longQwen_captions", "dense"])
    prepare_folder(tmp_path / "t.tsv", tmp_path / "images", tmp_path / "out", columns=columns)
    ((_, record),) = pictures(tmp_path / "out")
    assert record == {
        IMAGE_COLUMN: "1.jpg",
        "raw_caption": "a bus",
        "raw_caption of the table": "not this",
        "longQwen_captions": LONG,
    }
    for words in (
        ["long=nothing"],
        ["long"],
        ["long=dense", "short=dense"],
        ["raw=caption", "raw_caption=dense"],
        ["x=dense"],
    ):
        with pytest.raises(UserError, match="--columns"):
            prepare_folder(tmp_path / "t.tsv", tmp_path / "images", tmp_path / "o", columns=parse_columns(words))
    (tmp_path / "u.tsv").write_text(f"URL\tdense\nhttp://h/1.jpg\t{LONG}\n")
    made = write_url_list(tmp_path / "u.tsv", tmp_path / "u.parquet", parse_columns(["url=URL", "longQwen=dense"]))
    assert made["columns"] == ["longQwen_captions"]
    assert pyarrow.parquet.read_table(tmp_path / "u.parquet").to_pylist() == [
        {"url": "http://h/1.jpg", "longQwen_captions": LONG}
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["SAMPLE_ID", "URL", "TEXT", "similarity"], "url=URL raw=TEXT"),  # LAION
        (["id", "url", "text", "width", "image_phash", "text_length"], "url=url raw=text"),  # COYO
        (["image_url", "caption", "transcripts"], "url=image_url long=caption"),  # PixMo-Cap
        (["file_name", "text"], "url=file_name raw=text"),  # Hugging Face's imagefolder
        (["dataset_id", "image_id", "annotator_id", "caption", "timed_caption"], "url=image_id long=caption"),
        (["raw", "sentids", "split", "filename", "img_id"], "url=filename raw=raw"),  # Flickr30k
        (["image_id", "url", "raw_caption", "caption"], "url=url"),  # RedCaps
        (["id", "a b"], "url=THEIRS long=THEIRS"),
    ],
)
def test_a_table_of_others_is_answered_with_the_words_that_read_it(tmp_path, names, words):
    """The advice was url=THEIRS long=THEIRS, whatever the table had."""
    (tmp_path / "t.jsonl").write_text(json.dumps({name: f"{name}.jpg" for name in names}) + "\n")
    with pytest.raises(UserError, match="needs the column 'Image Path'") as refused:
        list(Table(tmp_path / "t.jsonl"))
    assert f": --columns {words} (long is" in str(refused.value)
    if "THEIRS" not in words:
        ((_, row, _),) = Table(tmp_path / "t.jsonl", parse_columns(words.split()))
        assert row[IMAGE_COLUMN] and caption_pool(row)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "a dog\thttp://h/1.jpg\t0.3\n", "no line with its columns' names.*http://h/1.jpg"),
        ("t.csv", "image_name| comment\n1.jpg| a dog\n", r"read_csv\(FILE, sep='\|'"),
        ("sa_1.json", json.dumps({"image": "1.jpg", "mask_data": {"0": {}}}), "of 'image', 'mask_data'.*jq -c"),
        ("sbu.json", json.dumps({"image_urls": ["u"], "captions": ["c"]}), "an object of 'image_urls', 'captions'"),
        ("captions.txt", "image,caption\n1.jpg,a dog\n", "is no tar; if it is a table, name it .csv"),
    ],
)
def test_what_is_no_table_yet_is_told_what_to_become(tmp_path, name, content, message, capsys):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit):
        cli.main(["prepare", "validate", str(tmp_path / name)])
    assert re.search(message, capsys.readouterr().err)


def test_a_row_per_caption_is_one_picture_where_no_caption_is_long(tmp_path, capsys):
    """Of Flickr8k's five captions prepare folder kept one; validate called every row usable."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [(0, "A child."), (0, "A girl."), (1, "A dog."), (1, "A dog."), (2, "A cat."), (0, "A boy.")]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,{text}\n" for i, text in rows))
    manifest = prepare_folder(tmp_path / "t.csv", images, tmp_path / "raw", shard_size=2)
    assert manifest["shards"]["00000.tar"]["samples"] == 2, "shards are cut by pictures, not by lines"
    captions = [record["raw_caption"] for _, record in pictures(tmp_path / "raw")]
    assert captions == [["A child.", "A girl."], "A dog.", "A cat."]
    assert manifest["bad"]["duplicate image"]["count"] == 2
    with pytest.raises(SystemExit):
        cli.main(["prepare", "validate", str(tmp_path / "t.csv")])
    printed = capsys.readouterr().out
    assert "5 rows on 7 lines, 3 usable" in printed and "2 x duplicate image" in printed
    long = {IMAGE_COLUMN: "image", "long_captions": "caption"}
    prepare_folder(tmp_path / "t.csv", images, tmp_path / "long", columns=long)
    assert [record["long_captions"] for _, record in pictures(tmp_path / "long")] == ["A child.", "A dog.", "A cat."]


def test_a_caption_in_the_json_alone(tmp_path):
    """As img2dataset names it: where neither a txt nor one of our columns has any."""
    own = json.dumps({"caption": "a bus", "url": "u"}).encode()
    write_tar(
        tmp_path / "0.tar",
        [
            *[("a.jpg", jpeg(1)), ("a.json", own)],
            *[("b.jpg", jpeg(2)), ("b.json", own), ("b.txt", b"a tree")],
            *sample("c", 3, caption="a bus", longIB_captions=LONG),
        ],
    )
    pools = [{(piece.source, piece.text) for piece in caption_pool(record)} for _, record in pictures(tmp_path)]
    assert pools[:2] == [{("raw_caption", "a bus")}, {("raw_caption", "a tree")}]
    assert pools[2] == {("longIB_captions", piece) for piece in PIECES}


def test_a_long_caption_in_a_text_file_is_split(tmp_path):
    """An open_clip shard of recaptioned pictures: the KEY.txt was one raw caption, cut at the context."""
    long = " ".join(f"Sentence {i} of the caption says something more of the picture." for i in range(8))
    assert text_columns(long) == {"long_captions": long}
    for short in ("A bus. A tree.", "word " * 200, ""):
        assert text_columns(short) == {"raw_caption": short}
    write_tar(
        tmp_path / "0.tar",
        [("a.jpg", jpeg(1)), ("a.txt", long.encode()), ("b.jpg", jpeg(2)), ("b.txt", b"A bus. A tree.")],
    )
    pools = [[(piece.source, piece.text) for piece in caption_pool(record)] for _, record in pictures(tmp_path)]
    assert len(pools[0]) == 8 and {source for source, _ in pools[0]} == {"long_captions"}
    assert pools[1] == [("raw_caption", "A bus. A tree.")]
    assert not validate_shards(str(tmp_path))["bad"]
    write_tar(tmp_path / "0.tar", [*sample("a", 1, long_captions="Mine. Too."), ("a.txt", long.encode())])
    ((_, record),) = pictures(tmp_path)
    assert record["long_captions"] == "Mine. Too."  # the json comes first


def test_a_dialog_is_no_caption(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [
        {"id": 1, "image": "1.jpg", "conversations": turns * 2},
        {"id": 2, "conversations": turns},
        {
            "id": 3,
            "image": "3.jpg",
            "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A."}],
        },
        {"id": 4, "image": "4.jpg", "conversations": "none"},
        {"id": 5, "image": ["5.jpg"], "conversations": turns},
    ]
    (tmp_path / "t.json").write_text(json.dumps(records))
    rows = [row for _, row, _ in Table(tmp_path / "t.json")]
    assert [row.get("longSV_captions") for row in rows] == [None, "a", "A.", "none", "a"]
    assert [row.get(IMAGE_COLUMN) for row in rows] == ["1.jpg", None, "3.jpg", "4.jpg", "5.jpg"]


def test_a_damaged_compressed_table_keeps_what_comes_before(tmp_path):
    whole = gzip.compress(
        b"Image Path,raw_caption\n" + b"".join(b"%d.jpg,a dog %d\n" % (i, i * i) for i in range(20_000))
    )
    (tmp_path / "t.csv.gz").write_bytes(whole[: len(whole) // 2])
    rows = list(Table(tmp_path / "t.csv.gz"))
    assert 1000 < len(rows) < 20_000 and rows[0][1][IMAGE_COLUMN] == "0.jpg"
    for name, content in (("a.csv.gz", b"no gzip"), ("a.json.zst", b"no zstd"), ("a.jsonl.zst", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="--captions"):
            assert not list(Table(tmp_path / name))
            raise UserError("--captions: empty")
    with pytest.raises(UserError, match="is none of"):
        (tmp_path / "t.parquet.gz").write_bytes(b"")
        Table(tmp_path / "t.parquet.gz")


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    """pyarrow takes names in UTF-8 alone: a traceback."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for case in ("gz", "zst"):
        name, content, *_ = LAYOUTS[case]
        (folder / name).write_bytes(content)
        assert len(list(Table(folder / name))) == 1
    rows = pyarrow.Table.from_pylist([{IMAGE_COLUMN: "http://h/0.jpg", "raw_caption": "a dog"}])
    pyarrow.parquet.write_table(rows, tmp_path / "t.parquet")
    table = (tmp_path / "t.parquet").rename(folder / "t.parquet")
    assert len(list(Table(table))) == 1 and write_url_list(table, folder / "u.parquet")["rows"] == 1
    write_tar(tmp_path / "in" / "0.tar", sample("a", 1))
    with pytest.raises(UserError, match="--output: the name of .* is not UTF-8"):
        join_captions(str(table), str(tmp_path / "in"), folder / "out")
