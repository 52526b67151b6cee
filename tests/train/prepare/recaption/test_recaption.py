"""recaption: a tiny LLaVA and a real HTTP server, one that fails, stalls and talks nonsense;
nothing finished is lost or asked for twice."""

import hashlib
import json
import resource
import time

import pytest
from chat_server import PER_SHARD, ChatServer, number, through
from shard_files import jpeg, records, write_tar

from dreamlip_train import cli
from dreamlip_train.jobs.user_error import RunError, UserError
from dreamlip_train.prepare.options import RecaptionOptions
from dreamlip_train.prepare.recaption import endpoint
from dreamlip_train.prepare.recaption.answers import AnswerFile
from dreamlip_train.prepare.recaption.captioners import caption_text
from dreamlip_train.prepare.recaption.endpoint import ServerError
from dreamlip_train.prepare.recaption.recaption import recaption_shards


def test_failures_that_come_before_the_first_answer_are_a_share_of_all_that_was_asked(tmp_path):
    """Of a window of 256 pictures the fifth that is broken fails at once: 52 of 52 ended the run."""
    with AnswerFile(tmp_path / "a.jsonl", (), max_bad_fraction=0.3) as answers:
        for i in range(52):
            answers.add([str(i)], [ValueError("no picture")], under_way=256)
        with pytest.raises(RunError, match="53 of 53"):
            answers.add(["52"], [ValueError("no picture")], under_way=0)


def test_a_served_model_captions_every_picture_with_the_papers_prompts(tmp_path, shards):
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.glob("*.tar")}
    with ChatServer() as server:
        counts = through(server, shards, tmp_path / "out")
    assert (counts["shards done"], counts["captioned"], counts["failed"]) == (3, 24, 0)
    found = records(tmp_path / "out")
    for i in range(24):
        record = found[f"{i:04d}"]
        assert (
            record["longX_captions"] == f"Picture {number(i)}. It has details. And a half sent"
            and record["shortX_captions"] == f"Picture {number(i)}. Short."
        )
        assert (record["raw_caption"], record["url"]) == (f"raw {i}", f"u{i}")
    questions = {"Describe the image in details", "Describe the image in short."}
    assert {body["messages"][0]["content"][1]["text"] for body in server.requests} == questions
    assert {body["model"] for body in server.requests} == {"served"} and {
        body["max_tokens"] for body in server.requests
    } == {256, 64}
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.glob("*.tar")}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["samples"] == 24
        and {entry["samples"] for entry in manifest["shards"].values()} == {PER_SHARD}
        and not manifest["bad"]
    )


@pytest.mark.parametrize(
    "trouble", [*("500", "429", "stall", "garbage", "drip", "giant", "deep"), *("broken off", "not gzip", "giant 500")]
)
def test_trouble_that_passes_costs_nothing(tmp_path, shards, trouble):
    with ChatServer(lambda attempt, image: trouble if attempt < 2 and sum(image) % 3 == 0 else "ok") as server:
        counts = through(server, shards, tmp_path / "out", timeout=0.5 if trouble in ("stall", "drip") else 10.0)
    assert (counts["captioned"], counts["failed"]) == (24, 0)
    assert max(server.asked.values()) == 3


def test_answers_are_written_down_as_they_come(tmp_path, shards):
    """One slow answer held back those of its whole batch, and all pictures after it: a kill lost them."""
    written = []

    def behave(attempt, image):
        for _ in range(100 if image == jpeg(0) and attempt == 0 else 0):
            files = list((tmp_path / "out" / ".recaption").glob("*.jsonl"))
            written[:] = [line for file in files for line in file.read_text().splitlines()]
            if len(written) == PER_SHARD - 1:
                break
            time.sleep(0.05)
        return "ok"

    with ChatServer(behave) as server:
        counts = through(server, shards, tmp_path / "out", batch_size=2)
    assert len(written) == PER_SHARD - 1 and counts["captioned"] == 24


