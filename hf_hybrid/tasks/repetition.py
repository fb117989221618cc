"""How much a generated text repeats itself, or another one."""

from collections.abc import Sequence
from typing import Any


def repetition(text: str | Sequence[Any], n: int = 4) -> float:
    """The share of the runs of `n` words (or of `n` entries of a sequence) of a text that were in it before."""
    words = text.split() if isinstance(text, str) else list(text)
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_looping(tokens: Sequence[Any], times: int = 3, shortest: int = 12) -> bool:
    """
    Whether a text ends in a loop: with at least `times` copies, one behind the other, of some piece, which are
    `shortest` tokens or more in all.
    """
    tokens = list(tokens)
    for period in range(1, len(tokens) // times + 1):
        length = max(times * period, shortest)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False


def agreement(tokens: Sequence[int], teacher: Sequence[int]) -> float:
    """
    The share of places at which both have the same token, of as many places as the longer one has: what one writes
    behind the end of the other agrees with nothing.
    """
    longest = max(len(tokens), len(teacher))
    return sum(a == b for a, b in zip(tokens, teacher, strict=False)) / longest if longest else 1.0


def common_prefix(tokens: Sequence[int], teacher: Sequence[int]) -> int:
    """How many tokens both begin with."""
    same = [a == b for a, b in zip(tokens, teacher, strict=False)]
    return same.index(False) if False in same else len(same)
