"""What the teacher loses without one layer's attention, by other measures than the KL, and how little a layer does."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import datasets
import torch

from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.trainers.distillation import final_hidden_states
from hf_hybrid.trainers.held_out import HeldOut, row_means
from hf_hybrid.trainers.losses import widen
from hf_hybrid.trainers.modes import evaluating
from hf_hybrid.trainers.next_token import predict
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.scores import LayerScore, LayerScores
from hf_hybrid.trainers.scoring.scoring_method import ScoringMethod
from hf_hybrid.trainers.scoring.teacher import Rows, ablate, nll_of_batch


def ablation_ppl(job: Job) -> LayerScores:
    """
    The rise of the teacher's negative log likelihood on held-out rows, in nats per token, without layer l's
    attention: the logarithm of the ratio of perplexities. Stands for LM-PPL of arXiv 2512.20569, whose definition and
    code are not published; bypassing a layer's attention is how independent runs read it.
    """

    def of_batch(batch: dict[str, torch.Tensor], reference: torch.Tensor | None = None) -> Rows:
        return nll_of_batch(job.teacher, batch, job.precision)

    return ablate(job, of_batch, relative=True)


def attention_mse(job: Job) -> LayerScores:
    """
    Mean squared change of the teacher's final hidden states when layer l's attention output is set to zero. Stands
    for ACT-MSE of arXiv 2512.20569, whose definition and code are not published: this is how we read the name. (The
    residual of the alignment, the other reading, is `ga-s1`.)
    """

    def of_batch(batch: dict[str, torch.Tensor], reference: torch.Tensor) -> Rows:
        change = widen(final_hidden_states(job.teacher, batch, job.precision)) - widen(reference)
        return row_means(change.square().mean(-1), batch.get("attention_mask"))

    return ablate(job, of_batch)


def ablation_recall(job: Job, *, task: Any = None, by: Literal["nll", "accuracy"] = "nll") -> LayerScores:
    """
    The AR family of arXiv 2512.20569's baselines: what zeroing layer l's attention in the teacher does to its answers
    in associative recall. The released code generates answers to a prompt in words; here the rows are token ids with
    marked answers, under teacher forcing, so that a base model can be scored too.

    Args:
        task: `(input_ids, answer_mask)`, `[rows, length]` each, as `hf_hybrid.synthetic.associative_recall` makes.
        by (`str`): `"nll"`, the rise of the negative log likelihood of the marked tokens in nats per answer, or
            `"accuracy"`, the rise of the share of them that are predicted wrong.
    """
    ids, answers = _checked_task(task)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    job.held_out = HeldOut(rows, job.teacher, job.args.per_device_eval_batch_size, job.precision, answers)

    def of_batch(batch: dict[str, torch.Tensor], reference: torch.Tensor | None = None) -> Rows:
        nll, right = predict(job.teacher, batch, job.precision)
        values = nll if by == "nll" else 1 - right.to(nll.dtype)
        return row_means(values, batch["answers"][:, 1:])

    what, unit = ("NLL of recalled values", "nats per answer") if by == "nll" else ("share of wrong recalls", "share")
    measure = f"rise of the {what} without this layer's attention"
    return ablate(job, of_batch, relative=True, measure=measure, unit=unit, options={"by": by})


def block_influence(job: Job) -> LayerScores:
    """
    `1 - cos(x, x')`, the mean over tokens, between the residual stream before and after layer l's attention in the
    teacher: a layer whose attention turns the stream little is taken to matter little. ShortGPT's block influence
    (arXiv 2403.03853, equation 1), of the attention alone and not of the whole block. One forward pass for all layers.
    """
    layers = decoder_layers(job.teacher)

    def of_batch(index: int, batch: dict[str, torch.Tensor]) -> list[list[float]]:
        with _streams(layers) as streams:
            final_hidden_states(job.teacher, batch, job.precision)
        mask = batch.get("attention_mask")
        turned = []
        for layer in job.all_layers:
            before, after = (widen(x) for x in streams[layer])
            turned.append(row_means(1 - torch.cosine_similarity(before, after, dim=-1), mask))
        return [list(row) for row in zip(*turned, strict=True)]

    def work() -> list[list[float]]:
        job.tokens_forward += job.held_out.tokens
        with evaluating(job.teacher):
            return job.held_out.measure(of_batch)

    # All layers whatever was asked for: a later call may ask for others, and finds this result.
    by_layer = list(zip(*job.once("influence", work), strict=True))
    scores = [LayerScore.of_rows(layer, list(by_layer[layer]), is_kl=False) for layer in job.layers]
    for score in scores:
        job.report(score)
    return job.finish(scores)


def _checked_task(task: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The task's tensors, or a `ValueError` that says what is wrong with them."""
    if task is None:
        raise ValueError(
            "method='ablation-recall' needs a task; pass options={'task': (input_ids, answer_mask)}, for example from "
            "hf_hybrid.synthetic.associative_recall."
        )
    ids, answers = task
    if ids.shape != answers.shape or ids.dim() != 2 or not answers.any(1).all() or answers[:, 0].any():
        raise ValueError(
            "the task's input_ids and answer_mask must be [rows, length], with at least one answer in each row and "
            f"none at its first token; they are {tuple(ids.shape)} and {tuple(answers.shape)}."
        )
    return ids, answers


