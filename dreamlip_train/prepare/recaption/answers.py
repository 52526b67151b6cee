"""A shard's answers, written down as they come, so that nothing is asked twice: OUTPUT/.recaption/NAME.jsonl."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dreamlip_train.jobs.atomic_json import read_json_lines
from dreamlip_train.jobs.user_error import RunError
from dreamlip_train.prepare.recaption.captioners import Answer, Prompt

_LONGEST_REASON = 500  # characters of an error: a server may say megabytes
_JUDGED_AFTER = 50  # pictures asked about before max_bad_fraction can stop a run


class AnswerFile:
    """Context manager: the captions of one shard by key, those of earlier runs and those that are added.

    A line is {"key", a caption by column} or {"key", "error"}. Where another prompt was added since, a picture is
    asked about again.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], max_bad_fraction: float) -> None:
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.captions: dict[str, dict[str, Any]] = {}
        columns = {column for prompt in prompts for column in prompt.columns}
        for answer in read_json_lines(path) if path.exists() else ():
            if columns <= answer.keys() and "key" in answer:
                self.captions[answer.pop("key")] = answer
        self.counts = Counter({"kept from before": len(self.captions)})

    def __enter__(self) -> AnswerFile:
        self.file = self.path.open("ab")
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self.file.write(b"\n")  # a crash cut the last line off
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def add(self, keys: Sequence[str], answers: Sequence[Answer], under_way: int = 0) -> None:
        """Write down answers that have come; ``under_way`` pictures of those that were taken up have none yet.

        Raises:
            RunError: too many of the pictures could not be captioned.
        """
        failure = ""
        for key, answer in zip(keys, answers, strict=True):
            if isinstance(answer, dict):
                self.captions[key] = answer
                line = {"key": key, **answer}
                self.counts["captioned"] += 1
            else:
                failure = f"{type(answer).__name__}: {answer}"[:_LONGEST_REASON]
                line = {"key": key, "error": failure}
                self.counts["failed"] += 1
            self.file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        total = self.counts["captioned"] + self.counts["failed"]
        # What fails comes first: pictures that nobody can decode, requests that are refused.
        bound = self.max_bad_fraction * (total + under_way)
        if failure and total >= _JUDGED_AFTER and self.counts["failed"] > bound:
            raise RunError(
                f"--max-bad-fraction: {self.counts['failed']} of {total} pictures could not be captioned, "
                f"the last because of {failure}. The reasons are in {self.path}; "
                "finished captions are kept, and the same command resumes"
            )


class AnswersElsewhere:
    """The answers that other processes write, counted by what their files have grown by since this was made."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.ends = {file: file.stat().st_size if file.exists() else 0 for file in files}

    def count(self) -> Counter[Path]:
        """Answers since the last call, by file."""
        new: Counter[Path] = Counter()
        for file, end in self.ends.items():
            if file.exists() and file.stat().st_size > end:
                with file.open("rb") as stream:
                    stream.seek(end)
                    lines = stream.read()
                whole = lines.rfind(b"\n") + 1
                new[file] = sum(line != b"" for line in lines[:whole].split(b"\n"))
                self.ends[file] = end + whole
        return new
