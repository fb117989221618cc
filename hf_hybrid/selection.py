"""Which layers keep softmax attention: from scores, by position, or as given."""

import math
from collections.abc import Sequence

from hf_hybrid.modeling.configuration_hybrid import check_layers
from hf_hybrid.trainers.scoring.methods import METHODS, method_of
from hf_hybrid.trainers.scoring.rules import PHASES, POSITIONAL, check_count, positional_layers, uniform_layers
from hf_hybrid.trainers.scoring.scores import LayerScores


__all__ = ["PHASES", "POSITIONAL", "SELECTORS", "check_selector", "layers_within", "select_layers", "uniform_layers"]

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


def layers_within(
    scores: LayerScores, softmax_bytes: Sequence[int], linear_bytes: Sequence[int], limit: int
) -> list[int]:
    """
    Returns the layers that keep softmax attention, ascending, such that the cache of all layers stays within `limit`.

    Where each layer has a score of its own, the set with the largest sum of gains is found exactly, by dynamic
    programming over the layers (Nemhauser and Ullmann 1969): a layer's gain is its value where higher is better, and
    else how far it is below `scores.baseline`; layers without a gain are left linear. Where students were trained
    (`ga-s2`), most of the way from the baseline is the training's, and counting that for every layer would prefer many
    small layers to the important ones: gains are then over the worst layer, which comes in last, where there is room.
    Where layers were chosen together, gains do not add up; they are taken in their order, each one that still fits.

    Args:
        scores ([`LayerScores`]): of all layers.
        softmax_bytes, linear_bytes (`Sequence[int]`): bytes of cache of each layer, as softmax and as linear
            attention, at the context that the limit is for, see `hf_hybrid.evaluation.layer_cache_bytes`.
        limit (`int`): bytes.
    """
    count = len(scores.scores)
    if not count == len(softmax_bytes) == len(linear_bytes):
        raise ValueError(f"scores of {count} layers, sizes of {len(softmax_bytes)} and {len(linear_bytes)}; pass all.")
    extra, free = _room(softmax_bytes, linear_bytes, limit)
    # Softmax attention over a short context takes less than a state.
    always = [layer for layer in range(count) if extra[layer] <= 0]
    rest = [layer for layer in scores.ranking if extra[layer] > 0 and layer not in scores.diverged]
    if scores.order:
        return sorted([*always, *_in_order(scores, extra, free)])
    gains, spare = _gains(scores)
    frontier: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for layer in rest:
        if gains[layer] > 0:
            added = [(size + extra[layer], gain + gains[layer], (*kept, layer)) for size, gain, kept in frontier]
            frontier = _undominated([*frontier, *(entry for entry in added if entry[0] <= free)])
    size, _, chosen = frontier[-1]
    if spare is not None and extra[spare] > 0 and size + extra[spare] <= free:
        chosen = (*chosen, spare)
    return sorted([*always, *chosen])


def count_within(softmax_bytes: Sequence[int], linear_bytes: Sequence[int], limit: int) -> int:
    """
    Returns how many layers may keep softmax attention within `limit`, whichever they are, for methods that choose
    layers for one k; a `ValueError` where layers differ in size. Arguments as in [`layers_within`].
    """
    extra, free = _room(softmax_bytes, linear_bytes, limit)
    if len(set(extra)) > 1:
        raise ValueError(
            f"softmax attention takes {min(extra):,} to {max(extra):,} bytes more than linear attention, by layer, so "
            "a limit on the cache says no number of layers; choose a method that scores each layer, such as "
            "zero-shot-linearise or ga-s2, or give k."
        )
    return len(extra) if extra[0] <= 0 else min(len(extra), free // extra[0])


def _room(softmax_bytes: Sequence[int], linear_bytes: Sequence[int], limit: int) -> tuple[list[int], int]:
    """What softmax attention takes beyond linear attention in each layer, and what `limit` leaves for it."""
    extra = [a - b for a, b in zip(softmax_bytes, linear_bytes, strict=True)]
    free = limit - sum(min(a, b) for a, b in zip(softmax_bytes, linear_bytes, strict=True))
    if free < 0:
        raise ValueError(
            f"a cache of {limit:,} bytes is less than the {limit - free:,} that all layers need at their smallest; "
            "raise the limit, or shorten the context."
        )
    return extra, free


def _in_order(scores: LayerScores, extra: list[int], free: int) -> list[int]:
    """Of layers that were chosen together those that fit, one after the other."""
    if scores.k is not None:
        raise ValueError(
            f"{scores.method} chose its layers for k={scores.k} alone, so none of them can be left out or added; use "
            f"its top({scores.k}), or scores of a method that goes by size."
        )
    chosen = []
    for layer in (layer for layer in scores.ranking if extra[layer] > 0 and layer not in scores.diverged):
        if extra[layer] <= free:
            if layer not in scores.order:
                raise ValueError(
                    f"{scores.method} chose {len(scores.order)} layers, and there is room for more; score with a "
                    "larger k."
                )
            chosen.append(layer)
            free -= extra[layer]
    return chosen


def _gains(scores: LayerScores) -> tuple[dict[int, float], int | None]:
    """Each layer's gain, and the layer that the others are compared with, where there is no better zero."""
    if scores.higher_is_better:
        return {score.layer: score.value for score in scores.scores}, None
    if not scores.tokens and not math.isnan(scores.baseline):
        return {score.layer: scores.baseline - score.value for score in scores.scores}, None
    known = [score for score in scores.scores if not score.diverged]
    worst = max(known, key=lambda score: (score.value, score.layer))
    return {score.layer: worst.value - score.value for score in known}, worst.layer


def _undominated(entries: list[tuple[int, float, tuple[int, ...]]]) -> list[tuple[int, float, tuple[int, ...]]]:
    """Of (bytes, gain, layers) those that no other one of at most as many bytes equals or betters, by bytes."""
    kept: list[tuple[int, float, tuple[int, ...]]] = []
    for entry in sorted(entries, key=lambda entry: (entry[0], -entry[1])):
        if not kept or entry[1] > kept[-1][1]:
            kept.append(entry)
    return kept


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
    if isinstance(selector, str):
        method_of(selector, "selector")
