"""Selectors: which indices exactly, and what is refused."""

import pytest

from hf_hybrid import select_layers, uniform_layers
from hf_hybrid.trainers import LayerScore, LayerScores


SCORES = LayerScores([LayerScore(layer, kl, 0.0, 1, 0.0) for layer, kl in enumerate([0.9, 0.2, 0.7, 0.1, 0.2, 0.8])])


@pytest.mark.parametrize(
    ("num_layers", "k", "first", "last", "centre"),
    [
        (8, 2, [0, 4], [3, 7], [1, 5]),
        (6, 2, [0, 3], [2, 5], [1, 4]),
        (7, 3, [0, 2, 4], [1, 3, 6], [0, 2, 5]),
        (28, 7, [0, 4, 8, 12, 16, 20, 24], [3, 7, 11, 15, 19, 23, 27], [1, 5, 9, 13, 17, 21, 25]),
        (3, 3, [0, 1, 2], [0, 1, 2], [0, 1, 2]),
        (5, 0, [], [], []),
    ],
)
def test_uniform_layers(num_layers: int, k: int, first: list[int], last: list[int], centre: list[int]) -> None:
    for phase, expected in (("first", first), ("last", last), ("centre", centre)):
        assert uniform_layers(num_layers, k, phase=phase) == expected
        name = {"first": "uniform"}.get(phase, f"uniform-{phase}")
        assert select_layers(name, k, num_layers) == expected


def test_uniform_layers_are_one_of_each_group() -> None:
    for num_layers in range(1, 40):
        for k in range(num_layers + 1):
            groups = [range(i * num_layers // k, (i + 1) * num_layers // k) for i in range(k)]
            for phase in ("first", "last", "centre"):
                layers = uniform_layers(num_layers, k, phase=phase)
                assert [layer in group for layer, group in zip(layers, groups, strict=True)] == [True] * k


def test_scores_choose_the_lowest_kl_and_break_ties_by_index() -> None:
    assert select_layers("ga-s2", 1, 6, SCORES) == [3]
    assert select_layers("ga-s2", 2, 6, SCORES) == [1, 3]
    assert select_layers("ga-s2", 6, 6, SCORES) == list(range(6))


def test_a_list_is_taken_as_it_is() -> None:
    assert select_layers([5, 2], None, 6) == [2, 5]
    assert select_layers([], 0, 6) == []


@pytest.mark.parametrize(
    ("selector", "k", "scores", "message"),
    [
        ("ga-s2", 7, SCORES, r"k=7 layers cannot be chosen from a model with 6; pass an integer in 0\.\.6"),
        ("uniform", 7, None, "k=7 layers cannot be chosen"),
        ("uniform", -1, None, "k=-1 layers cannot be chosen"),
        ("uniform", 1.5, None, "k=1.5 layers cannot be chosen"),
        ("uniform", None, None, "selector='uniform' needs k"),
        ("ga-s2", 2, None, "needs scores"),
        ("ga-s2", 2, LayerScores(SCORES.scores[:3]), "the scores are of 3 layers, the model has 6"),
        ("best", 2, SCORES, r"selector='best' is unknown; choose one of \['ga-s2', "),
        ([1, 6], None, None, r"\[6\] names a layer outside 0\.\.5"),
        ([1, 1], None, None, "names a layer twice"),
        ([1, 2], 3, None, "k=3 layers were asked for, but the list"),
    ],
)
def test_what_cannot_be_selected(selector: object, k: int | None, scores: LayerScores | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(selector, k, 6, scores)


def test_an_unknown_phase() -> None:
    with pytest.raises(ValueError, match="phase='middle' is unknown; choose one of"):
        uniform_layers(6, 2, phase="middle")
