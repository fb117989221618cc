"""Methods that distil one student for each layer: their runs against runs made by hand, and their rounds."""

import copy

import pytest
import torch
from scored import DEAD, LAYERS, LENGTH, Stop, arguments, rows, score
from teachers import tokens

import hf_hybrid as hh


class TestRounds:
    GIVEN = {"tokens_per_layer": 4 * 4 * LENGTH}

    def test_a_curve_changes_nothing(self, dead_layer, tmp_path):
        plain = score(*dead_layer, tmp_path, "ga-s2", **self.GIVEN)
        curved = score(*dead_layer, tmp_path, "ga-s2", options={"rounds": 2}, **self.GIVEN)
        for a, b in zip(plain.scores, curved.scores, strict=True):
            assert a.per_sequence == b.per_sequence and a.curve == []
            assert [point[0] for point in b.curve] == [2 * 4 * LENGTH, 4 * 4 * LENGTH]
            assert b.curve[-1][1:] == [b.value, b.sem] and b.curve[0][1] != b.value

    def test_losers_stop_and_the_others_end_as_without(self, dead_layer, tmp_path):
        plain = score(*dead_layer, tmp_path, "ga-s2", layers=[0, 1, 2], **self.GIVEN)
        options = {"rounds": 2, "halving": True, "noise": 0.0}
        halved = score(*dead_layer, tmp_path, "ga-s2", layers=[0, 1, 2], k=1, options=options, **self.GIVEN)
        assert halved.order == plain.ranking and halved.order[-1] == DEAD
        for a, b in zip(plain.scores, halved.scores, strict=True):
            stopped = b.layer == DEAD
            assert b.tokens == (2 if stopped else 4) * 4 * LENGTH and len(b.curve) == (1 if stopped else 2)
            assert (a.per_sequence == b.per_sequence) != stopped

    def test_a_job_with_fewer_layers_than_are_kept_stops_none(self, dead_layer, tmp_path):
        options = {"rounds": 2, "halving": True, "noise": 0.0}
        part = score(*dead_layer, tmp_path, "ga-s2", layers=[DEAD], k=2, options=options, **self.GIVEN)
        assert [s.tokens for s in part.scores] == [4 * 4 * LENGTH]
        with pytest.raises(ValueError, match="k=2 layers cannot be chosen from 1"):
            score(*dead_layer, tmp_path, "zero-shot-greedy", layers=[DEAD], k=2)

    def test_a_stable_choice_ends_it_and_an_interrupted_one_goes_on(self, dead_layer, tmp_path):
        options = {"rounds": 4, "stability_window": 1}
        given = {"k": 1, "layers": [0, DEAD], "options": options, "output_dir": tmp_path / "kept", **self.GIVEN}

        def stop(done, total, text):
            if text.startswith("round 2 of 4"):
                raise Stop

        with pytest.raises(Stop):
            score(*dead_layer, tmp_path, "ga-s2", steps=stop, **given)
        resumed = score(*dead_layer, tmp_path, "ga-s2", **given)
        assert resumed.top(1) == [0] and resumed.order == []
        assert [s.tokens for s in resumed.scores] == [2 * 4 * LENGTH] * 2
        whole = score(*dead_layer, tmp_path, "ga-s2", **{**given, "output_dir": None})
        assert [s.per_sequence for s in whole.scores] == [s.per_sequence for s in resumed.scores]
        assert not (tmp_path / "kept" / "rounds").exists()

    def test_bad_options(self, dead_layer, tmp_path):
        with pytest.raises(ValueError, match="a run of 2 steps has no 3 rounds"):
            score(*dead_layer, tmp_path, "ga-s2", options={"rounds": 3})


@pytest.mark.slow
def test_avg_s2_is_the_mean_of_two_ranks(dead_layer, tmp_path):
    ga, gr, mean = (score(*dead_layer, tmp_path, method) for method in ("ga-s2", "gr-s2", "avg-s2"))
    for layer, found in enumerate(mean.scores):
        assert found.value == (ga.ranking.index(layer) + gr.ranking.index(layer)) / 2 + 1
    assert mean.tokens == ga.tokens + gr.tokens


def test_gr_s2_is_a_run_of_its_own(dead_layer, tmp_path):
    """Layer 1's score equals linearising it by hand, distilling on the same batches and measuring."""
    teacher, student = dead_layer
    twin = copy.deepcopy(student)
    twin.set_full_attention_layers([0, 2, 3], teacher)
    args = arguments(tmp_path, max_steps=2, save_strategy="no", disable_tqdm=True)
    hh.DistillationTrainer(model=twin, teacher=teacher, args=args, train_dataset=rows(16)).train()
    wanted = hh.held_out_kl(twin, teacher, rows(6, seed=9), 3).mean
    assert score(*dead_layer, tmp_path, "gr-s2").scores[1].kl == pytest.approx(wanted, rel=1e-6)


def test_ga_s1_is_the_alignment_loss(dead_layer, tmp_path):
    teacher, student = dead_layer
    trainer = hh.AlignmentTrainer(model=student, teacher=teacher, args=hh.AlignmentConfig(str(tmp_path), use_cpu=True))
    with torch.no_grad():
        losses = trainer.layer_losses(student, {"input_ids": tokens(6, LENGTH, 9)})
    scores = score(teacher, student, tmp_path, "ga-s1").scores
    assert [s.value for s in scores] == pytest.approx([losses[i].item() for i in range(LAYERS)], rel=1e-5)
