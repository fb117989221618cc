"""Scores of a run: the stages `score` and `select`, and a recipe for scoring a model by itself."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch

from hf_hybrid.trainers import DistillationConfig, LayerScores, score_layers
from hf_hybrid.trainers.scoring import METHODS, TEACHER_ONLY

from .data import DataConfig
from .evaluation import layer_cache_bytes
from .recipe import AlignStage, DistillStage, Recipe, ScoreStage, SelectStage
from .selection import layers_within, select_layers
from .stages import Event, Listener, cut_for, training_arguments
from .synthetic import associative_recall, ordinary_token_ids


# The recipe `demo`'s rates and budgets, for the teacher that it is made for.
_EMBEDDED: dict[str, Any] = {"align": 250_000, "score": 60_000, "block_size": 256, "align_rate": 3e-3}
_EMBEDDED |= {"rate": 3e-4, "mixer_rate": 3e-3}
# The papers' rates; far fewer tokens, so that a first look is not a day's work.
_OTHER: dict[str, Any] = {"align": 2_000_000, "score": 200_000, "block_size": 512, "align_rate": 1e-3}
_OTHER |= {"rate": 7e-6, "mixer_rate": 1e-4}


def scoring_recipe(
    teacher: str,
    method: str,
    data: dict[str, Any] | None = None,
    *,
    k: int | None = None,
    tokens_per_layer: int | None = None,
    align_tokens: int | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Recipe:
    """
    Returns a recipe whose score stage scores `teacher`, with defaults for all else.

    Args:
        teacher (`str`): Hub id or folder, or `"embedded"`.
        method (`str`): one of `METHODS`.
        data (`dict`, *optional*): fields of [`DataConfig`]; may be left out for the embedded teacher.
        k (`int`, *optional*): layers to keep; by default a quarter.
        tokens_per_layer, align_tokens (`int`, *optional*): budgets. By default 200,000 and 2 million, and those of the
            recipe `demo` for the embedded teacher; the papers use 200 to 600 million and 100 million.
        options (`dict`, *optional*): options of the method.
        seed (`int`): of everything random.
        revision (`str`, *optional*): branch, tag or commit of a teacher on the Hub; by default its main branch.
    """
    defaults = _EMBEDDED if teacher == "embedded" else _OTHER
    if not data:
        if teacher != "embedded":
            raise ValueError(f"scoring {teacher} needs text to measure on; pass --data-files or --dataset.")
        data = {"source": "embedded-demo"}
    rates = {"learning_rate": defaults["rate"], "mixer_learning_rate": defaults["mixer_rate"]}
    align = AlignStage(tokens=align_tokens or defaults["align"], learning_rate=defaults["align_rate"])
    budget = tokens_per_layer or defaults["score"]
    return Recipe(
        teacher=teacher,
        data=DataConfig(**{"block_size": defaults["block_size"], **data}),
        align=align,
        score=ScoreStage(tokens_per_layer=budget, method=method, options=options or {}, **rates),
        select=SelectStage(selector=method, k=k, fraction=0.25 if k is None else None),
        distill=DistillStage(tokens=budget, **rates),
        seed=seed,
        revision=revision,
    )


def needs_alignment(recipe: Recipe) -> bool:
    """Whether the score stage of `recipe` starts from an aligned student."""
    return recipe.score is None or recipe.score.method not in TEACHER_ONLY


def score_stage(
    recipe: Recipe,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    rows: dict[str, Any],
    folder: Path,
    listener: Listener,
    *,
    layers: Iterable[int] | None = None,
) -> LayerScores:
    """Scores all or some layers as the score stage of `recipe` says; results are kept in `folder` as they come."""
    stage, num_layers = cast(ScoreStage, recipe.score), teacher.config.num_hidden_layers
    options = dict(stage.options)
    if stage.method == "ablation-recall":
        options["task"] = recall_task(teacher, tokenizer, recipe.data.held_out_rows, recipe.seed)

    def report(score: Any) -> None:
        text = f"layer {score.layer}: {score.value:.4f}"
        listener(Event("score", "step", score.layer + 1, num_layers, text))

    def steps(done: int, total: int, text: str) -> None:
        listener(Event("score", "step", done, total, text))

    return score_layers(
        student,
        teacher,
        cut_for(recipe, "score", rows["train"]),
        cut_for(recipe, "score", rows["score"]),
        args=cast(DistillationConfig, training_arguments(recipe, "score", folder.with_name("score_checkpoints"))),
        tokens_per_layer=stage.tokens_per_layer,
        layers=layers,
        method=stage.method,
        options=options,
        k=recipe.select.count(num_layers),
        output_dir=folder,
        progress=report,
        steps=None if stage.method == "ga-s2" else steps,
    )


def choose(recipe: Recipe, scores: LayerScores | None, num_layers: int) -> list[int]:
    """The layers that the select stage of `recipe` keeps, where it says which or how many."""
    select = recipe.select
    return select_layers(select.rule, select.count(num_layers), num_layers, scores, seed=recipe.seed)


def choose_within(recipe: Recipe, scores: LayerScores | None, teacher: Any, student: Any) -> list[int]:
    """The layers that the select stage of `recipe` keeps, where it limits the cache; `student` is all linear."""
    context, limit = cast(int, recipe.select.context), cast(int, recipe.select.cache_bytes)
    if scores is None:
        raise ValueError("select.cache_bytes needs scores, but the recipe has no score stage; add one.")
    return layers_within(scores, layer_cache_bytes(teacher, context), layer_cache_bytes(student, context), limit)


def recall_task(
    teacher: Any, tokenizer: Any, rows: int, seed: int, length: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Associative recall for `ablation-recall`, of ordinary tokens, as long as vocabulary and positions allow."""
    config = teacher.config.get_text_config()
    ids = ordinary_token_ids(tokenizer)
    ids = ids[ids < config.vocab_size]
    length = min(length, getattr(config, "max_position_embeddings", None) or length, 2 * ids.numel()) // 4 * 4
    return associative_recall(rows, length, ids, torch.Generator().manual_seed(10**6 + seed))


def check_method(method: str) -> None:
    """Raises a `ValueError` where there is no such method."""
    if method not in METHODS:
        raise ValueError(f"--method {method!r} is unknown; choose one of {list(METHODS)}.")
