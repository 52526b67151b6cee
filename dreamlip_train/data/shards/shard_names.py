"""From a pattern to shards: each final name is decided once, by an allow-list of schemes, and is opened only as what
that decision says.

    "a/*.tar::http://host/{0..9}.tar" -> parts at "::" -> braces expanded -> decide each name -> globs and folders of
    local ones -> [Shard, ..]

Nothing here hands a name to code that would interpret it again: a file that is called "pipe:rm x.tar" is a file.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import subprocess
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import braceexpand
from webdataset.gopen import Pipe

from dreamlip_train.jobs.user_error import UserError

Scheme = Literal["file", "http", "pipe"]
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*$")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_MOST_NAMES = 1_000_000
_LONGEST_NUMBER = 20  # digits
# curl may end because we stop reading (23), and a shell or its command for the same reason (SIGPIPE, 141 or -13).
_STOPPED_READING = (23, 141, -13)
_CURL = "curl --fail --silent --show-error --location --globoff --proto =http,https --proto-redir =http,https".split()
_CURL += "--connect-timeout 30 --retry 30 --retry-delay 2 --url".split()


class Shard(str):
    """A shard's name as it is shown and compared, with what it is: a local path ("file"), a URL ("http") or a shell
    command ("pipe").

    Only ``list_shards`` makes one that is no local path; any other string that is read as a shard is a local path,
    whatever it looks like.
    """

    scheme: Scheme

    def __new__(cls, name: str, scheme: Scheme = "file") -> Shard:
        shard = super().__new__(cls, name)
        shard.scheme = scheme
        return shard


def list_shards(pattern: str, *, allow_pipe: bool = False, field: str = "data.shards") -> list[Shard]:
    """The shards that a pattern names, sorted within each part: globs, braces, folders, URLs, several parts joined with
    "::".

    Raises:
        UserError: the pattern is empty, matches nothing, names a shard twice, has a scheme that is not read,
            or is a "pipe:" (a shell command) that was not permitted.
    """
    if not pattern.strip():
        raise UserError(
            f"{field}: is empty; give a folder, a glob such as 'shards/*.tar', or braces such as "
            f"'cc3m-{{0000..0575}}.tar'"
        )
    shards: list[Shard] = []
    for name in _expanded(pattern, field):
        shard = _decided(name, allow_pipe, field)
        shards += _matches(shard, field) if shard.scheme == "file" else [shard]
    places = Counter(os.path.abspath(shard) if shard.scheme == "file" else shard for shard in shards)
    duplicates = [place for place, times in places.items() if times > 1]
    if duplicates:
        raise UserError(f"{field}: {duplicates[0]!r} is named more than once by {pattern!r}; name each shard once")
    return shards


def _expanded(pattern: str, field: str) -> list[str]:
    """The names of a pattern, its braces expanded."""
    names: list[str] = []
    for part in pattern.split("::"):
        # braceexpand makes a list of each range, before anybody can stop it.
        if any(
            max(len(first), len(last)) > _LONGEST_NUMBER or abs(int(last) - int(first)) >= _MOST_NAMES
            for first, last in _RANGE.findall(part)
        ):
            raise UserError(f"{field}: {part!r} names more than {_MOST_NAMES:,} shards; use larger shards or a glob")
        try:
            names += islice(braceexpand.braceexpand(part), _MOST_NAMES - len(names) + 1)
        except ValueError as error:
            raise UserError(
                f"{field}: {part!r} cannot be expanded ({error}); write a brace that belongs to the name as '\\{{'"
            ) from error
        if len(names) > _MOST_NAMES:
            raise UserError(f"{field}: {part!r} names more than {_MOST_NAMES:,} shards; use larger shards or a glob")
    return names


def _decided(name: str, allow_pipe: bool, field: str) -> Shard:
    """What one name is; the only place that says so."""
    if "\0" in name:
        raise UserError(f"{field}: {name!r} has a null byte in it; no file is called that")
    bare = name.strip()
    if bare.lower().startswith("pipe:"):
        if not allow_pipe:
            raise UserError(f"{field}: {name!r} runs a shell command; set data.allow_pipe if you trust it")
        if not name.startswith("pipe:"):
            raise UserError(f"{field}: {name!r}: write pipe: in lower case and without blanks before it")
        return Shard(name, "pipe")
    scheme, mark, rest = bare.partition("://")
    if not mark or not _SCHEME.match(scheme):
        return Shard(name)
    if scheme.lower() == "file":
        return Shard(rest)
    if scheme.lower() not in ("http", "https"):
        raise UserError(
            f"{field}: {name!r}: {scheme}:// is not read; copy it, mount it, or give 'pipe:COMMAND' with "
            "data.allow_pipe"
        )
    if bare != name or any(c.isspace() or not c.isprintable() for c in bare):
        raise UserError(f"{field}: {name!r} has blanks in it; percent-encode a URL's blanks as %20")
    path = address(Shard(name, "http")).partition("://")[2].partition("/")[2]
    if os.path.basename(path) in ("", ".", ".."):
        raise UserError(f"{field}: {name!r} names no file; give the URL of a .tar")
    return Shard(name, "http")


def _matches(path: Shard, field: str) -> list[Shard]:
    """The local files that a path, folder or glob names."""
    if os.path.isdir(path):
        names = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    else:
        names = [str(path)] if os.path.lexists(path) else sorted(glob.glob(path))
    if not names:
        what = "a folder without .tar files" if os.path.isdir(path) else f"no such file (in {os.getcwd()})"
        raise UserError(f"{field}: {str(path)!r} matches no shard: {what}; `dreamlip-train prepare` makes shards")
    return [Shard(name) for name in names]


def scheme_of(shard: str) -> Scheme:
    """What ``list_shards`` decided; a plain string is a local path."""
    return shard.scheme if isinstance(shard, Shard) else "file"


def local_folder(shard: str) -> Path | None:
    """The folder of a shard on this machine; None for a URL or a command."""
    return Path(shard).parent if scheme_of(shard) == "file" else None


def address(shard: str) -> str:
    """Where a shard is: of a URL without its query, in which a signature or a token changes from day to day."""
    return shard.partition("?")[0].partition("#")[0] if scheme_of(shard) == "http" else str(shard)


def file_name(shard: str) -> str:
    """What a shard is called in its folder, in an index, and in the folder of its copies."""
    return os.path.basename(address(shard))


def shard_ids(shards: Sequence[str]) -> list[str]:
    """What each shard is called within its set, wherever the set lies: its file name, and of several of one name which
    of them it is.

    >>> shard_ids(["/a/train/0.tar", "/a/val/0.tar", "/a/val/1.tar"])
    ['0.tar', '2/0.tar', '1.tar']
    """
    times: Counter[str] = Counter()
    ids = []
    for shard in shards:
        name = file_name(shard)
        times[name] += 1
        ids.append(f"{times[name]}/{name}" if times[name] > 1 else name)  # no file name has a slash
    return ids


def open_shard(shard: str) -> IO[bytes] | Any:
    """The shard's bytes, as a context manager; closing it raises OSError when a download or command has failed.

    Raises:
        OSError: a file is missing or unreadable, or curl is.
    """
    scheme = scheme_of(shard)
    if scheme == "file":
        if stat.S_ISFIFO(os.stat(shard).st_mode):  # it would be waited for without end
            raise OSError("it is a named pipe; 'pipe:cat PATH' reads one")
        return open(shard, "rb")
    if scheme == "http":
        return Pipe([*_CURL, shard], mode="rb", stdin=subprocess.DEVNULL, ignore_status=list(_STOPPED_READING))
    command = shard.removeprefix("pipe:")
    return Pipe(command, mode="rb", shell=True, stdin=subprocess.DEVNULL, ignore_status=list(_STOPPED_READING))
