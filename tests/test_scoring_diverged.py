"""A layer whose run or measurement is not finite: it comes last, it says why, and the others go on."""

import json
import math

import pytest
import torch
from scored import LAYERS, LENGTH, score, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.run.plots import plot_scores
from hf_hybrid.selection import layers_within
from hf_hybrid.trainers import LayerScore
from hf_hybrid.trainers.distillation import DistillationTrainer


BUDGET = {"tokens_per_layer": 4 * 4 * LENGTH}


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss nan from step 3 on where the student has softmax attention in one of these sets of layers."""
    sets = []
    plain = DistillationTrainer.student_loss

    def student_loss(self, student, inputs):
        loss = plain(self, student, inputs)
        wrong = student.full_attention_layers in sets and self.state.global_step >= 2
        return loss * math.nan if wrong else loss

    monkeypatch.setattr(DistillationTrainer, "student_loss", student_loss)
    return sets


def test_the_others_go_on_and_it_comes_last(pair, poisoned, tmp_path):
    given = {"output_dir": tmp_path / "kept", **BUDGET}
    whole = score(*pair, tmp_path, "ga-s2", **BUDGET)
    poisoned.append([1])
    found = score(*pair, tmp_path, "ga-s2", **given)
    assert found.diverged == [1] and found.ranking == [*(layer for layer in whole.ranking if layer != 1), 1]
    lost = found.scores[1]
    assert math.isnan(lost.value) and math.isnan(lost.kl) and lost.diverged == "the loss is nan at step 3 of 4"
    for a, b in zip(whole.scores, found.scores, strict=True):
        assert a.layer == 1 or a.per_sequence == b.per_sequence
    text = str(found)
    assert "│    4 │     1 │ diverged │" in text
    assert "layer 1 diverged and comes last: the loss is nan at step 3 of 4; to try it again, delete " in text
    assert found.top(3) == [0, 2, 3] and found.top(LAYERS) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"\[1\] diverged, so there is no gap"):
        found.gap(0, 1)
    found.save(tmp_path / "scores.json")
    assert "NaN" not in (tmp_path / "scores.json").read_text()
    loaded = hh.LayerScores.load(tmp_path / "scores.json")
    assert loaded.diverged == [1] and loaded.ranking == found.ranking and str(loaded) == text
    plot_scores(found, found.top(2), tmp_path / "scores.png")
    # Not tried again by itself, and as soon as its file is gone.
    again = score(*pair, tmp_path, "ga-s2", **given)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    poisoned.clear()
    assert score(*pair, tmp_path, "ga-s2", **given).diverged == [1]
    (tmp_path / "kept" / "layer_001.json").unlink()
    tried = score(*pair, tmp_path, "ga-s2", **given)
    assert tried.diverged == [] and [s.value for s in tried.scores] == [s.value for s in whole.scores]


def test_it_is_not_kept_as_softmax_without_a_word():
    layers = [LayerScore.of_rows(0, [0.5, 0.7]), LayerScore.of_diverged(1, "why"), LayerScore.of_rows(2, [0.1, 0.2])]
    for higher in (False, True):
        scores = hh.LayerScores(layers, baseline=0.9, higher_is_better=higher)
        assert scores.ranking[-1] == 1 and scores.top(2) == [0, 2] and scores.top(3) == [0, 1, 2]
        assert layers_within(scores, [10] * 3, [1] * 3, 30) == [0, 2]
    trained = hh.LayerScores(layers, tokens_forward_backward=9)
    assert layers_within(trained, [10] * 3, [1] * 3, 30) == [0, 2]
    one = hh.LayerScores([layers[1], layers[0]])
    with pytest.raises(ValueError, match=r"layers \[1\] of ga-s2 diverged and come last, and the best 2 would have"):
        hh.LayerScores([*one.scores, LayerScore.of_diverged(2, "why")]).top(2)


def test_all_of_them_rank_nothing(pair, poisoned, tmp_path):
    poisoned += [[layer] for layer in range(LAYERS)]
    for _ in range(2):
        with pytest.raises(
            ValueError, match="all 4 layers diverged.*the loss is nan at step 3 of 4; lower the learning"
        ):
            score(*pair, tmp_path, "ga-s2", output_dir=tmp_path / "kept", **BUDGET)


def test_in_rounds(pair, poisoned, tmp_path):
    """It leaves after the second round, and comes after those that halving stopped."""
    options = {"rounds": 4, "halving": True, "noise": 0.0}
    plain = score(*pair, tmp_path, "ga-s2", k=1, options=options, **BUDGET)
    best = plain.ranking[0]
    poisoned.append([best])
    found = score(*pair, tmp_path, "ga-s2", k=1, options=options, output_dir=tmp_path / "kept", **BUDGET)
    assert found.ranking[-1] == best and found.diverged == [best] and sorted(found.ranking) == [0, 1, 2, 3]
    assert found.scores[best].curve == plain.scores[best].curve[:2]
    again = score(*pair, tmp_path, "ga-s2", k=1, options=options, output_dir=tmp_path / "kept", **BUDGET)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())


def test_a_set_that_is_proposed(pair, poisoned, tmp_path):
    plain = score(*pair, tmp_path, "verified", k=1, **BUDGET)
    sets = [verdict["layers"] for verdict in plain.options["distilled"]]
    assert len(sets) > 1
    poisoned.append(sets[0])
    found = score(*pair, tmp_path, "verified", k=1, output_dir=tmp_path / "kept", **BUDGET)
    assert found.top(1) == sets[1] and found.options["distilled"][-1]["diverged"] == "the loss is nan at step 3 of 4"
    assert f"the set {sets[0]} (" in str(found)
    poisoned += sets
    with pytest.raises(ValueError, match="all sets that were proposed diverged"):
        score(*pair, tmp_path, "verified", k=1, **BUDGET)


@pytest.mark.parametrize("method", ["shared", "distilled-greedy", "gates"])
def test_the_one_run_of_a_method_ends_it(method, pair, monkeypatch, tmp_path):
    plain = DistillationTrainer.student_loss
    monkeypatch.setattr(DistillationTrainer, "student_loss", lambda *given: plain(*given) * math.nan)
    with pytest.raises(
        ValueError, match="the loss is nan at step 1 of 4, and nothing is kept of it; lower the learning"
    ):
        score(*pair, tmp_path, method, output_dir=tmp_path / "kept", **BUDGET)
    assert [path.name for path in (tmp_path / "kept").glob("*.json")] == ["settings.json"]
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_a_vocabulary_that_only_the_student_masks_is_said_in_words(pair, tmp_path):
    teacher = pair[0]
    student = weak_student(teacher)
    bias = torch.zeros(teacher.config.vocab_size)
    bias[-5:] = -torch.inf
    student.lm_head.bias = torch.nn.Parameter(bias)
    with pytest.raises(ValueError, match="student has a held-out KL of inf.*: the teacher says tokens that it cannot"):
        score(teacher, student, tmp_path, "zero-shot")
