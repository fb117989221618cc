"""Layers chosen by position: the rules of thumb that a score has to beat."""

import math
import random

from .job import Job
from .scores import LayerScore, LayerScores
from .scoring_method import ScoringMethod


PHASES = ("first", "last", "centre")
POSITIONAL = ("uniform", "uniform-last", "uniform-centre", "first", "last", "random")


def uniform_layers(num_layers: int, k: int, phase: str = "first") -> list[int]:
    """
    Returns `k` evenly spaced layers, ascending.

    The L layers are cut into k groups as equal as can be, group i holding the layers `floor(i L / k)` to
    `floor((i + 1) L / k) - 1`, and one layer of each group is taken. For L=8 and k=2 the groups are 0..3 and 4..7.

    Args:
        num_layers (`int`): L, the layers of the model.
        k (`int`): how many to take, 0 to L.
        phase (`str`, *optional*, defaults to `"first"`):
            `"first"` takes the first layer of each group, `floor(i L / k)`: `[0, 4]` in the example. `"last"` takes
            the last one, `floor((i + 1) L / k) - 1`: `[3, 7]`. `"centre"` takes the middle one, the lower of two,
            `floor((first + last) / 2)`: `[1, 5]`.

    Example:

    ```python
    >>> uniform_layers(8, 2), uniform_layers(8, 2, phase="last"), uniform_layers(8, 2, phase="centre")
    ([0, 4], [3, 7], [1, 5])

    ```
    """
    check_count(k, num_layers)
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is unknown; choose one of {list(PHASES)}.")
    layers = []
    for i in range(k):
        first, last = i * num_layers // k, (i + 1) * num_layers // k - 1
        layers.append({"first": first, "last": last, "centre": (first + last) // 2}[phase])
    return layers


def positional_layers(rule: str, k: int, num_layers: int, seed: int = 0) -> list[int]:
    """
    Returns `k` layers by position alone, ascending.

    Args:
        rule (`str`): one of `POSITIONAL`. `"first"` and `"last"` take the ends, `"random"` a set drawn with `seed`,
            every set being as likely as any other; sets of one seed are nested in `k`. For the others see
            [`uniform_layers`].
        k (`int`), num_layers (`int`): how many, of how many.
        seed (`int`): of `"random"`.
    """
    check_count(k, num_layers)
    if rule not in POSITIONAL:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {list(POSITIONAL)}.")
    if rule == "first":
        return list(range(k))
    if rule == "last":
        return list(range(num_layers - k, num_layers))
    if rule == "random":
        return sorted(random.Random(seed).sample(range(num_layers), num_layers)[:k])
    return uniform_layers(num_layers, k, {"uniform": "first"}.get(rule, rule.removeprefix("uniform-")))


def by_position(job: Job) -> LayerScores:
    """The layers of the method's rule as scores: 1 for those it takes, 0 for the others. Nothing is measured."""
    k = job.wanted
    chosen = positional_layers(job.method.name, k, job.num_layers, job.args.seed)
    scores = [LayerScore(layer, math.nan, 0.0, 0, 0.0, value=float(layer in chosen)) for layer in job.all_layers]
    for score in scores:
        job.report(score)
    return job.finish(scores, order=chosen, k=k)


def check_count(k: int, num_layers: int) -> None:
    """Raises a `ValueError` where `k` layers cannot be taken from `num_layers`."""
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= num_layers:
        raise ValueError(
            f"k={k!r} layers cannot be chosen from a model with {num_layers}; pass an integer in 0..{num_layers}."
        )


RULES = tuple(
    ScoringMethod(
        name=rule,
        score=by_position,
        value="1 where it is taken by position",
        source="rule of thumb",
        measure="taken by position",
        unit="1 or 0",
        higher_is_better=True,
        needs_student=False,
        needs_k=True,
        among_all=True,
    )
    for rule in POSITIONAL
)
