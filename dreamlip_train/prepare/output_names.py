"""What writers of shards make sure of: no two inputs become one file, and one process at a time writes a folder."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dreamlip_train.jobs.user_error import UserError


def require_distinct_names(shards: Sequence[str], field: str, advice: str) -> None:
    """A shard's copy keeps its file name, so that two of one name would become one file.

    Raises:
        UserError: two shards have the same file name.
    """
    name, times = Counter(os.path.basename(shard) for shard in shards).most_common(1)[0]
    if times > 1:
        same = [shard for shard in shards if os.path.basename(shard) == name]
        raise UserError(f"{field}: two shards are both called {name!r} ({same[0]} and {same[1]}); {advice}")


@contextmanager
def sole_writer(output: Path, state: str) -> Iterator[None]:
    """Held while a command writes into ``output``, on this machine; the system lets go when the process ends, however.

    Args:
        state: the folder below ``output`` that holds the command's notes.
    Raises:
        UserError: another process holds it, or the folder can't be written.
    """
    try:
        (output / state).mkdir(parents=True, exist_ok=True)
        file = (output / state / "writing.lock").open("w")
    except OSError as error:
        raise UserError(f"--output: cannot write into {str(output)!r}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers would keep
        except OSError as error:
            raise UserError(
                f"--output: another process is writing into {str(output)!r}; wait for it, or give another folder"
            ) from error
        yield
