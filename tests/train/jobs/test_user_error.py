"""What a person must mend prints as one message wherever it was raised; our own mistakes keep their traceback."""

import pickle

import pytest

from dreamlip_train import cli
from dreamlip_train.cli.main import COMMANDS
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.user_error import RunError, UserError


def refuses(item):
    raise UserError(f"--item: got {item}; give another")


def test_they_cross_process_boundaries_as_themselves():
    for kind in (UserError, RunError):
        copy = pickle.loads(pickle.dumps(kind("--x: got 1; give 2")))
        assert type(copy) is kind and str(copy) == "--x: got 1; give 2"
    with pytest.raises(UserError) as raised:
        list(map_bounded(refuses, [1], processes=1))
    assert str(raised.value) == "--item: got 1; give another"


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_the_command_line_prints_them(kind, monkeypatch, capsys):
    def command(arguments, program):
        raise kind("--x: got 1; give 2")

    monkeypatch.setitem(COMMANDS, "doctor", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    assert stopped.value.code == 2 and capsys.readouterr().err == "dreamlip-train: --x: got 1; give 2\n"


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch):
    """A ``zip(strict=True)`` whose last frame was ours counted as the user's fault."""

    def command(arguments, program):
        from dreamlip_train.data.shards.shards import record_of

        record_of({"json": b"[]"})

    monkeypatch.setitem(COMMANDS, "doctor", command)
    with pytest.raises(ValueError, match="not an object") as raised:
        cli.main(["doctor"])
    assert not isinstance(raised.value, UserError)
