"""The page on which sentences are tried: what a sentence selects, hostile text and requests, the page in a browser."""

import io
import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager

import browser
import numpy as np
import pytest
from PIL import Image
from planted import COLORS, PlantedModel, planted_sample

from dreamlip_train import cli
from dreamlip_train.evaluation.segmentation.localization import mask_to_regions
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.reporting.explore import MAX_BODY, Explorer, explorer_server

HOSTILE = (
    "<img src=x onerror=alert(1)> a red </script><script>alert(2)</script> square & 'it' \"is\" \u202e\x00 \U0001f3af"
)


@contextmanager
def serving(samples):
    explorer = Explorer(PlantedModel(), threshold=0.5)
    explorer.add_samples(samples)
    server = explorer_server(explorer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", explorer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(address, body=None, kind="application/json", **headers):
    """(status, answer, headers) of one request."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, headers | ({"Content-Type": kind} if data is not None else {}))
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_a_sentence_selects_its_region_and_its_picture():
    samples = [planted_sample(seed) for seed in range(4)]
    with serving(samples) as (address, _):
        listing = json.loads(ask(f"{address}/pictures")[1])
        assert [picture["sentences"] for picture in listing["pictures"]] == [s["sentences"] for s in samples]
        assert (listing["grid"], listing["patch"], listing["threshold"]) == ([8, 8], 8, 0.5)
        for index, sample in enumerate(samples):
            regions = mask_to_regions(sample["mask"], 3, (8, 8))
            for sentence, region in zip(sample["sentences"], regions, strict=True):
                answer = json.loads(ask(f"{address}/look", {"picture": index, "text": sentence})[1])
                assert sum(answer["weights"]) == pytest.approx(1) and len(answer["cosines"]) == 4
                assert bool(region[int(np.argmax(answer["weights"]))])
                assert bool(region[int(np.argmax(answer["similarities"]))])
        kept = [json.loads(ask(f"{address}/look", {"picture": 0, "text": "red", "threshold": t})[1]) for t in (0, 0.9)]
        assert np.count_nonzero(kept[0]["weights"]) > np.count_nonzero(kept[1]["weights"])
        picture = np.asarray(Image.open(io.BytesIO(ask(f"{address}/picture/2")[1])))
        assert np.array_equal(picture, samples[2]["image"].permute(1, 2, 0).numpy())


def test_a_picture_of_the_users_is_decoded_as_every_other():
    """A wide JPEG turned by EXIF: the model gets the square that evaluation would take."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (160, 80), COLORS["red"]).save(buffer, "JPEG", exif=exif)
    with serving([]) as (address, explorer):
        status, answer, _ = ask(f"{address}/picture", buffer.getvalue(), "application/octet-stream")
        assert (status, json.loads(answer)) == (200, {"picture": 0})
        assert explorer.pictures[0].image.shape == (3, 64, 64)
        status, answer, _ = ask(f"{address}/picture", buffer.getvalue()[:200], "application/octet-stream")
        assert status == 400 and "error" in json.loads(answer) and len(explorer.pictures) == 1
        status, answer, _ = ask(f"{address}/picture?name=a%20%C3%BC.svg", b"<svg>", "application/octet-stream")
        assert status == 400 and json.loads(answer)["error"].startswith("'a ü.svg' is no picture")
        assert "object at 0x" not in answer.decode()
        assert ask(f"{address}/picture?name=b.jpg", buffer.getvalue(), "application/octet-stream")[0] == 200
        assert [picture["name"] for picture in json.loads(ask(f"{address}/pictures")[1])["pictures"]][1:] == ["b.jpg"]


def test_a_browser_that_leaves_is_no_traceback(capsys):
    """A tab that was closed while a picture was sent printed one."""
    with serving([planted_sample(0)]) as (address, _):
        host = address.removeprefix("http://")
        head = f"Host: {host}\r\nContent-Type: application/octet-stream\r\nContent-Length: 9999\r\n\r\nabc"
        for sent in (
            f"POST /picture HTTP/1.1\r\n{head}",
            f"GET /picture/0 HTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET /pic",
        ):
            with socket.create_connection(("127.0.0.1", int(host.split(":")[1]))) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed with a reset
                client.sendall(sent.encode())
                threading.Event().wait(0.1)
        assert ask(f"{address}/look", {"picture": 0, "text": "a red square"})[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_hostile_text_stays_text():
    """What it holds is data in JSON, under a policy that runs no inline script, and never a part of the page."""
    sample = planted_sample(0) | {"key": HOSTILE, "sentences": [HOSTILE]}
    with serving([sample]) as (address, _):
        for path in ("/", "/pictures", "/page.js", "/picture/0", "/absent/<script>"):
            _, body, headers = ask(address + path.replace("<", "%3C"))
            assert "script-src 'self'" in headers["Content-Security-Policy"] and "unsafe" not in str(headers)
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert b"onerror" not in body or headers["Content-Type"] == "application/json"
            assert b"absent" not in body, "an error does not repeat what was asked for"
        (picture,) = json.loads(ask(f"{address}/pictures")[1])["pictures"]
        assert picture == {"name": plain(HOSTILE), "sentences": [HOSTILE]}
        assert ask(f"{address}/look", {"picture": 0, "text": HOSTILE})[0] == 200
        script = ask(f"{address}/page.js")[1].decode()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "setAttribute"):
            assert word not in script


@pytest.mark.parametrize(
    "body",
    [
        {"picture": 1, "text": "red"},
        {"picture": -1, "text": "red"},
        {"picture": True, "text": "red"},
        {"picture": "../0", "text": "red"},
        {"picture": 1e400, "text": "red"},
        {"picture": 0, "text": " "},
        {"picture": 0, "text": ["red"]},
        {"picture": 0, "text": "red " * 1000},
        {"picture": 0, "text": "red", "threshold": "0"},
        {"picture": 0, "text": "red", "threshold": True},
        {"picture": 0.5, "text": "red"},
        {"picture": 0, "text": "red", "threshold": float("nan")},
        ["picture"],
        b"{",
        b"[" * 100_000,
    ],
)
def test_a_wrong_request_is_refused_and_the_server_goes_on(body, capsys):
    with serving([planted_sample(0)]) as (address, _):
        status, answer, _ = ask(f"{address}/look", body)
        assert status in (400, 404) and json.loads(answer)["error"]
        assert ask(f"{address}/look", {"picture": 0, "text": "a red square"})[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_only_its_own_page_is_answered():
    """A name of someone else's that leads to 127.0.0.1, a foreign page's request, a form, a path out of the folder."""
    with serving([planted_sample(0)]) as (address, explorer):
        port = address.rsplit(":", 1)[1]
        look = {"picture": 0, "text": "a red square"}
        assert ask(f"{address}/pictures", Host=f"evil.example:{port}")[0] == 403
        assert ask(f"{address}/look", look, Origin="http://evil.example")[0] == 403
        assert ask(f"{address}/look", look, Origin="null")[0] == 403
        assert ask(f"{address}/look", look, Origin=address)[0] == 200
        assert ask(f"{address}/look", look, kind="text/plain")[0] == 400
        assert ask(f"{address}/picture", b"x", "application/x-www-form-urlencoded")[0] == 400
        assert ask(f"{address}/picture/../../explore.py")[0] == ask(f"{address}/explore.py")[0] == 404
        request = {"Content-Length": str(MAX_BODY + 1)}
        assert ask(f"{address}/picture", b"", "application/octet-stream", **request)[0] == 413
        server = explorer_server(explorer)
        assert server.server_address[0] == "127.0.0.1"
        server.server_close()


def test_show_draws_a_picture_and_refuses_what_is_none(tmp_path, monkeypatch, capsys):
    import dreamlip_train.checkpoint.weights
    from dreamlip_train.config.schema import Config

    def load(path, model, weights):
        asked.append(weights)
        return PlantedModel().eval(), Config()

    asked = []
    monkeypatch.setattr(dreamlip_train.checkpoint.weights, "load_for_eval", load)
    sample = planted_sample(1)
    Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    cli.main(["show", "run", str(tmp_path / "a.png"), "a red $x$ square", "a teal one", "--output", str(out)])
    two = np.asarray(Image.open(out).convert("RGB"))
    words = ["--output", str(out), "--weights", "average"]
    cli.main(["show", "run", str(tmp_path / "a.png"), *["a red square"] * 6, *words])
    assert asked == ["", "average"]
    six = np.asarray(Image.open(out).convert("RGB"))
    assert two.std() > 10 and six.shape[0] > 1.8 * two.shape[0], "six sentences take two rows"
    capsys.readouterr()
    (tmp_path / "b.png").write_bytes(b"<svg onload=alert(1)>")
    for words, message in (
        ([str(tmp_path / "b.png"), "a red square"], "'b.png' is no picture"),
        ([str(tmp_path / "none.png"), "a red square"], "IMAGE"),
        ([str(tmp_path / "a.png")], "CAPTIONS"),
        ([str(tmp_path / "a.png"), " "], "CAPTIONS"),
        ([str(tmp_path / "a.png"), "red", "--output", str(tmp_path / "no" / "x.png")], "--output"),
        ([str(tmp_path / "a.png"), "red", "--threshold", "1.5"], "--threshold: got 1.5"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["show", "run", *words])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit):
        cli.main(["explore", "nowhere", "--port", str(other.getsockname()[1])])
    assert "--port: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_in_a_browser():
    if not browser.available():
        pytest.skip("no chromium and chromedriver here")
    samples = [planted_sample(seed) for seed in range(3)]
    samples[1] |= {"key": HOSTILE, "sentences": [HOSTILE, "a blue square"]}
    server = ExitStack()
    address, explorer = server.enter_context(serving(samples))
    with server, browser.page(address) as script:
        wait_for(script, "document.querySelectorAll('#pictures img').length == 3")
        script("document.getElementById('sentence').value = arguments[0]; look()", samples[0]["sentences"][0])
        wait_for(script, "state.answer !== null && state.images[0].complete")
        lit = np.array(script(LIT))
        region = mask_to_regions(samples[0]["mask"], 3, (8, 8))[0].numpy()
        assert lit[region].min() > lit[~region].max(), "what the sentence names is lit"
        assert script("return document.querySelectorAll('button.nearest').length") == 1
        script("choose(1)")
        assert script("return document.querySelector('#examples button').textContent") == HOSTILE
        assert script("return document.querySelectorAll('#examples img, #examples script, body script').length") == 1
        script("document.querySelector('#examples button').click()")
        wait_for(script, "state.answer !== null")
        script("document.getElementById('sentence').value = 'x'.repeat(3000); look()")
        wait_for(script, "document.getElementById('message').textContent.includes('2000')")
        assert script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert script("return state.answer") is None, "nothing of the sentence before stays lit"
        script("document.getElementById('sentence').value = ''; look()")
        wait_for(script, "document.getElementById('message').textContent == ''")
        # Another tab adds a picture: it had the numbers of the next one here.
        assert ask(f"{address}/picture?name=b.png", explorer.png(2), "application/octet-stream")[0] == 200
        script("document.getElementById('sentence').value = 'a blue square'; look()")
        wait_for(script, "document.querySelectorAll('#pictures img').length == 4 && state.answer !== null")
        script("choose(3)")
        wait_for(script, "state.answer !== null && document.querySelector('button.chosen span').textContent")
        cosines = script("return [...document.querySelectorAll('#pictures span')].map((span) => span.textContent)")
        assert len(cosines) == 4 and cosines[2] == cosines[3]
        server.close()
        script("document.getElementById('sentence').value = 'a blue square'; look()")
        wait_for(script, "document.getElementById('message').textContent.includes('still running')")


# The saturation of the middle of each patch as the canvas shows it: what is not selected is gray.
LIT = """
const canvas = document.getElementById("spotlight"), context = canvas.getContext("2d"), found = [];
for (let patch = 0; patch < 64; patch++) {
  const [r, g, b] = context.getImageData((patch % 8) * 60 + 30, Math.floor(patch / 8) * 60 + 30, 1, 1).data;
  found.push(Math.max(r, g, b) - Math.min(r, g, b));
}
return found;
"""


def wait_for(script, condition):
    for _ in range(100):
        if script(f"return {condition}"):
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"never: {condition}")
