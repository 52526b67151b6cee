"""Text of strangers, such as names and captions, where people read it: nothing in it is a command to a terminal."""

from __future__ import annotations

import logging
import re

# Escape sequences move a terminal's cursor, rename its window or hide lines; marks of direction turn around what
# stands after them. Line breaks and tabs stay.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """``text`` with each control character as its escape, such as ``\\x1b``."""
    return _COMMANDS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class PlainFormatter(logging.Formatter):
    """A formatter of log lines, which are ``plain``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text."""
        return plain(super().format(record))
