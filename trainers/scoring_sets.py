"""Scores by evaluation alone: layers flipped in one student, aligned or distilled once, and sets built greedily."""

import random
from functools import partial
from typing import Any, Literal

from transformers import TrainerCallback

from .both_attentions import BothAttentions
from .scores import KL_MEASURE, LayerScore, LayerScores
from .scoring_job import Job
from .scoring_rules import smart_layers


LINEAR_MEASURE = "held-out KL with only this layer linear"


def zero_shot(job: Job) -> LayerScores:
    """
    GA-S2's question without its distillation: `KL(teacher || student)` on held-out rows of the aligned all-linear
    student with layer l restored to the teacher's softmax attention. One evaluation a layer, no training.

    Taylor-Calibrate's repository (arXiv 2606.16429) uses such a score by perplexity; its results there change with
    the initialisation of the mixers, so this one stands and falls with the alignment.
    """
    with BothAttentions(job.student, job.teacher) as both:
        return job.finish("zero-shot", single_layers(job, both))


def single_layers(job: Job, both: BothAttentions, linear: bool = False) -> list[LayerScore]:
    """Each layer alone restored to softmax, or (`linear`) alone linear, by held-out KL."""
    scores = []
    for layer in job.layers:
        both.keep(set(job.all_layers) - {layer} if linear else [layer])
        scores.append(job.score(layer, partial(_by_kl, job, layer)))
        job.say(len(scores), len(job.layers), f"layer {layer}: KL {scores[-1]}")
    return scores


def zero_shot_linearise(job: Job) -> LayerScores:
    """
    The reverse of [`zero_shot`]: `KL(teacher || student)` of the teacher with the aligned mixer of layer l in the
    place of its attention, all other layers softmax. The layers that cost most keep softmax. No training.
    """
    with BothAttentions(job.student, job.teacher) as both:
        scores = single_layers(job, both, linear=True)
    return job.finish("zero-shot-linearise", scores, measure=LINEAR_MEASURE, higher_is_better=True)


def zero_shot_greedy(job: Job, *, swaps: int = 0) -> LayerScores:
    """
    Greedy addition with [`zero_shot`]'s measure: from the aligned all-linear student, restore the layer that leaves
    the lowest held-out KL, keep it, and go on until k are restored: `l_t = argmin_l KL(S_{t-1} + l)`. Unlike the
    paper's "greedy addition" it measures sets, so it sees that two layers do the same or need one another.

    Args:
        swaps (`int`): afterwards exchange, up to this many times, one chosen layer for one that is not, whichever
            exchange lowers the KL most; it ends where none does.
    """
    with BothAttentions(job.student, job.teacher) as both:
        return greedy(job, both, "zero-shot-greedy", swaps, {"swaps": swaps})


def distilled_greedy(job: Job, *, swaps: int = 0) -> LayerScores:
    """
    The all-linear student is distilled once (`tokens_per_layer` tokens), then as [`zero_shot_greedy`]. Ours: the
    short stage 2 that makes GA-S2's scores reliable, once for all layers and not once for each.

    Args:
        swaps (`int`): as there.
    """
    with job.restored_afterwards():
        once_distilled(job)
        with BothAttentions(job.student, job.teacher) as both:
            return greedy(job, both, "distilled-greedy", swaps, {"swaps": swaps})


def once_distilled(job: Job) -> None:
    """Distils the student as it is; in a later call with the same folder, loads what it became."""
    job.trained_once("distilled", partial(job.distil, "distilled"))


