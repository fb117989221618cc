"""Methods that choose layers together or train nothing, against hybrids made by hand."""

import pytest
import torch
from scored import LAYERS, LENGTH, kl_with, score


class TestZeroShot:
    def test_scores_are_the_kl_of_hybrids_made_by_hand(self, dead_layer, tmp_path):
        teacher, student = dead_layer
        for score_ in score(teacher, student, tmp_path, "zero-shot").scores:
            assert score_.kl == pytest.approx(kl_with(student, teacher, [score_.layer]), rel=1e-5)
        for score_ in score(teacher, student, tmp_path, "zero-shot-linearise").scores:
            others = [i for i in range(LAYERS) if i != score_.layer]
            assert score_.kl == pytest.approx(kl_with(student, teacher, others), rel=1e-5, abs=1e-6)

    def test_greedy_adds_the_best_layer_to_those_before(self, dead_layer, tmp_path):
        teacher, student = dead_layer
        scores = score(teacher, student, tmp_path, "zero-shot-greedy", k=3)
        order = []
        for chosen in scores.order:
            kls = {i: kl_with(student, teacher, [*order, i]) for i in range(LAYERS) if i not in order}
            assert chosen == min(kls, key=kls.get)
            assert scores.scores[chosen].kl == pytest.approx(kls[chosen], rel=1e-5)
            order.append(chosen)
        assert scores.k is None and scores.top(2) == sorted(order[:2]) and len(order) == 3
        two = score(teacher, student, tmp_path, "zero-shot-greedy", k=2)
        with pytest.raises(
            ValueError, match="chose 2 layers one after the other, and none after those; score with k=3"
        ):
            two.top(3)
        assert scores.tokens == 0 and scores.tokens_forward == (4 + 3 + 2) * 6 * LENGTH

    def test_smart_keeps_its_constraints(self, dead_layer, tmp_path):
        scores = score(*dead_layer, tmp_path, "smart", k=2)
        assert scores.order[0] in (0, 1) and scores.order[1] in (2, 3)
        with pytest.raises(ValueError, match="chose its layers for k=2, which says nothing about k=1"):
            scores.top(1)
        with pytest.raises(ValueError, match="chooses among all layers; leave out layers="):
            score(*dead_layer, tmp_path, "smart", k=1, layers=[0, 1])


class TestShared:
    def test_one_run_for_all_layers(self, dead_layer, tmp_path):
        scores = score(*dead_layer, tmp_path, "shared", k=2)
        assert scores.tokens == 2 * 4 * LENGTH and scores.tokens_forward == (4 + 3) * 6 * LENGTH

    def test_trains_what_it_says(self, dead_layer, tmp_path):
        """With frozen softmax attention the restored layers are the teacher's; trained, they are not."""
        from hf_hybrid.trainers.scoring.both_attentions import BothAttentions

        teacher, student = dead_layer
        changed = {}
        for trained in (False, True):
            seen = []
            keep = BothAttentions.register

            def register(self, registered, seen=seen, keep=keep):
                if not registered and self.registered:
                    own = [attention.q_proj.weight for attention in self.softmax]
                    theirs = [layer.self_attn.q_proj.weight for layer in teacher.model.layers]
                    seen.append([torch.equal(a, b) for a, b in zip(own, theirs, strict=True)])
                keep(self, registered)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(BothAttentions, "register", register)
                options = {"train_softmax": trained, "max_size": 4}
                score(teacher, student, tmp_path, "shared", options=options, tokens_per_layer=4 * 4 * LENGTH)
            changed[trained] = seen[0]
        assert all(changed[False]) and not all(changed[True])
