"""The record of a scoring method: what it needs, what it may do, what its options may be, and what is said of it."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from .scores import KL_MEASURE, KL_UNIT, LayerScores


Options = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """Where a number may lie, ends included: `Annotated[int, Range(1)]` in the signature of a method's function."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoringMethod:
    """
    One way to score layers. It stands beside its function, and all that is asked of the method, from Python, by a
    recipe and on the command line, is checked against it. [`score_layers`] takes it, or the name of one in `METHODS`.

    Args:
        name (`str`): what recipes and scores call it.
        score (`Callable`): `score(job, **options)` gives [`LayerScores`], by `job.finish`. Its keyword-only arguments
            are the method's options, checked by their annotations: `bool`, `int`, `float`, `Literal`, sequences of
            these and `Annotated` with a [`Range`].
        value (`str`): a layer's value, in the symbols of docs/scoring.md.
        source (`str`): where it comes from.
        trained, measured (`str`): tokens that it trains on and measures on, in the same symbols.
        measure, unit (`str`), higher_is_better (`bool`): as in [`LayerScores`].
        needs_student (`bool`): whether it starts from an aligned student, or looks at the teacher alone.
        trains (`bool`): whether it trains, and so needs training rows.
        needs_k (`bool`): whether it chooses layers together, for one number of them.
        least_k (`int`): the smallest such number.
        asks_k, follows_k (`Callable`, *optional*): whether, with these options, the number has to be known, and
            whether the scores depend on it; by default as `needs_k` says.
        compares (`bool`): whether what is measured of a layer depends on which others are scored, also without a k.
        among_all (`bool`): whether it chooses among all layers of the model, and not among those of a call.
        splits (`bool`): whether jobs may share the layers out (`hf-hybrid score --layers`): each is a run of its own.
        keeps_student (`bool`): whether it goes on with the student that it trained, which FSDP2 would have sharded.
        check (`Callable`, *optional*): raises a `ValueError` where options do not go together.
    """

    name: str
    score: Callable[..., LayerScores]
    value: str
    source: str
    trained: str = "0"
    measured: str = "0"
    measure: str = KL_MEASURE
    unit: str = KL_UNIT
    higher_is_better: bool = False
    needs_student: bool = True
    trains: bool = False
    needs_k: bool = False
    least_k: int = 0
    asks_k: Callable[[Options], bool] | None = None
    follows_k: Callable[[Options], bool] | None = None
    compares: bool = False
    among_all: bool = False
    splits: bool = False
    keeps_student: bool = False
    check: Callable[[Options], None] | None = None

    def asks_for_k(self, options: Options) -> bool:
        """Whether the method with these options has to know how many layers are wanted."""
        return self.needs_k if self.asks_k is None else self.asks_k(options)

    def depends_on_k(self, options: Options) -> bool:
        """Whether other scores come out where another number of layers is wanted."""
        return self.asks_for_k(options) or (self.follows_k is not None and self.follows_k(options))

    def together(self, options: Options) -> bool:
        """Whether what is measured of a layer depends on which others are scored with it."""
        return self.needs_k or self.compares or self.asks_for_k(options)

    def options(self) -> dict[str, Any]:
        """The annotations of its options, by name."""
        parameters = inspect.signature(self.score).parameters.items()
        return {name: each.annotation for name, each in parameters if each.kind is each.KEYWORD_ONLY}

    def check_options(self, options: Options) -> None:
        """Raises a `ValueError` where `options` are not the method's, by name, type and range."""
        known = self.options()
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"options {unknown} are unknown to method={self.name!r}; it has {list(known) or 'none'}.")
        for name, value in options.items():
            expected = _expected(known[name], value)
            if expected is not None:
                raise ValueError(f"option {name}={value!r} of method={self.name!r} is wrong; pass {expected}.")
        if self.check is not None:
            self.check(options)

    def check_k(self, options: Options, k: int | None) -> None:
        """Raises a `ValueError` where the method needs `k`, how many layers are wanted, and has none."""
        if not self.asks_for_k(options):
            return
        if k is None:
            what = " chooses layers together and" if self.needs_k else f" with options={options}"
            raise ValueError(f"method={self.name!r}{what} needs k, how many layers are kept; pass k.")
        if k < self.least_k:
            raise ValueError(f"method={self.name!r} chooses layers for k={k}; pass at least k={self.least_k}.")


def _expected(kind: Any, value: Any, within: Range = Range()) -> str | None:  # noqa: B008  frozen
    """What should stand where `value` does, or None where it may."""
    if get_origin(kind) is Annotated:
        kind, within = get_args(kind)
    if type(None) in get_args(kind):
        if value is None:
            return None
        return _expected(next(part for part in get_args(kind) if part is not type(None)), value, within)
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {list(get_args(kind))}"
    if get_origin(kind) is not None:  # a sequence of names
        names = get_args(get_args(kind)[0])
        fits = isinstance(value, list | tuple) and len(value) > 0 and all(entry in names for entry in value)
        return None if fits else f"a list with one or more of {list(names)}"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind in (int, float):
        low, high = within.low, within.high
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if fits and math.isfinite(value) and (low is None or low <= value) and (high is None or value <= high):
            return None
        words = "a whole number" if kind is int else "a number"
        return words + (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
    return None


def table(methods: Iterable[ScoringMethod]) -> str:
    """The methods as a table in Markdown, as in docs/scoring.md."""
    columns = ("method", "a layer's value", "better", "source", "trained", "measured", "needs")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in methods:
        better = "high" if method.higher_is_better else "low"
        needs = [word for word, needed in (("student", method.needs_student), ("k", method.needs_k)) if needed]
        cells = (f"`{method.name}`", method.value, better, method.source, method.trained, method.measured)
        lines.append(f"| {' | '.join((*cells, ', '.join(needs)))} |")
    return "\n".join(lines)
