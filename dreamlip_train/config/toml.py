"""Config to TOML and back: a base file sets any field, an unknown key fails with the closest names,
and the resolved config can be read again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

from dreamlip_train.config.presets import PRESETS, apply_preset
from dreamlip_train.config.renamed import refuse_renamed_keys
from dreamlip_train.config.schema import Config
from dreamlip_train.jobs.user_error import UserError

_NONE = "None"  # TOML has no word for it


def read_config(path: str | Path, base: Config | None = None) -> Config:
    """``base`` (or the defaults) with the fields that the TOML file ``path`` names.

    Raises:
        UserError: the file is missing or not TOML, or a key or the type of a value is wrong (named as section.field).
    """
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also no UTF-8, numbers of thousands of digits, depth
        raise UserError(f"--config: {str(path)!r} is not TOML: {error}") from error
    refuse_renamed_keys(settings, str(path))
    base, loss = base or Config(), settings.get("loss")
    if isinstance(loss, dict) and loss.get("preset") in PRESETS:  # what else the file says wins
        base = apply_preset(base, loss["preset"])
    return override(base, settings)


def override(config: Any, settings: dict[str, Any], section: str = "") -> Any:
    """A copy of the dataclass ``config`` with the nested ``settings`` in it; a dict field is replaced, not merged."""
    types = typing.get_type_hints(type(config))
    changes = {}
    for key, value in settings.items():
        name = f"{section}.{key}" if section else key
        if key not in types:
            close = difflib.get_close_matches(key, types, n=3) or sorted(types)
            raise UserError(
                f"{name}: no such setting; did you mean {', '.join(f'{section}.{c}' if section else c for c in close)}?"
            )
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"{name}: got {value!r}; it is a section, write [{name}]")
            changes[key] = override(getattr(config, key), value, name)
        else:
            changes[key] = _checked(value, types[key], name)
    return dataclasses.replace(config, **changes)


def _checked(value: Any, expected: Any, name: str) -> Any:
    """``value`` as TOML gives it in the type of its field: lists become tuples, whole numbers floats."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if value == _NONE and type(None) in arguments:
        return None
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{name}: got {value!r}; choose from {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise UserError(f"{name}: got {value!r}; give {len(inner)} values")
        return tuple(_checked(item, kind, name) for item, kind in zip(value, inner, strict=True))
    if origin is dict and isinstance(value, dict):
        if arguments[1] is Any:
            return _with_none(value)
        return {key: _checked(item, arguments[1], name) for key, item in value.items()}
    kinds = (
        [kind for kind in (arguments or (expected,)) if kind is not type(None)] if origin not in (tuple, dict) else []
    )
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if any(type(value) is kind for kind in kinds):
        return value
    type_name = getattr(expected, "__name__", str(expected)) if not arguments else str(expected)
    raise UserError(f"{name}: got {value!r}; it must be {type_name}")


def _with_none(value: Any) -> Any:
    """A value of a free-form table, None where that was written."""
    if isinstance(value, dict):
        return {key: _with_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_none(item) for item in value]
    return None if value == _NONE else value


def format_config(config: Config) -> str:
    """``config`` as TOML, every field of every section, from which ``read_config`` gives the same config again;
    None is written as "None".

    Raises:
        UserError: a text can't be written (the field is named).
    """
    lines = []
    for section, fields in config.to_dict().items():
        lines += [
            f"[{section}]",
            *(f"{key} = {_toml(value, f'{section}.{key}')}" for key, value in fields.items()),
            "",
        ]
    return "\n".join(lines)


def _toml(value: Any, name: str) -> str:
    if value is None:
        return f'"{_NONE}"'
    if isinstance(value, dict):
        items = (f"{_toml(str(key), name)} = {_toml(item, name)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item, name) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf and nan are TOML's words too
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name}: {value!r} is not UTF-8, which a TOML file must be; rename what it names"
            ) from error
    # JSON's strings, numbers and booleans are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.field": (old value, new value)} of every field whose value changed."""
    before, after = old.to_dict(), new.to_dict()
    return {
        f"{section}.{key}": (before[section][key], value)
        for section, fields in after.items()
        for key, value in fields.items()
        if before[section][key] != value
    }
