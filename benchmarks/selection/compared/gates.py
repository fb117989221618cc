"""Scores from gates between the two kinds of attention: `U = U_linear + g (U_softmax - U_linear)` in every layer."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from hf_hybrid.trainers.distillation import DistillationTrainer, kl_of_batch
from hf_hybrid.trainers.losses import masked_mean
from hf_hybrid.trainers.modes import evaluating
from hf_hybrid.trainers.scoring.both_attentions import BothAttentions
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.scores import LayerScore, LayerScores
from hf_hybrid.trainers.scoring.scoring_method import Range, ScoringMethod


@contextlib.contextmanager
def gated(both: BothAttentions, gates: Any) -> Iterator[None]:
    """
    Mixes each layer's attention outputs by `gates()[layer]`, which broadcasts to `[B, T, H]`: 0 is linear attention,
    1 is softmax attention. The student must be linear in every layer.
    """

    def mix(layer: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, dict):  # what a mixer is told beside the teacher's mask, see `hand_over`
                kwargs = {**kwargs, "attention_mask": mask["attention_mask"]}
            restored = both.softmax[layer](*args, **kwargs)[0]
            return (output[0] + gates()[layer] * (restored - output[0]), *output[1:])

        return hook

    handles = [attention.register_forward_hook(mix(i), with_kwargs=True) for i, attention in enumerate(both.linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def path_gradient(
    job: Job, *, points: Annotated[int, Range(1)] = 4, until: Annotated[float, Range(0, 1)] = 1.0
) -> LayerScores:
    """
    How much each layer takes part in the fall of the KL on the way from the all-linear student to the teacher's
    attention everywhere, all gates rising together: `phi_l = - integral over t from 0 to 1 of dKL/dg_l at g = t`, by
    Gauss-Legendre quadrature. The scores of all layers add up to the whole fall (Aumann and Shapley 1974; integrated
    gradients, arXiv 1703.01365, here over layers). Ours; `points` forward and backward passes in all, no training.

    Args:
        points (`int`): where on the way the gradient is taken.
        until (`float`): where the way ends; 0 takes the gradient at the all-linear student alone, the first term of
            the KL's Taylor series.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points if until else 1)
    places = [(until * (x + 1) / 2, w / 2 * (until or 1.0)) for x, w in zip(nodes, weights, strict=True)]

    def of_batch(index: int, batch: dict[str, torch.Tensor]) -> list[list[float]]:
        count, mask = len(batch["input_ids"]), batch.get("attention_mask")
        total = torch.zeros(count, job.num_layers, dtype=torch.float64)
        reference = job.held_out.reference(index, batch)
        for place, weight in places:
            at = torch.full((job.num_layers, count, 1, 1), place, device=job.teacher.device, dtype=job.student.dtype)
            at.requires_grad_(True)
            with torch.enable_grad(), gated(both, lambda at=at: at):
                kl = kl_of_batch(job.student, job.teacher, batch, job.precision, reference=reference)
                rows = [masked_mean(row, None if mask is None else mask[i]) for i, row in enumerate(kl)]
                (slope,) = torch.autograd.grad(torch.stack(rows).sum(), at)
            total -= weight * slope[..., 0, 0].T.double().cpu()
        return total.tolist()

    def work() -> list[list[float]]:
        job.tokens_forward_backward += len(places) * job.held_out.tokens
        trainable = [p for p in job.student.parameters() if p.requires_grad]
        with evaluating(job.student), _frozen(trainable):
            return job.held_out.measure(of_batch)

    with BothAttentions(job.student, job.teacher) as both:
        for attention in both.softmax:
            attention.eval().requires_grad_(False)
        rows = list(zip(*job.once("gradients", work), strict=True))
    scores = [LayerScore.of_rows(layer, list(rows[layer]), is_kl=False) for layer in job.layers]
    for score in scores:
        job.report(score)
    return job.finish(scores, options={"points": points, "until": until})


def gates(
    job: Job,
    *,
    learning_rate: Annotated[float, Range(0)] = 0.05,
    penalty: Annotated[float, Range(0)] = 1.0,
    ramp: Annotated[float, Range(0, 1)] = 0.5,
) -> LayerScores:
    """
    One learnable gate a layer, `g_l = sigmoid(a_l)`, between the frozen softmax and linear branches, all learned
    together in one run: `KL(teacher || student) + penalty KL_0 max(0, sum_l g_l / k - 1)`, KL_0 being that of the
    all-linear student. The k largest gates keep softmax attention. After FlashMorph (arXiv 2606.30562), whose code is
    not released: it learns on synthetic retrieval, this on the training rows, and the form of the penalty is ours.

    Args:
        learning_rate (`float`): of the gates, which start at 1/2.
        penalty (`float`): weight of the budget.
        ramp (`float`): share of the steps over which the penalty rises from 0 to its weight.
    """
    k = job.wanted
    weight = penalty * job.baseline

    def work() -> list[float]:
        values = nn.Parameter(torch.zeros(job.num_layers, device=job.teacher.device))
        job.student.register_parameter("softmax_gates", values)
        trained: dict[str, Any] = {"learning_rate": learning_rate, "mixer_learning_rate": None}

        def kind(**options: Any) -> DistillationTrainer:
            trainer = _GateTrainer(**options)
            trainer.budget, trainer.weight, trainer.ramp = k, weight, ramp
            return trainer

        frozen = [p for p in job.student.parameters() if p.requires_grad and p is not values]
        try:
            with _frozen(frozen), gated(both, lambda: torch.sigmoid(job.student.softmax_gates)):
                job.distil("gates", kind=kind, **trained)
        finally:
            del job.student.softmax_gates
        return torch.sigmoid(values).tolist()

    with job.restored_afterwards(), BothAttentions(job.student, job.teacher) as both:
        for attention in both.softmax:
            attention.requires_grad_(False)
        found = job.once("gates", work)
    scores = [LayerScore(layer, float("nan"), 0.0, 0, 0.0, value=found[layer]) for layer in job.layers]
    for score in scores:
        job.report(score)
    order = sorted(job.layers, key=lambda layer: (-found[layer], layer))[:k]
    options = {"learning_rate": learning_rate, "penalty": penalty, "ramp": ramp}
    return job.finish(scores, order=order, k=k, options=options)


class _GateTrainer(DistillationTrainer):
    """Adds the price of the gates that are open beyond the budget."""

    budget: int
    weight: float
    ramp: float

    def student_loss(self, student: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        done = (self.state.global_step + 1) / self.state.max_steps
        rising = min(1.0, done / self.ramp) if self.ramp else 1.0
        excess = torch.sigmoid(student.softmax_gates).sum() / self.budget - 1
        return super().student_loss(student, inputs) + rising * self.weight * excess.clamp(min=0)


@contextlib.contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Without gradients for `parameters`, which had them."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


GATES = ScoringMethod(
    name="gates",
    score=gates,
    value="`g_l` minimising `KL + w KL_0 max(0, sum g / K - 1)`, both branches frozen",
    source="after FlashMorph, arXiv 2606.30562",
    trained="R",
    measure="learned gate, 1 for softmax attention",
    unit="0 to 1",
    higher_is_better=True,
    trains=True,
    needs_k=True,
    least_k=1,
    among_all=True,
    keeps_student=True,
)
PATH_GRADIENT = ScoringMethod(
    name="path-gradient",
    score=path_gradient,
    value="`- integral of dKL/dg_l` from all linear to all softmax",
    source="integrated gradients, arXiv 1703.01365, over layers",
    trained="4 E",
    measure="share in the fall of the KL from all linear to all softmax",
    higher_is_better=True,
)
