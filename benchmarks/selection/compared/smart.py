"""Zebra-Llama's constrained choice by the sensitivity of single layers."""

import math
from collections.abc import Sequence

from hf_hybrid.trainers.scoring.both_attentions import BothAttentions
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.rules import check_count
from hf_hybrid.trainers.scoring.scores import LayerScores
from hf_hybrid.trainers.scoring.scoring_method import ScoringMethod
from hf_hybrid.trainers.scoring.zero_shot import single_layers


def smart(job: Job) -> LayerScores:
    """
    Zebra-Llama's SMART (arXiv 2505.17272): the sensitivity of a layer is the fall of the KL when it alone is restored
    in the aligned all-linear student; of the nearly uniform sets, the one with the largest total is taken. The rule is
    the reconstruction in [`smart_layers`].
    """
    k = job.wanted
    with BothAttentions(job.student, job.teacher) as both:
        scores = single_layers(job, both)
    chosen = smart_layers([job.baseline - score.value for score in scores], k)
    return job.finish(scores, order=chosen, k=k)


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


SMART = ScoringMethod(
    name="smart",
    score=smart,
    value="`KL({}) - KL({l})`, summed over nearly uniform sets",
    source="Zebra-Llama, arXiv 2505.17272, reconstructed",
    measured="L E",
    needs_k=True,
    among_all=True,
)
