"""Scores that look at the teacher alone: what it loses without one layer's attention, or how little a layer does."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from ..distillation import kl_of_batch
from ..held_out import HeldOut, row_means
from ..modes import evaluating
from ..next_token import predict, predicted_tokens
from ..precision import Precision
from .job import Job
from .scores import LayerScore, LayerScores
from .scoring_method import ScoringMethod


Rows = list[float]


@contextlib.contextmanager
def without_attention(model: Any, layer: int) -> Iterator[None]:
    """The model with layer `layer`'s attention output set to zero."""

    def zero(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    handle = decoder_layers(model)[layer].self_attn.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def ablation_kl(job: Job) -> LayerScores:
    """
    `KL(teacher || teacher without layer l's attention)` on held-out rows; the layers that are missed most keep
    softmax. The output-distribution form of the ablations among arXiv 2512.20569's baselines.
    """

    def of_batch(batch: dict[str, torch.Tensor], reference: torch.Tensor) -> Rows:
        kl = kl_of_batch(job.teacher, job.teacher, batch, job.precision, reference=reference)
        return row_means(kl, batch.get("attention_mask"))

    return ablate(job, of_batch)


def ablate(job: Job, of_batch: Any, *, relative: bool = False, **about: Any) -> LayerScores:
    """
    Scores every layer by `of_batch(batch, reference)`, one number a row, of the teacher without that layer's
    attention; `reference` are the intact teacher's final hidden states. `relative`: minus the intact teacher's.
    """

    def intact() -> Rows:
        job.tokens_forward += job.held_out.tokens
        with evaluating(job.teacher):
            return job.held_out.measure(lambda index, batch: of_batch(batch))

    whole = job.once("intact", intact) if relative else [0.0] * job.held_out.rows
    scores = []
    for layer in job.layers:

        def ablated(index: int, batch: dict[str, torch.Tensor], layer: int = layer) -> Rows:
            reference = job.held_out.reference(index, batch)
            with without_attention(job.teacher, layer), evaluating(job.teacher):
                return of_batch(batch, reference)

        def work(ablated: Any = ablated, layer: int = layer) -> LayerScore:
            rows = job.held_out.measure(ablated)
            job.tokens_forward += job.held_out.tokens
            return LayerScore.of_rows(layer, [a - b for a, b in zip(rows, whole, strict=True)], is_kl=False)

        scores.append(job.score(layer, work))
        job.say(len(scores), len(job.layers), f"layer {layer}: {scores[-1]}")
    return job.finish(scores, **about)


def token_nll(held_out: HeldOut, model: Any) -> Rows:
    """[`nll_of_batch`] of all held-out rows."""
    with evaluating(model):
        return held_out.measure(lambda index, batch: nll_of_batch(model, batch, held_out.precision))


def nll_of_batch(model: Any, batch: dict[str, torch.Tensor], precision: Precision) -> Rows:
    """Mean negative log likelihood of each row's predicted tokens, nats per token."""
    return row_means(predict(model, batch, precision)[0], predicted_tokens(batch))


ABLATION_KL = ScoringMethod(
    name="ablation-kl",
    score=ablation_kl,
    value="`KL(teacher, teacher without l)`",
    source="2512.20569's baselines",
    measured="L E",
    measure="KL of the teacher without this layer's attention",
    higher_is_better=True,
    needs_student=False,
)
