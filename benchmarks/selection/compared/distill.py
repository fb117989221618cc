"""GA-S2's ablations in the paper: distillations with one layer linear, and the mean of both ranks."""

from hf_hybrid.trainers.scoring.distill import each_distilled, each_restored
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.scores import LayerScore, LayerScores
from hf_hybrid.trainers.scoring.scoring_method import ScoringMethod


def gr_s2(job: Job) -> LayerScores:
    """
    GR-S2, the paper's greedy removal (arXiv 2512.20569, ablations): from the student with softmax attention in every
    layer, give layer l its aligned mixer, distil, and measure the held-out KL. The layers that cost most keep softmax
    attention, the least harmful lose it. Its code is not released; this is the description's reading.
    """
    return job.finish(_each_linearised(job, "layer"))


def _each_linearised(job: Job, prefix: str) -> list[LayerScore]:
    def linearise(layer: int) -> None:
        job.student.set_full_attention_layers(set(job.all_layers) - {layer}, job.teacher)

    return each_distilled(job, linearise, prefix)


def avg_s2(job: Job) -> LayerScores:
    """
    AVG-S2 of arXiv 2512.20569's ablations: the mean of a layer's ranks in GA-S2 and GR-S2, 1 being the best. Both are
    run, for twice the cost.
    """
    added, removed = each_restored(job, "added"), _each_linearised(job, "removed")
    ranks = []
    for scores, sign in ((added, 1), (removed, -1)):
        ordered = sorted((s for s in scores if not s.diverged), key=lambda score: (sign * score.kl, score.layer))
        ranks.append({score.layer: rank for rank, score in enumerate(ordered, start=1)})
    averaged = []
    for a, b in zip(added, removed, strict=True):
        if a.diverged or b.diverged:
            averaged.append(LayerScore.of_diverged(a.layer, a.diverged or b.diverged))
            continue
        mean = (ranks[0][a.layer] + ranks[1][a.layer]) / 2
        averaged.append(LayerScore(a.layer, float("nan"), 0.0, a.tokens + b.tokens, a.seconds + b.seconds, value=mean))
    return job.finish(averaged)


GR_S2 = ScoringMethod(
    name="gr-s2",
    score=gr_s2,
    value="`KL'(all but l)`, a run for each layer",
    source="arXiv 2512.20569, ablations",
    trained="L R",
    measured="L E",
    measure="held-out KL with only this layer linear, distilled",
    higher_is_better=True,
    trains=True,
)
AVG_S2 = ScoringMethod(
    name="avg-s2",
    score=avg_s2,
    value="mean of the ranks in `ga-s2` and `gr-s2`",
    source="arXiv 2512.20569, ablations",
    trained="2 L R",
    measured="2 L E",
    measure="mean rank in ga-s2 and gr-s2",
    unit="rank",
    trains=True,
)
