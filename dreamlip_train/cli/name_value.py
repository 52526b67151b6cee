"""Tables on the command line: ``--data.source-weights raw_caption=0.2 shortSV_captions=0.3`` replaces the recipe's."""

from __future__ import annotations

import typing
from typing import Any

import tyro

TABLES = tyro.constructors.ConstructorRegistry()
"""For ``tyro.cli(registry=...)``: fields of type dict[str, float] and dict[str, str] take any number of NAME=VALUE,
whatever names the default has (tyro would take the default's names alone); none makes the table empty.
"""


@TABLES.primitive_rule
def _table(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    kind = (typing.get_args(info.type) or (None, None))[-1]
    if info.type_origin is not dict or kind not in (float, str):
        return None

    def read(words: list[str]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not name or not equals or name in table:
                raise ValueError(f"got {word!r}; " + ("it is given twice" if name in table else "write NAME=VALUE"))
            table[name] = kind(value)
        return table

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[NAME={'NUMBER' if kind is float else 'TEXT'} ...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda table: [f"{name}={value}" for name, value in table.items()],
    )
