"""What a hybrid lost and what it saves: held-out KL, perplexity, recall, and bytes of cache."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_hybrid.modeling.library import cache_argument
from hf_hybrid.trainers import held_out_kl
from hf_hybrid.trainers.durable import write_json
from hf_hybrid.trainers.held_out import batches, standard_error
from hf_hybrid.trainers.losses import check_logit_function
from hf_hybrid.trainers.modes import evaluating
from hf_hybrid.trainers.next_token import predict, predicted_tokens
from hf_hybrid.trainers.precision import AS_LOADED, Precision
from hf_hybrid.trainers.teacher_trainer import counted_tokens

from .data.rows import text_prefix
from .run.schema import parse
from .synthetic import associative_recall, ordinary_token_ids, task_accuracy
from .tasks.scores import GenerationScore, TaskScore


@dataclass
class TextEvaluation:
    """
    Measurements on the held-out rows of one text.

    Args:
        name (`str`): of the text.
        rows, tokens (`int`): rows, and their tokens that are not padding.
        kl, kl_sem (`float`): held-out `KL(teacher || model)` and its standard error over rows, nats per token.
        perplexity, perplexity_sem (`float`): see [`perplexity_of`].
        teacher_perplexity, teacher_perplexity_sem (`float`): likewise.
    """

    name: str
    rows: int
    tokens: int
    kl: float | None = None
    kl_sem: float | None = None
    perplexity: float | None = None
    perplexity_sem: float | None = None
    teacher_perplexity: float | None = None
    teacher_perplexity_sem: float | None = None


@dataclass
class Evaluation:
    """
    Measurements of one model; what was not measured is None.

    Args:
        kl, kl_sem (`float`): held-out `KL(teacher || model)` and its standard error over rows, nats per token.
        tokens (`int`): tokens of the held-out rows that are not padding.
        perplexity, teacher_perplexity (`float`): `exp` of the mean negative log likelihood per predicted token.
        perplexity_sem, teacher_perplexity_sem (`float`): their standard errors over rows.
        texts (`list[TextEvaluation]`): the same of each text, where there are several; the figures above are of the
            rows of all of them.
        recall, teacher_recall (`float`): share of right answers in multi-query associative recall.
        recall_length, recall_answers (`int`): tokens of a row of that task, and answers in all rows.
        cache_context (`int`): tokens of context for which the next two are computed.
        cache_bytes, teacher_cache_bytes (`int`): bytes of cache per sequence.
        cache_bytes_per_token, teacher_cache_bytes_per_token (`int`): bytes that the last token of that context adds.
        tasks, teacher_tasks (`list[TaskScore]`): what they scored in tasks, see `docs/evaluation.md`.
        generation (`GenerationScore`): what they write, with samples.
    """

    kl: float | None = None
    kl_sem: float | None = None
    tokens: int = 0
    perplexity: float | None = None
    teacher_perplexity: float | None = None
    perplexity_sem: float | None = None
    teacher_perplexity_sem: float | None = None
    texts: list[TextEvaluation] = field(default_factory=list)
    recall: float | None = None
    teacher_recall: float | None = None
    recall_length: int | None = None
    recall_answers: int = 0
    cache_context: int = 0
    cache_bytes: int | None = None
    teacher_cache_bytes: int | None = None
    cache_bytes_per_token: int | None = None
    teacher_cache_bytes_per_token: int | None = None
    tasks: list[TaskScore] = field(default_factory=list)
    teacher_tasks: list[TaskScore] = field(default_factory=list)
    generation: GenerationScore | None = None

    def __post_init__(self) -> None:
        # As JSON has them.
        self.texts = [TextEvaluation(**text) if isinstance(text, dict) else text for text in self.texts]
        self.tasks = [TaskScore(**score) if isinstance(score, dict) else score for score in self.tasks]
        self.teacher_tasks = [TaskScore(**s) if isinstance(s, dict) else s for s in self.teacher_tasks]
        if isinstance(self.generation, dict):
            self.generation = parse(GenerationScore, self.generation, "generation")

    def to_dict(self) -> dict[str, Any]:
        """All measurements by name."""
        return dataclasses.asdict(self)

    def short(self) -> str:
        """The main figures in one line, the teacher's behind the model's."""
        parts = []
        if self.kl is not None:
            parts.append(f"KL {self.kl:.4f} ± {self.kl_sem:.4f} nats per token")
        for name, shown in (("perplexity", ".3f"), ("recall", ".3f")):
            own, its = getattr(self, name), getattr(self, f"teacher_{name}")
            if own is not None:
                parts.append(f"{name} {own:{shown}}" + ("" if its is None else f" (teacher {its:{shown}})"))
        if self.cache_bytes is not None:
            its = "" if self.teacher_cache_bytes is None else f" (teacher {self.teacher_cache_bytes:,})"
            parts.append(f"cache of {self.cache_context:,} tokens {self.cache_bytes:,} bytes{its}")
        return ", ".join(parts)

    def save(self, path: str | os.PathLike) -> None:
        """Writes them as JSON, in one step or not at all."""
        write_json(path, self.to_dict())


def evaluate_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None = None,
    tokenizer: Any = None,
    rows: Any = None,
    *,
    batch_size: int = 8,
    recall_length: int = 256,
    recall_rows: int = 64,
    cache_context: int | None = None,
    seed: int = 0,
    precision: Precision = AS_LOADED,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """
    Measures `model`, and `teacher` beside it.

    Args:
        model (`PreTrainedModel`): the hybrid, or any causal language model.
        teacher (`PreTrainedModel`, *optional*): for KL and the teacher's own numbers; of one vocabulary and device.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for recall, which draws ordinary tokens; without, no recall.
        rows (`datasets.Dataset`, *optional*): held-out rows with `input_ids`; without, no KL and no perplexity. Or
            several by name, of which each is measured by itself, too.
        batch_size (`int`): rows at once.
        recall_length (`int`), recall_rows (`int`): size of the recall task. It is made shorter where the vocabulary or
            the model's positions are few, and left out where nothing of 16 tokens fits.
        cache_context (`int`, *optional*): by default the model's longest context, at most 32,768.
        seed (`int`): of the recall task.
        precision ([`~hf_hybrid.trainers.precision.Precision`]): what the models run in, by default the dtype of their
            weights, as whoever loads them will run them.
        progress (`Callable`, *optional*): called with how many passes of a row through KL and perplexities are done,
            how many there are, and what is measured.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 32_768
    result = Evaluation(cache_context=cache_context or min(limit, 32_768))
    if teacher is not None:
        _check_vocabularies(model, teacher)
    if rows is not None:
        texts = rows if isinstance(rows, dict) else {"": rows}
        _measure_texts(result, model, teacher, texts, batch_size, precision, progress)
    task = None
    if tokenizer is not None:
        task = recall_task(model.config, tokenizer, recall_rows, recall_length, seed=seed)
    if task is not None:
        result.recall_length, result.recall_answers = task.length, int(task.answers.sum())
        result.recall = recall_of(model, task, batch_size, precision)
        if teacher is not None:
            result.teacher_recall = recall_of(teacher, task, batch_size, precision)
    result.cache_bytes = cache_bytes(model, result.cache_context)
    result.cache_bytes_per_token = result.cache_bytes - cache_bytes(model, result.cache_context - 1)
    if teacher is not None:
        result.teacher_cache_bytes = cache_bytes(teacher, result.cache_context)
        result.teacher_cache_bytes_per_token = result.teacher_cache_bytes - cache_bytes(
            teacher, result.cache_context - 1
        )
    return result