@contextlib.contextmanager
def _streams(layers: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """
    The residual stream before and after each layer's attention, by layer, filled as the model runs.

    After it: what the first module behind the attention gets that is neither the attention's own input nor its output
    (a norm of the output comes before the sum in some families). Where there is none, attention and MLP work in
    parallel, and it is the sum of the two.
    """
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for i, layer in enumerate(layers):
        found: dict[str, torch.Tensor] = {}

        def first(args: tuple, kwargs: dict) -> Any:
            return args[0] if args else kwargs.get("hidden_states")

        def enter(module: Any, args: tuple, kwargs: dict, found: Any = found, first: Any = first) -> None:
            found.clear()
            found["before"] = first(args, kwargs)

        def attend(module: Any, args: tuple, kwargs: dict, out: Any, found: Any = found, first: Any = first) -> None:
            found["given"], found["output"] = first(args, kwargs), out[0]

        def follow(module: Any, args: tuple, kwargs: dict, found: Any = found, first: Any = first) -> None:
            x = first(args, kwargs)
            if "output" in found and "after" not in found and isinstance(x, torch.Tensor):
                known = (found["output"], found["given"])
                if x.shape == known[0].shape and not any(torch.equal(x, y) for y in known):
                    found["after"] = x

        def leave(module: Any, args: tuple, out: Any, found: Any = found, i: int = i) -> None:
            seen[i] = (found["before"], found.get("after", found["before"] + found["output"]))

        handles += [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.self_attn.register_forward_hook(attend, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]
        for child in layer.children():
            if child is not layer.self_attn:
                handles.append(child.register_forward_pre_hook(follow, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


_ALONE: dict[str, Any] = {"higher_is_better": True, "needs_student": False}
ABLATION_RECALL = ScoringMethod(
    name="ablation-recall",
    score=ablation_recall,
    value="rise of the NLL of recalled values without l",
    source="the AR family",
    measured="task",
    **_ALONE,
)
ABLATION_PPL = ScoringMethod(
    name="ablation-ppl",
    score=ablation_ppl,
    value="rise of the NLL without l",
    source="LM-PPL, our reading",
    measured="L E",
    measure="rise of the teacher's NLL without this layer's attention",
    **_ALONE,
)
ATTENTION_MSE = ScoringMethod(
    name="attention-mse",
    score=attention_mse,
    value="mean square change of the final hidden states without l",
    source="ACT-MSE, our reading",
    measured="L E",
    measure="change of the final hidden states without this layer's attention",
    unit="mean square",
    **_ALONE,
)
BLOCK_INFLUENCE = ScoringMethod(
    name="block-influence",
    score=block_influence,
    value="`1 - cos` of the stream before and after the attention",
    source="ShortGPT, arXiv 2403.03853",
    measured="E",
    measure="1 - cosine of the residual stream before and after the attention",
    unit="1 - cosine",
    **_ALONE,
)
