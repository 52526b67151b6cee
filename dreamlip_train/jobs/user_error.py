"""What a person must mend, as opposed to what we must: errors that the command line prints as one message,
without a traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """An argument, setting or input that can't work. The message names it, says what came, and what to do.

    Raise it with that message alone: it then crosses process boundaries as itself.
    """


class RunError(RuntimeError):
    """Work that had to end for a cause outside of this program: a full disk, unreadable data, a dead worker,
    a loss that stays NaN.

    The message says what is kept and what to do. Raised with the message alone, as ``UserError``.
    """
