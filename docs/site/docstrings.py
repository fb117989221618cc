"""
Our docstrings, in the style of transformers, as the Google style that the site's parser reads.

`name ([`Type`], *optional*, defaults to 3): text` becomes `name (Type): text`: whether an argument is optional, and
its default, are in the signature. `a, b (`int`): text` becomes an entry for each. A reference `[`Name`]` becomes a
link where the site has that name.
"""

import re
from typing import Any

import griffe
import yaml


_ARGUMENT = re.compile(r"([\w*]+)(?: \(((?:[^()]|\([^()]*\))+)\))?(, |:)")
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")
_RETURNS = re.compile(r"^( +)(\[?`[^:]*`\]?): (.*)$")


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is found."""

    def __init__(self) -> None:
        with open("mkdocs.yml", encoding="utf-8") as stream:
            reference = yaml.safe_load(stream)["extra"]["reference"]
        self.names = {name for entry in reference for name in entry["names"]}

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = self.rewritten(obj.docstring.value)

    def rewritten(self, text: str) -> str:
        lines: list[str] = []
        section, indent = "", 0
        for line in text.split("\n"):
            depth = len(line) - len(line.lstrip())
            if line.strip() in ("Args:", "Returns:", "Yields:"):
                section, indent = line.strip(), depth + 4
            elif line.strip() and depth < indent:
                section = ""
            if section == "Args:" and depth == indent and line.strip():
                lines += entries(line)
            elif section and section != "Args:" and (returns := _RETURNS.match(line)):
                lines.append(f"{returns[1]}{plain_type(returns[2])}: {returns[3]}")
            else:
                lines.append(line)
        return _REFERENCE.sub(self.link, "\n".join(lines))

    def link(self, reference: re.Match) -> str:
        name = reference[1]
        known = next((known for known in self.names if known == name or known.endswith(f".{name}")), None)
        return f"`{name}`" if known is None else f"[`{name}`][{known}]"


def entries(line: str) -> list[str]:
    """An entry for each argument that a line begins to describe; a type stands behind the last of those it is of."""
    place, found, kind = len(line) - len(line.lstrip()), [], None
    while argument := _ARGUMENT.match(line, place):
        found.append(argument)
        place = argument.end()
        if argument[3] == ":":
            break
    else:
        return [line]
    lines: list[str] = []
    for argument in reversed(found):
        kind = argument[2] or kind
        typed = "" if kind is None else f" ({plain_type(kind)})"
        lines.insert(0, f"{line[: found[0].start()]}{argument[1]}{typed}: {line[place:].strip()}")
    return lines


def plain_type(text: str) -> str:
    """`[`~a.B`] or `None`, *optional*, defaults to 3` as `a.B | None`."""
    text = re.sub(r",? *\*optional\*.*$", "", text)
    return re.sub(r"\[?`~?([^`]*)`\]?", r"\1", text).replace(" or ", " | ")
