"""Shards behind URLs with a signature or a token: what a shard is called does not change with it."""

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from shard_files import tokenize, write_shards

from dreamlip_train import cli
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.data.shards.shard_names import file_name, list_shards
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.validate import validate_shards


@pytest.fixture
def server(tmp_path):
    """A function: the URLs of two shards, signed with a word; the paths that were asked for are in ``asked``."""
    write_shards(tmp_path / "s", [8, 9])
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "s"))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()

    def urls(word: str) -> str:
        return f"http://127.0.0.1:{http.server_port}/{{00000..00001}}.tar?Expires=1&Signature=a/{word * 60}=="

    urls.asked = asked
    yield urls
    http.shutdown()


def test_a_resumed_run_takes_the_shards_of_another_day(server):
    """The signature was part of the shards' names: no index knew them, each was downloaded to be counted, and the
    resume was refused for other data.
    """
    loaders = [
        train_loader(
            DataConfig(shards=server(word), num_workers=0, shuffle_buffer=4),
            image_size=16,
            tokenize=tokenize,
            batch_size=4,
        )
        for word in "xy"
    ]
    assert loaders[0].fingerprint == loaders[1].fingerprint and sum(loaders[0].counts) == 17
    assert set(server.asked) == {"/manifest.json"}
    assert set(loaders[0].ids.values()) == {"00000.tar", "00001.tar"}


def test_copies_are_called_as_the_files_are(server, tmp_path):
    """A name of more than 255 bytes is none: the copies failed with an OSError."""
    validate_shards(server("x"), fix=str(tmp_path / "fixed"))
    assert sorted(path.name for path in (tmp_path / "fixed").glob("*.tar")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("url", ["http://h/", "http://h", "https://h/a/..", "http://h/?a=/0.tar"])
def test_a_url_without_a_file_is_refused(url, capsys):
    with pytest.raises(UserError, match="names no file"):
        list_shards(url)
    with pytest.raises(SystemExit):
        cli.main(["recaption", url, "--output", "x", "--model", "x"])
    assert "Traceback" not in capsys.readouterr().err


def test_a_question_mark_in_a_local_name_belongs_to_it(tmp_path):
    (tmp_path / "a?b.tar").write_bytes(b"")
    assert [file_name(shard) for shard in list_shards(str(tmp_path))] == ["a?b.tar"]
