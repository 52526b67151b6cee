"""recaption: a tiny LLaVA and a real HTTP server, one that fails, stalls and talks nonsense;
nothing finished is lost or asked for twice.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_server import ChatServer
from safetensors.torch import save_file
from shard_files import jpeg, write_tar
from tiny import TOWERS, clean_environment, tiny_model
from tiny_captioners import FAMILIES, save_tiny
from tiny_llava import WORDS, save_tiny_llava

from dreamlip_train import cli
from dreamlip_train.captions.columns import split_sub_captions
from dreamlip_train.data.shards.shards import read_shard
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.jobs.work_claims import Claims
from dreamlip_train.model.build import build_model
from dreamlip_train.model.open_clip_weights import open_clip_state_dict
from dreamlip_train.prepare.options import RecaptionOptions
from dreamlip_train.prepare.recaption import captioners, endpoint
from dreamlip_train.prepare.recaption.captioners import caption_text
from dreamlip_train.prepare.recaption.recaption import recaption_shards

PER_SHARD = 8


@pytest.fixture
def shards(tmp_path) -> Path:
    for shard in range(3):
        members = []
        for i in range(PER_SHARD * shard, PER_SHARD * (shard + 1)):
            members += [
                (f"{i:04d}.jpg", jpeg(i)),
                (f"{i:04d}.json", json.dumps({"raw_caption": f"raw {i}", "url": f"u{i}"}).encode()),
            ]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava")))


def records(folder) -> dict[str, dict]:
    return {
        sample["key"]: json.loads(sample["json"])
        for shard in sorted(Path(folder).glob("*.tar"))
        for sample in read_shard(str(shard))
    }


def number(i):
    return sum(jpeg(i)) % 10007


def through(server, shards, output, **changes):
    settings = {"model": "served", "endpoint": server.url, "batch_size": 4, "timeout": 1.0, "name": "X"} | changes
    return recaption_shards(RecaptionOptions(str(shards), str(output), **settings))


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
    assert {body["messages"][0]["content"][1]["text"] for body in server.requests} == {
        "Describe the image in details", "Describe the image in short.",
    }  # fmt: skip
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


@pytest.mark.parametrize("trouble", ["500", "429", "stall", "garbage", "drip", "giant", "deep"])
def test_trouble_that_passes_costs_nothing(tmp_path, shards, trouble):
    with ChatServer(lambda attempt, image: trouble if attempt < 2 and sum(image) % 3 == 0 else "ok") as server:
        counts = through(server, shards, tmp_path / "out", timeout=0.5 if trouble in ("stall", "drip") else 10.0)
    assert (counts["captioned"], counts["failed"]) == (24, 0)
    assert max(server.asked.values()) == 3


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
        and "InternalServerError" in errors["0020"]
    )
    assert server.asked[jpeg(12), "Describe the image in details"] == 1  # its own fault: not asked again
    assert server.asked[jpeg(20), "Describe the image in details"] == 3
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["bad"]["not captioned"]["count"] == 3


def test_a_server_that_is_down_stops_the_run_and_no_shard_is_called_done(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("dreamlip_train.prepare.recaption.answers._JUDGED_AFTER", 6)
    with (
        ChatServer(lambda attempt, image: "500") as server,
        pytest.raises(RuntimeError, match=r"--max-bad-fraction: 8 of 8 .*InternalServerError"),
    ):
        through(server, shards, tmp_path / "out", retries=1)
    assert not list((tmp_path / "out").glob("*.tar"))
    with ChatServer() as server:
        assert through(server, shards, tmp_path / "out")["captioned"] == 24


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


def start(shards, output, server, *extra) -> subprocess.Popen:
    words = [
        "recaption",
        str(shards),
        "--output",
        str(output),
        "--model",
        "served",
        "--name",
        "X",
        "--endpoint",
        server.url,
        "--batch-size",
        "2",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "dreamlip_train", *words, *extra],
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def slowly(attempt, image):
    time.sleep(0.15)
    return "ok"


def answered(output) -> int:
    return (
        sum(path.read_text().count("\n") for path in (output / ".recaption").glob("*.jsonl")) if output.exists() else 0
    )


def test_killed_in_the_middle_no_finished_picture_is_asked_for_again(tmp_path, shards):
    with ChatServer(slowly) as server:
        for goal in (5, 13):
            process = start(shards, tmp_path / "out", server)
            while answered(tmp_path / "out") < goal and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        finished = answered(tmp_path / "out")
        asked = server.asked.total()
        counts = through(server, shards, tmp_path / "out", batch_size=4)
    assert counts["captioned"] == 24 - finished and server.asked.total() - asked == 2 * (24 - finished)
    assert len([record for record in records(tmp_path / "out").values() if "longX_captions" in record]) == 24


def test_several_processes_share_the_shards_without_overlap(tmp_path, shards):
    with ChatServer(slowly) as server:
        processes = [start(shards, tmp_path / "out", server) for _ in range(3)]
        said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert set(server.asked.values()) == {1} and len(records(tmp_path / "out")) == 24
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 24


def test_claims_are_exclusive_and_those_of_the_dead_are_free(tmp_path):
    ours, theirs = Claims(tmp_path, 60.0, "here:1"), Claims(tmp_path, 60.0, "there:2")
    assert ours.take("a") and not theirs.take("a")
    ours.release("a")
    assert theirs.take("a") and theirs.take("a") and not ours.take("a")  # a task that is run again finds its own claim
    os.utime(tmp_path / "a.claim", (0, 0))
    assert ours.take("a")  # stale
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert Claims(tmp_path, 60.0, f"{ours.host}:{ended.pid}").take("b") and theirs.take("b")  # its process is gone
    for attempt in range(20):
        winners = []
        Claims(tmp_path, 60.0, "slow:x").take(f"c{attempt}")
        os.utime(tmp_path / f"c{attempt}.claim", (0, 0))

        def rival(number, attempt=attempt, winners=winners):
            if Claims(tmp_path, 60.0, f"rival{number}:x").take(f"c{attempt}"):
                winners.append(number)

        rivals = [threading.Thread(target=rival, args=(number,)) for number in range(8)]
        for thread in rivals:
            thread.start()
        for thread in rivals:
            thread.join()
        assert len(winners) == 1


def test_a_local_model_end_to_end(tmp_path, shards, llava):
    words = [
        "recaption",
        str(shards),
        "--output",
        str(tmp_path / "out"),
        "--model",
        llava,
        "--name",
        "LLA",
        "--max-tokens",
        "24",
    ]
    cli.main([*words, "--batch-size", "3", "--max-bad-fraction", "1"])
    found = records(tmp_path / "out")
    captioned = [record["longLLA_captions"] for record in found.values() if "longLLA_captions" in record]
    assert len(found) == 24 and len(captioned) >= 16 and len(set(captioned)) > 8  # what it says depends on the picture
    alone = captioners.LocalModel(llava, [captioners.Prompt("longLLA_captions", "Describe the image in details", 24)])
    for key in list(found)[:6]:
        (answer,) = alone.answer([jpeg(int(key))])
        if "longLLA_captions" in found[key]:
            assert answer == {"longLLA_captions": found[key]["longLLA_captions"]}  # as in a batch


def test_a_damaged_picture_spoils_no_other(llava):
    model = captioners.LocalModel(llava, [captioners.Prompt("c", "Describe the image in details", 24)])
    whole, damaged, other = model.answer([jpeg(0), b"no picture", jpeg(3)])
    assert isinstance(damaged, ValueError)
    assert [whole, other] == model.answer([jpeg(0), jpeg(3)])


def test_without_a_chat_template_llava_gets_its_own_form(tmp_path):
    model = captioners.LocalModel(str(save_tiny_llava(tmp_path, chat_template=False)), [])
    assert model._question("Describe the image in details") == "USER: <image>\nDescribe the image in details ASSISTANT:"


@pytest.mark.parametrize("family", FAMILIES)
def test_current_captioners_are_asked_through_their_own_classes(family, tmp_path):
    """Their processors, templates and generation; weights are random, so that any words will do."""
    model = captioners.LocalModel(str(save_tiny(family, tmp_path)), [captioners.Prompt("c", "Describe the image", 6)])
    assert family.replace("-", "").lower() in type(model.model).__name__.lower()
    one, two = model.answer([jpeg(1, 60), jpeg(2, 90)])
    assert {word for answer in (one, two) for word in answer["c"].split()} <= set(WORDS), "without the question"
    assert model.answer([jpeg(2, 90)]) == [two]  # padding does not show


def test_a_summary_and_its_details_are_asked_for_at_once(tmp_path, shards):
    with ChatServer() as server:
        counts = through(server, shards, tmp_path / "out", summary_prompt="Describe in detail")
        assert counts["captioned"] == 24 and len(server.requests) == 24
        assert through(server, shards, tmp_path / "out", summary_prompt="Describe in detail") == {"done before": 3}
    record = records(tmp_path / "out")["0003"]
    assert record["shortX_captions"] == f"Picture {number(3)}."
    assert record["longX_captions"] == "It has details. And a half sent"
    prompt = captioners.Prompt("long", "?", 9, summary_column="short")
    assert prompt.captions("One. Two is cu", True) == {"short": "One.", "long": "One."}


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    folder = tmp_path / "clip"
    folder.mkdir()
    model = build_model(tiny_model(), seed=3)
    settings = TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"context_length": 16}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    save_file(open_clip_state_dict(model), folder / "open_clip_model.safetensors")
    return folder


def test_sentences_that_clip_does_not_find_in_the_picture_are_left_out(tmp_path, shards, clip_folder):
    options = {"clip_model": str(clip_folder), "short_prompt": ""}
    with ChatServer() as server:
        through(server, shards, tmp_path / "all", keep_above=-1.0, **options)
        found = records(tmp_path / "all")
        scores = sorted(score for record in found.values() for score in record["longX_scores"])
        limit = scores[len(scores) // 2]
        through(server, shards, tmp_path / "half", keep_above=limit, **options)
        with pytest.raises(UserError, match="--output: .* holds captions of other"):
            through(server, shards, tmp_path / "half", keep_above=0.1, **options)
        with pytest.raises(UserError, match="--keep-above, --clip-model"):
            through(server, shards, tmp_path / "none", keep_above=0.1)
    left = 0
    for key, record in records(tmp_path / "half").items():
        sentences = split_sub_captions(found[key]["longX_captions"])
        assert record["longX_scores"] == found[key]["longX_scores"] and len(sentences) == 3
        kept = split_sub_captions(record["longX_captions"])
        assert all(
            (text in kept) == (score > limit)
            for text, score in zip(sentences, record["longX_scores"], strict=True)
            if abs(score - limit) > 1e-3
        )
        left += len(sentences) - len(kept)
    assert 20 < left < 52  # of 72


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
