"""A headless Chromium through its driver's HTTP interface, to see a page as a reader's browser shows it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def available() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


@contextmanager
def page(where: Path | str) -> Iterator[Any]:
    """``run(script, *arguments)`` executes JavaScript in the page of a file or an address and returns its value."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def call(method: str, where: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{where}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    with tempfile.TemporaryDirectory() as profile:
        try:
            for attempt in range(100):
                try:
                    call("GET", "/status")
                    break
                except OSError:
                    if attempt == 99:
                        raise
                    time.sleep(0.1)
            options = {"args": [*_FLAGS.split(), f"--user-data-dir={profile}"]}
            session = call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})[
                "sessionId"
            ]
            address = where.absolute().as_uri() if isinstance(where, Path) else where
            call("POST", f"/session/{session}/url", {"url": address})
            yield lambda script, *arguments: call(
                "POST", f"/session/{session}/execute/sync", {"script": script, "args": [*arguments]}
            )
            call("DELETE", f"/session/{session}")
        finally:
            driver.terminate()
            driver.wait()
