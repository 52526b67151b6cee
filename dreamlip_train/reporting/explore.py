"""``dreamlip-train explore``: type a sentence, choose a picture, see the patches that the sentence selects.

A page of three files and an HTTP server of the standard library on 127.0.0.1. Shapes: N pictures, P patches,
D embedding width.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import torch
from PIL import Image
from torch import Tensor, nn

from dreamlip_train.config.schema import DataConfig, Normalization
from dreamlip_train.data.images import ImageError, decode_image, resize_center_crop
from dreamlip_train.data.validation import val_samples
from dreamlip_train.evaluation.features import eval_mode, sub_caption_weights
from dreamlip_train.jobs.atomic_json import parse_json
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.user_error import UserError

MAX_BODY, MAX_TEXT, MAX_PICTURES = 50 * 2**20, 2000, 1000
_LONGEST_NAME = 200
_PAGE = Path(__file__).parent / "explore_page"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Picture:
    """A picture as the model sees it: its name, uint8 [3, S, S], example sentences, its features [D] and [P, D]."""

    name: str
    image: Tensor
    sentences: list[str]
    image_D: Tensor
    patch_PD: Tensor


class Explorer:
    """Pictures with their features, and what a sentence selects in them. Safe to call from several threads.

    Args:
        model: DreamLIP (model/dreamlip.py) with patch features, on its device.
        threshold, normalization: of the patch selection; a request may bring a threshold of its own.
    """

    def __init__(self, model: Any, *, threshold: float | None = None, normalization: Normalization = "minmax") -> None:
        self.model, self.threshold = model, threshold
        self.normalization: Normalization = normalization
        self.device = next(model.parameters()).device
        self.pictures: list[Picture] = []
        self.lock = threading.Lock()

    def add_held_out(self, data: DataConfig, max_samples: int) -> None:
        """The first pictures of ``data.val_shards``, whose sentences become examples to click on.

        Raises:
            UserError: the shards are not there.
        """
        self.add_samples(val_samples(data, image_size=self.model.image_size, max_samples=max_samples))

    def add_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """What ``val_samples`` yields."""
        for sample in samples:
            self._add(sample["key"], sample["image"], sample["sentences"])

    def add_file(self, name: str, data: bytes) -> int:
        """The index of a picture file, cut to the model's square as evaluation does.

        Raises:
            UserError: the bytes are no whole picture, or no more pictures are held.
        """
        try:
            image = resize_center_crop(decode_image(data), self.model.image_size)
        except ImageError as error:
            raise UserError(f"{name!r} is no picture that can be read: {error}") from error
        return self._add(name, image, [])

    def _add(self, name: str, image: Tensor, sentences: list[str]) -> int:
        with self.lock, eval_mode(self.model), torch.no_grad():
            if len(self.pictures) >= MAX_PICTURES:
                raise UserError(f"explore: holds {MAX_PICTURES} pictures and takes no more; start it again")
            image_nD, patch_nPD = self.model.encode_images(image[None].to(self.device))
            if patch_nPD is None:
                raise UserError("explore: the model gives no patch features; train with loss.grouping_weight > 0")
            self.pictures.append(Picture(plain(name), image, sentences, image_nD[0].float(), patch_nPD[0].float()))
            return len(self.pictures) - 1

    def listing(self) -> dict[str, Any]:
        """What the page begins with: {"pictures": [{"name", "sentences"}], "grid": [rows, columns], "patch": pixels
        a side, "size": pixels a side, "threshold": float}.
        """
        rows, columns = self.model.grid
        threshold = 1 / (rows * columns) if self.threshold is None else self.threshold
        pictures = [{"name": picture.name, "sentences": picture.sentences} for picture in list(self.pictures)]
        size = self.model.image_size
        return {
            "pictures": pictures,
            "grid": [rows, columns],
            "patch": size // rows,
            "size": size,
            "threshold": threshold,
        }

    def look(self, index: int, text: str, threshold: float | None = None) -> dict[str, Any]:
        """What ``text`` selects in picture ``index``: {"weights": [P] summing to one, "similarities": [P] cosines,
        "cosines": [N] of the text to every picture}.
        """
        with self.lock, eval_mode(self.model), torch.no_grad():
            picture = self.pictures[index]
            text_BD = self.model.encode_texts(self.model.tokenize([text]).to(self.device)).float()
            sigma = self.threshold if threshold is None else threshold
            weights_KP = sub_caption_weights(picture.patch_PD[None], [text_BD], sigma, self.normalization)[0]
            similarities_P = nn.functional.normalize(picture.patch_PD, dim=-1) @ text_BD[0]
            cosines_N = torch.stack([other.image_D for other in self.pictures]) @ text_BD[0]
        return {
            "weights": weights_KP[0].tolist(),
            "similarities": similarities_P.tolist(),
            "cosines": cosines_N.tolist(),
        }

    def png(self, index: int) -> bytes:
        """Picture ``index`` as the model sees it."""
        buffer = io.BytesIO()
        Image.fromarray(self.pictures[index].image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()


def explorer_server(explorer: Explorer, port: int = 0) -> ThreadingHTTPServer:
    """The page's server on 127.0.0.1; port 0 takes a free one. Start it with ``serve_forever()``.

    Only this machine reaches it, and only under that name: a page from elsewhere that a browser has open is refused.
    """

    class Handler(_Handler):
        pass

    Handler.explorer = explorer
    return _Server(("127.0.0.1", port), Handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle, as it does when its tab is closed, is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _RefusedRequest(Exception):
    """(status, message)."""


class _Handler(BaseHTTPRequestHandler):
    explorer: Explorer
    timeout = 60  # seconds that a silent client is waited for

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: Any) -> None:
        """A line a request would hide what the command says."""

    def _get(self) -> tuple[bytes, str]:
        path = self.path.split("?")[0]
        if path in _FILES:
            name, kind = _FILES[path]
            return (_PAGE / name).read_bytes(), kind
        if path == "/pictures":
            return _json(self.explorer.listing())
        if path.startswith("/picture/"):
            return self.explorer.png(self._index(path.removeprefix("/picture/"))), "image/png"
        raise _RefusedRequest(404, "no such page")

    def _post(self) -> tuple[bytes, str]:
        if self.path == "/look":
            request = self._json_body()
            text, threshold = request.get("text"), request.get("threshold")
            if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
                raise _RefusedRequest(400, f"text: give a sentence of 1 to {MAX_TEXT} characters")
            if threshold is not None and (type(threshold) not in (int, float) or not 0 <= threshold <= 1):
                raise _RefusedRequest(400, "threshold: give a number from 0 to 1")
            return _json(self.explorer.look(self._index(request.get("picture")), text, threshold))
        path, _, query = self.path.partition("?")
        if path == "/picture":
            name = parse_qs(query).get("name", ["your picture"])[0][:_LONGEST_NAME]
            try:
                index = self.explorer.add_file(name, self._body("application/octet-stream"))
            except UserError as error:
                raise _RefusedRequest(400, str(error)) from error
            return _json({"picture": index})
        raise _RefusedRequest(404, "no such page")

    def _answer(self, make: Any) -> None:
        try:
            self._check_origin()
            body, kind, status = *make(), 200
        except _RefusedRequest as error:
            status, message = error.args
            body, kind = _json({"error": message})
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check_origin(self) -> None:
        """A foreign page can send requests here, and can make a name of its own lead to 127.0.0.1."""
        port = cast(ThreadingHTTPServer, self.server).server_port
        own = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in own or (origin is not None and origin.removeprefix("http://") not in own):
            raise _RefusedRequest(403, "open this page as http://127.0.0.1")

    def _body(self, kind: str) -> bytes:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Content-Type") != kind or not length.isascii() or not length.isdigit():
            raise _RefusedRequest(400, f"send {kind} with its length")
        if int(length) > MAX_BODY:
            self.close_connection = True
            raise _RefusedRequest(413, f"more than {MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def _json_body(self) -> dict[str, Any]:
        try:
            content = parse_json(self._body("application/json"))
        except ValueError as error:
            raise _RefusedRequest(400, "that is no JSON") from error
        if not isinstance(content, dict):
            raise _RefusedRequest(400, "send a JSON object")
        return content

    def _index(self, value: Any) -> int:
        try:
            index = int(value)
        except (TypeError, ValueError, OverflowError):
            index = -1
        if isinstance(value, bool | float) or not 0 <= index < len(self.explorer.pictures):
            raise _RefusedRequest(404, "no such picture")
        return index


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"
