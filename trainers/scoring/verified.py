"""Several ways to look at a set of layers, and a short distillation where they disagree."""

import heapq
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

from ..held_out import standard_error
from .both_attentions import BothAttentions
from .distill import alignment_distances
from .job import Job, NotFinite
from .scores import LayerScore, LayerScores
from .scoring_method import ScoringMethod
from .zero_shot import LINEAR_MEASURE, single_layers


Proposal = Literal["zero-shot-linearise", "lazy-removal", "ga-s1"]
PROPOSALS: tuple[Proposal, ...] = get_args(Proposal)


def verified(job: Job, *, proposals: Sequence[Proposal] = PROPOSALS) -> LayerScores:
    """
    Sets of k layers are proposed without training, and where they differ each is distilled: the one whose student ends
    with the lowest held-out KL is taken. Ours. At most three distillations of `tokens_per_layer` take the place of
    GA-S2's L, and none where all agree.

    The proposals err in different places. [`zero_shot_linearise`] asks what one linear layer costs the teacher: where
    two layers do the same, each alone seems dispensable. Greedy removal sees that once one of them is linear, but is
    misled by errors of mixers that add up and that a distillation would mend. Both overrate layers of which a
    distilled linear layer does the work, which matters most where few are kept; [`ga_s1`], how far an aligned mixer
    stays from its softmax, does not, but sees no layer that only helps together with another.

    The removal starts from the measurements of the first and measures a layer again only when it is next to go (lazy
    evaluation, Minoux 1978), about L evaluations more; that is exact where a loss only grows as other layers become
    linear.

    Args:
        proposals (`Sequence[str]`): of `"zero-shot-linearise"`, `"lazy-removal"` and `"ga-s1"`, which to compare.
    """
    k = job.wanted
    with BothAttentions(job.student, job.teacher) as both:
        scores = single_layers(job, both, linear=True)
        found = {"zero-shot-linearise": _largest(scores, k)}
        if "lazy-removal" in proposals:
            found["lazy-removal"] = _lazy_removal(job, both, scores, k)
    if "ga-s1" in proposals:
        found["ga-s1"] = _largest(alignment_distances(job), k)
    by_set: dict[tuple[int, ...], list[str]] = {}
    for name in proposals:
        by_set.setdefault(tuple(found[name]), []).append(name)
    verdicts = _distilled(job, by_set) if len(by_set) > 1 else []
    chosen = verdicts[0]["layers"] if verdicts else list(next(iter(by_set)))
    order = sorted(chosen, key=lambda layer: (-scores[layer].value, layer))
    options = {"proposals": {name: found[name] for name in proposals}, "distilled": verdicts}
    return job.finish(scores, order=order, k=k, options=options, notes=[_note(chosen, verdicts)])


def _largest(scores: list[LayerScore], k: int) -> list[int]:
    return sorted(score.layer for score in sorted(scores, key=lambda score: (-score.value, score.layer))[:k])


def _note(chosen: list[int], verdicts: list[dict[str, Any]]) -> str:
    if not verdicts:
        return f"all proposals are {chosen}, so nothing was distilled"
    verdicts = [verdict for verdict in verdicts if "diverged" not in verdict]
    lines = [f"{v['layers']} ({', '.join(v['by'])}) {v['kl']:.4f} ± {v['sem']:.4f}" for v in verdicts]
    if len(lines) == 1:
        return f"KL of the only proposal that did not diverge, distilled: {lines[0]}"
    ahead = [b - a for a, b in zip(*(v["per_sequence"] for v in verdicts[:2]), strict=True)]
    lead = f"the first leads the second by {sum(ahead) / len(ahead):.4f} ± {standard_error(ahead):.4f} row by row"
    return f"KL of the proposals, distilled: {'; '.join(lines)}; {lead}"


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
    both.keep(set(job.all_layers) - set(linear))
    return job.kl()


def _distilled(job: Job, by_set: dict[tuple[int, ...], list[str]]) -> list[dict[str, Any]]:
    """Held-out KL of each set after a distillation from the aligned weights on the same batches, the lowest first."""
    verdicts: list[dict[str, Any]] = []
    with job.restored_afterwards() as aligned:
        for layers, names in by_set.items():
            name = f"distilled_{len(verdicts)}"

            def work(layers: tuple[int, ...] = layers, name: str = name) -> list[float] | str:
                job.part = (len(verdicts), len(by_set))
                job.student.set_full_attention_layers(list(layers), job.teacher)
                try:
                    job.distil(name)
                    return job.kl()
                except NotFinite as error:
                    return error.reason

            try:
                rows = job.once(name, work)
            finally:
                job.reset(aligned)
            if isinstance(rows, str):
                job.note_diverged(f"the set {list(layers)} ({', '.join(names)})", rows, name)
                about: dict[str, Any] = {"kl": math.nan, "diverged": rows}
            else:
                about = {"kl": sum(rows) / len(rows), "sem": standard_error(rows), "per_sequence": rows}
            verdicts.append({"by": names, "layers": list(layers), **about})
            shown = about.get("diverged", f"KL {about['kl']:.4f}")
            job.say(len(verdicts), len(by_set), f"softmax in {list(layers)}, distilled: {shown}")
    if all("diverged" in verdict for verdict in verdicts):
        raise ValueError(f"all sets that were proposed diverged, which decides nothing. {' '.join(job.notes)}")
    return sorted(verdicts, key=lambda verdict: math.inf if "diverged" in verdict else verdict["kl"])


VERIFIED = ScoringMethod(
    name="verified",
    score=verified,
    value="`KL(all but l)`, aligned mixer; the set is that of `zero-shot-linearise`, of greedy removal or of `ga-s1`, "
    "whichever distils best",
    source="ours",
    trained="0, or 2 to 3 R where they differ",
    measured="about 2 L E",
    measure=LINEAR_MEASURE,
    higher_is_better=True,
    trains=True,
    needs_k=True,
    among_all=True,
)
