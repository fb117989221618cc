"""Which layers keep softmax attention: from scores, by position, or as given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_hybrid.modeling.configuration_hybrid import check_layers


if TYPE_CHECKING:
    from hf_hybrid.trainers import LayerScores

PHASES = ("first", "last", "centre")
SELECTORS = ("ga-s2", "uniform", "uniform-last", "uniform-centre")


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
    _check_count(k, num_layers)
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is unknown; choose one of {list(PHASES)}.")
    layers = []
    for i in range(k):
        first, last = i * num_layers // k, (i + 1) * num_layers // k - 1
        layers.append({"first": first, "last": last, "centre": (first + last) // 2}[phase])
    return layers


def select_layers(
    selector: str | Sequence[int], k: int | None, num_layers: int, scores: "LayerScores | None" = None
) -> list[int]:
    """
    Returns the layers that keep softmax attention, ascending.

    Args:
        selector (`str` or `list[int]`):
            `"ga-s2"` takes the `k` layers with the lowest KL in `scores`; `"uniform"`, `"uniform-last"` and
            `"uniform-centre"` take evenly spaced ones, see [`uniform_layers`]; a list of indices is taken as it is.
        k (`int`, *optional*): how many; not needed for a list.
        num_layers (`int`): the layers of the model.
        scores ([`LayerScores`], *optional*): needed by `"ga-s2"`.
    """
    check_selector(selector)
    if not isinstance(selector, str):
        layers = check_layers(selector, num_layers)
        if k is not None and k != len(layers):
            raise ValueError(
                f"k={k} layers were asked for, but the list {layers} has {len(layers)}; drop one of both."
            )
        return layers
    if k is None:
        raise ValueError(f"selector={selector!r} needs k, the number of layers that keep softmax attention.")
    _check_count(k, num_layers)
    if selector != "ga-s2":
        return uniform_layers(num_layers, k, {"uniform": "first"}.get(selector, selector.removeprefix("uniform-")))
    if scores is None:
        raise ValueError("selector='ga-s2' needs scores; measure them with score_layers, or use selector='uniform'.")
    if len(scores.scores) != num_layers:
        raise ValueError(
            f"the scores are of {len(scores.scores)} layers, the model has {num_layers}; score all of its layers."
        )
    return scores.top(k)


def check_selector(selector: str | Sequence[int]) -> None:
    """Raises a `ValueError` where `selector` is a name that is not known."""
    if isinstance(selector, str) and selector not in SELECTORS:
        raise ValueError(f"selector={selector!r} is unknown; choose one of {list(SELECTORS)} or list layer indices.")


def _check_count(k: int, num_layers: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= num_layers:
        raise ValueError(
            f"k={k!r} layers cannot be chosen from a model with {num_layers}; pass an integer in 0..{num_layers}."
        )
