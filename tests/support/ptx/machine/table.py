"""Which function executes an instruction: each states the whole form it knows as a pattern, so that an unknown
modifier is an error by name.
"""

from __future__ import annotations

import re
from functools import cache

from .errors import UnknownInstruction

_FORMS: dict[str, list[tuple[re.Pattern, object]]] = {}


def executes(head: str, *patterns: str):
    """Registers a function ``(threads, operands, form, head)`` for opcodes of that head whose rest matches one of the
    patterns; ``form`` is the match.
    """

    def register(function):
        for pattern in patterns:
            _FORMS.setdefault(head, []).append((re.compile(pattern), function))
        return function

    return register


@cache
def lookup(opcode: str):
    """(function, form) of an opcode.

    Raises:
        UnknownInstruction: no function states this form.
    """
    head, dot, rest = opcode.partition(".")
    for pattern, function in _FORMS.get(head, ()):
        if form := pattern.fullmatch(dot + rest):
            return function, form
    raise UnknownInstruction(
        f"{opcode}: the executor does not know {'this form of it' if head in _FORMS else 'this instruction'}"
    )
