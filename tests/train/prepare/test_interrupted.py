"""Ctrl-C and folders that may not be written: one message, nothing half, and the same command goes on."""

import contextlib
import hashlib
import os
import re
import signal
import time
from pathlib import Path

import forked
import pytest
from caption_tables import write_csv
from chat_server import ChatServer
from shard_files import jpeg, write_shards

import dreamlip_train.prepare.folder
import dreamlip_train.prepare.shard_copy
import dreamlip_train.reporting.caption_histograms
from dreamlip_train import cli


@pytest.fixture
def root(tmp_path):
    """Shards without an index, pictures and a table."""
    write_shards(tmp_path / "in", [4] * 6, index=False)
    (tmp_path / "images").mkdir()
    for i in range(24):
        (tmp_path / "images" / f"{i:06d}.jpg").write_bytes(jpeg(i))
    write_csv(tmp_path / "t.csv", [(f"{i:06d}.jpg", f"raw {i}", "", f"A {i}. B {i}.") for i in range(24)])
    return tmp_path


def slowed() -> None:
    """Each picture and each sample of a shard takes 50 ms."""

    def slow(module, name):
        real = getattr(module, name)

        def function(*arguments):
            time.sleep(0.05)
            return real(*arguments)

        setattr(module, name, function)

    def slow_reading(module):
        real = module.read_shard

        def read(*arguments):
            for sample in real(*arguments):
                time.sleep(0.05)
                yield sample

        module.read_shard = read

    slow(dreamlip_train.prepare.folder, "decode_image")
    slow_reading(dreamlip_train.prepare.shard_copy)
    slow_reading(dreamlip_train.reporting.caption_histograms)


COMMANDS = {
    "folder": "prepare folder --captions {root}/t.csv --images {root}/images --output {out} --shard-size 4",
    "join": "prepare join --captions {root}/t.csv --shards {root}/in --on path --output {out}",
    "validate": "prepare validate {root}/in --crop 0 --fix {out}",
    "stats": "prepare stats {root}/in --output {out}/stats.png",
    "recaption": "recaption {root}/in --output {out} --model x --batch-size 1 --endpoint {url}",
}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("after", [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_ctrl_c_is_no_traceback_and_the_same_command_goes_on(root, name, after):
    """Each worker of the pool once printed a traceback of its own."""

    def words(folder: str, server: ChatServer) -> list[str]:
        (root / folder).mkdir(exist_ok=True)
        return [word.format(root=root, out=root / folder, url=server.url) for word in COMMANDS[name].split()]

    def slowly(attempt, image):
        time.sleep(0.05)
        return "ok"

    with ChatServer(slowly) as server:
        process = forked.start(words("out", server), root / "said", slowed)
        time.sleep(after)
        os.killpg(process, signal.SIGINT)  # as a terminal does: to the workers too
        code = forked.ended(process)
        said = (root / "said").read_text()
        assert code == 130 and "Traceback" not in said and "KeyboardInterrupt" not in said, (code, said)
        assert not list((root / "out").glob("*.partial"))
        for folder in ("out", "undisturbed"):
            with contextlib.suppress(SystemExit):
                cli.main(words(folder, server))
    assert contents(root / "out") == contents(root / "undisturbed")
    assert contents(root / "out") or (root / "out" / "stats.png").stat().st_size


@pytest.fixture
def read_only(root):
    """The same folders, which nobody may write to, and one to write to."""
    (root / "out").mkdir()
    (root / "said").touch()
    for folder in (root / "in", root / "images", root):
        folder.chmod(0o555)
    yield root
    for folder in (root / "in", root / "images", root):
        folder.chmod(0o755)


def run(root: Path, words: str) -> tuple[int, str]:
    process = forked.start(words.format(root=root, out=root / "out").split(), root / "said", forked.obey_permissions)
    code = forked.ended(process)
    said = (root / "said").read_text()
    assert "Traceback" not in said, said
    return code, said


def test_read_only_data_are_read(read_only):
    """validate lost its findings where it could not write its index."""
    code, said = run(read_only, "prepare validate {root}/in --crop 0")
    assert code == 0 and "24 samples in 6 shards" in said and "no manifest.json in" in said and "denied" in said
    code, said = run(read_only, "prepare stats {root}/in --output {out}/stats.png")
    assert code == 0 and (read_only / "out" / "stats.png").stat().st_size
    for words in (COMMANDS["folder"], COMMANDS["join"].replace("{out}", "{out}/join")):
        assert run(read_only, words)[0] == 0
    assert len(contents(read_only / "out")) == len(contents(read_only / "out" / "join")) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare folder --captions {root}/t.csv --images {root}/images --output {root}/new", "--output: cannot write"),
        ("prepare join --captions {root}/t.csv --shards {root}/in --on path --output {root}/new", "--output: cannot"),
        ("recaption {root}/in --model x --endpoint http://h --output {root}/new", "--output: cannot write into"),
        ("prepare stats {root}/in --output {root}/stats.png", "--output: .* can't be written there"),
        ("prepare urls {root}/t.csv --output {root}/urls.parquet", "--output: .* can't be written there"),
        ("prepare validate {root}/in --fix {root}/fixed", "Permission denied"),
        ("prepare scenes --output {root}/scenes", "Permission denied"),
    ],
)
def test_a_folder_that_may_not_be_written_is_named(read_only, words, message):
    code, said = run(read_only, words)
    assert code == 2
    assert re.search(message, said) and str(read_only) in said, said