def test_a_body_that_never_ends_is_not_kept(tmp_path, shards):
    """The client read the body of an error whole, for as long as a request may take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ChatServer(lambda attempt, image: "giant 500" if attempt == 0 else "ok") as server:
        through(server, shards, tmp_path / "out", timeout=3.0, batch_size=1, retries=20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_what_a_server_says_is_cut_and_commands_nothing(tmp_path, shards, capsys):
    with ChatServer(lambda attempt, image: "307") as server:
        words = ["recaption", str(shards), "--output", str(tmp_path / "out"), "--model", "x", "--endpoint", server.url]
        with pytest.raises(SystemExit):
            cli.main(words)
    said = capsys.readouterr().err
    assert "it redirects to http://elsewhere/" in said and "\x1b" not in said and len(said) < 1000
    assert str(ServerError(500, "x" * 10**6, 0.0)) == "status 500: " + "x" * 300


def test_a_picture_that_always_fails_is_recorded_and_keeps_its_place(tmp_path, shards):
    hopeless = {jpeg(3): "garbage", jpeg(12): "400", jpeg(20): "500"}
    with ChatServer(lambda attempt, image: hopeless.get(image, "ok")) as server:
        counts = through(server, shards, tmp_path / "out", retries=2, max_bad_fraction=0.5)
    assert (counts["captioned"], counts["failed"], counts["shards done"]) == (21, 3, 3)
    found = records(tmp_path / "out")
    assert len(found) == 24 and [key for key, record in found.items() if "longX_captions" not in record] == [
        "0003",
        "0012",
        "0020",
    ]
    answers = [
        json.loads(line)
        for path in (tmp_path / "out" / ".recaption").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    errors = {answer["key"]: answer["error"] for answer in answers if "error" in answer}
    assert (
        set(errors) == {"0003", "0012", "0020"}
        and "told to answer 400" in errors["0012"]
        and "status 500" in errors["0020"]
    )
    assert server.asked[jpeg(12), "Describe the image in details"] == 1  # its own fault: not asked again
    assert server.asked[jpeg(20), "Describe the image in details"] == 3
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["bad"]["not captioned"]["count"] == 3


def test_a_server_that_is_down_stops_the_run_and_no_shard_is_called_done(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("dreamlip_train.prepare.recaption.answers._JUDGED_AFTER", 6)
    with (
        ChatServer(lambda attempt, image: "500") as server,
        pytest.raises(RuntimeError, match=r"--max-bad-fraction: (\d) of \1 .*status 500"),
    ):
        through(server, shards, tmp_path / "out", retries=1)
    assert not list((tmp_path / "out").glob("*.tar"))
    with ChatServer() as server:
        assert through(server, shards, tmp_path / "out")["captioned"] == 24


def test_a_command_that_failed_does_not_keep_the_folder_from_the_corrected_one(tmp_path, shards):
    """A model's name with a typing error claimed the folder: the right one was refused."""
    with ChatServer(lambda attempt, image: "404") as server, pytest.raises(UserError, match="refuses"):
        through(server, shards, tmp_path / "out", model="servde")
    with ChatServer() as server:
        assert through(server, shards, tmp_path / "out")["captioned"] == 24
        with pytest.raises(UserError, match="--output: .* holds captions of other shards, prompts or another model"):
            through(server, shards, tmp_path / "out", model="another")


@pytest.mark.parametrize("status", ["404", "401"])
def test_a_refusal_is_said_at_once(tmp_path, shards, status):
    with (
        ChatServer(lambda attempt, image: status) as server,
        pytest.raises(ValueError, match="--endpoint: .* refuses: .*--model 'served'"),
    ):
        through(server, shards, tmp_path / "out")
    assert len(server.requests) <= 8


def test_a_long_caption_that_the_limit_cut_loses_its_half_sentence(tmp_path, shards):
    with ChatServer(lambda attempt, image: "cut") as server:
        through(server, shards, tmp_path / "out")
    assert records(tmp_path / "out")["0000"]["longX_captions"] == f"Picture {number(0)}. It has details."
    assert caption_text("half a sent", cut=True) == "half a sent"  # all there is


ERRORS = {
    "model": ({"model": "/nothing/here"}, "--model: '/nothing/here' is no image-text-to-text model"),
    "name": ({"name": "a b"}, "--name: got 'a b'"),
    "prompts": ({"long_prompt": "", "short_prompt": ""}, "both are empty"),
    "sizes": ({"batch_size": 0}, "too small"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_bad_settings_are_named(tmp_path, shards, error):
    changes, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        recaption_shards(RecaptionOptions(str(shards), str(tmp_path / "out"), **({"model": "x"} | changes)))


def test_other_settings_and_the_input_folder_are_refused(tmp_path, shards):
    with ChatServer() as server:
        through(server, shards, tmp_path / "out")
        with pytest.raises(ValueError, match="--output: .* holds captions of other shards, prompts or another model"):
            through(server, shards, tmp_path / "out", model="another")
        with pytest.raises(ValueError, match="--output: .* is the folder of the shards"):
            through(server, shards, shards)
        assert through(server, shards, tmp_path / "out") == {"done before": 3}


def test_a_server_that_wants_a_pause_gets_it(tmp_path, shards):
    with ChatServer(lambda attempt, image: "429" if attempt == 0 else "ok") as server:
        began = time.monotonic()
        through(server, shards, tmp_path / "out", batch_size=24)
    assert time.monotonic() - began > 2 * 3 * 0.2  # two prompts, three shards one after another


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT", "date": "Fri, 31 Dec 1999 23:59:47 GMT"}, 12),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),  # it is over
        ({"retry-after": "Fri, 31 Dec 2999 23:59:59 GMT"}, 60),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59", "date": "Fri, 31 Dec 1999 23:59:47 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "1e999"}, 60),
        ({"retry-after": "-5"}, 0),
        ({}, 0),
    ],
)
def test_a_pause_is_asked_for_in_seconds_or_until_a_date(headers, seconds):
    """A date was taken for nothing."""
    assert endpoint._retry_after(headers) == seconds


def test_half_a_character_of_an_answer_costs_only_itself(tmp_path, shards):
    with ChatServer(lambda attempt, image: "surrogate") as server:
        counts = through(server, shards, tmp_path / "out")
    assert counts["captioned"] == 24 and records(tmp_path / "out")["0000"]["longX_captions"].endswith("Half ?")


def test_two_sets_whose_shards_have_one_name_are_refused(tmp_path, shards):
    """The second set's shards of the same names were once left out in silence."""
    write_tar(tmp_path / "more" / "00000.tar", [("a.jpg", jpeg(1)), ("a.json", b"{}")])
    with pytest.raises(UserError, match="SHARDS: two shards are both called '00000.tar'"):
        recaption_shards(RecaptionOptions(f"{shards}::{tmp_path / 'more'}", str(tmp_path / "out"), model="x"))
