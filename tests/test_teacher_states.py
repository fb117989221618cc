"""What the teacher says of batches that come again is computed once, and changes no score."""

import dataclasses

import pytest
import torch
from scored import LENGTH, arguments, score, weak_student
from teachers import tiny_teacher, tokens

from hf_hybrid.trainers.teacher_states import TeacherStates


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


BATCH = 4 * LENGTH * 64 * 4  # bytes


@pytest.mark.parametrize(
    ("options", "room", "saved"), [({}, 3, 6), ({}, 2, 4), ({"rounds": 3, "halving": True}, 1, 6)]
)
def test_scores_run_the_teacher_once_for_a_batch(pair, tmp_path, options, room, saved):
    """Of three layers, two have nothing to compute of what is kept: three batches, two, or the one of each round."""
    teacher, student = pair
    passes, found = [0, 0], []
    given = {"tokens_per_layer": 3 * 4 * LENGTH, "layers": [0, 1, 3], "k": 3, "options": options}
    for i, most in enumerate((0, room * BATCH)):
        count = teacher.model.register_forward_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
        scores = score(
            teacher, student, tmp_path, "ga-s2", args=arguments(tmp_path, teacher_states_bytes=most), **given
        )
        count.remove()
        found.append([dataclasses.asdict(s) | {"seconds": 0} for s in scores.scores])
    assert found[0] == found[1] and passes[0] - passes[1] == saved


def test_what_does_not_fit_is_computed_each_time():
    calls = []

    def compute():
        calls.append(1)
        return torch.full((1, 4, 2), float(len(calls)))

    states = TeacherStates(40)
    first, second = ({"input_ids": tokens(1, 4, seed)} for seed in (0, 1))
    for _ in range(3):
        kept, anew = states.of(first, compute), states.of(second, compute)
    assert len(calls) == 4 and kept.max() == 1 and anew.max() == 4
    packed = {**first, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert states.of(packed, compute).max() == 5