def shared(
    job: Job,
    *,
    train_softmax: bool = False,
    subset: Literal["sizes", "single"] = "sizes",
    max_size: int | None = None,
    select: Literal["greedy", "single"] = "greedy",
    swaps: int = 0,
) -> LayerScores:
    """
    One run in the place of GA-S2's L. The student's mixers and the teacher's softmax attention live side by side; each
    optimizer step restores a random subset of the layers and distils what results, so that all weights are shared by
    all hybrids, as in a once-for-all network (arXiv 1908.09791; PostNAS, arXiv 2508.15884, trains one to place softmax
    attention). Afterwards hybrids are compared by their held-out KL, without further training.

    Args:
        train_softmax (`bool`): whether the restored attention trains too, or stays the teacher's.
        subset (`str`): `"sizes"` restores a subset whose size is drawn uniformly from 0 to `max_size`, `"single"` one
            layer.
        max_size (`int`, *optional*): by default twice `k`, or half of the layers where there is no `k`.
        select (`str`): `"greedy"` adds layers one by one, as [`zero_shot_greedy`]; `"single"` scores each alone.
        swaps (`int`): of the greedy choice, as there.
    """
    largest = max_size
    if largest is None:
        largest = min(len(job.layers), 2 * job.k if job.k else (len(job.layers) + 1) // 2)
    if not 1 <= largest <= len(job.layers):
        raise ValueError(f"max_size={max_size} layers cannot be restored; pass 1..{len(job.layers)}.")
    options = {"train_softmax": train_softmax, "subset": subset, "max_size": largest, "select": select, "swaps": swaps}
    with job.restored_afterwards(), BothAttentions(job.student, job.teacher) as both:
        both.register(True)
        for attention in both.softmax:
            attention.requires_grad_(train_softmax)
        draw = _RandomSubset(both, job.layers, None if subset == "single" else largest)
        many: dict[str, Any] = {"callbacks": [draw], "ddp_find_unused_parameters": True}
        job.trained_once("shared", partial(job.distil, "shared", **many))
        both.register(False)
        if select == "single":
            return job.finish("shared", single_layers(job, both), options=options)
        return greedy(job, both, "shared", swaps, options)


class _RandomSubset(TrainerCallback):
    """Restores other layers in each optimizer step, drawn with the seed and the step alone, so that runs resume."""

    def __init__(self, both: BothAttentions, layers: list[int], max_size: int | None) -> None:
        self.both, self.layers, self.max_size = both, layers, max_size

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        draw = random.Random(f"{args.seed}/{state.global_step}")
        size = 1 if self.max_size is None else draw.randint(0, self.max_size)
        self.both.keep(draw.sample(self.layers, size))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.both.keep([])  # a checkpoint is written next, and its names say which attention is which


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
    return job.finish("smart", scores, order=chosen, k=k)


def greedy(
    job: Job, both: BothAttentions, method: str, swaps: int, options: dict[str, Any], prefix: str = ""
) -> LayerScores:
    """Greedy addition by held-out KL; a layer's score is the KL of the set in the round that took it, or the last."""
    k, order = job.wanted, list[int]()
    found: dict[int, list[float]] = {}
    for number in range(k):
        rest = [layer for layer in job.layers if layer not in order]

        def one_round(rest: list[int] = rest, number: int = number) -> dict[str, list[float]]:
            kls = {}
            for layer in rest:
                both.keep([*order, layer])
                kls[str(layer)] = job.kl()
                job.say(len(kls), len(rest), f"layer {number + 1} of {k}")
            return kls

        rows = job.once(f"{prefix}round_{number:03d}", one_round)
        found |= {int(layer): values for layer, values in rows.items()}
        order.append(min(rest, key=lambda layer: (sum(found[layer]), layer)))
        job.report(LayerScore.of_rows(order[-1], found[order[-1]]))
    nested = list(order)
    for number in range(swaps):
        exchange = job.once(f"{prefix}swap_{number:03d}", partial(_best_swap, job, both, order))
        if exchange is None:
            break
        order = [layer for layer in order if layer != exchange["out"]] + [exchange["in"]]
        found[exchange["in"]] = exchange["rows"]
    scores = [LayerScore.of_rows(layer, rows) for layer, rows in found.items()]
    measure = "held-out KL with the layer restored after those before it"
    only = None if order == nested else k
    return job.finish(method, scores, order=order, k=only, measure=measure if k else KL_MEASURE, options=options)


def _by_kl(job: Job, layer: int) -> LayerScore:
    return LayerScore.of_rows(layer, job.kl())


def _best_swap(job: Job, both: BothAttentions, order: list[int]) -> dict[str, Any] | None:
    """The exchange of one chosen layer for another that lowers the held-out KL most, or None where none does."""
    both.keep(order)
    best, exchange = sum(job.kl()), None
    others = [layer for layer in job.layers if layer not in order]
    for done, out in enumerate(order, start=1):
        for layer in others:
            both.keep([*(i for i in order if i != out), layer])
            rows = job.kl()
            if sum(rows) < best:
                best, exchange = sum(rows), {"out": out, "in": layer, "rows": rows}
        job.say(done, len(order), "exchanging layers")
    return exchange
