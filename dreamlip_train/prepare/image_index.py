"""Which file of an image folder a table's row means."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from dreamlip_train.data.shards.shards import IMAGE_EXTENSIONS


class ImageIndex:
    """Finds a row's image in a folder by relative path, then by file name, then by name without extension.

    A name is not guessed: where folders are named they must agree as far as both name them ("val/1.jpg" is not
    "train/1.jpg"), one of several files of a name is none, and so is a file that several rows could mean by its name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: set[str] = set()
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.rival: dict[str, str] = {}
        for parent, _, names in os.walk(folder):
            below = os.path.relpath(parent, folder)
            for name in names:
                if name.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS:
                    path = name if below == "." else f"{below}/{name}"
                    self.paths.add(path)
                    for alias in {name, name.rsplit(".", 1)[0]}:
                        self.by_name[alias].append(path)

    def pair(self, values: Iterable[str]) -> int:
        """Note, from all the rows' values, which files more than one of them would take by name; returns how many rows
        there are.
        """
        first: dict[str, str] = {}
        rows = 0
        for value in values:
            rows += 1
            if not value:
                continue
            try:
                path = self._match(value)
            except LookupError:
                continue
            if path == _plain(value):
                self.rival[path] = repr(value)  # its very path: who comes by the name alone means another file
            elif first.setdefault(path, value) != value:
                self.rival.setdefault(path, f"{first[path]!r} and {value!r}")
        return rows

    def find(self, value: str) -> str:
        """The image's path below the folder.

        Raises:
            LookupError: there is none, or several, or another row means the same file.
        """
        path = self._match(value)
        if path in self.rival and path != _plain(value):
            raise LookupError(f"{value!r} can mean {path} by its name alone, which is meant by {self.rival[path]} too")
        return path

    def _match(self, value: str) -> str:
        plain = _plain(value)
        if plain in self.paths:
            return plain
        name = PurePosixPath(plain)
        for alias in (name.name, name.stem):
            matches = [path for path in self.by_name.get(alias, []) if "://" in value or _agree(name, path)]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise LookupError(f"{value!r} matches {len(matches)} images, such as {matches[0]} and {matches[1]}")
        raise LookupError(f"no image for {value!r}")


def _plain(value: str) -> str:
    """A path with forward slashes; of a URL its path."""
    try:
        path = unquote(urlsplit(value).path) if "://" in value else value
    except ValueError:  # such as "http://[abc]/": no URL, and no file is called so
        path = value
    return str(PurePosixPath(path.replace("\\", "/")))


def _agree(row: PurePosixPath, path: str) -> bool:
    """Whether the folders of both agree, from the file upwards, as far as both name them."""
    ours, theirs = row.parts[-2::-1], PurePosixPath(path).parts[-2::-1]
    return all(one == other for one, other in zip(ours, theirs, strict=False))