class RecallTask(NamedTuple):
    """Rows of associative recall, `tokens [N, P + length]`: P that the tokenizer puts before a text, then the task."""

    tokens: torch.Tensor
    answers: torch.Tensor
    length: int


def recall_task(config: Any, tokenizer: Any, rows: int = 64, length: int = 256, *, seed: int = 0) -> RecallTask | None:
    """
    Multi-query associative recall of ordinary tokens, made shorter where the vocabulary or the positions of a model
    with `config` are few; None where nothing of 16 tokens fits.
    """
    config = config.get_text_config()
    prefix = torch.tensor(text_prefix(tokenizer), dtype=torch.int64).expand(rows, -1)
    limit = (getattr(config, "max_position_embeddings", None) or 32_768) - prefix.shape[1]
    ids = ordinary_token_ids(tokenizer)
    ids = ids[ids < config.vocab_size]
    length = min(length, limit, 2 * ids.numel()) // 4 * 4
    if length < 16:
        return None
    tokens, answers = associative_recall(rows, length, ids, torch.Generator().manual_seed(seed))
    no_answers = torch.zeros(prefix.shape, dtype=answers.dtype)
    return RecallTask(torch.cat((prefix, tokens), 1), torch.cat((no_answers, answers), 1), length)


def recall_of(model: PreTrainedModel, task: RecallTask | None, batch_size: int, precision: Precision) -> float | None:
    """The share of right answers of `model` in `task`."""
    return None if task is None else task_accuracy(model, task.tokens, task.answers, batch_size, precision)


