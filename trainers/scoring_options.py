"""What may be asked of a scoring method: its options and `k`, checked before anything is aligned or measured."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from .scoring_rules import POSITIONAL


# What chooses layers together, for one number of them.
NEEDS_K = (*POSITIONAL, "smart", "zero-shot-greedy", "distilled-greedy", "shared", "gates", "verified")
# Of those, what has no choice of no layers.
_AT_LEAST_ONE = ("zero-shot-greedy", "distilled-greedy", "shared", "gates")
# What chooses among all layers of the model, and not among those of a job.
AMONG_ALL = (*POSITIONAL, "smart", "gates", "verified")
# Where the number of an option may lie, ends included.
_BOUNDS: dict[str, tuple[float, float | None]] = {
    "rounds": (1, None),
    "noise": (0, None),
    "stability_window": (0, None),
    "stability": (0, 1),
    "swaps": (0, None),
    "max_size": (1, None),
    "points": (1, None),
    "until": (0, 1),
    "learning_rate": (0, None),
    "penalty": (0, None),
    "ramp": (0, 1),
}


def check_options(method: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raises a `ValueError` where `options` are not keyword arguments of `function`, by name, type and range."""
    parameters = inspect.signature(function).parameters.items()
    known = {name: each.annotation for name, each in parameters if each.kind is each.KEYWORD_ONLY}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"options {unknown} are unknown to method={method!r}; it has {list(known) or 'none'}.")
    for name, value in options.items():
        expected = _expected(known[name], value, *_BOUNDS.get(name, (None, None)))
        if expected is not None:
            raise ValueError(f"option {name}={value!r} of method={method!r} is wrong; pass {expected}.")
    rounds, window = options.get("rounds", 1), options.get("stability_window", 0)
    if rounds < 2 and options.get("halving"):
        raise ValueError(f"halving stops layers between rounds, and there are rounds={rounds}; pass 2 or more.")
    if window and rounds < window + 2:
        raise ValueError(
            f"stability_window={window} compares {window + 1} rounds before the last, and there are rounds={rounds}; "
            f"pass rounds of {window + 2} or more."
        )


def _expected(kind: Any, value: Any, low: float | None, high: float | None) -> str | None:
    """What should stand where `value` does, or None where it may."""
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {list(get_args(kind))}"
    if get_origin(kind) is not None:  # a sequence of names
        names = get_args(get_args(kind)[0])
        fits = isinstance(value, list | tuple) and len(value) > 0 and all(entry in names for entry in value)
        return None if fits else f"a list with one or more of {list(names)}"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind in (int, float):
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if fits and math.isfinite(value) and (low is None or low <= value) and (high is None or value <= high):
            return None
        words = "a whole number" if kind is int else "a number"
        return words + (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
    return None


def compares_rounds(options: dict[str, Any]) -> bool:
    """Whether `ga-s2` with these options looks at its layers together, between rounds."""
    return bool(options.get("halving") or options.get("stability_window"))


def together(method: str, options: dict[str, Any]) -> bool:
    """Whether what is measured of a layer depends on which others are scored with it."""
    return method in (*NEEDS_K, "zero-shot-removal") or compares_rounds(options)


def needs_k(method: str, options: dict[str, Any]) -> bool:
    """Whether the method with these options has to know how many layers are wanted."""
    alone = method == "shared" and options.get("select") == "single"
    return compares_rounds(options) or (method in NEEDS_K and not alone)


def follows_k(method: str, options: dict[str, Any]) -> bool:
    """Whether other scores come out where another number of layers is wanted."""
    return needs_k(method, options) or (method == "shared" and options.get("max_size") is None)


def check_k(method: str, options: dict[str, Any], k: int | None) -> None:
    """Raises a `ValueError` where the method needs `k`, how many layers are wanted, and has none."""
    if not needs_k(method, options):
        return
    if k is None:
        what = " with halving or a stability window" if compares_rounds(options) else " chooses layers together and"
        raise ValueError(f"method={method!r}{what} needs k, how many layers are kept; pass k.")
    if k < 1 and method in _AT_LEAST_ONE:
        raise ValueError(f"method={method!r} chooses layers for k={k}; pass at least k=1.")
