"""Methods with a gate between the two attentions of each layer."""

import copy

import pytest
from scored import DEAD, LAYERS, LENGTH, arguments, rows, score

import hf_hybrid as hh
from benchmarks.selection.compared import gates
from benchmarks.selection.compared.gates import PATH_GRADIENT, gated


class TestGates:
    def test_the_shares_of_all_layers_add_up_to_the_whole(self, dead_layer, tmp_path):
        scores = score(*dead_layer, tmp_path, "path-gradient", options={"points": 6})
        assert sum(s.value for s in scores.scores) == pytest.approx(scores.baseline, rel=1e-3)
        assert scores.scores[DEAD].value == pytest.approx(0, abs=1e-7)
        assert scores.tokens == 6 * 6 * LENGTH and scores.tokens_forward == 0

    def test_the_price_is_in_units_of_the_first_kl(self, dead_layer, tmp_path, monkeypatch):
        seen = []
        own = gates._GateTrainer.student_loss

        def student_loss(trainer, *given):
            seen.append((trainer.budget, trainer.weight, trainer.ramp))
            return own(trainer, *given)

        monkeypatch.setattr(gates._GateTrainer, "student_loss", student_loss)
        scores = score(*dead_layer, tmp_path, "gates", k=2, options={"penalty": 3.0, "ramp": 0.25})
        assert set(seen) == {(2, 3.0 * scores.baseline, 0.25)}

    def test_the_gradient_at_the_start_is_the_slope(self, dead_layer, tmp_path):
        """
        Against the change of the KL when one gate opens by a little, computed with the gates themselves. The library's
        norms compute in float32, which leaves 2e-9 of the KL open: the little is a thousandth, on both sides.
        """
        from hf_hybrid.trainers.scoring.both_attentions import BothAttentions

        teacher, student = (copy.deepcopy(model).double() for model in dead_layer)
        args = arguments(tmp_path)
        found = hh.score_layers(
            student, teacher, None, rows(6, 9), method=PATH_GRADIENT, args=args, options={"until": 0.0}
        )
        step, kls = 1e-3, []
        with BothAttentions(student, teacher) as both:
            for opened in (-step, step):
                with gated(both, lambda opened=opened: [opened if i == 1 else 0.0 for i in range(LAYERS)]):
                    kls.append(hh.held_out_kl(student, teacher, rows(6, 9)).mean)
        assert found.scores[1].value == pytest.approx((kls[0] - kls[1]) / (2 * step), rel=1e-3)

    def test_gates_open_where_it_pays_and_close_beyond_the_budget(self, dead_layer, tmp_path):
        given = {"tokens_per_layer": 20 * 4 * LENGTH, "k": 1}
        dear, free = (
            score(*dead_layer, tmp_path, "gates", options={"penalty": penalty, "learning_rate": 0.2}, **given)
            for penalty in (30.0, 0.0)
        )
        assert all(s.value > 0.7 for s in free.scores if s.layer != DEAD)
        assert free.scores[DEAD].value == pytest.approx(0.5, abs=0.01)
        assert sum(s.value for s in dear.scores) < 1.5 < sum(s.value for s in free.scores)
        assert dear.k == 1 and len(dear.order) == 1
        with pytest.raises(ValueError, match="at least k=1"):
            score(*dead_layer, tmp_path, "gates", k=0)
