"""Layers chosen by position: the rules of thumb that a score has to beat, and Zebra-Llama's constrained choice."""

import math
import random
from collections.abc import Sequence

from .scores import LayerScore, LayerScores
from .scoring_job import Job


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


def by_position(rule: str, job: Job) -> LayerScores:
    """The layers of a positional rule as scores: 1 for those it takes, 0 for the others. Nothing is measured."""
    k = job.wanted
    chosen = positional_layers(rule, k, job.num_layers, job.args.seed)
    scores = [LayerScore(layer, math.nan, 0.0, 0, 0.0, value=float(layer in chosen)) for layer in job.all_layers]
    for score in scores:
        job.report(score)
    about = {"measure": "taken by position", "unit": "1 or 0", "higher_is_better": True}
    return job.finish(rule, scores, order=chosen, k=k, **about)


def smart_layers(sensitivity: Sequence[float], k: int) -> list[int]:
    """
    Returns the `k` layers with the largest total sensitivity among sets that are nearly uniform, ascending.

    SMART of Zebra-Llama (arXiv 2505.17272), whose code is not released, as reconstructed from its published lists,
    all twelve of which satisfy these constraints. With L layers, the first chosen layer is one of `0 ..
    floor(L/k) - 1`, the last one of the last `floor(L/k)`, and neighbours are `floor(x) + 1` or `ceil(x) + 1` apart,
    `x = (last - first - k + 1) / (k - 1)`. The best such set is found exactly, by dynamic programming.

    Args:
        sensitivity (`Sequence[float]`): for each layer, how much the KL falls when it alone is restored to softmax.
        k (`int`): how many layers to take.
    """
    num_layers = len(sensitivity)
    check_count(k, num_layers)
    if k < 2:
        return sorted(range(num_layers), key=lambda layer: (-sensitivity[layer], layer))[:k]
    group = num_layers // k
    candidates = [
        path
        for first in range(group)
        for last in range(num_layers - group, num_layers)
        if last - first >= k - 1
        for path in [_best_path(sensitivity, first, last, k)]
        if path is not None
    ]
    return list(max(candidates)[1])


def _best_path(sensitivity: Sequence[float], first: int, last: int, k: int) -> tuple[float, tuple[int, ...]] | None:
    """The best layers from `first` to `last` with gaps as equal as can be, and their total sensitivity."""
    free = (last - first - k + 1) / (k - 1)
    gaps = {math.floor(free) + 1, math.ceil(free) + 1}
    best: dict[int, tuple[float, tuple[int, ...]]] = {first: (sensitivity[first], (first,))}
    for _ in range(k - 1):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end, (total, path) in best.items():
            for gap in gaps:
                layer = end + gap
                if layer <= last:
                    found = (total + sensitivity[layer], (*path, layer))
                    reached[layer] = max(reached.get(layer, found), found)
        best = reached
    return best.get(last)


def check_count(k: int, num_layers: int) -> None:
    """Raises a `ValueError` where `k` layers cannot be taken from `num_layers`."""
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= num_layers:
        raise ValueError(
            f"k={k!r} layers cannot be chosen from a model with {num_layers}; pass an integer in 0..{num_layers}."
        )
