"""How measurements become a choice: rounds, exchanges, gates and draws, on numbers made up for it."""

import math
from types import SimpleNamespace

import pytest
import torch
from scored import LAYERS, LENGTH, arguments, rows, score, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh
from benchmarks.selection.compared import gates, sets, smart
from hf_hybrid.trainers.distillation import DistillationTrainer
from hf_hybrid.trainers.held_out import standard_error
from hf_hybrid.trainers.scoring import distill as scoring_distill
from hf_hybrid.trainers.scoring.scores import LayerScore, LayerScores


class Table:
    """A job whose KL is a function of the softmax layers."""

    def __init__(self, num_layers, kl, **fields):
        self.layers, self.all_layers, self.num_layers = list(range(num_layers)), range(num_layers), num_layers
        self.table, self.kept, self.measured = kl, (), []
        for name, value in fields.items():
            setattr(self, name, value)

    def keep(self, layers):
        self.kept = tuple(sorted(layers))

    def once(self, name, work):
        return work()

    def kl(self):
        self.measured.append(self.kept)
        return [self.table(set(self.kept))]

    def say(self, *_):
        pass

    report = keep_states = say

    def finish(self, scores, **fields):
        return LayerScores(scores, **fields)


def of(*values):
    """Scores of layers 0, 1, ... from the values of two rows."""
    return [LayerScore.of_rows(layer, list(pair)) for layer, pair in enumerate(values)]


class TestStops:
    def test_of_the_worse_half_those_beyond_the_noise(self):
        """Layers 2 and 3 are worse than the second by 0.2 ± 0.1 and 0.2 ± 0.3, row by row."""
        ranked = of((0.1, 0.1), (1.0, 1.0), (1.1, 1.3), (0.9, 1.5))
        assert scoring_distill._losers(ranked, 2, noise=0.5) == [2, 3]
        assert scoring_distill._losers(ranked, 2, noise=1.0) == [2]
        assert scoring_distill._losers(ranked, 2, noise=3.0) == []

    def test_never_one_of_the_best_k_nor_of_the_better_half(self):
        ranked = of(*((float(i), float(i)) for i in range(6)))
        found = {k: scoring_distill._losers(ranked, k, noise=0.0) for k in (1, 3, 4, 6)}
        assert found == {1: [3, 4, 5], 3: [3, 4, 5], 4: [4, 5], 6: []}

    def test_stable_is_the_mean_over_the_last_pairs_of_rounds(self):
        tops = [{0, 1}, {2, 3}, {2, 4}, {2, 4}]  # similarities 0, 1/3, 1
        assert not scoring_distill._stable(tops, 0, 0.0) and not scoring_distill._stable(tops[:2], 2, 0.0)
        for window, similarity in ((1, 1.0), (2, 2 / 3), (3, 4 / 9)):
            assert scoring_distill._stable(tops, window, similarity)
            assert not scoring_distill._stable(tops, window, similarity + 1e-9)

    def test_what_was_stopped_later_comes_first(self, tmp_path, monkeypatch):
        """Three rounds of six layers: 3, 4, 5 stop after the first, 2 after the second."""
        monkeypatch.setattr(scoring_distill, "_advance", advance)
        job = Table(6, lambda kept: 0.0, wanted=1, folder=tmp_path, origin="", step_points=lambda rounds: [1, 2, 3])
        job.restored_afterwards = lambda: _nothing()
        options = {"rounds": 3, "halving": True, "noise": 0.0, "stability_window": 0, "stability": 1.0}
        found = scoring_distill._by_rounds(job, options)
        assert found.order == [0, 1, 2, 3, 4, 5] and [s.tokens for s in found.scores] == [3, 3, 2, 1, 1, 1]


class _nothing:
    def __enter__(self):
        return {}

    def __exit__(self, *error):
        pass


def advance(job, scores, layer, points, number, states, aligned):
    scores[layer] = LayerScore.of_rows(layer, [float(layer), float(layer)])
    scores[layer].tokens = number + 1


