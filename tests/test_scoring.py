"""What all scoring methods have in common, against teachers in which the answer is known."""

import copy
import json
import math

import pytest
import torch
from scored import DEAD, EVERY, LAYERS, LENGTH, Stop, arguments, recall_task, rows, score, step_of, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.trainers.scoring.job import Job
from hf_hybrid.trainers.scoring.methods import check_request
from hf_hybrid.trainers.scoring.rules import POSITIONAL


# A random model predicts random text no better with a layer than without.
UNORDERED = (*POSITIONAL, "smart", "ablation-ppl", "ablation-recall")


@pytest.mark.parametrize("method", [method for method in EVERY if method not in UNORDERED])
def test_a_layer_whose_attention_does_nothing_comes_last(method, dead_layer, tmp_path):
    teacher, student = dead_layer
    changes = {"k": 3} if EVERY[method].needs_k else {}
    scores = score(teacher, student, tmp_path, method, **changes)
    assert scores.ranking[-1] == DEAD
    assert sorted(scores.ranking) == list(range(LAYERS)) and scores.top(4) == [0, 1, 2, 3]
    assert scores.method == method and scores.measured_on["eval_tokens"] == 6 * LENGTH


@pytest.mark.parametrize(
    "method", [m.name for m in EVERY.values() if not m.needs_student and m.name not in POSITIONAL]
)
def test_what_does_nothing_scores_zero(method, dead_layer, tmp_path):
    values = {s.layer: s.value for s in score(*dead_layer, tmp_path, method).scores}
    assert values.pop(DEAD) == pytest.approx(0, abs=1e-6)
    assert all(abs(value) > 1e-4 for value in values.values())


# These make the same runs as ga-s2, or twice as many.
# The mean of two methods, avg-s2, is compared with them in test_scoring_distill.py.
ALL = [pytest.param(m, marks=pytest.mark.slow if m == "gr-s2" else ()) for m in EVERY if m != "avg-s2"]


@pytest.mark.parametrize("method", ALL)
def test_the_student_and_the_teacher_are_given_back_as_they_were(method, dead_layer, tmp_path):
    teacher, student = dead_layer[0], copy.deepcopy(dead_layer[1]).eval()
    student.model.layers[1].self_attn.q_proj.requires_grad_(False)
    before = [copy.deepcopy(model.state_dict()) for model in (teacher, student)]
    parameters = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    modes = [(module, module.training) for module in student.modules()]
    score(teacher, student, tmp_path, method)
    for model, state in zip((teacher, student), before, strict=True):
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert student.full_attention_layers == [] and all(p.grad is None for p in student.parameters())
    # The very tensors, so that an optimizer made before still has them, frozen or not as they were; and the modes.
    after = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    assert [(id(parameter), trains) for parameter, trains in after] == [(id(p), trains) for p, trains in parameters]
    assert all(module.training == mode for module, mode in modes)
    assert student._keep_in_fp32_modules_strict == student._kept_in_fp32()


@pytest.mark.parametrize("method", ["ga-s2", "zero-shot", "zero-shot-linearise", "shared", "zero-shot-greedy"])
def test_a_layer_whose_mixer_is_exact_comes_last(method, dead_layer, tmp_path):
    """Sliding-window attention over the whole row is the teacher's own: restoring it gives nothing."""
    teacher, exact = tiny_teacher("llama"), 1
    with torch.no_grad():
        teacher.load_state_dict(dead_layer[0].state_dict())
        teacher.model.layers[DEAD].self_attn.o_proj.weight.normal_(0, 0.05)
    mixers = ["sliding_window" if i == exact else "gated_deltanet" for i in range(LAYERS)]
    student = weak_student(teacher, mixer=mixers, mixer_options={"sliding_window": {"window": LENGTH}})
    scores = score(teacher, student, tmp_path, method, **({"k": 3} if EVERY[method].needs_k else {}))
    assert scores.ranking[-1] == exact
    if method == "zero-shot":
        assert scores.scores[exact].kl == pytest.approx(scores.baseline, rel=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_same_seed_same_scores_and_json_goes_round(method, dead_layer, tmp_path):
    first, second = (score(*dead_layer, tmp_path, method) for _ in range(2))
    assert [s.value for s in first.scores] == [s.value for s in second.scores] and first.order == second.order
    first.save(tmp_path / "scores.json")
    loaded = hh.LayerScores.load(tmp_path / "scores.json")
    assert "NaN" not in (tmp_path / "scores.json").read_text()
    assert json.dumps(loaded.to_dict()) == json.dumps(first.to_dict())
    assert loaded.ranking == first.ranking and loaded.top(2) == first.top(2) and str(loaded) == str(first)


# What measures all layers at once keeps one result.
AT_ONCE = ("block-influence", "ga-s1", "path-gradient", "gates")


@pytest.mark.parametrize("method", [m for m in ALL if m.values[0] not in POSITIONAL])
def test_an_interrupted_call_goes_on(method, dead_layer, tmp_path):
    """Stopped at its second report, and called again: nothing is measured twice, and the result is the same."""
    seen = []

    def stop(layer_score):
        seen.append(layer_score)
        if len(seen) == 2:
            raise Stop

    folder = tmp_path / "kept"
    with pytest.raises(Stop):
        score(*dead_layer, tmp_path, method, output_dir=folder, progress=stop)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert len(times) >= (2 if method in AT_ONCE else 3)  # the settings, and what was finished
    resumed = score(*dead_layer, tmp_path, method, output_dir=folder)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole = score(*dead_layer, tmp_path, method)
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores] and resumed.order == whole.order
    assert (resumed.tokens, resumed.tokens_forward) == (whole.tokens, whole.tokens_forward)
    with pytest.raises(ValueError, match="has scores made with seed=42, this call has 1"):
        score(*dead_layer, tmp_path, method, output_dir=folder, args=arguments(tmp_path, seed=1))


