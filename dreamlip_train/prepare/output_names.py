"""What writers of shards make sure of: no two inputs become one file, and no input is overwritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dreamlip_train.data.shards.shard_names import file_name, local_folder
from dreamlip_train.jobs.user_error import UserError


def require_distinct_names(shards: Sequence[str], field: str, advice: str) -> None:
    """A shard's copy keeps its file name, so that two of one name would become one file.

    Raises:
        UserError: two shards have the same file name.
    """
    name, times = Counter(file_name(shard) for shard in shards).most_common(1)[0]
    if times > 1:
        same = [shard for shard in shards if file_name(shard) == name]
        raise UserError(f"{field}: two shards are both called {name!r} ({same[0]} and {same[1]}); {advice}")


def require_another_folder(shards: Sequence[str], output: Path, field: str) -> None:
    """Copies do not replace the originals.

    Raises:
        UserError: ``output`` is the folder of some of the shards.
    """
    folders = {folder.resolve() for shard in shards if (folder := local_folder(shard)) is not None}
    if output.resolve() in folders:
        raise UserError(
            f"{field}: {str(output)!r} is the folder of the shards, which are not to be changed; give another"
        )