class TestGreedy:
    @staticmethod
    def pairs(kept):
        """Layer 0 is the best alone, 1 and 2 the best together."""
        return {(0,): 1.0, (1,): 2.0, (2,): 3.0, (0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.1}.get(tuple(sorted(kept)), 9.0)

    def test_an_exchange_that_lowers_the_kl_most(self):
        job = Table(3, self.pairs, wanted=2)
        plain = sets.greedy(job, job, 0, {})
        swapped = sets.greedy(job, job, 5, {})
        assert (plain.order, plain.k) == ([0, 2], None) and (swapped.order, swapped.k) == ([2, 1], 2)
        assert {s.layer: s.value for s in swapped.scores}[1] == 0.1

    def test_no_more_exchanges_than_asked_for(self):
        """Each exchange lowers the KL: 0 for 3, 1 for 4, 2 for 5."""
        job = Table(6, lambda kept: 10.0 - sum(kept) if len(kept) == 3 else float(sum(kept)), wanted=3)
        tops = [sets.greedy(job, job, swaps, {}).order for swaps in (0, 1, 9)]
        assert [sorted(order) for order in tops] == [[0, 1, 5], [1, 4, 5], [3, 4, 5]]

    def test_smart_takes_what_lowers_the_kl(self, monkeypatch):
        monkeypatch.setattr(smart, "BothAttentions", lambda *_: _nothing())
        monkeypatch.setattr(smart, "single_layers", lambda *_: of((0.9, 0.9), (0.2, 0.2), (0.8, 0.8), (0.3, 0.3)))
        job = Table(4, self.pairs, wanted=2, student=None, teacher=None, baseline=1.0)
        assert smart.smart(job).order == [1, 3]


class TestDraws:
    def test_each_step_draws_another_subset_of_a_size_up_to_the_largest(self):
        job = Table(8, None)
        subsets = sets._RandomSubset(job, list(range(8)), 3)
        seen = []
        for step in range(200):
            subsets.on_step_begin(SimpleNamespace(seed=0), SimpleNamespace(global_step=step), None)
            seen.append(job.kept)
            subsets.on_step_end(None, None, None)
            assert job.kept == ()
        counts = [sum(len(kept) == size for kept in seen) for size in range(9)]
        assert all(30 < count < 75 for count in counts[:4]) and not any(counts[4:])
        assert {i for kept in seen for i in kept} == set(range(8)) and len(set(seen)) > 60

    def test_or_one_layer(self):
        job = Table(8, None)
        subsets = sets._RandomSubset(job, [1, 5], None)
        seen = set()
        for step in range(40):
            subsets.on_step_begin(SimpleNamespace(seed=0), SimpleNamespace(global_step=step), None)
            seen.add(job.kept)
        assert seen == {(1,), (5,)}


class TestGates:
    @pytest.mark.parametrize(
        ("opened", "step", "ramp", "price"),
        [
            ((0.9, 0.9, 0.2), 9, 0.5, 1.0),  # 2 open for a budget of 1: once over
            ((0.9, 0.9, 0.2), 0, 0.5, 0.2),  # the first step of ten
            ((0.9, 0.9, 0.2), 0, 0.0, 1.0),
            ((0.3, 0.3, 0.2), 9, 0.5, 0.0),  # below the budget nothing is earned
        ],
    )
    def test_the_price_of_open_gates(self, opened, step, ramp, price, monkeypatch):
        monkeypatch.setattr(DistillationTrainer, "student_loss", lambda *_: torch.tensor(0.25))
        trainer = object.__new__(gates._GateTrainer)
        trainer.budget, trainer.weight, trainer.ramp = 1, 7.0, ramp
        trainer.state = SimpleNamespace(global_step=step, max_steps=10)
        student = SimpleNamespace(softmax_gates=torch.tensor(opened).logit())
        assert trainer.student_loss(student, {}).item() == pytest.approx(0.25 + 7 * price, abs=1e-5)

    def test_a_part_of_the_way_is_integrated_over_that_part(self, tmp_path):
        """The shares up to a half add up to the fall of the KL at gates half open."""
        from hf_hybrid.trainers.scoring.both_attentions import BothAttentions

        teacher = tiny_teacher("llama")
        student = weak_student(teacher)
        found = score(teacher, student, tmp_path, "path-gradient", options={"points": 8, "until": 0.5})
        with BothAttentions(student, teacher) as both, gates.gated(both, lambda: [0.5] * LAYERS):
            half = hh.held_out_kl(student, teacher, rows(6, 9)).mean
        assert sum(s.value for s in found.scores) == pytest.approx(found.baseline - half, rel=1e-3)


def test_a_standard_error_is_of_the_mean():
    values = [1.0, 2.0, 4.0, 9.0]
    assert standard_error(values) == pytest.approx(torch.tensor(values).std().item() / 2)
    assert standard_error([3.0]) == 0.0 and LayerScore.of_rows(0, values).sem == standard_error(values)


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("zero-shot", LAYERS),
        ("ablation-kl", LAYERS),
        ("ablation-ppl", LAYERS + 1),
        ("block-influence", 1),
        ("ga-s1", 1),
    ],
)
def test_tokens_of_a_measurement(method, passes, tmp_path):
    teacher = tiny_teacher("llama")
    scores = score(teacher, weak_student(teacher), tmp_path, method, args=arguments(tmp_path))
    assert (scores.tokens_forward, scores.tokens) == (passes * 6 * LENGTH, 0)
    assert math.isnan(scores.baseline) == (method not in ("zero-shot", "ga-s1"))
