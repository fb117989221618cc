"""A limit on the cache instead of a number of layers: against every set, with layers of unequal size."""

import copy
import math
import random
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import save_teacher, save_texts, tiny_recipe
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.evaluation import cache_bytes, layer_cache_bytes
from hf_hybrid.run.recipe import Recipe, SelectStage
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.score import count_for, scoring_recipe
from hf_hybrid.selection import count_within, layers_within
from hf_hybrid.trainers import LayerScore, LayerScores


def scores_of(kls: list[float], **fields: Any) -> LayerScores:
    return LayerScores([LayerScore(i, kl, 0.0, 1, 0.0) for i, kl in enumerate(kls)], **{"baseline": 1.0, **fields})


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_all_sets_that_fit(seed: int) -> None:
    draw = random.Random(seed)
    kls = [draw.uniform(0.2, 1.1) for _ in range(9)]  # some layers are no gain
    softmax = [draw.choice([100, 100, 30, 7]) for _ in range(9)]
    linear, limit = [10] * 9, draw.choice([90, 150, 300, 500])
    chosen = tuple(
        layers_within(scores_of(kls, method="zero-shot", tokens_forward_backward=0), softmax, linear, limit)
    )

    def size(kept: tuple[int, ...]) -> int:
        return sum(softmax[i] if i in kept else linear[i] for i in range(9))

    def gain(kept: tuple[int, ...]) -> float:
        return sum(1.0 - kls[i] for i in kept if softmax[i] > linear[i])

    every = chain.from_iterable(combinations(range(9), k) for k in range(10))
    # What is smaller as softmax is kept in any case.
    small = {i for i in range(9) if softmax[i] <= linear[i]}
    best = max(gain(kept) for kept in every if size(kept) <= limit and small <= set(kept))
    assert gain(chosen) == pytest.approx(best) and size(chosen) <= limit and small <= set(chosen)


def test_higher_is_better_and_joint_orders() -> None:
    values = [LayerScore(i, math.nan, 0.0, 0, 0.0, value=value) for i, value in enumerate([3.0, 1.0, 2.0])]
    assert layers_within(LayerScores(values, higher_is_better=True), [50, 50, 50], [0, 0, 0], 100) == [0, 2]
    ordered = scores_of([0.9, 0.5, 0.7, 0.1], order=[2, 0, 1])
    assert layers_within(ordered, [50, 10, 60, 10], [0] * 4, 75) == [1, 2]  # 0 does not fit any more, 1 does
    with pytest.raises(ValueError, match="chose 3 layers, and there is room for more; score with a larger k"):
        layers_within(ordered, [50, 10, 60, 10], [0] * 4, 1000)
    with pytest.raises(ValueError, match=r"chose its layers for k=3 alone, so none of them.*use its top\(3\)"):
        layers_within(scores_of([0.9, 0.5, 0.7, 0.1], order=[2, 0, 1], k=3), [50] * 4, [0] * 4, 75)


def test_what_all_students_gain_by_their_training_is_not_counted_for_each_layer() -> None:
    """Layer 0 is worth more than all others together; beside it nothing fits."""
    trained = scores_of([0.2, 0.6, 0.62, 0.64, 0.65])  # the all-linear student had 1.0 before any training
    assert layers_within(trained, [40, 10, 10, 10, 10], [0] * 5, 40) == [0]
    assert layers_within(trained, [40, 10, 10, 10, 10], [0] * 5, 70) == [0, 1, 2, 3]
    assert layers_within(trained, [40, 10, 10, 10, 10], [0] * 5, 80) == [0, 1, 2, 3, 4]


def test_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="a cache of 20 bytes is less than the 30 that all layers need"):
        layers_within(scores_of([0.5] * 3), [50] * 3, [10] * 3, 20)
    with pytest.raises(ValueError, match="scores of 3 layers, sizes of 2 and 3"):
        layers_within(scores_of([0.5] * 3), [50] * 2, [10] * 3, 100)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"cache_bytes": 100}, "select.cache_bytes and select.context go together"),
        ({"k": 1, "cache_bytes": 100, "context": 10}, "select gives k and cache_bytes"),
        ({"selector": "uniform", "cache_bytes": 100, "context": 10}, "goes by position, not by size"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            SelectStage(**given)


def test_how_many_layers_of_one_size_fit() -> None:
    softmax, linear = [50] * 4, [10] * 4
    assert [count_within(softmax, linear, limit) for limit in (40, 79, 80, 199, 200, 999)] == [0, 0, 1, 3, 4, 4]
    assert count_within([5] * 4, linear, 40) == 4  # smaller as softmax
    with pytest.raises(ValueError, match="takes 20 to 40 bytes more.*says no number of layers.*or give k"):
        count_within([50, 30], [10] * 2, 100)
    with pytest.raises(ValueError, match="a cache of 39 bytes is less than the 40"):
        count_within(softmax, linear, 39)


def test_bytes_of_each_layer_add_up_and_windows_are_counted() -> None:
    teacher = tiny_teacher("mistral")
    sizes = layer_cache_bytes(teacher, 1000)
    assert sum(sizes) == cache_bytes(teacher, 1000) and sizes == [2 * 15 * 2 * 16 * 4] * 4  # window 16, 2 heads of 16
    student = hh.convert(tiny_teacher("llama"), [1])
    linear, softmax = layer_cache_bytes(student, 1000)[:2]
    assert softmax == 2 * 1000 * 2 * 16 * 4 and linear == layer_cache_bytes(student, 10)[0]


def test_a_recipe_with_a_limit(tmp_path: Path) -> None:
    teacher, texts = save_teacher(tmp_path / "teacher"), save_texts(tmp_path / "texts")
    linear, softmax = (layer_cache_bytes(hh.convert(str(teacher), kept), 500)[0] for kept in ([], range(4)))
    assert softmax > linear
    limit = 4 * linear + 2 * (softmax - linear) + 5  # two layers and a little
    data = tiny_recipe(teacher, texts, finetune=None)
    data["score"]["method"] = "zero-shot"
    data["select"] = {"selector": "zero-shot", "cache_bytes": limit, "context": 500}
    result = run_recipe(Recipe.from_dict(data), tmp_path / "run", stop_after="select")
    assert result.scores is not None
    gains = {score.layer: result.scores.baseline - score.kl for score in result.scores.scores}
    best = sorted(gains, key=lambda layer: -gains[layer])[:2]
    assert result.selected == sorted(layer for layer in best if gains[layer] > 0)


def test_a_limit_is_on_the_finished_models_cache() -> None:
    """A student that trains in fp32 is measured in the dtype of its teacher, which the finished model has."""
    teacher = tiny_teacher("llama").to(torch.bfloat16)
    student = hh.convert(teacher, [], mixer="sliding_window", mixer_options={"window": 32})
    linear, softmax = (layer_cache_bytes(model, 500)[0] for model in (student, teacher))
    recipe = scoring_recipe(
        "some/teacher",
        "verified",
        {"text_files": ["a.txt"]},
        {"cache_bytes": 4 * linear + 2 * (softmax - linear), "context": 500},
    )
    wide = copy.deepcopy(student).float()
    assert layer_cache_bytes(wide, 500)[0] == 2 * linear
    assert count_for(recipe, teacher, student) == count_for(recipe, teacher, wide) == 2
    assert wide.dtype == torch.float32
