"""Machines and files as users have them: no home, a damaged verdict, another process at work, a key pressed."""

import copy
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from dreamlip_kernels import __main__ as command_line
from dreamlip_kernels.backends import cache, dispatch, identity, verdicts
from dreamlip_kernels.qualification import measure, supervisor
from dreamlip_kernels.qualification.journal import Journal

CPU = torch.device("cpu")
TIMING = verdicts.Timing("N=10", 8, 10, ms=1.0, torch_ms=2.0, floor_ms=0.1)
RIGHT = verdicts.Verdict("twice", "right", "float32", error=0.5, cases=1, timings=(TIMING,))


def a_record():
    about = dict(identity=identity.identity(CPU), date="2026-01-01", seconds=1.0, widths=(8,), rates={})
    return verdicts.Record(**about, verdicts=(RIGHT,), tiles={"exp_sums 2": {"512": [128, 128, 64, 8, 3]}})


def test_a_user_without_a_home_has_a_temporary_folder(fakes, monkeypatch):
    """As containers are started, by a number that has no entry: every loss on a GPU ended in RuntimeError."""
    monkeypatch.delenv("DREAMLIP_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it returns where nobody knows the home
    monkeypatch.setattr(tempfile, "tempdir", str(fakes))
    assert cache.folders() == [fakes / f"dreamlip-{os.getuid()}"]
    assert Path(verdicts.store(CPU, a_record()).path).parent == cache.folders()[0]
    verdicts.forget()
    assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "right"


def test_without_any_folder_the_verdict_stays_in_memory(fakes, monkeypatch, caplog):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.delenv("DREAMLIP_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with cache.lock("x"):
        assert verdicts.store(CPU, a_record()).path == "memory"
    assert "neither a home nor a folder for temporary files" in caplog.text


def test_a_folder_of_another_user_is_neither_read_nor_written_nor_waited_for(fakes, monkeypatch, caplog):
    monkeypatch.delenv("DREAMLIP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(fakes))
    theirs = fakes / f"dreamlip-{os.getuid()}"
    theirs.mkdir()
    (theirs / identity.file_name(CPU)).write_text(json.dumps(a_record().to_json()))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(cache, "_user", lambda: theirs.name.removeprefix("dreamlip-"))
    assert verdicts.record(CPU) is None and "belongs to another user" in caplog.text
    with cache.lock("x"):
        assert not (theirs / "x.lock").exists()
    assert verdicts.store(CPU, a_record()).path == "memory"


DAMAGE = {
    "a time that is a word": lambda content: content["verdicts"][0]["timings"][0].update(ms="fast"),
    "a time of zero": lambda content: content["verdicts"][0]["timings"][0].update(ms=0),
    "no number": lambda content: content["verdicts"][0]["timings"][0].update(torch_ms=float("nan")),
    "a width that is a list": lambda content: content["verdicts"][0]["timings"][0].update(width=[8]),
    "a tile of four": lambda content: content["tiles"]["exp_sums 2"].update({"512": [1, 2, 3, 4]}),
    "a tile of words": lambda content: content["tiles"]["exp_sums 2"].update({"512": ["a"] * 5}),
    "a width of a tile that is a word": lambda content: content["tiles"]["exp_sums 2"].update({"wide": [1] * 5}),
    "tiles in a list": lambda content: content.update(tiles=[1]),
    "a field more": lambda content: content["verdicts"][0].update(colour="red"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_verdict_is_taken_for_absent(fakes, caplog, damage):
    """JSON like a verdict's, which broke the first call that compared its times."""
    content = copy.deepcopy(json.loads(json.dumps(a_record().to_json())))
    DAMAGE[damage](content)
    path = cache.folders()[0] / identity.file_name(CPU)
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    assert dispatch.select("twice", torch.ones(1), N=10, D=8) == "torch"
    assert str(path) in caplog.text and "is not read" in caplog.text


def test_who_waits_for_another_process_says_so(fakes, caplog):
    """Two minutes of silence looked like a hang."""
    folder = cache.folders()[0]
    folder.mkdir()
    waited = threading.Event()
    with (folder / "x.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def wait():
            with cache.lock("x"):
                waited.set()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert not waited.wait(0.3)
    assert waited.wait(10) and "waiting for its end" in caplog.text
    thread.join()


WORKING = """
import json, sys, time
print(json.dumps({"ready": 1}), flush=True)
for job in sys.stdin:
    print(json.dumps({"trying": "a case"}), flush=True)
    time.sleep(60)
"""


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interrupt_is_no_answer(fakes, monkeypatch):
    """Workers that the interrupted command killed were answers, "killed by SIGKILL", which the next one went on from;
    and the two threads that ended one worker met in a traceback."""
    monkeypatch.setattr(supervisor, "WORKER", [sys.executable, "-c", WORKING])
    monkeypatch.setattr(supervisor, "subprocess", subprocess)  # a Python of its own, which imports nothing
    journal = Journal("x.json")
    jobs = [{"name": str(number)} for number in range(4)]
    once = iter([lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        journal.run(jobs, 2, 30.0, lambda said: next(once, lambda: None)())
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and "work" in thread.name:
            thread.join(10)
    assert journal.answers == Journal("x.json").answers == {}


def test_the_command_says_what_an_interrupt_leaves(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "qualify", interrupted)
    with pytest.raises(SystemExit, match="130"):
        command_line.main(["qualify"])
    assert "goes on from there" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_minutes_of_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "qualify", lambda *_, **__: pytest.fail("it measured first"))
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["qualify", "--output", str(tmp_path / "missing" / "x.json")])
    assert "there is no folder" in capsys.readouterr().err


def test_tuning_a_cpu_is_named(monkeypatch, caplog):
    monkeypatch.setattr(verdicts, "record", lambda device: None)
    assert measure._tiles(CPU, (8,), True, 1, 1.0, None) == {}
    assert "no tiles to tune on cpu" in caplog.text


def test_an_unknown_wish_in_the_environment_is_named_once(fakes, monkeypatch, caplog):
    monkeypatch.setenv("DREAMLIP_AUTO", "first_use")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            dispatch.select("twice", torch.ones(1), N=10, D=8)
    assert caplog.text.count("DREAMLIP_AUTO=first_use means nothing") == 1


def test_the_first_use_imports_nothing_from_the_folder_it_starts_in(fakes, monkeypatch):
    """A file argparse.py in the user's folder made every first use fail."""
    (fakes / "argparse.py").write_text("raise SystemExit('the wrong argparse')")
    monkeypatch.chdir(fakes)
    monkeypatch.setenv("DREAMLIP_AUTO", "first-use")
    ran = []

    def run(words, **options):
        words = [*words[: words.index("-m") + 2], "--help"]
        ran.append(real([*words], **options))
        return ran[-1]

    real = subprocess.run
    monkeypatch.setattr(dispatch.subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    dispatch.select("twice", torch.ones(1), N=10, D=8)
    assert ran[0].returncode == 0 and "usage: python -m dreamlip_kernels" in ran[0].stdout, ran[0]
