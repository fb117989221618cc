"""Scores of a run: the stages `score` and `select`, and a recipe for scoring a model by itself."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from hf_hybrid.trainers import DistillationConfig, LayerScores, score_layers
from hf_hybrid.trainers.scoring.methods import METHODS, check_request, method_of

from ..conversion import convert
from ..data.config import DataConfig
from ..data.rows import RowSets
from ..evaluation import layer_cache_bytes
from ..selection import count_within, layers_within, select_layers
from .inputs import load_run_pair
from .recipe import AlignStage, DistillStage, Recipe, ScoreStage, SelectStage
from .stages import Event, Listener, cut_for, training_arguments


# The recipe `demo-full`'s rates and budgets, for the teacher that it is made for.
_EMBEDDED: dict[str, Any] = {"align": 250_000, "score": 60_000, "block_size": 256, "align_rate": 3e-3}
_EMBEDDED |= {"rate": 3e-4, "mixer_rate": 3e-3}
# The papers' rates; far fewer tokens, so that a first look is not a day's work.
_OTHER: dict[str, Any] = {"align": 2_000_000, "score": 200_000, "block_size": 512, "align_rate": 1e-3}
_OTHER |= {"rate": 7e-6, "mixer_rate": 1e-4}


def scoring_recipe(
    teacher: str,
    method: str,
    data: dict[str, Any] | None = None,
    select: dict[str, Any] | None = None,
    *,
    tokens_per_layer: int | None = None,
    align_tokens: int | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    revision: str | None = None,
    gguf_file: str | None = None,
    mixer: str = "gated_deltanet",
    mixer_options: dict[str, Any] | None = None,
) -> Recipe:
    """
    Returns a recipe whose score stage scores `teacher`, with defaults for all else.

    Args:
        teacher (`str`): Hub id or folder, GGUF file, or `"embedded"`.
        method (`str`): one of `METHODS`.
        data (`dict`, *optional*): fields of [`DataConfig`]; may be left out for the embedded teacher.
        select (`dict`, *optional*): how many layers to keep, fields of [`SelectStage`]; by default a quarter.
        tokens_per_layer, align_tokens (`int`, *optional*): budgets. By default 200,000 and 2 million, and those of the
            recipe `demo-full` for the embedded teacher; the papers use 200 to 600 million and 100 million.
        options (`dict`, *optional*): options of the method.
        seed (`int`): of everything random.
        revision (`str`, *optional*): branch, tag or commit of a teacher on the Hub; by default its main branch.
        gguf_file (`str`, *optional*): the teacher's GGUF file, in a folder that holds several or on the Hub.
        mixer (`str`), mixer_options (`dict`, *optional*): what the other layers will have: layers are good for one.
    """
    defaults = _EMBEDDED if teacher == "embedded" else _OTHER
    data = dict(data or {})
    if not data.keys() & {"text_files", "dataset", "source"}:
        if teacher != "embedded":
            raise ValueError(f"scoring {teacher} needs text to measure on; pass --data-files or --dataset.")
        data["source"] = "embedded-demo"
    rates = {"learning_rate": defaults["rate"], "mixer_learning_rate": defaults["mixer_rate"]}
    align_tokens = defaults["align"] if align_tokens is None else align_tokens
    align = AlignStage(tokens=align_tokens, learning_rate=defaults["align_rate"])
    budget = defaults["score"] if tokens_per_layer is None else tokens_per_layer
    return Recipe(
        teacher=teacher,
        data=DataConfig(**{"block_size": defaults["block_size"], **data}),
        align=align,
        score=ScoreStage(tokens_per_layer=budget, method=method, options=options or {}, **rates),
        select=SelectStage(selector=method, **(select or {"fraction": 0.25})),
        distill=DistillStage(tokens=budget, **rates),
        seed=seed,
        revision=revision,
        gguf_file=gguf_file,
        mixer=mixer,
        mixer_options=mixer_options or {},
    )


def needs_alignment(recipe: Recipe) -> bool:
    """Whether the score stage of `recipe` starts from an aligned student."""
    return recipe.score is None or method_of(recipe.score.method, "score.method").needs_student


def check_score_stage(recipe: Recipe, teacher: Any) -> None:
    """Raises a `ValueError` where the score stage of `recipe` asks its method for what it does not have."""
    stage, select = recipe.score, recipe.select
    if stage is None:
        return
    count = select.count(teacher.config.num_hidden_layers)
    if _count_follows(recipe):
        sizes = layer_cache_bytes(teacher, cast(int, select.context))
        count = count_within(sizes, [0] * len(sizes), sum(sizes))  # layers of one size, or an error that says so
    check_request(stage.method, stage.options, count)


def _count_follows(recipe: Recipe) -> bool:
    """Whether how many layers the score stage chooses follows from a limit on the cache."""
    stage = recipe.score
    asked = stage is not None and method_of(stage.method).asks_for_k(stage.options)
    return asked and recipe.select.cache_bytes is not None


def count_for(recipe: Recipe, teacher: Any, student: Any) -> int | None:
    """How many layers keep softmax attention; None where that depends on which. `student` is all linear."""
    if _count_follows(recipe):
        return count_within(*_cache_sizes(recipe, teacher, student), cast(int, recipe.select.cache_bytes))
    return recipe.select.count(teacher.config.num_hidden_layers)


def _cache_sizes(recipe: Recipe, teacher: Any, student: Any) -> tuple[list[int], list[int]]:
    context = cast(int, recipe.select.context)
    if student.dtype != teacher.dtype:  # it trains in fp32 under autocast, and the finished model has the teacher's
        student = copy.deepcopy(student).to(teacher.dtype)
    return layer_cache_bytes(teacher, context), layer_cache_bytes(student, context)


def check_divisible(recipe: Recipe) -> None:
    """Raises a `ValueError` where jobs cannot share out the layers that the score stage of `recipe` scores."""
    stage = recipe.score
    if stage is None or not method_of(stage.method).splits:
        given = None if stage is None else stage.method
        able = [method.name for method in METHODS.values() if method.splits]
        raise ValueError(f"--layers splits scores of methods {able}, and the recipe has {given!r}; leave it out.")
    if method_of(stage.method).together(stage.options):
        raise ValueError(
            f"--layers splits scores of layers by themselves, and with options={stage.options} they are compared with "
            "one another on the way; leave --layers out, or these options."
        )


def score_stage(
    recipe: Recipe,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    rows: RowSets,
    folder: Path,
    listener: Listener,
    *,
    layers: Iterable[int] | None = None,
) -> LayerScores:
    """Scores all or some layers as the score stage of `recipe` says; results are kept in `folder` as they come."""
    stage = cast(ScoreStage, recipe.score)

    def steps(done: float, total: float, text: str) -> None:
        # Without a measure of how far it is, it is something to be told.
        listener(Event("score", "step" if total else "note", done, total, text))

    return score_layers(
        student,
        teacher,
        cut_for(recipe, "score", rows["train"], rows.packing.prefix),
        cut_for(recipe, "score", rows["score"], rows.packing.prefix),
        args=cast(DistillationConfig, training_arguments(recipe, "score", folder.with_name("score_checkpoints"))),
        tokens_per_layer=stage.tokens_per_layer,
        layers=layers,
        method=stage.method,
        options=stage.options,
        k=count_for(recipe, teacher, student),
        output_dir=folder,
        checkpoints=stage.checkpoints,
        steps=steps,
    )


def choose(recipe: Recipe, scores: LayerScores | None, num_layers: int) -> list[int]:
    """The layers that the select stage of `recipe` keeps, where it says which or how many."""
    select = recipe.select
    return select_layers(select.rule, select.count(num_layers), num_layers, scores, seed=recipe.seed)


def choose_within(recipe: Recipe, scores: LayerScores | None, teacher: Any, student: Any) -> list[int]:
    """The layers that the select stage of `recipe` keeps, where it limits the cache; `student` is all linear."""
    if scores is None:
        raise ValueError("select.cache_bytes needs scores, but the recipe has no score stage; add one.")
    count = count_for(recipe, teacher, student)
    if count is not None:
        return scores.top(count)
    return layers_within(scores, *_cache_sizes(recipe, teacher, student), cast(int, recipe.select.cache_bytes))


def layers_of(recipe: Recipe, scores: LayerScores, folder: Path) -> list[int]:
    """The layers that follow from a run's `scores`; for a limit on the cache, models are loaded and measured."""
    if recipe.select.cache_bytes is None:
        return choose(recipe, scores, len(scores.scores))
    teacher, _ = load_run_pair(recipe, folder)
    student = convert(teacher, [], mixer=recipe.mixer, mixer_options=recipe.mixer_options)
    return choose_within(recipe, scores, teacher, student)
