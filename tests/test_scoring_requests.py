"""What may be asked of scores, and what of it a folder with scores remembers."""

import copy
import math

import pytest
import torch
from scored import EVERY, LAYERS, LENGTH, arguments, score, weak_student
from teachers import tiny_teacher

from hf_hybrid.trainers import LayerScore
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.methods import check_placement, check_request


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("zero-shot", {"layers": []}, r"layers=\[\] leaves nothing to score; pass one or more"),
        ("zero-shot", {"layers": [1, 4]}, r"layers=\[4\] are outside 0\.\.3; the model has 4 layers"),
        ("zero-shot", {"layers": [1.5]}, r"layers=\[1.5\] are outside 0\.\.3"),
        ("zero-shot", {"layers": [True]}, r"layers=\[True\] are outside 0\.\.3"),
        ("zero-shot-greedy", {"k": 2.0}, r"k=2.0 layers cannot be chosen from 4; pass an integer in 0\.\.4"),
        ("distilled-greedy", {"tokens_per_layer": 0}, "tokens_per_layer=0 trains on nothing; pass at least 1"),
        ("uniform", {"layers": [0, 1]}, "method='uniform' chooses among all layers; leave out layers="),
        ("gates", {"layers": [0, 1]}, "method='gates' chooses among all layers; leave out layers="),
        ("smart", {"layers": [0, 1]}, "method='smart' chooses among all layers; leave out layers="),
    ],
)
def test_what_is_refused(pair, tmp_path, method, given, message):
    with pytest.raises(ValueError, match=message):
        score(*pair, tmp_path, method, **given)


def test_no_number_is_infinite():
    with pytest.raises(ValueError, match="option noise=inf of method='ga-s2' is wrong; pass a number from 0"):
        check_request("ga-s2", {"rounds": 2, "halving": True, "noise": float("inf")}, 1)


@pytest.mark.parametrize("method", ["shared", "distilled-greedy", "gates"])
def test_a_student_that_is_needed_whole_is_not_sharded(method, monkeypatch):
    """Said before anything is trained, and not after."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="goes on with the student that it trained, whose weights FSDP2 shards"):
        check_placement(EVERY[method], False)
    check_placement("ga-s2", False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_placement(EVERY[method], False)


def test_another_number_of_layers_takes_the_scores_that_do_not_depend_on_it(pair, tmp_path):
    """Also where an earlier version wrote it down."""
    given = {"tokens_per_layer": 4 * LENGTH, "layers": [1], "output_dir": tmp_path / "kept"}
    first = score(*pair, tmp_path, "ga-s2", k=1, **given)
    times = (tmp_path / "kept" / "layer_001.json").stat().st_mtime_ns
    assert score(*pair, tmp_path, "ga-s2", k=2, **given).scores == first.scores
    assert (tmp_path / "kept" / "layer_001.json").stat().st_mtime_ns == times
    job = Job(EVERY["ga-s2"], *pair, None, arguments(tmp_path), None, [], LAYERS, folder=tmp_path / "old")
    job.write("settings", {"method": "ga-s2", "k": 1})
    job.claim({"method": "ga-s2", "bf16": False})
    with pytest.raises(ValueError, match="has scores made with method=ga-s2, this call has gates"):
        job.claim({"method": "gates", "k": 1})
    ga_s2, shared = EVERY["ga-s2"], EVERY["shared"]
    assert not ga_s2.depends_on_k({"rounds": 2}) and ga_s2.depends_on_k({"rounds": 2, "halving": True})
    assert shared.depends_on_k({"select": "single"})  # its largest subset follows from k
    assert not shared.depends_on_k({"select": "single", "max_size": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True}, "bf16=False, this call has True"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=1.0, this call has 0.5"),
        ({"final_learning_rate": 0.0}, "final_learning_rate=None, this call has 0.0"),
        ({"adam_beta2": 0.9}, "adam_beta2=0.95, this call has 0.9"),
    ],
)
def test_what_decides_a_run_is_remembered(pair, tmp_path, changes, message):
    given = {"tokens_per_layer": 4 * LENGTH, "layers": [1], "output_dir": tmp_path / "kept"}
    score(*pair, tmp_path, "ga-s2", **given)
    with pytest.raises(ValueError, match=f"has scores made with {message}"):
        score(*pair, tmp_path, "ga-s2", args=arguments(tmp_path, **changes), **given)


def test_another_student_is_another_run(pair, tmp_path):
    teacher, student = pair
    score(teacher, student, tmp_path, "zero-shot", output_dir=tmp_path / "kept")
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="has scores made with baseline="):
        score(teacher, other, tmp_path, "zero-shot", output_dir=tmp_path / "kept")


def test_modules_are_given_back_in_their_own_modes(pair, tmp_path):
    """A module in eval mode below one that trains is neither measured nor left otherwise."""
    student = copy.deepcopy(pair[1]).train()
    student.model.layers[1].mlp.eval()
    modes = [module.training for module in student.modules()]
    score(pair[0], student, tmp_path, "zero-shot")
    assert [module.training for module in student.modules()] == modes and len(set(modes)) == 2


def test_nothing_that_is_not_finite_is_kept_or_ranks(pair, tmp_path):
    job = Job(EVERY["ga-s2"], None, pair[0], None, arguments(tmp_path), None, [], LAYERS, folder=tmp_path / "kept")
    for found in ([[0.5, float("nan")]], {"1": [float("inf")]}):
        with pytest.raises(ValueError, match="influence: a measurement is (nan|inf), which ranks nothing"):
            job.once("influence", lambda found=found: found)
    assert not (tmp_path / "kept").exists()
    found = job.score(3, lambda: LayerScore.of_rows(3, [0.1, float("nan")], is_kl=False))
    assert found.diverged == "layer 3: a measurement is nan, which ranks nothing" and math.isnan(found.value)
