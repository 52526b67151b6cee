"""Progress as people see it: a bar on a terminal, lines and JSON lines elsewhere, with the time that is left."""

import contextlib
import json
import os
import pty
import threading
import time

import pytest

from dreamlip_train import cli
from dreamlip_train.jobs import progress_line as module
from dreamlip_train.jobs.progress_line import Progress, set_progress_style


@pytest.fixture(autouse=True)
def style_as_before():
    yield
    set_progress_style("auto")


def test_a_terminal_gets_a_bar_and_standard_output_stays_clean(monkeypatch, capsys):
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read():
        try:
            while part := os.read(ours, 4096):
                seen.extend(part)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with Progress("recaption [out]", total=4, unit="images") as progress:
            for _ in range(3):
                progress.advance(text="1 failed")
                time.sleep(0.15)
            print("a result")
        monkeypatch.undo()
    reader.join(timeout=10)
    os.close(ours)
    text = seen.decode(errors="replace")
    assert "recaption [out]" in text and "3/4" in text and "1 failed" in text
    assert capsys.readouterr().out == "a result\n"


def test_elsewhere_a_line_tells_the_time_left_also_while_nothing_ends(capsys, monkeypatch):
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.05)
    with Progress("validate", total=1000, unit="shards") as progress:
        progress.advance(250, "7 findings")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert lines[-1].startswith("validate: 250 of 1,000 shards, 7 findings, 0:00:00 so far, about 0:00:0")


def test_no_line_is_told_of_short_work(capsys):
    with Progress("stats", total=1) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


def test_json_lines_on_request(capsys, monkeypatch):
    monkeypatch.setattr(module, "_JSON_SECONDS", 0.0)
    set_progress_style("json")
    with Progress("urls", unit="rows") as progress:
        progress.advance(5)
    with Progress("folder", total=10, unit="shards") as progress:
        progress.skip(8)
        progress.advance(1, "a\nb")
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert records[0]["done"] == 5 and records[0]["total"] is None and records[0]["seconds_left"] is None
    assert [record["finished"] for record in records] == [False, True, False, False, True]
    last = records[-1]
    assert (last["progress"], last["done"], last["total"], last["unit"], last["text"]) == (
        "folder",
        9,
        10,
        "shards",
        "a\nb",
    )


@pytest.mark.parametrize("style", ["lines", "json"])
def test_a_full_disk_or_a_closed_pipe_behind_standard_error_ends_nothing(style, monkeypatch):
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_JSON_SECONDS", 0.0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: failed.append(arguments))
    failed = []
    set_progress_style(style)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        with Progress("validate", total=2) as progress:
            progress.advance()
            time.sleep(0.05)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert not failed


def test_what_was_done_before_does_not_shorten_the_time_left(capsys):
    progress = Progress("recaption", total=100)
    progress.skip(50)
    assert progress._seconds_left(10.0) is None
    progress.advance(10)
    assert progress._seconds_left(10.0) == 40.0


def test_the_command_line_takes_the_style_before_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--progress=json"])
    assert module._style == "json" and "--progress" in capsys.readouterr().out
    for words in (["--progress"], ["--progress", "loud", "doctor"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "auto, bar, lines, json" in capsys.readouterr().err
