"""A data set of the Hugging Face hub, or a folder that ``datasets`` reads, as a table that is streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from dreamlip_train.captions.cells import IMAGE_BYTES, as_row
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN, describe_layout, renaming
from dreamlip_train.captions.table import Row, check_columns
from dreamlip_train.jobs.user_error import UserError

PREFIX = "hf:"


class HubTable:
    """As ``table.Table``, of ``hf:NAME``, ``hf:NAME:SPLIT`` or ``hf:NAME:CONFIG:SPLIT``; NAME may be a local folder.

    Rows come in the data set's order; a picture comes as bytes (``IMAGE_BYTES``). Nothing of it runs code: data sets
    with a script are refused.

    Raises:
        UserError: datasets is not installed, or has no such data set; while iterating: columns that are not accepted.
    """

    lines = None

    def __init__(
        self,
        name: str,
        columns: Mapping[str, str] | None = None,
        check: Callable[[str, list[str], list[str]], None] | None = None,
    ) -> None:
        self.name, self.columns, self.check = name, dict(columns or {}), check or check_columns
        self.layout = ""
        self.count: int | None = None
        """Rows, where the data set's card says it."""
        try:
            import datasets
        except ImportError as error:
            raise UserError("--captions: datasets is not installed; pip install 'dreamlip[hub]'") from error
        words = name.removeprefix(PREFIX).split(":")
        if not words[0] or len(words) > 3:
            raise UserError(f"--captions: got {name!r}; give hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        config = words[1] if len(words) == 3 else None
        try:
            self.rows = datasets.load_dataset(
                words[0], config, split=words[-1] if len(words) > 1 else "train", streaming=True
            )
            features = self.rows.features or {}
            for column, feature in features.items():
                if isinstance(feature, datasets.Image):
                    self.rows = self.rows.cast_column(column, datasets.Image(decode=False))
            split = (self.rows.info.splits or {}).get(str(self.rows.split))
            self.count = (split.num_examples or None) if split else None
        except Exception as error:  # its own, the hub's, the network's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--captions: datasets can't load {name!r}: {reason}") from error

    def __iter__(self) -> Iterator[Row]:
        rename: dict[str, str] | None = None
        for number, record in enumerate(self.rows, 1):
            if rename is None:
                names = [str(name) for name in record]
                self.layout = describe_layout(names, self.columns)
                rename = renaming(names, self.columns)
                self.check(f"--captions: {self.name!r}", [rename.get(name, name) for name in names], names)
            row, wrong = as_row(record, rename)
            if row is not None and IMAGE_BYTES not in row and IMAGE_COLUMN not in row:
                row, wrong = None, "no picture"
            yield number, row, wrong
