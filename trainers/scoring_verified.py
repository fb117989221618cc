"""Two ways to look at a set of layers, and a short distillation where they disagree."""

import heapq
from collections.abc import Iterable
from functools import partial
from typing import Any

from .both_attentions import BothAttentions
from .held_out import standard_error
from .scores import LayerScore, LayerScores
from .scoring_job import Job


def verified(job: Job) -> LayerScores:
    """
    Two sets of k layers are proposed without training, and where they differ both are distilled: the one whose student
    ends with the lower held-out KL is taken. Ours.

    The first is [`zero_shot_linearise`]'s, which errs where two layers do the same: each alone seems dispensable. The
    second comes from greedy removal, which sees that once one of them is linear, but which is misled by errors of
    mixers that add up and that a distillation would mend. It starts from the first one's measurements and measures a
    layer again only when it is next to go (lazy evaluation, Minoux 1978), about L evaluations more; that is exact
    where a loss only grows as other layers become linear. Two distillations of `tokens_per_layer` at the most take
    the place of GA-S2's L.
    """
    k = job.needs_k("verified")
    if list(job.layers) != list(job.all_layers):
        raise ValueError("method='verified' chooses among all layers; leave out layers=.")
    scores = []
    with BothAttentions(job.student, job.teacher) as both:
        for layer in job.layers:
            scores.append(job.score(layer, partial(_loss, job, both, [layer])))
            job.say(len(scores), job.num_layers, f"layer {layer} linear: KL {scores[-1].value:.4f}")
        alone = sorted(scores, key=lambda score: (-score.value, score.layer))
        proposals = {"zero-shot-linearise": sorted(score.layer for score in alone[:k])}
        proposals["lazy removal"] = _lazy_removal(job, both, scores, k)
    chosen, verdicts = proposals["zero-shot-linearise"], []
    if proposals["lazy removal"] != chosen:
        verdicts = sorted(_distilled(job, proposals), key=lambda verdict: verdict["kl"])
        chosen = verdicts[0]["layers"]
    order = [score.layer for score in alone if score.layer in chosen]
    measure = "held-out KL with only this layer linear"
    options = {"proposals": proposals, "distilled": verdicts}
    about: dict[str, Any] = {"measure": measure, "higher_is_better": True, "notes": [_note(chosen, verdicts)]}
    return job.finish("verified", scores, order=order, k=k, options=options, **about)


def _note(chosen: list[int], verdicts: list[dict[str, Any]]) -> str:
    if not verdicts:
        return f"both proposals are {chosen}, so nothing was distilled"
    taken, other = (f"{v['layers']} ({v['by']}), KL {v['kl']:.4f} ± {v['sem']:.4f}" for v in verdicts)
    ahead = [b - a for a, b in zip(*(v["per_sequence"] for v in verdicts), strict=True)]
    lead = f"lower by {sum(ahead) / len(ahead):.4f} ± {standard_error(ahead):.4f} row by row"
    return f"distilled: {taken}, against {other}; {lead}"


def _loss(job: Job, both: BothAttentions, linear: Iterable[int]) -> LayerScore:
    both.keep(set(job.all_layers) - set(linear))
    *_, last = linear
    return LayerScore.of_rows(last, job.kl())


def _lazy_removal(job: Job, both: BothAttentions, scores: list[LayerScore], k: int) -> list[int]:
    """The `k` layers that greedy removal leaves, from what each layer costs alone."""
    removed: list[int] = []
    loss = 0.0
    # By cost, the last layer first of equal ones, as zero-shot-removal; then after how many removals it was measured.
    heap = [(score.value, -score.layer, 0) for score in scores]
    heapq.heapify(heap)
    while job.num_layers - len(removed) > k:
        cost, negative, measured = heapq.heappop(heap)
        if measured < len(removed):
            # What has been removed follows from the results kept before, so that a second call finds the same names.
            name = f"removal_{len(removed):03d}_{-negative:03d}"
            rows = job.once(name, partial(_rows, job, both, [*removed, -negative]))
            heapq.heappush(heap, (sum(rows) / len(rows) - loss, negative, len(removed)))
            continue
        removed.append(-negative)
        loss += cost
        job.say(len(removed), job.num_layers - k, f"{job.num_layers - len(removed)} softmax layers left")
    return [layer for layer in job.layers if layer not in removed]


def _rows(job: Job, both: BothAttentions, linear: list[int]) -> list[float]:
    return _loss(job, both, linear).per_sequence


def _distilled(job: Job, proposals: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Held-out KL of each proposed set after a distillation from the aligned weights on the same batches."""
    verdicts: list[dict[str, Any]] = []
    with job.restored_afterwards() as aligned:
        for name, layers in proposals.items():

            def work(layers: list[int] = layers) -> list[float]:
                job.student.set_full_attention_layers(layers, job.teacher)
                job.distil()
                return job.kl()

            try:
                rows = job.once(f"distilled_{len(verdicts)}", work)
            finally:
                job.reset(aligned)
            kl = sum(rows) / len(rows)
            about = {"kl": kl, "sem": standard_error(rows), "per_sequence": rows}
            verdicts.append({"by": name, "layers": layers, **about})
            job.say(len(verdicts), len(proposals), f"softmax in {layers}, distilled: KL {kl:.4f}")
    return verdicts
