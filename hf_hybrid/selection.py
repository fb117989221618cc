"""Which layers keep softmax attention: from scores, by position, or as given."""

from collections.abc import Sequence

from hf_hybrid.modeling.configuration_hybrid import check_layers
from hf_hybrid.trainers.scores import LayerScores
from hf_hybrid.trainers.scoring import METHODS
from hf_hybrid.trainers.scoring_rules import PHASES, POSITIONAL, check_count, positional_layers, uniform_layers


__all__ = ["PHASES", "POSITIONAL", "SELECTORS", "check_selector", "select_layers", "uniform_layers"]

SELECTORS = tuple(METHODS)


def select_layers(
    selector: str | Sequence[int],
    k: int | None,
    num_layers: int,
    scores: LayerScores | None = None,
    *,
    seed: int = 0,
) -> list[int]:
    """
    Returns the layers that keep softmax attention, ascending.

    Args:
        selector (`str` or `list[int]`):
            The method of `scores`, whose `k` best layers are taken; a rule that goes by position, one of `POSITIONAL`,
            see [`positional_layers`]; or a list of indices, which is taken as it is.
        k (`int`, *optional*): how many; not needed for a list.
        num_layers (`int`): the layers of the model.
        scores ([`LayerScores`], *optional*): needed by what does not go by position.
        seed (`int`): of `"random"`.
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
    check_count(k, num_layers)
    if selector in POSITIONAL:
        return positional_layers(selector, k, num_layers, seed)
    return checked_scores(selector, scores, num_layers).top(k)


def checked_scores(selector: str, scores: LayerScores | None, num_layers: int) -> LayerScores:
    """`scores`, or a `ValueError` where they are not what `selector` needs."""
    if scores is None:
        raise ValueError(
            f"selector={selector!r} needs scores; measure them with score_layers, or use selector='uniform'."
        )
    if scores.method != selector:
        raise ValueError(
            f"selector={selector!r}, but the scores were measured by {scores.method!r}; name the method they are of."
        )
    if len(scores.scores) != num_layers:
        raise ValueError(
            f"the scores are of {len(scores.scores)} layers, the model has {num_layers}; score all of its layers."
        )
    return scores


def check_selector(selector: str | Sequence[int]) -> None:
    """Raises a `ValueError` where `selector` is a name that is not known."""
    if isinstance(selector, str) and selector not in SELECTORS:
        raise ValueError(f"selector={selector!r} is unknown; choose one of {list(SELECTORS)} or list layer indices.")
