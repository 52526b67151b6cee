"""Names and captions of strangers are text wherever people read them: on a terminal, in a log, in a figure."""

import ast
import json
import logging
from pathlib import Path

import pytest
from shard_files import jpeg, sample, write_tar

import dreamlip_train
from dreamlip_train import cli
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.progress_line import Progress, set_progress_style
from dreamlip_train.monitoring.run_log import EarlyLines, RunLog

PACKAGE = Path(dreamlip_train.__file__).parent
EVIL = "\x1b]0;title\x07\x1b[2J$x_{<b>\u202e\x9b1m\u2066"
COMMANDS = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066")


def said_plainly(text: str) -> bool:
    return "x1b]0;title" in text and not any(command in text for command in COMMANDS)


def test_line_breaks_and_other_scripts_stay():
    assert plain("a\n\tb é 中文 שלום ة 😀 \u200d") == "a\n\tb é 中文 שלום ة 😀 \u200d"
    assert plain("\0\x1b\r\x7f\x85\u202e") == "\\x00\\x1b\\r\\x7f\\x85\\u202e"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder of shards, pictures and tables in which every name and caption tries to command the terminal."""
    for module in ("prepare.folder", "prepare.validate", "reporting.caption_histograms", "jobs.map_tasks"):
        monkeypatch.setattr(
            f"dreamlip_train.{module}.map_bounded", lambda function, items, processes=0: map(function, items)
        )
    folder = tmp_path / f"s{EVIL}"
    members = [
        member
        for i in range(3)
        for member in sample(f"{EVIL}{i}", i, raw_caption=f"a {EVIL}", **{f"long{EVIL}_captions": [[EVIL]]})
    ]
    write_tar(folder / f"{EVIL}.tar", [*members, (f"{EVIL}9.jpg", b"no picture"), (f"{EVIL}9.txt", b"a dog")])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{EVIL}0.jpg").write_bytes(jpeg(0))
    rows = [{"Image Path": f"{EVIL}{i}.jpg", "raw_caption": f"a {EVIL}", f"long{EVIL}_captions": 1.5} for i in range(2)]
    (tmp_path / f"t{EVIL}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "prepare validate {root}/s{evil}",
        "prepare validate {root}/s{evil} --fix {root}/fixed{evil}",
        "prepare validate {root}/t{evil}.json",
        "prepare stats {root}/s{evil} --output {root}/{evil}.png",
        "prepare folder --captions {root}/t{evil}.json --images {root}/images --output {root}/o{evil}",
        "prepare join --captions {root}/t{evil}.json --shards {root}/s{evil} --output {root}/o{evil} --on path",
        "prepare urls {root}/t{evil}.json --output {root}/{evil}.parquet",
        "train demo --run-dir {root}/run --data.shards {evil}",
        "recaption {root}/s{evil} --output {root}/o --model {evil} --endpoint {evil}",
        "eval retrieval {evil}",
        "plot {evil} --output {root}/x.png",
        "prepare {evil}",
    ],
)
@pytest.mark.parametrize("style", ["lines", "json"])
def test_no_command_prints_one(hostile, words, style, capsys):
    """Escape sequences of file names, keys and captions went to the terminal as they were."""
    arguments = [word.format(root=hostile, evil=EVIL) for word in words.split()]
    try:
        cli.main(["--progress", style, *arguments])
    except SystemExit:
        pass
    finally:
        set_progress_style("auto")
    said = capsys.readouterr()
    assert said_plainly(said.out + said.err) and "Traceback" not in said.err


def test_logs_are_plain(tmp_path, capsys):
    logger = logging.getLogger("dreamlip_train")
    with EarlyLines(tmp_path) as early:
        logger.warning("left out: %s", EVIL)
        log = RunLog(tmp_path, 0, 1)
        early.hand_over(log)
        log.message(EVIL, loud=True)
        log.close()
    said = capsys.readouterr()
    assert said_plainly(said.err) and said_plainly(said.out) and said_plainly((tmp_path / "log.txt").read_text())


def test_progress_is_plain_on_a_terminal_too(monkeypatch, capsys):
    with Progress(f"validate {EVIL}", 2) as progress:
        progress.advance(text=EVIL)
        assert said_plainly(progress.title) and said_plainly(progress.text)


def test_everything_printed_passes_one_place():
    """``print`` of anything but plain text, or of a text that is plain by then, has no place in the package."""
    allowed = {"jobs/progress_line.py", "monitoring/run_log.py"}  # what they print was made plain before
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
        if path.relative_to(PACKAGE).as_posix() not in allowed and not ast.unparse(node.args[0]).startswith("plain(")
    ]
    assert not wrong
