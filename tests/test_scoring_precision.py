"""Scores under mixed precision, which accelerate would otherwise leave on the models for good."""

import pytest
import torch
from scored import LAYERS, LENGTH, arguments, rows, score, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.trainers.precision import Precision


@pytest.fixture
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


@pytest.mark.parametrize("method", ["ga-s2", "shared"])
def test_many_short_runs_in_bf16_leave_no_autocast_behind(method, pair, tmp_path):
    """Each run prepares the same two models; the second one finds them as the first one did."""
    before = [set(model.__dict__) for model in pair]
    scores = score(*pair, tmp_path, method, k=1, args=arguments(tmp_path, bf16=True))
    assert len(scores.scores) == LAYERS and all(s.value > 0 for s in scores.scores)
    assert [set(model.__dict__) for model in pair] == before
    with torch.no_grad():
        ids = torch.arange(LENGTH)[None]
        assert all(model(ids).logits.dtype == torch.float32 for model in pair)


def test_a_student_aligned_in_bf16_is_scored_and_distilled(pair, tmp_path):
    teacher, student = pair
    aligned = hh.AlignmentConfig(str(tmp_path), use_cpu=True, bf16=True, max_steps=2, save_strategy="no")
    hh.AlignmentTrainer(model=student, teacher=teacher, args=aligned, train_dataset=rows(16)).train()
    own, wide = (hh.held_out_kl(model, teacher, rows(6, 9)).mean for model in (student, student.float()))
    assert own == wide
    args = arguments(tmp_path, bf16=True)
    scores = score(teacher, student, tmp_path, "zero-shot", args=args)
    as_it_trains = hh.held_out_kl(student, teacher, rows(6, 9), precision=Precision.of(args)).mean
    assert scores.baseline == pytest.approx(as_it_trains, rel=1e-6) and as_it_trains != own
    trainer = hh.DistillationTrainer(student, teacher, arguments(tmp_path, bf16=True), train_dataset=rows(16))
    trainer.train()
    assert "forward" not in student.__dict__ and "forward" not in teacher.__dict__
