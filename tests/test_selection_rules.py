"""Layers by position, and SMART's constraints on the lists its authors published."""

import math
import random
from itertools import combinations

import pytest

from benchmarks.selection.compared.smart import smart_layers
from hf_hybrid.trainers.scoring.rules import positional_layers


# The twelve lists that arXiv 2512.20569's repository calls "smart", with the layers of each model.
PUBLISHED = [
    (28, [0, 9, 18, 26]),  # Llama-3.2-3B, 12.5% of the layers
    (28, [0, 5, 10, 14, 18, 22, 26]),  # Llama-3.2-3B, 25.0% of the layers
    (28, [0, 3, 6, 9, 12, 15, 19, 23, 26]),  # Llama-3.2-3B, 33.0% of the layers
    (28, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26]),  # Llama-3.2-3B, 50.0% of the layers
    (28, [0, 4, 9, 14, 19, 23, 27]),  # Qwen2.5-1.5B, 25.0% of the layers
    (28, [0, 3, 6, 9, 12, 16, 19, 23, 27]),  # Qwen2.5-1.5B, 33.0% of the layers
    (36, [3, 11, 19, 27, 35]),  # Qwen2.5-3B, 12.5% of the layers
    (36, [3, 7, 11, 15, 19, 23, 27, 31, 35]),  # Qwen2.5-3B, 25.0% of the layers
    (36, [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35]),  # Qwen2.5-3B, 33.0% of the layers
    (36, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 27, 29, 31, 33, 35]),  # Qwen2.5-3B, 50.0% of the layers
    (28, [2, 6, 10, 14, 18, 22, 27]),  # Qwen2.5-7B, 25.0% of the layers
    (28, [2, 5, 8, 11, 14, 17, 20, 23, 27]),  # Qwen2.5-7B, 33.0% of the layers
]


def is_smart(layers: list[int], num_layers: int) -> bool:
    """The constraints, written down again: ends in the outer groups, gaps as equal as can be."""
    k, group = len(layers), num_layers // len(layers)
    free = (layers[-1] - layers[0] - k + 1) / (k - 1)
    gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
    ends = layers[0] < group and layers[-1] >= num_layers - group
    return ends and gaps <= {math.floor(free) + 1, math.ceil(free) + 1}


@pytest.mark.parametrize(("num_layers", "layers"), PUBLISHED)
def test_published_lists_satisfy_the_rule_and_are_found_by_it(num_layers: int, layers: list[int]) -> None:
    assert is_smart(layers, num_layers)
    # With all of the sensitivity in the published layers, the best set is the published one.
    assert smart_layers([float(i in layers) for i in range(num_layers)], len(layers)) == layers


@pytest.mark.parametrize(("num_layers", "k"), [(6, 2), (8, 3), (12, 4), (12, 5), (10, 10), (9, 2)])
def test_smart_is_the_best_of_all_sets_that_satisfy_it(num_layers: int, k: int) -> None:
    draw = random.Random(num_layers * k)
    for _ in range(20):
        sensitivity = [draw.random() for _ in range(num_layers)]
        allowed = [c for c in combinations(range(num_layers), k) if is_smart(list(c), num_layers)]
        best = max(allowed, key=lambda layers: sum(sensitivity[i] for i in layers))
        assert smart_layers(sensitivity, k) == list(best)


def test_smart_with_one_layer_or_none() -> None:
    assert smart_layers([0.1, 0.5, 0.2], 1) == [1]
    assert smart_layers([0.1, 0.5, 0.2], 0) == []
    with pytest.raises(ValueError, match="k=4 layers cannot be chosen"):
        smart_layers([0.1, 0.5, 0.2], 4)


def test_positions() -> None:
    assert positional_layers("first", 2, 6) == [0, 1]
    assert positional_layers("last", 2, 6) == [4, 5]
    assert positional_layers("last", 0, 6) == []
    drawn = [positional_layers("random", k, 12, seed=4) for k in range(13)]
    assert all(set(a) < set(b) for a, b in zip(drawn, drawn[1:], strict=False)) and drawn[12] == list(range(12))
    assert len({tuple(positional_layers("random", 3, 12, seed=seed)) for seed in range(20)}) > 15
    with pytest.raises(ValueError, match="rule='middle' is unknown"):
        positional_layers("middle", 2, 6)
