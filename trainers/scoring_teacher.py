"""Scores that look at the teacher alone: what it loses without one layer's attention, or how little a layer does."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import datasets
import torch

from ..modeling.modeling_hybrid import decoder_layers
from .distillation import final_hidden_states, kl_of_batch
from .held_out import HeldOut, row_means
from .losses import LogitFunction, logit_function, tokens_per_chunk, widen
from .modes import evaluating
from .precision import Precision
from .scores import LayerScore, LayerScores
from .scoring_job import Job
from .teacher_trainer import model_inputs


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

    about = {"measure": "KL of the teacher without this layer's attention", "unit": "nats per token"}
    return _ablate(job, "ablation-kl", of_batch, about)


def ablation_ppl(job: Job) -> LayerScores:
    """
    The rise of the teacher's negative log likelihood on held-out rows, in nats per token, without layer l's
    attention: the logarithm of the ratio of perplexities. Stands for LM-PPL of arXiv 2512.20569, whose definition and
    code are not published; bypassing a layer's attention is how independent runs read it.
    """

    def of_batch(batch: dict[str, torch.Tensor], reference: torch.Tensor | None = None) -> Rows:
        return nll_of_batch(job.teacher, batch, job.precision)

    about = {"measure": "rise of the teacher's NLL without this layer's attention", "unit": "nats per token"}
    return _ablate(job, "ablation-ppl", of_batch, about, relative=True)


def attention_mse(job: Job) -> LayerScores:
    """
    Mean squared change of the teacher's final hidden states when layer l's attention output is set to zero. Stands
    for ACT-MSE of arXiv 2512.20569, whose definition and code are not published: this is how we read the name. (The
    residual of the alignment, the other reading, is `ga-s1`.)
    """

    def of_batch(batch: dict[str, torch.Tensor], reference: torch.Tensor) -> Rows:
        change = widen(final_hidden_states(job.teacher, batch, job.precision)) - widen(reference)
        return row_means(change.square().mean(-1), batch.get("attention_mask"))

    about = {"measure": "change of the final hidden states without this layer's attention", "unit": "mean square"}
    return _ablate(job, "attention-mse", of_batch, about)


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
        nll, right = _predict(job.teacher, batch, job.precision)
        values = nll if by == "nll" else 1 - right.to(nll.dtype)
        return row_means(values, batch["answers"][:, 1:])

    what, unit = ("NLL of recalled values", "nats per answer") if by == "nll" else ("share of wrong recalls", "share")
    about = {"measure": f"rise of the {what} without this layer's attention", "unit": unit, "options": {"by": by}}
    return _ablate(job, "ablation-recall", of_batch, about, relative=True)


def _ablate(job: Job, method: str, of_batch: Any, about: dict[str, Any], relative: bool = False) -> LayerScores:
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
    return job.finish(method, scores, higher_is_better=True, **about)


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
    measure = "1 - cosine of the residual stream before and after the attention"
    return job.finish("block-influence", scores, measure=measure, unit="1 - cosine", higher_is_better=True)


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


def token_nll(held_out: HeldOut, model: Any) -> Rows:
    """[`nll_of_batch`] of all held-out rows."""
    with evaluating(model):
        return held_out.measure(lambda index, batch: nll_of_batch(model, batch, held_out.precision))


def nll_of_batch(model: Any, batch: dict[str, torch.Tensor], precision: Precision) -> Rows:
    """Negative log likelihood of each row's tokens that have one before them in their document, nats per token."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    predicted = counts[:, 1:] & counts[:, :-1]
    if "position_ids" in batch:
        predicted = predicted & (batch["position_ids"].diff(dim=-1) == 1)
    return row_means(_predict(model, batch, precision)[0], predicted)


def _predict(model: Any, batch: dict[str, torch.Tensor], precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of every token but the first, `[B, T - 1]`, and whether it was the most likely; a chunk of logits a time."""
    hidden = final_hidden_states(model, model_inputs(batch), precision)[:, :-1]
    targets = batch["input_ids"][:, 1:].long()
    head: LogitFunction = logit_function(model, precision)
    chunk = tokens_per_chunk(model.config.get_text_config().vocab_size)
    nll, right = [], []
    for part, target in zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True):
        logits = widen(head(part))
        nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(nll).view_as(targets), torch.cat(right).view_as(targets)


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
