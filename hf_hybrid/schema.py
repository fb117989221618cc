"""Dataclasses from plain data (as YAML gives it), strictly."""

import dataclasses
import difflib
import types
import typing
from typing import Any


def parse(kind: Any, data: Any, where: str = "") -> Any:
    """
    Makes the dataclass `kind` of a dictionary, nested ones included.

    Unknown keys, missing keys and values of another type than the field's are errors that name the key.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the recipe'} is {data!r}; expected keys with values.")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    known = [f.name for f in dataclasses.fields(kind)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {known}."
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
    values = {key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing; set it.")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against a type annotation; numbers like 1e-3, which YAML reads as text, are converted."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)
    origin = typing.get_origin(hint) or hint
    if origin is dict:
        value = {} if value is None else value
        if isinstance(value, dict):
            return {str(key): read_numbers(entry) for key, entry in value.items()}
    elif origin is list:
        if isinstance(value, list):
            return [_value(typing.get_args(hint)[0], entry, where) for entry in value]
        if isinstance(value, str):
            return [value]
    elif origin in (int, float):
        number = read_numbers(value)
        if origin is int and isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, int if origin is int else (int, float)) and not isinstance(number, bool):
            return origin(number)
    elif isinstance(value, origin):
        return value
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise ValueError(f"{where}={value!r} is not {expected.get(origin, f'a {origin.__name__}')}; correct it.")


def read_numbers(value: Any) -> Any:
    """A number where `value` is one that YAML reads as text, such as 1e-3; else `value`."""
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value
