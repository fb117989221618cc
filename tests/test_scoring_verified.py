"""Three proposals and a short distillation between them; what all methods share is in tests/test_scoring.py."""

import itertools
from types import SimpleNamespace

import pytest
from scored import LAYERS, LENGTH, arguments, kl_with, rows, score, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.trainers.held_out import standard_error
from hf_hybrid.trainers.scoring import verified as scoring_verified
from hf_hybrid.trainers.scoring.scores import LayerScore


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


class Table:
    """A job whose KL is a function of the linear layers, and which counts the sets that it is asked for."""

    def __init__(self, num_layers, loss):
        self.num_layers, self.layers, self.all_layers = num_layers, list(range(num_layers)), range(num_layers)
        self.loss, self.asked = loss, []
        self.both = SimpleNamespace(keep=lambda kept: setattr(self, "linear", set(self.layers) - set(kept)))

    def once(self, name, work):
        return work()

    def kl(self):
        self.asked.append(frozenset(self.linear))
        return [self.loss(self.linear)]

    def say(self, *_):
        pass

    def alone(self):
        return [LayerScore.of_rows(layer, [self.loss({layer})]) for layer in self.layers]


def stand_ins(linear):
    """Layers 1 and 4 do the same, as nothing else does; 0 and 3 are two hops, of which either breaks both."""
    return 0.6 * ({1, 4} <= linear) + 0.3 * bool({0, 3} & linear) + 0.01 * len(linear)


@pytest.mark.parametrize(("k", "expected"), [(0, []), (1, [1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (6, [*range(6)])])
def test_lazy_removal_sees_layers_that_stand_in_for_one_another(k, expected):
    job = Table(6, stand_ins)
    assert scoring_verified._lazy_removal(job, job.both, job.alone(), k) == expected
    assert len(set(job.asked)) == len(job.asked) <= 2 * 6


def test_lazy_removal_is_removal_where_losses_only_grow():
    def loss(linear):
        costs = (0.2, 0.05, 0.4, 0.1, 0.3)
        return sum(costs[i] for i in linear) + sum(0.1 * costs[i] * costs[j] for i in linear for j in linear if i < j)

    job, kept = Table(5, loss), [*range(5)]
    for k in (4, 3, 2, 1):
        kept.remove(min(kept, key=lambda layer: loss({*range(5)} - {*kept} | {layer})))
        assert scoring_verified._lazy_removal(job, job.both, job.alone(), k) == kept


def test_lazy_removal_measures_again_only_what_is_next_to_go():
    """Where losses add up, what a layer costs stays the same, so each removal but the first measures one."""
    job = Table(6, lambda linear: sum(1 + i / 16 for i in linear))
    assert scoring_verified._lazy_removal(job, job.both, job.alone(), 1) == [5]
    assert len(job.asked) == 4


def proposed(pair, k):
    """What each layer costs alone, and the k that cost most."""
    teacher, student = pair
    alone = {layer: kl_with(student, teacher, set(range(LAYERS)) - {layer}) for layer in range(LAYERS)}
    best = sorted(alone, key=lambda layer: -alone[layer])[:k]
    return alone, best


def test_proposals_that_agree_cost_no_training(pair, tmp_path):
    teacher, student = pair
    alone, best = proposed(pair, 2)
    two = {"proposals": ["zero-shot-linearise", "lazy-removal"]}
    found = score(teacher, student, tmp_path, "verified", k=2, options=two)
    assert found.options["proposals"] == {"zero-shot-linearise": sorted(best), "lazy-removal": sorted(best)}
    assert found.top(2) == sorted(best) and found.order == best
    assert {s.layer: s.value for s in found.scores} == pytest.approx(alone, abs=1e-5)
    assert found.tokens == 0 and found.options["distilled"] == []
    assert f"all proposals are {sorted(best)}, so nothing was distilled" in str(found)
    with pytest.raises(ValueError, match="chose its layers for k=2"):
        found.top(1)


@pytest.mark.parametrize(("k", "every"), [(0, []), (LAYERS, [*range(LAYERS)])])
def test_none_and_all_need_no_decision(pair, tmp_path, k, every):
    found = score(*pair, tmp_path, "verified", k=k)
    assert found.top(k) == every and found.tokens == 0


def test_the_third_proposal_is_the_alignments(pair, tmp_path):
    teacher, student = pair
    found = score(teacher, student, tmp_path / "a", "verified", k=1)
    residuals = score(teacher, student, tmp_path / "b", "ga-s1")
    assert found.options["proposals"]["ga-s1"] == residuals.top(1)


def test_where_they_differ_the_distilled_student_with_the_lowest_kl_is_taken(pair, tmp_path, monkeypatch):
    teacher, student = pair
    _, best = proposed(pair, 2)
    first = sorted(best)
    others = [list(s) for s in itertools.combinations(range(LAYERS), 2) if list(s) != first]
    for number, (second, third) in enumerate([*zip(others, others[1:], strict=False), (others[0], first)]):
        monkeypatch.setattr(scoring_verified, "_lazy_removal", lambda *_, found=second: found)
        distances = [LayerScore.of_rows(i, [float(i in third)], is_kl=False) for i in range(LAYERS)]
        monkeypatch.setattr(scoring_verified, "alignment_distances", lambda *_, found=distances: found)
        folder = tmp_path / str(number)
        found = score(teacher, student, folder, "verified", k=2, output_dir=folder)
        kls = {}
        for layers in {tuple(first), tuple(second), tuple(third)}:
            hybrid = hh.convert(teacher, [])
            hybrid.load_state_dict(student.state_dict())
            hybrid.set_full_attention_layers(list(layers), teacher)
            args = arguments(tmp_path / "by_hand", save_strategy="no", logging_strategy="no")
            hh.DistillationTrainer(hybrid, teacher, args, train_dataset=rows(16)).train()
            kls[layers] = hh.held_out_kl(hybrid, teacher, rows(6, seed=9)).mean
        verdicts = found.options["distilled"]
        assert {tuple(v["layers"]): v["kl"] for v in verdicts} == pytest.approx(kls, abs=1e-5)
        assert [v["kl"] for v in verdicts] == sorted(v["kl"] for v in verdicts)
        assert found.top(2) == list(min(kls, key=kls.get))
        assert found.tokens == len(kls) * 2 * 4 * LENGTH
        taken, beaten = (verdict["per_sequence"] for verdict in verdicts[:2])
        lead = [b - a for a, b in zip(taken, beaten, strict=True)]
        assert f"leads the second by {sum(lead) / 6:.4f} ± {standard_error(lead):.4f} row by row" in str(found)
        again = score(teacher, student, folder, "verified", k=2, output_dir=folder)
        assert again.to_dict() == found.to_dict()
    assert student.full_attention_layers == []


def test_it_chooses_among_all_layers(pair, tmp_path):
    teacher, student = pair
    with pytest.raises(ValueError, match="leave out layers="):
        score(teacher, student, tmp_path, "verified", k=1, layers=[0, 1])
