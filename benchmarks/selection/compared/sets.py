"""Sets built greedily from one student, aligned, distilled once, or shared by all hybrids in one run."""

import random
from functools import partial
from typing import Annotated, Any, Literal

from transformers import TrainerCallback

from hf_hybrid.trainers.scoring.both_attentions import BothAttentions
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.scores import KL_MEASURE, LayerScore, LayerScores
from hf_hybrid.trainers.scoring.scoring_method import Range, ScoringMethod
from hf_hybrid.trainers.scoring.zero_shot import single_layers


def zero_shot_greedy(job: Job, *, swaps: Annotated[int, Range(0)] = 0) -> LayerScores:
    """
    Greedy addition with [`zero_shot`]'s measure: from the aligned all-linear student, restore the layer that leaves
    the lowest held-out KL, keep it, and go on until k are restored: `l_t = argmin_l KL(S_{t-1} + l)`. Unlike the
    paper's "greedy addition" it measures sets, so it sees that two layers do the same or need one another.

    Args:
        swaps (`int`): afterwards exchange, up to this many times, one chosen layer for one that is not, whichever
            exchange lowers the KL most; it ends where none does.
    """
    with BothAttentions(job.student, job.teacher) as both:
        return greedy(job, both, swaps, {"swaps": swaps})


def distilled_greedy(job: Job, *, swaps: Annotated[int, Range(0)] = 0) -> LayerScores:
    """
    The all-linear student is distilled once (`tokens_per_layer` tokens), then as [`zero_shot_greedy`]. Ours: the
    short stage 2 that makes GA-S2's scores reliable, once for all layers and not once for each.

    Args:
        swaps (`int`): as there.
    """
    with job.restored_afterwards():
        once_distilled(job)
        with BothAttentions(job.student, job.teacher) as both:
            return greedy(job, both, swaps, {"swaps": swaps})


def once_distilled(job: Job) -> None:
    """Distils the student as it is; in a later call with the same folder, loads what it became."""
    job.trained_once("distilled", partial(job.distil, "distilled"))


def shared(
    job: Job,
    *,
    train_softmax: bool = False,
    subset: Literal["sizes", "single"] = "sizes",
    max_size: Annotated[int, Range(1)] | None = None,
    select: Literal["greedy", "single"] = "greedy",
    swaps: Annotated[int, Range(0)] = 0,
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
            return job.finish(single_layers(job, both), options=options, measure=KL_MEASURE)
        return greedy(job, both, swaps, options)


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


def greedy(job: Job, both: BothAttentions, swaps: int, options: dict[str, Any]) -> LayerScores:
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

        rows = job.once(f"round_{number:03d}", one_round)
        found |= {int(layer): values for layer, values in rows.items()}
        order.append(min(rest, key=lambda layer: (sum(found[layer]), layer)))
        job.report(LayerScore.of_rows(order[-1], found[order[-1]]))
    nested = list(order)
    for number in range(swaps):
        exchange = job.once(f"swap_{number:03d}", partial(_best_swap, job, both, order))
        if exchange is None:
            break
        order = [layer for layer in order if layer != exchange["out"]] + [exchange["in"]]
        found[exchange["in"]] = exchange["rows"]
    scores = [LayerScore.of_rows(layer, rows) for layer, rows in found.items()]
    return job.finish(scores, order=order, k=None if order == nested else k, options=options)


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


_GREEDY: dict[str, Any] = {
    "measure": "held-out KL with the layer restored after those before it",
    "needs_k": True,
    "least_k": 1,
}
SHARED = ScoringMethod(
    name="shared",
    score=shared,
    value="`KL(S + l)`, greedily, after one run in which each step restores a random subset",
    source="once-for-all networks, arXiv 1908.09791; PostNAS, 2508.15884",
    trained="R",
    measured="about K L E",
    trains=True,
    keeps_student=True,
    asks_k=lambda options: options.get("select") != "single",
    follows_k=lambda options: options.get("max_size") is None,  # the largest subset follows from it
    **_GREEDY,
)
DISTILLED_GREEDY = ScoringMethod(
    name="distilled-greedy",
    score=distilled_greedy,
    value="`KL(S + l)`, greedily, after one run of the all-linear student",
    source="ours",
    trained="R",
    measured="about K L E",
    trains=True,
    keeps_student=True,
    **_GREEDY,
)
ZERO_SHOT_GREEDY = ScoringMethod(
    name="zero-shot-greedy",
    score=zero_shot_greedy,
    value="`KL(S + l)`, greedily, aligned student",
    source="ours",
    measured="about K L E",
    **_GREEDY,
)
