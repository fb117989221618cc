"""Scores by evaluation alone, from the teacher's side: layers become linear one after the other."""

from typing import Any

from .both_attentions import BothAttentions
from .scores import LayerScore, LayerScores
from .scoring_job import Job


def zero_shot_removal(job: Job) -> LayerScores:
    """
    Greedy removal (backward elimination): from softmax attention in every layer, make the layer linear whose aligned
    mixer leaves the lowest held-out KL, leave it so, and go on until one softmax layer is left: `S_{t+1} = S_t - l_t`,
    `l_t = argmin_l KL(S_t - l)`. The layers that went last are the ones to keep. Ours; `L (L + 1) / 2 - 1`
    evaluations, no training.

    Where two layers are worth little one without the other, as the two hops of a chained recall, no way up from the
    all-linear student finds the pair, while on the way down either loss shows. Where two layers do the same, one of
    them goes early.
    """
    if len(job.layers) < 2:
        raise ValueError("method='zero-shot-removal' ranks layers against one another; give it two or more.")
    kept, removed = list(job.layers), list[int]()
    found: dict[int, list[float]] = {}
    with BothAttentions(job.student, job.teacher) as both:
        while len(kept) > 1:

            def one_round(kept: list[int] = kept) -> dict[str, list[float]]:
                kls = {}
                for layer in kept:
                    both.keep(set(job.all_layers) - set(removed) - {layer})
                    kls[str(layer)] = job.kl()
                    job.say(len(kls), len(kept), f"{len(kept)} softmax layers left")
                return kls

            rows: dict[str, Any] = job.once(f"removal_{len(kept):03d}", one_round)
            found |= {int(layer): values for layer, values in rows.items()}
            removed.append(min(kept, key=lambda layer: (sum(found[layer]), -layer)))
            kept = [layer for layer in kept if layer != removed[-1]]
            job.report(LayerScore.of_rows(removed[-1], found[removed[-1]]))
    scores = [LayerScore.of_rows(layer, found[layer]) for layer in sorted(found)]
    measure = "held-out KL when the layer became linear, after those below it"
    order = [*kept, *reversed(removed)]
    return job.finish("zero-shot-removal", scores, order=order, measure=measure, higher_is_better=True)
