"""The command line: `commands.py` has every command and its options, the others what one family of commands shares."""

from .commands import main, parse_layers


__all__ = ["main", "parse_layers"]