@pytest.mark.parametrize("method", ["shared", "gates", "distilled-greedy"])
def test_a_killed_training_run_goes_on_from_its_last_checkpoint(method, dead_layer, tmp_path):
    """Stopped at step 3 of 4, called again: the same result as without, and steps 1 and 2 are not made again."""
    given = {"tokens_per_layer": 4 * 4 * LENGTH, "output_dir": tmp_path / "kept", "checkpoints": 4}
    seen = []

    def stop(done, total, text):
        if step_of(text) == 3:
            raise Stop

    with pytest.raises(Stop):
        score(*dead_layer, tmp_path, method, steps=stop, **given)
    assert list((tmp_path / "kept").glob(f"{method.split('-')[0]}_checkpoints_*/checkpoint-2/files.json"))
    resumed = score(*dead_layer, tmp_path, method, steps=lambda *event: seen.append(event), **given)
    assert [step_of(text) for _, _, text in seen if step_of(text)] == [3, 4]
    whole = score(*dead_layer, tmp_path, method, tokens_per_layer=4 * 4 * LENGTH)
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores] and resumed.order == whole.order
    assert resumed.tokens == whole.tokens == 4 * 4 * LENGTH
    assert not list((tmp_path / "kept").glob("*_checkpoints_*"))


@pytest.mark.parametrize("method", ["shared", "gates", "distilled-greedy"])
def test_killed_after_its_last_step_it_trains_no_more_than_that(method, dead_layer, tmp_path, monkeypatch):
    """Stopped amid an epoch with its last step done and nothing kept of it yet: from there the Trainer would go on."""
    given = {"tokens_per_layer": 3 * 4 * LENGTH, "output_dir": tmp_path / "kept"}

    write = Job.write

    def stop(job, name, data):
        if name == method.split("-")[0]:
            raise Stop
        write(job, name, data)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Job, "write", stop)
        score(*dead_layer, tmp_path, method, **given)
    resumed = score(*dead_layer, tmp_path, method, **given)
    whole = score(*dead_layer, tmp_path, method, **given | {"output_dir": None})
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores] and resumed.order == whole.order
    assert resumed.tokens == whole.tokens == 3 * 4 * LENGTH


def test_what_cannot_be_scored(dead_layer, tmp_path):
    teacher, student = dead_layer
    held_out = rows(6, 9)
    for given, message in (
        ({"method": "best"}, r"method='best' is unknown; choose one of \['ga-s2'"),
        (
            {"method": "zero-shot", "options": {"swap": 1}},
            r"options \['swap'\] are unknown to method='zero-shot'; it",
        ),
        ({"method": EVERY["zero-shot-greedy"], "options": {"swap": 1}}, r"it has \['swaps'\]"),
        ({"method": EVERY["zero-shot-greedy"]}, "chooses layers together and needs k"),
        (
            {"method": EVERY["zero-shot-greedy"], "k": 5},
            r"k=5 layers cannot be chosen from 4; pass an integer in 0\.\.4",
        ),
        ({"method": EVERY["zero-shot-greedy"], "k": 0}, "chooses layers for k=0; pass at least k=1"),
        ({"method": "uniform"}, "needs k, how many layers are kept"),
        ({"method": "ga-s2"}, "trains and needs train_dataset"),
        ({"method": EVERY["shared"], "k": 2}, "trains and needs train_dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            hh.score_layers(student, teacher, None, held_out, args=arguments(tmp_path), **given)
    with pytest.raises(ValueError, match="needs an aligned student; without one choose from"):
        hh.score_layers(None, teacher, None, held_out, args=arguments(tmp_path), method="zero-shot")
    with pytest.raises(ValueError, match=r"max_size=5 layers cannot be restored; pass 1\.\.4"):
        score(teacher, student, tmp_path, "shared", options={"max_size": 5})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ga-s2", {"rounds": "two"}, "option rounds='two' of method='ga-s2' is wrong; pass a whole number from 1"),
        ("ga-s2", {"rounds": 0}, "pass a whole number from 1"),
        ("ga-s2", {"rounds": True}, "pass a whole number from 1"),
        ("ga-s2", {"rounds": 2, "halving": "yes"}, "pass true or false"),
        ("ga-s2", {"halving": True}, "there are rounds=1; pass 2 or more"),
        ("ga-s2", {"rounds": 3, "stability_window": 2}, "compares 3 rounds before the last.*pass rounds of 4"),
        ("ga-s2", {"rounds": 2, "halving": True}, r"with options=\{'rounds': 2, 'halving': True\} needs k"),
        ("shared", {"subset": "all"}, r"pass one of \['sizes', 'single'\]"),
        ("shared", {"max_size": 0}, "pass a whole number from 1"),
        ("zero-shot-greedy", {"swaps": -1}, "pass a whole number from 0"),
        ("gates", {"learning_rate": "1e-2x"}, "pass a number from 0"),
        ("gates", {"ramp": math.nan}, "pass a number from 0 to 1"),
        ("path-gradient", {"until": 2}, "pass a number from 0 to 1"),
        ("ablation-recall", {"by": "f1"}, r"pass one of \['nll', 'accuracy'\]"),
        ("verified", {"proposals": ["magic"]}, r"pass a list with one or more of \['zero-shot-linearise'"),
        ("verified", {"proposals": "ga-s1"}, "pass a list with one or more of"),
        ("verified", {"proposals": []}, "pass a list with one or more of"),
        ("first", {"phase": 1}, "it has none"),
    ],
)
def test_wrong_options_are_found_without_a_model(method, options, message):
    with pytest.raises(ValueError, match=message):
        check_request(EVERY[method], options, 1 if EVERY[method].needs_k else None)


