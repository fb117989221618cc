"""Dataclasses from plain data (as YAML gives it), strictly."""

import dataclasses
import difflib
import enum
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, the later would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line} has a list or a mapping as a key; a key is a word.")
            key = self.construct_object(key_node)
            if key in seen:
                raise ValueError(f"key {key} stands twice, in lines {seen[key]} and {line}; keep one of them.")
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> Any:
    """What a YAML file holds; a `ValueError` where it is none, or has a key twice in one place."""
    try:
        loader = _StrictLoader(Path(path).read_text("utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}.") from error


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
            raise ValueError(unknown_key(key, known, prefix))
    values = {key: typed(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing; set it.")
    return kind(**values)


def unknown_key(key: Any, known: typing.Iterable[str], prefix: str = "") -> str:
    """What is said of a key that is not among `known`."""
    known = list(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {known}."
    return f"unknown key {prefix}{key}; {hint}"


def typed(hint: Any, value: Any, where: str) -> Any:
    """
    `value` where it fits a type annotation, else a `ValueError` that names `where`.

    Numbers like 1e-3, which YAML reads as text, become numbers where a number is wanted; a text becomes a list of one
    where a list is.
    """
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        if value is None and type(None) in parts:
            return None
        if any(isinstance(part, type) and issubclass(part, enum.Enum) for part in parts):
            parts = tuple(part for part in parts if part is not str)  # which only says how a member is written
        problems = []
        for part in sorted((part for part in parts if part is not type(None)), key=lambda part: part is float):
            try:
                return typed(part, value, where)
            except ValueError as error:
                problems.append(error)
        raise problems[0]
    if hint is Any:
        value = read_numbers(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}={value!r} is not finite; pass a number.")
        return value
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)
    if origin is dict:
        value = {} if value is None else value
        if isinstance(value, dict):
            kind = (typing.get_args(hint) or (str, Any))[1]
            return {str(key): typed(kind, entry, f"{where}.{key}") for key, entry in value.items()}
    elif origin is list:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list):
            kind = (typing.get_args(hint) or (Any,))[0]
            return [typed(kind, entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    elif origin in (int, float):
        number = read_numbers(value)
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{where}={value!r} is not finite; pass a number.")
        if origin is int and isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, int if origin is int else (int, float)) and not isinstance(number, bool):
            return origin(number)
    elif origin is typing.Literal:
        choices = list(typing.get_args(hint))
        if value in choices:
            return value
        raise ValueError(f"{where}={value!r} is unknown; choose one of {choices}.")
    elif isinstance(origin, type) and issubclass(origin, enum.Enum):
        choices = [member.value for member in origin]
        if value in choices:
            return value
        raise ValueError(f"{where}={value!r} is unknown; choose one of {choices}.")
    elif isinstance(value, origin):
        return value
    raise ValueError(f"{where}={value!r} is not {_EXPECTED.get(origin, f'a {_name(origin)}')}; correct it.")


_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_EXPECTED |= {list: "a list", dict: "keys with values"}


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def read_numbers(value: Any) -> Any:
    """A number where `value` is one that YAML reads as text, such as 1e-3; else `value`."""
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value
