"""Lists, conversations and bytes that a program wrote into a table as text are read as what they were."""

import csv

import pytest

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.table import Table


def read(folder, caption):
    """What a CSV of one row with this long caption gives: its cells, and what was noted."""
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[IMAGE_COLUMN, "raw_caption", "longSV_captions"], ["1.jpg", "a dog", caption]])
    ((_, cells, note),) = Table(folder / "t.csv")
    return cells, note


@pytest.mark.parametrize(
    "written",
    [
        *("['A dog.', 'It runs.']", '["A dog.", "It runs."]', "['A dog.' 'It runs.']", "['A dog.'\n 'It runs.']"),
        *("('A dog.', 'It runs.')", "[b'A dog.', b'It runs.']", '["A dog.", "It runs.", null]'),
        *("array(['A dog.', 'It runs.'], dtype=object)", "array(['A dog.',\n       'It runs.'], dtype='<U8')"),
        "[{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': 'A dog. It runs.'}]",
    ],
)
def test_a_list_written_as_text_is_a_list_and_it_is_said(tmp_path, written):
    cells, note = read(tmp_path, written)
    assert "longSV_captions: a list that was written as text" in note
    assert [piece.text for piece in caption_pool(cells, ["longSV_captions"])] == ["A dog.", "It runs."]


@pytest.mark.parametrize("written", ["b'A dog.'", 'b"A dog."'])
def test_bytes_written_as_text_are_what_they_say(tmp_path, written):
    cells, note = read(tmp_path, written)
    assert cells["longSV_captions"] == "A dog." and "bytes that were written as text" in note


@pytest.mark.parametrize(
    "written", ["{'text': 'A dog.'}", "b'\\xff'", '["A", ["B"]]', "[{'from': 'human', 'value': 'A?'}]"]
)
def test_other_values_written_as_text_are_left_out_and_named(tmp_path, written):
    cells, note = read(tmp_path, written)
    assert "longSV_captions" not in cells and "longSV_captions left out" in note


@pytest.mark.parametrize(
    "text", ["('A dog')", "{'hello'}", "[dog] a dog]", "[1, 2]", "b'A dog", "['a' if 1 else 'b']", '("A")']
)
def test_a_caption_in_quotes_and_brackets_stays_as_it_is(tmp_path, text, recwarn):
    cells, note = read(tmp_path, text)
    assert cells["longSV_captions"] == text and not note and not recwarn
