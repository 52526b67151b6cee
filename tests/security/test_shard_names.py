"""No shard name runs a command without data.allow_pipe, however it is written, and no file or URL is taken for one."""

import http.server
import shutil
import threading
from pathlib import Path

import pytest
from shard_files import write_shards, write_tar

from dreamlip_train import cli
from dreamlip_train.data.shards.shard_names import Shard, list_shards, open_shard
from dreamlip_train.data.shards.shards import ShardError, read_shard
from dreamlip_train.jobs.user_error import UserError

COMMAND = "touch ran"
NAMES = [
    f"pipe:{COMMAND}",
    f"PIPE:{COMMAND}",
    f" pipe:{COMMAND}",
    f"\tPiPe:{COMMAND}",
    f"file://pipe:{COMMAND}; echo x://y",
    f"FILE://pipe:{COMMAND} #x://y",
    f"file://file://pipe:{COMMAND} #://",
    f"{{pipe:{COMMAND} #://,x://}}",
    f"pip{{e:{COMMAND},a://}}",
    f"p{{ip,}}e:{COMMAND} #://",
    f"00000.tar::pipe:{COMMAND}",
    f"00000.tar::{{pipe:{COMMAND} #://,x://}}",
    f"00000.tar:: pipe:{COMMAND}",
    f"x://pipe:{COMMAND}",
    f"pipe://{COMMAND}",
    f"http://localhost:9/$({COMMAND})",
    f"http://localhost:9/`{COMMAND}`;{COMMAND}",
    "http://localhost:9/x -o ran",
    "http://localhost:9/x\n-o\nran",
    "scp://localhost/x",
    "gs://bucket/$(touch ran)",
    "hf://x/y",
    f"\\pipe:{COMMAND}",
    f"\\{{pipe:{COMMAND} #://\\}}",
    "-",
    "|touch ran",
    "a\0b.tar",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path, [2])


@pytest.mark.parametrize("name", NAMES)
def test_no_name_runs_a_command(name):
    """The test for "pipe:" came before "file://" was taken off and braces expanded; webdataset's gopen then ran what
    came out.
    """
    try:
        for shard in list_shards(name):
            assert shard.scheme != "pipe"
            if shard.scheme == "file":
                list(read_shard(shard))
    except (UserError, ShardError):
        pass
    assert not Path("ran").exists()


def test_a_file_that_is_called_like_a_command_is_a_file():
    for name in (f"pipe:{COMMAND} #.tar", "http:x.tar", "-o ran.tar"):
        shutil.copy("00000.tar", name)
    Path("http:").mkdir()
    shutil.copy("00000.tar", "http:/y.tar")
    for pattern in ("*.tar", ".", "./*", "file://*.tar", "http:/*.tar"):
        shards = [shard for shard in list_shards(pattern) if shard.endswith(".tar")]
        assert shards and {shard.scheme for shard in shards} == {"file"}
        assert all(len(list(read_shard(shard))) == 2 for shard in shards)
        assert all(len(list(read_shard(str(shard)))) == 2 for shard in shards), "as a plain string too"
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "validate"],
        ["train", "demo", "--run-dir", "run", "--data.shards"],
        ["prepare", "join", "--captions", "c.csv", "--output", "joined", "--shards"],
        ["recaption", "--output", "new", "--model", "none", "--endpoint", "http://localhost:9"],
        ["doctor"],
        ["prepare", "stats"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
@pytest.mark.parametrize("name", [f"{{pipe:{COMMAND} #://,x://}}", f"file://pipe:{COMMAND}; echo x://y"])
def test_no_command_of_ours_runs_one_either(words, name, capsys):
    Path("c.csv").write_text("Image Path,raw_caption\nx.jpg,a dog\n")
    words = [*words, name]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and not Path("ran").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_with_permission_a_command_runs_and_its_failure_is_an_error():
    (shard,) = list_shards("pipe:cat 00000.tar", allow_pipe=True)
    assert shard.scheme == "pipe" and len(list(read_shard(shard))) == 2
    next(read_shard(shard)).clear()  # stopping early is no error
    with pytest.raises(ShardError):
        list(read_shard(*list_shards("pipe:cat 00000.tar; exit 3", allow_pipe=True)))
    assert [str(s) for s in list_shards("pipe:cat {a,b}.tar", allow_pipe=True)] == ["pipe:cat a.tar", "pipe:cat b.tar"]


def test_a_url_is_fetched_as_it_is_written():
    """Brackets and braces are curl's patterns, a redirect can name another protocol: neither is followed."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            if self.path.startswith("/elsewhere"):
                self.send_response(302)
                self.send_header("Location", f"file://{Path('00000.tar').absolute()}")
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, *_):
            pass

    paths = []
    write_tar(Path("x[1-3].tar"), [("a.jpg", b"1")])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        assert len(list(read_shard(*list_shards(f"{base}/00000.tar")))) == 2
        assert [s["key"] for s in read_shard(*list_shards(f"{base}/x[1-3].tar"))] == ["a"]
        with pytest.raises(ShardError):
            list(read_shard(*list_shards(f"{base}/missing.tar")))
        with pytest.raises(ShardError):
            list(read_shard(*list_shards(f"{base}/elsewhere.tar")))
    finally:
        server.shutdown()
    assert paths == ["/00000.tar", "/x[1-3].tar", "/missing.tar", "/elsewhere.tar"]


def test_patterns_that_name_too_much_or_the_same_are_messages():
    with pytest.raises(UserError, match="more than 1,000,000"):
        list_shards("{0..999999999}.tar")
    with pytest.raises(UserError, match="more than 1,000,000"):
        list_shards(f"{{0..{'9' * 5000}}}.tar")  # which Python makes no number of
    with pytest.raises(UserError, match="more than once"):
        list_shards("00000.tar::./00000.tar")
    with pytest.raises(UserError, match="cannot be expanded"):
        list_shards("a{b.tar")
    assert open_shard(Shard("00000.tar")).read(1)
