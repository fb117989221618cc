"""Scores by evaluation alone, of one aligned student whose layers flip: one restored, one linear, or greedily."""

from functools import partial
from typing import Any

from .both_attentions import BothAttentions
from .job import Job
from .scores import LayerScore, LayerScores
from .scoring_method import ScoringMethod


LINEAR_MEASURE = "held-out KL with only this layer linear"


def zero_shot(job: Job) -> LayerScores:
    """
    GA-S2's question without its distillation: `KL(teacher || student)` on held-out rows of the aligned all-linear
    student with layer l restored to the teacher's softmax attention. One evaluation a layer, no training.

    Taylor-Calibrate's repository (arXiv 2606.16429) uses such a score by perplexity; its results there change with
    the initialisation of the mixers, so this one stands and falls with the alignment.
    """
    with BothAttentions(job.student, job.teacher) as both:
        return job.finish(single_layers(job, both))


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
    return job.finish(scores)


def _by_kl(job: Job, layer: int) -> LayerScore:
    return LayerScore.of_rows(layer, job.kl())


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
    return job.finish(scores, order=[*kept, *reversed(removed)])


ZERO_SHOT = ScoringMethod(
    name="zero-shot",
    score=zero_shot,
    value="`KL({l})`, aligned student",
    source="as GA-S2, untrained",
    measured="L E",
)
ZERO_SHOT_LINEARISE = ScoringMethod(
    name="zero-shot-linearise",
    score=zero_shot_linearise,
    value="`KL(all but l)`, aligned mixer",
    source="its reverse",
    measured="L E",
    measure=LINEAR_MEASURE,
    higher_is_better=True,
)
ZERO_SHOT_REMOVAL = ScoringMethod(
    name="zero-shot-removal",
    score=zero_shot_removal,
    value="`KL(S - l)`, greedily down from all softmax, aligned mixers",
    source="ours, backward elimination",
    measured="about L²/2 E",
    measure="held-out KL when the layer became linear, after those below it",
    higher_is_better=True,
    compares=True,
)
