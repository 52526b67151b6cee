"""export --push against a server that answers as the Hub's API does: what reaches it is the folder, byte for byte."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from dreamlip_train.checkpoint.interoperability.hub import upload
from dreamlip_train.jobs.user_error import UserError


class Hub:
    """Context manager: private repositories with small files in the commit and large ones by LFS, as the real one."""

    def __init__(self, monkeypatch, refuses: str = "", exists: bool = False):
        self.refuses, self.exists = refuses, exists
        self.repositories, self.files, self.large, self.asked = [], {}, {}, []
        self.monkeypatch = monkeypatch

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, content = hub.answer(self, body)
                content = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        for name, value in (("ENDPOINT", self.url), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
            self.monkeypatch.setattr(constants, name, value)
        self.monkeypatch.setenv("HF_TOKEN", "hf_of_a_user")
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request, body: bytes) -> tuple[int, object]:
        path = request.path.split("?")[0]
        self.asked.append(path)
        if request.command == "PUT":  # addresses that the LFS batch gave out carry no token
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if request.headers["Authorization"] != "Bearer hf_of_a_user":
            return 401, {"error": "Invalid username or password."}
        if self.refuses and self.refuses in path:
            return 403, {"error": "You don't have the rights"}
        if path == "/api/models/lab/tiny" and not self.exists and not self.repositories:
            return 404, {"error": "Repository not found"}
        if path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            answer = {"url": f"{self.url}/lab/tiny"}
            return (409, answer | {"error": "You already created it"}) if self.exists else (200, answer)
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            mode = lambda file: "lfs" if file["path"].endswith(".safetensors") else "regular"  # noqa: E731
            return 200, {"files": [dict(path=f["path"], uploadMode=mode(f), shouldIgnore=False) for f in files]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]}
        if "/commit/" in path:
            self.commit(body)
            return 200, {"commitUrl": f"{self.url}/lab/tiny/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 200, {"id": "lab/tiny", "private": True, "sha": "0" * 40, "siblings": []}

    def place(self, large: dict) -> dict:
        return large | {"actions": {"upload": {"href": f"{self.url}/storage/{large['oid']}", "header": {}}}}

    def commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
                assert hashlib.sha256(self.files[value["path"]]).hexdigest() == value["oid"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cc3m"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# tiny\n")
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_model.safetensors").write_bytes(bytes(range(256)) * 500)
    return folder


@pytest.mark.parametrize("exists", [False, True])
def test_the_folder_arrives_in_a_private_repository(folder, monkeypatch, exists):
    with Hub(monkeypatch, exists=exists) as hub:
        assert upload(folder, "lab/tiny") == f"{hub.url}/lab/tiny"
    (made,) = hub.repositories
    assert made["name"] == "tiny" and made["organization"] == "lab"
    assert made.get("visibility") == "private" or made.get("private") is True
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("part", ["/api/repos/create", "/commit/", "/info/lfs/"])
def test_a_token_that_may_not_write_is_said_and_the_folder_stays(folder, monkeypatch, part):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        Hub(monkeypatch, refuses=part) as hub,
        pytest.raises(UserError, match=r"--push: 'lab/tiny' could not be written: .*403.*hf upload lab/tiny"),
    ):
        upload(folder, "lab/tiny")
    assert not hub.files and before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_token_is_said(folder, monkeypatch):
    with Hub(monkeypatch) as hub, pytest.raises(UserError, match=r"could not be written: .*401"):
        monkeypatch.setenv("HF_TOKEN", "hf_of_another")
        upload(folder, "lab/tiny")
    assert not hub.repositories and not hub.files