def test_right_options_pass():
    check_request("ga-s2", {"rounds": 4, "halving": True, "noise": 2, "stability_window": 2}, 1)
    check_request(EVERY["shared"], {"max_size": None, "select": "single", "swaps": 1}, None)
    check_request("verified", {"proposals": ("ga-s1", "lazy-removal")}, 0)
    check_request(EVERY["ablation-recall"], {"task": recall_task(), "by": "accuracy"}, None)


def test_other_layers_in_a_folder_are_other_layers(dead_layer, tmp_path):
    """A second call for other layers must not take the first call's numbers for its own."""
    whole = {s.layer: s.value for s in score(*dead_layer, tmp_path, "block-influence").scores}
    for layers in ([0, 1], [2, 3]):
        part = score(*dead_layer, tmp_path, "block-influence", layers=layers, output_dir=tmp_path / "kept")
        assert {s.layer: s.value for s in part.scores} == {layer: whole[layer] for layer in layers}


@pytest.mark.parametrize("method", ["zero-shot-removal", "zero-shot-greedy"])
def test_layers_that_are_compared_are_part_of_the_settings(method, dead_layer, tmp_path):
    given = {"output_dir": tmp_path / "kept", "k": 1}
    score(*dead_layer, tmp_path, method, layers=[0, 1], **given)
    with pytest.raises(ValueError, match=r"has scores made with layers=\[0, 1\], this call has \[2, 3\]"):
        score(*dead_layer, tmp_path, method, layers=[2, 3], **given)


def test_other_training_is_not_mixed_in(dead_layer, tmp_path):
    teacher, student = dead_layer
    given = {"tokens_per_layer": 4 * LENGTH, "layers": [0], "output_dir": tmp_path / "kept"}
    args, held_out = arguments(tmp_path), rows(6, 9)
    hh.score_layers(student, teacher, rows(16), held_out, args=args, **given)
    with pytest.raises(ValueError, match="has scores made with train_rows=16 rows, .*, this call has 16 rows, "):
        hh.score_layers(student, teacher, rows(16, 1), held_out, args=args, **given)
    with pytest.raises(ValueError, match="has scores made with weight_decay=0.0, this call has 0.1"):
        changed = arguments(tmp_path, weight_decay=0.1)
        hh.score_layers(student, teacher, rows(16), held_out, args=changed, **given)


def test_a_gap_is_how_much_better_one_layer_is():
    def of(direction):
        layers = [hh.trainers.LayerScore.of_rows(i, [i + 1.0, 3.0 * i]) for i in range(2)]
        return hh.LayerScores(layers, higher_is_better=direction)

    assert of(False).gap(0, 1) == (2.0, 1.0) and of(True).gap(0, 1) == (-2.0, 1.0) == (-of(True).gap(1, 0)[0], 1.0)
    with pytest.raises(ValueError, match=r"layer 2 was not scored; choose from \[0, 1\]"):
        of(True).gap(0, 2)
    without = hh.LayerScores([hh.trainers.LayerScore(i, 0.5, 0.0, 0, 0.0) for i in range(2)], method="gates")
    with pytest.raises(ValueError, match="gates has no values of single rows"):
        without.gap(0, 1)


def test_scores_of_earlier_versions_load(tmp_path):
    entry = {"layer": 0, "kl": 0.5, "sem": 0.1, "tokens": 10, "seconds": 2.0, "per_sequence": [0.4, 0.6]}
    old = {"scores": [entry], "method": "ga-s2", "seed": 3, "evaluation_tokens": 64, "baseline": 1.5}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    scores = hh.LayerScores.load(tmp_path / "scores.json")
    assert scores.scores[0].value == 0.5 and scores.tokens == 10 and scores.seconds == 2.0 and scores.top(1) == [0]
    assert math.isnan(hh.trainers.LayerScore(0, math.nan, 0, 0, 0).value)