def _measure_texts(
    result: Evaluation,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    texts: dict[str, Any],
    batch_size: int,
    precision: Precision,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """KL and perplexity of each text into `result.texts`, where there are several, and of all rows into `result`."""
    kls: list[float] = []
    done, total = 0, sum(map(len, texts.values())) * (1 if teacher is None else 3)

    def told(what: str) -> Callable[[int, int], None]:
        before = done
        return lambda rows, _: None if progress is None else progress(before + rows, total, what)

    losses: dict[str, list[tuple[float, int]]] = {"": [], "teacher_": []}
    for name, rows in texts.items():
        tokens = sum(int(counted_tokens(batch)) for batch in batches(rows, batch_size, torch.device("cpu")))
        found = TextEvaluation(name, len(rows), tokens)
        if teacher is not None:
            kl = held_out_kl(model, teacher, rows, batch_size, precision, told(f"KL {name}".strip()))
            done += len(rows)
            found.kl, found.kl_sem = kl.mean, kl.sem
            kls += kl.per_sequence
        for who, measured in (("", model), ("teacher_", teacher)):
            if measured is not None:
                what = f"{'teacher: ' if who else ''}perplexity {name}".strip()
                of_rows = row_losses(measured, rows, batch_size, precision, told(what))
                done += len(rows)
                losses[who] += of_rows
                value, sem = perplexity_of(of_rows)
                setattr(found, f"{who}perplexity", value)
                setattr(found, f"{who}perplexity_sem", sem)
        result.texts.append(found)
        result.tokens += tokens
    if kls:
        result.kl, result.kl_sem = sum(kls) / len(kls), standard_error(kls)
    result.perplexity, result.perplexity_sem = perplexity_of(losses[""])
    if losses["teacher_"]:
        result.teacher_perplexity, result.teacher_perplexity_sem = perplexity_of(losses["teacher_"])
    if len(texts) == 1:
        result.texts = []


def perplexity(model: PreTrainedModel, rows: Any, batch_size: int = 8, precision: Precision = AS_LOADED) -> float:
    """
    `exp` of the mean negative log likelihood of every token of `rows` that has one before it in its document.

    The logits of a few tokens are made at a time, so the vocabulary may be large. Padding does not count.
    """
    return perplexity_of(row_losses(model, rows, batch_size, precision))[0]


def perplexity_of(losses: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """
    The perplexity of rows, from the [`row_losses`], and its standard error over them.

    The mean loss per token is a ratio of two sums over rows, whose error is that of `loss - mean * tokens`; that of
    its `exp` is as many times larger as the perplexity is (the delta method). It is 0 for a single row.
    """
    total, count = sum(loss for loss, _ in losses), sum(tokens for _, tokens in losses)
    if count == 0:
        raise ValueError("no token of the rows has one before it in its document; pass longer rows.")
    mean, rows = total / count, len(losses)
    error = standard_error([loss - mean * tokens for loss, tokens in losses]) * rows / count
    return math.exp(mean), math.exp(mean) * error


@torch.no_grad()
def row_losses(
    model: PreTrainedModel,
    rows: Any,
    batch_size: int,
    precision: Precision,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, int]]:
    """Of each row the sum of the negative log likelihoods of its predicted tokens, in nats, and their number."""
    check_logit_function(model, precision)
    found: list[tuple[float, int]] = []
    with evaluating(model):
        for batch in batches(rows, batch_size, model.device):
            nll, predicted = predict(model, batch, precision)[0].double(), predicted_tokens(batch)
            losses = torch.where(predicted, nll, 0.0).sum(-1)
            found += zip(losses.tolist(), predicted.sum(-1).tolist(), strict=True)
            if progress is not None:
                progress(len(found), len(rows))
    return found


def cache_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes of cache of one sequence after `context` tokens: the sum of [`layer_cache_bytes`]."""
    return sum(layer_cache_bytes(model, context))


@torch.no_grad()
def layer_cache_bytes(model: PreTrainedModel, context: int) -> list[int]:
    """
    Bytes of cache of one sequence after `context` tokens in each layer, from what a real cache holds after a short
    forward pass.

    A softmax layer grows with every token, up to its window where it has one; a linear layer's state does not grow.
    """
    length = 8
    ids = torch.ones(1, length, dtype=torch.int64, device=model.device)
    cache, model_class = DynamicCache(config=model.config), cast(Any, type(model))
    with evaluating(model), AS_LOADED.running(model.device):
        model(input_ids=ids, use_cache=True, **{cache_argument(model_class): cache})
    sizes = []
    for layer in cache.layers:
        size = sum(state.nbytes for state in _states(layer))
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.numel():
            window = getattr(layer, "sliding_window", None)
            tokens = context if window is None else min(context, window - 1)
            size += (keys.nbytes + values.nbytes) // keys.shape[-2] * tokens
        sizes.append(size)
    return sizes


def _states(layer: Any) -> Iterable[torch.Tensor]:
    """The tensors of a linear layer's cache, whose size does not depend on the context."""
    for name in ("recurrent_states", "conv_states"):
        yield from (state for state in getattr(layer, name, {}).values() if state is not None)


def _check_vocabularies(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    ours, theirs = (m.config.get_text_config().vocab_size for m in (model, teacher))
    if ours != theirs:
        raise ValueError(
            f"the model has a vocabulary of {ours} tokens, the teacher of {theirs}; pass the teacher that the model "
            "was converted from."
        )
