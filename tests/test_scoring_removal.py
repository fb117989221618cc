"""Greedy removal against hybrids made by hand; what all methods share is in tests/test_scoring.py."""

import pytest
import torch
from scored import LAYERS, arguments, kl_with, rows, score, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


def test_the_order_is_that_of_removal_by_hand(pair, tmp_path):
    teacher, student = pair
    scores = score(teacher, student, tmp_path, "zero-shot-removal")
    kept, order = list(range(LAYERS)), []
    while len(kept) > 1:
        kls = {}
        for layer in kept:
            hybrid = hh.convert(teacher, [])
            hybrid.load_state_dict(student.state_dict())
            hybrid.set_full_attention_layers([i for i in kept if i != layer], teacher)
            kls[layer] = hh.held_out_kl(hybrid, teacher, rows(6, seed=9)).mean
        order.append(min(kept, key=kls.get))
        kept.remove(order[-1])
        assert scores.scores[order[-1]].kl == pytest.approx(kls[order[-1]], abs=1e-5)
    assert scores.order == [*kept, *reversed(order)] == scores.ranking
    assert scores.top(2) == sorted(scores.order[:2])
    evaluations = LAYERS * (LAYERS + 1) // 2 - 1
    assert scores.tokens_forward >= evaluations * 6 * rows(1).num_rows * 24 and scores.tokens == 0


def test_of_equal_layers_the_last_goes_first(tmp_path):
    teacher = tiny_teacher("llama")
    with torch.no_grad():
        for layer in (0, 1, 3):
            teacher.model.layers[layer].self_attn.o_proj.weight.zero_()
    assert score(teacher, weak_student(teacher), tmp_path, "zero-shot-removal").order == [2, 0, 1, 3]


def test_one_layer_is_no_choice(pair, tmp_path):
    teacher, student = pair
    with pytest.raises(ValueError, match="two or more"):
        hh.score_layers(
            student, teacher, None, rows(2), args=arguments(tmp_path), method="zero-shot-removal", layers=[1]
        )


def test_layers_that_are_not_scored_stay_softmax(pair, tmp_path):
    """From softmax attention in every layer, whichever of them compete."""
    teacher, student = pair
    scores = score(teacher, student, tmp_path, "zero-shot-removal", layers=[1, 3])
    alone = {layer: kl_with(student, teacher, set(range(LAYERS)) - {layer}) for layer in (1, 3)}
    assert {s.layer: s.kl for s in scores.scores} == pytest.approx(alone, abs=1e-5)
    assert scores.order == sorted(alone, key=lambda layer: -alone[layer])
