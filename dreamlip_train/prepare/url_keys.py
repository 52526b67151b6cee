"""One spelling of a URL or path, so that a table and an image shard that name the same picture agree."""

from __future__ import annotations

import html
from urllib.parse import unquote, urlsplit

_DEFAULT_PORTS = (":80", ":443")
_LONGEST_URL = 20_000  # characters; what is longer is compared as it is


def normal_url(value: str) -> str:
    """``value`` without what differs between copies of one URL: scheme, escaping (percent and HTML), case of the host,
    default port, fragment, blanks.

    >>> normal_url(" HTTP://Example.com:80/a%20b.jpg?x=1&amp;y=2#top ")
    'example.com/a b.jpg?x=1&y=2'
    """
    text = value.strip()
    if len(text) > _LONGEST_URL:
        return text
    try:
        text = html.unescape(text)
        if "://" not in text:
            text = "//" + text.lstrip("/")
        parts = urlsplit(text)
    except ValueError:  # an unclosed [ of an IPv6 address, a character's number of thousands of digits
        return unquote(text)
    host = parts.netloc.lower()
    for port in _DEFAULT_PORTS:
        host = host.removesuffix(port)
    query = f"?{unquote(parts.query)}" if parts.query else ""
    return f"{host}{unquote(parts.path)}{query}"


def normal_path(value: str) -> str:
    """``value`` as a relative path with forward slashes and without its extension.

    >>> normal_path("./train\\\\0001.JPG")
    'train/0001'
    """
    parts = [part for part in value.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    if parts and "." in parts[-1].lstrip("."):
        parts[-1] = parts[-1].rsplit(".", 1)[0]
    return "/".join(parts)
