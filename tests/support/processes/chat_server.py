"""A server that speaks OpenAI's chat completions over HTTP, and fails, stalls or talks nonsense on request."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from shard_files import jpeg

from dreamlip_train.prepare.options import RecaptionOptions
from dreamlip_train.prepare.recaption.recaption import recaption_shards

PER_SHARD = 8

GARBAGE = (
    b"<html>gateway</html>",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]}',
    b"[1, 2",
)


class ChatServer:
    """Context manager. ``behave(n, image bytes)`` names what the n-th request for a picture gets.

    That is "ok", a status, "stall", "garbage", "cut", "drip" (a byte every 0.2 s), "giant", "deep", "surrogate",
    "broken off" (in the middle of a body), "not gzip" or "giant 500" (an error that never stops talking).
    """

    def __init__(self, behave=lambda attempt, image: "ok"):
        self.behave, self.asked, self.lock = behave, Counter(), threading.Lock()
        self.requests: list[dict] = []

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.answer(self, body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, body):
        image_part, text_part = body["messages"][0]["content"]
        head, data = image_part["image_url"]["url"].split(",")
        assert head == "data:image/jpeg;base64" and handler.path == "/v1/chat/completions"
        image, prompt = base64.b64decode(data), text_part["text"]
        with self.lock:
            attempt = self.asked[image, prompt]
            self.asked[image, prompt] += 1
            self.requests.append(body)
        what = self.behave(attempt, image)
        if what == "stall":
            time.sleep(3)
        if what in ("drip", "broken off", "giant 500"):
            return unending(handler, what)
        status, content = int(what) if what.isdigit() else 200, self.completion(image, prompt, body, what)
        if what == "garbage":
            content = GARBAGE[(attempt + sum(image)) % len(GARBAGE)]
        elif what == "giant":
            content = b" " * 2**23 + content
        elif what == "deep":
            content = b"[" * 100_000
        elif status != 200:
            content = json.dumps({"error": {"message": f"told to answer {what}"}}).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            if what == "not gzip":
                handler.send_header("Content-Encoding", "gzip")
            if what == "429":
                handler.send_header("Retry-After", "0.2")
            if what == "307":
                handler.send_header("Location", "http://elsewhere/\x1b[2J")
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # the client has given up

    def completion(self, image, prompt, body, what):
        text = f"Picture {sum(image) % 10007}. {'It has details. And a half sent' if 'detail' in prompt else 'Short.'}"
        if what == "surrogate":
            text += " Half \ud83d"
        choice = {
            "index": 0,
            "finish_reason": "length" if what == "cut" else "stop",
            "message": {"role": "assistant", "content": text},
        }
        return json.dumps(
            {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        ).encode()


def unending(handler, what: str) -> None:
    """An answer of which each byte comes before any timeout of a single read, or as fast as it is read, or stops."""
    try:
        handler.send_response(500 if what == "giant 500" else 200)
        handler.send_header("Content-Length", str(2**40))
        handler.end_headers()
        for _ in range({"drip": 1000, "broken off": 1, "giant 500": 2**20}[what]):
            handler.wfile.write(b" " * (2**20 if what == "giant 500" else 1))
            handler.wfile.flush()
            if what == "drip":
                time.sleep(0.2)
    except OSError:
        pass  # the client has given up
    handler.close_connection = True


def number(i):
    return sum(jpeg(i)) % 10007


def through(server, shards, output, **changes):
    settings = {"model": "served", "endpoint": server.url, "batch_size": 4, "timeout": 1.0, "name": "X"} | changes
    return recaption_shards(RecaptionOptions(str(shards), str(output), **settings))
