"""What a run says: never markup, never lost to a full disk, and to W&B under an identity of its own."""

import json
import logging
import resource
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamlip_train.config.schema import Config
from dreamlip_train.monitoring.run_log import EarlyLines, RunLog


def test_names_of_samples_are_printed_as_they_are(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10)
    for text in ("a [bold]caption[/bold] of $x^2$", "[/nonsense] :dog: {x}"):
        log.message(text)
    log.close()
    assert capsys.readouterr().out == "a [bold]caption[/bold] of $x^2$\n[/nonsense] :dog: {x}\n"
    assert "[/nonsense] :dog: {x}" in (tmp_path / "log.txt").read_text()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # each ended with a traceback
def test_a_full_disk_ends_no_run_and_loses_no_row(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 100)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))  # writing more fails, as on a full disk
    try:
        for step in range(60):
            log.row({"step": step, "loss": float(step)}, f"step {step}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    log.row({"step": 60, "loss": 60.0}, "step 60")
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(61))
    assert sum("step " in line for line in (tmp_path / "log.txt").read_text().splitlines()) == 61
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {event.step for event in events.Scalars("loss")} == set(range(61))
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl CAN'T BE WRITTEN") == said.count("log.txt CAN'T BE WRITTEN") == 1


def test_wandb_gets_the_settings_and_an_identity_by_path(tmp_path, monkeypatch):
    """Two runs in folders of one name once were one W&B run, without a config."""
    started = []
    fake = types.SimpleNamespace(
        init=lambda **given: started.append(given) or types.SimpleNamespace(finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for parent in ("a", "b", "a"):
        RunLog(tmp_path / parent / "run 1/é", 0, 10, "project", Config()).close()
    first, second, again = started
    assert first["id"] == again["id"] != second["id"] and first["resume"] == "allow"
    assert first["config"]["optim"]["lr"] == 5e-4 and first["id"].replace("-", "").isalnum()


def test_what_was_said_before_the_log_opened_is_in_it(tmp_path, capsys):
    """That a checkpoint was put aside reached standard error alone."""
    logger = logging.getLogger("dreamlip_train")
    with EarlyLines(tmp_path) as early:
        logger.warning("CHECKPOINT DAMAGED: %s", "step-1")
        log = RunLog(tmp_path, 0, 10)
        early.hand_over(log)
        log.message("begun")
        logger.warning("later")
        log.close()
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["CHECKPOINT DAMAGED: step-1", "begun", "later"]
    assert capsys.readouterr().err == "CHECKPOINT DAMAGED: step-1\n"
    with pytest.raises(ValueError), EarlyLines(tmp_path):  # a start that is refused
        logger.warning("put aside")
        raise ValueError
    assert (tmp_path / "log.txt").read_text().endswith(" put aside\n") and not logger.handlers
