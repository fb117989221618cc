"""Scores with a short distillation for each layer: GA-S2 and the paper's ablations of it."""

from .scores import LayerScore, LayerScores
from .scoring_job import Job


def ga_s2(job: Job) -> LayerScores:
    """
    GA-S2 of arXiv 2512.20569, algorithm 1: from the aligned all-linear student, for each layer l, restore the
    teacher's attention in l, distil on the same batches in the same order, and measure `KL(teacher || student)` on
    the same held-out rows, `I(l) = -KL`. The paper's code ranks by training loss; this measures on held-out rows and
    reports the noise. One model is trained over and over, from one copy of the aligned weights in host memory.
    """
    scores = []
    with job.restored_afterwards() as aligned:
        for layer in job.layers:

            def work(layer: int = layer) -> LayerScore:
                job.student.set_full_attention_layers([layer], job.teacher)
                job.distil()
                return LayerScore.of_rows(layer, job.kl())

            scores.append(job.score(layer, work))
            job.reset(aligned)
    return job.finish("ga-s2", scores)
