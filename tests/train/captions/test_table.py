"""Tables as they come: a stray quote, a damaged page or a strange value costs its own row, and nothing ends in a
traceback.
"""

import csv
import json
import random
import resource
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.table import Table
from dreamlip_train.jobs.user_error import UserError

HEADER = [IMAGE_COLUMN, "raw_caption", "shortSV_captions", "longSV_captions"]
SUFFIXES = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]


def row(i):
    long = f'A ball {i}, lies there. It says "Stop".' if i % 3 else f"A ball {i}.\nIt is red, and round."
    return dict(zip(HEADER, (f"http://x.org/{i}.jpg", f"raw {i}", f"short {i}", long), strict=True))


def table(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, HEADER, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_written_is_read(tmp_path, suffix):
    rows = [row(i) for i in range(20)]
    assert list(Table(table(tmp_path / f"t{suffix}", rows))) == [(i, r, "") for i, r in enumerate(rows, 1)]


@pytest.mark.parametrize("delimiter, suffix", [(",", ".csv"), ("\t", ".tsv")])
@pytest.mark.parametrize("column", [1, 2, 3])
@pytest.mark.parametrize("stray", [0, 3, 18, 19])
def test_a_stray_quote_costs_its_own_line(tmp_path, delimiter, suffix, column, stray):
    """It joined all rows up to the next quote: 60 rows became 6, and others' captions were trained as one picture's."""
    lines = [delimiter.join(HEADER)]
    for i in range(20):
        cells = [f"http://x.org/{i}.jpg", f"raw {i}", f"short {i}", f"A red ball {i}. It is round."]
        if i == stray:
            cells[column] = '"' + cells[column]
        if i % 4 == 1:
            cells[3] = f'"A ball {i}{delimiter} the\nother line; ""Stop"" it says."'
        lines.append(delimiter.join(cells))
    path = tmp_path / f"t{suffix}"
    path.write_text("\n".join(lines) + "\n")
    rows = list(Table(path))
    whole = {r[IMAGE_COLUMN]: r for _, r, _ in rows if r is not None}
    others = [i for i in range(20) if i != stray]
    assert set(whole) == {f"http://x.org/{i}.jpg" for i in others}
    assert all(f" {i}" in whole[f"http://x.org/{i}.jpg"]["longSV_captions"].split("\n")[0] for i in others)
    line = 1 + next(
        n for n, text in enumerate("\n".join(lines).split("\n")) if text.startswith(f"http://x.org/{stray}.jpg")
    )
    assert [wrong.split(":")[0] for _, r, wrong in rows if r is None][:1] == [f"line {line}"]


@pytest.mark.parametrize("image", [0, 1])
def test_a_stray_quote_before_a_caption_of_several_lines_costs_its_own_line(tmp_path, image):
    """The next row's caption began before its picture was named, lost its first line to the quote, and was kept."""
    lines = [["Image Path", "raw_caption"], ["0.jpg", '"a stray'], ["1.jpg", '"line one\nline two"'], ["2.jpg", "two"]]
    path = tmp_path / "t.csv"
    path.write_text("".join(",".join(cells if image == 0 else cells[::-1]) + "\n" for cells in lines))
    rows = list(Table(path))
    whole = {r[IMAGE_COLUMN]: r["raw_caption"] for _, r, _ in rows if r is not None}
    assert whole == {"1.jpg": "line one\nline two", "2.jpg": "two"}
    assert [wrong.split(":")[0] for _, r, wrong in rows if r is None] == ["line 2"]


def test_captions_of_several_lines_are_whole_where_the_picture_comes_last(tmp_path):
    """The line in which the caption's quote closes has as many fields as a row: it was taken for one."""
    path = tmp_path / "t.csv"
    path.write_text('raw_caption,Image Path\n"line one\nline two",http://h/1.jpg\n"one ""1""\n\ntwo",2.jpg\n')
    assert [r["raw_caption"] for _, r, _ in Table(path)] == ["line one\nline two", 'one "1"\n\ntwo']


def test_captions_of_several_lines_with_commas_are_whole(tmp_path):
    caption = "\n".join(["Yes, it is, indeed, so.", "A dog, a cat, a bird, a fish.", "", "The end."])
    path = table(tmp_path / "t.csv", [row(1) | {"longSV_captions": caption}, row(2)])
    assert [r["longSV_captions"] for _, r, _ in Table(path)] == [caption, row(2)["longSV_captions"]]


def test_a_small_json_document_asks_for_little_memory(tmp_path):
    """16 GB were asked for, whatever the file's size: a MemoryError where memory is limited."""
    (tmp_path / "t.json").write_text(json.dumps([row(1)] * 5000))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        assert len(list(Table(tmp_path / "t.json"))) == 5000
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_header_with_a_stray_quote_is_a_message(tmp_path):
    """Each line after it was compared with a header that was not there yet."""
    path = tmp_path / "t.csv"
    path.write_text('"Image Path,raw_caption\n\n0.jpg,a\n"')
    with pytest.raises(UserError, match="--captions: .* needs the column 'Image Path'"):
        list(Table(path))


def test_a_quote_that_is_never_closed_ends_with_its_line(tmp_path):
    path = tmp_path / "t.csv"
    body = "".join(f"http://x.org/{i}.jpg,raw {i},s,A ball.\n" for i in range(3000))
    path.write_text(",".join(HEADER) + '\nhttp://x.org/a.jpg,"raw,s,A ball.\n' + body)
    rows = list(Table(path))
    assert sum(r is not None for _, r, _ in rows) == 3000 and rows[0][1] is None and "line 2" in rows[0][2]


def test_bytes_are_utf8_or_a_finding(tmp_path):
    """A binary column trained as "b'A dog'"."""
    columns = {IMAGE_COLUMN: ["0.jpg", "1.jpg"], "raw_caption": [b"a caf\xc3\xa9", b"\xff\xd8"], "x": [b"1", b"2"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    (_, first, note), (_, second, wrong) = Table(tmp_path / "t.parquet")
    assert first["raw_caption"] == "a café" and not note
    assert "raw_caption" not in second and "raw_caption left out: bytes that are not UTF-8" in wrong


def test_other_types_are_refused_by_column_name(tmp_path):
    image = {"bytes": b"\xff\xd8\xff", "path": "x"}
    whole = pyarrow.table({IMAGE_COLUMN: ["0.jpg"], "raw_caption": ["a dog"], "image": [image]})
    pyarrow.parquet.write_table(whole, tmp_path / "t.parquet")
    assert list(Table(tmp_path / "t.parquet")) == [(1, {IMAGE_COLUMN: "0.jpg", "raw_caption": "a dog"}, "")]
    for name, values in (
        ("raw_caption", [image]),
        ("longMine_captions", [[["a"]]]),
        (IMAGE_COLUMN, [["0.jpg"]]),
        ("raw_caption", [7]),
    ):
        columns = {IMAGE_COLUMN: ["0.jpg"], "raw_caption": ["a dog"]} | {name: values}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=f"the column '{name}' of .* holds .*, not text"):
            list(Table(tmp_path / "t.parquet"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_values_that_are_not_text_are_named(tmp_path, suffix):
    strange = {
        "raw_caption": {"x": 1},
        "longSV_captions": 3,
        "shortSV_captions": "half \ud83d a \0 pair",
        "depth": json.loads("[" * 40 + "]" * 40),
    }
    rows = list(
        Table(
            table(
                tmp_path / f"t{suffix}",
                [row(1) | strange, {IMAGE_COLUMN: True, "raw_caption": "x"}, row(2) | {IMAGE_COLUMN: 5}],
            )
        )
    )
    assert rows[0][1] == {IMAGE_COLUMN: "http://x.org/1.jpg", "shortSV_captions": "half ? a  pair"}
    for part in (
        "raw_caption left out: a dict",
        "longSV_captions left out: a int",
        "null bytes taken out",
        "depth left out: nested",
    ):
        assert part in rows[0][2]
    assert rows[1] == (2, None, "Image Path: a bool, not text") and rows[2][1][IMAGE_COLUMN] == "5"


def test_a_damaged_page_costs_its_row_group(tmp_path):
    path = table(tmp_path / "t.parquet", [row(i) for i in range(20)])
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1).dictionary_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = list(Table(path))
    assert [r[IMAGE_COLUMN] for _, r, _ in rows if r] == [f"http://x.org/{i}.jpg" for i in (*range(5), *range(10, 20))]
    assert "row group 1: 5 rows are damaged" in next(wrong for _, r, wrong in rows if r is None)
    assert [number for number, r, _ in rows if r] == [*range(1, 6), *range(11, 21)]


PIECES = [
    b'"',
    b"\n",
    b"\r",
    b",",
    b"\t",
    b"\0",
    b"\xff\xfe",
    b"\\ud800",
    b"\\u0000",
    b"http://[abc]/",
    b"\xe2\x80\xa8",
    b"{",
    b"[",
    b"]",
    b"}",
    b"null",
    b"NaN",
    b"1e999",
    b"true",
    b"['a', 'b']",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"[" * 5000,
    b"''",
    b";",
    b"\xf0\x9f",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mutated_tables_never_end_in_a_traceback(tmp_path, suffix):
    """493 of 10,000 crashed ``prepare folder``."""
    whole = table(tmp_path / f"whole{suffix}", [row(i) for i in range(12)]).read_bytes()
    path = tmp_path / f"t{suffix}"
    read = 0
    for seed in range(150):
        rng = random.Random(f"{suffix}-{seed}")
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[place : place + rng.randint(1, 30)]
            elif kind == 2:
                data[place:place] = rng.choice(PIECES)
            else:
                data[place:place] = data[rng.randrange(len(data)) :][: rng.randint(1, 60)]
        path.write_bytes(data)
        try:
            for number, cells, wrong in Table(path):
                assert number >= 1 and (cells is not None or wrong)
                if cells is not None:
                    json.dumps(cells, allow_nan=False, ensure_ascii=False).encode()
                    caption_pool(cells)
                    assert isinstance(cells.get(IMAGE_COLUMN, ""), str) and "\0" not in str(cells)
                    read += 1
        except UserError:
            pass
    assert read > 50  # else the mutations were too coarse to say anything


def test_a_line_longer_than_any_cell_costs_itself(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        ",".join(HEADER) + "\nhttp://x.org/1.jpg,raw,s," + "x" * (17 * 2**20) + "\nhttp://x.org/2.jpg,raw,s,A ball.\n"
    )
    rows = list(Table(path))
    assert rows[0][1] is None and rows[1][1][IMAGE_COLUMN] == "http://x.org/2.jpg"


def test_a_broken_record_of_a_json_object_by_key_costs_itself(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"0": None, "1": {"image": "1.jpg", "caption": "A dog."}, "2": {}}))
    rows = [row for _, row, _ in Table(tmp_path / "t.json")]
    assert rows[0] is None and rows[1][IMAGE_COLUMN] == "1.jpg"
