"""The selection benchmark's own training loop against the package's trainers, and its bookkeeping."""

import json

import pytest
import torch

import hf_hybrid as hh
from benchmarks.selection import analysis, ga_s2, methods, truth
from benchmarks.selection import student as students
from benchmarks.selection.data import (
    ALIGN_LENGTH,
    BATCH,
    SELECT_ROWS,
    TEACHERS,
    aligned_path,
    append_line,
    load_teacher,
    read_lines,
    rows,
)
from benchmarks.selection.stack import stack
from hf_hybrid.trainers.held_out import held_out_kl
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters


NAME, STEPS, KEEP = "embedded", 2, [2, 4]


@pytest.fixture(scope="module")
def data():
    teacher = load_teacher(NAME).requires_grad_(False)
    data = students.Data(NAME, 0, teacher, None, STEPS, STEPS)
    for key in ("held_out", "answers", "held_out_reference"):  # a few rows suffice here
        setattr(data, key, getattr(data, key)[:1])
    return teacher, data


def student_of(teacher, values):
    """A hybrid of the package with the all-linear parameters in `values`."""
    student = hh.convert(teacher, [])
    missing, unexpected = student.load_state_dict(
        {name.removeprefix("model."): value for name, value in values.items() if name.startswith("model.")},
        strict=False,
    )
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return student


def test_alignment_is_the_trainers(data, tmp_path):
    teacher, rows_of = data
    values = students.fresh_values(NAME, 3)
    aligned = students.Students(teacher, rows_of).align(values, STEPS)
    student = student_of(teacher, values)
    dataset = rows(TEACHERS[NAME].mix, "align", 0, STEPS * BATCH, length=ALIGN_LENGTH).dataset()
    args = hh.AlignmentConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=students.ALIGN_LR,
        train_sampling_strategy="sequential", use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    hh.AlignmentTrainer(student, teacher, args, train_dataset=dataset).train()
    for name, theirs in student.named_parameters():
        torch.testing.assert_close(
            aligned[f"model.{name}"], theirs, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# One student computes the branch that runs; of several at once, as in the CUDA graphs, both, and a mask chooses.
@pytest.mark.parametrize("sets", [[KEEP], [[0, 1], KEEP, []]])
def test_distillation_is_the_trainers(data, tmp_path, sets):
    teacher, rows_of = data
    values = students.fresh_values(NAME, 3)
    several = students.Students(teacher, rows_of, len(sets))
    before = several.zero_shot(values, sets)[sets.index(KEEP)].item()
    found = several.distill(values, sets, STEPS, [1])
    assert list(found) == [1, STEPS]
    ours = found[STEPS][sets.index(KEEP), :, 0]

    student = student_of(teacher, values)
    student.set_full_attention_layers(KEEP, teacher)
    held_out = rows(TEACHERS[NAME].mix, "score", 0, SELECT_ROWS).dataset().select(range(len(ours)))
    assert held_out_kl(student, teacher, held_out).mean == pytest.approx(before, abs=2e-4)
    dataset = rows(TEACHERS[NAME].mix, "train", 0, STEPS * BATCH).dataset()
    args = hh.DistillationConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=students.LR,
        mixer_learning_rate=students.MIXER_LR, train_sampling_strategy="sequential", use_cpu=True, save_strategy="no",
        logging_strategy="no",
    )  # fmt: skip
    hh.DistillationTrainer(student, teacher, args, train_dataset=dataset).train()
    theirs = held_out_kl(student, teacher, held_out)
    assert ours.tolist() == pytest.approx(theirs.per_sequence, abs=2e-4)


def test_students_stacked_do_not_touch_one_another(data):
    teacher, rows_of = data
    values = students.fresh_values(NAME, 3)
    several = students.Students(teacher, rows_of, 3)
    alone = several.distill(values, [[2]] * 3, STEPS)[STEPS]
    beside = several.distill(values, [[2], [], [2, 4]], STEPS)[STEPS]
    torch.testing.assert_close(beside[0], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[1], alone[0], atol=1e-5, rtol=0)
    assert (beside[1:, :, 0] - alone[1:, :, 0]).abs().max() > 0.1
    with pytest.raises(ValueError, match="2 sets of layers for 3 students"):
        several.set_keep([[], []])


def test_stacking_refuses_what_it_does_not_know():
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3))
    with pytest.raises(ValueError, match="Conv1d holds parameters {'weight': \\(2, 2, 3\\), 'bias': \\(2,\\)}"):
        stack(module, 2)


def test_rows_are_disjoint_and_cached(tmp_path):
    mix = (2, 2, 2, 1, 1)
    first = {split: rows(mix, split, 0, 16, tmp_path) for split in ("align", "train", "score", "report")}
    for split, drawn in first.items():
        again = rows(mix, split, 0, 16, tmp_path)
        assert torch.equal(drawn.input_ids, again.input_ids) and torch.equal(drawn.answers, again.answers)
        assert (
            drawn.kinds
            == again.kinds
            == ["text"] * 2
            + ["recall"] * 2
            + ["copying"] * 2
            + ["chained", "hops3"]
            + (["text"] * 2 + ["recall"] * 2 + ["copying"] * 2 + ["chained", "hops3"])
        )
        assert not drawn.answers[0].any() and drawn.answers[2].sum() == 32
    seen = [tuple(row) for drawn in first.values() for row in drawn.input_ids.tolist()]
    assert len(set(seen)) == len(seen)


def test_a_line_cut_short_costs_that_line_alone(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    append_line(path, {"a": 2})
    path.write_bytes(path.read_bytes()[:-4])
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}] and path.read_text().count("\n") == 3


def test_wanted_sets_resume_and_start_with_the_best_pair(tmp_path):
    line = {"teacher": "t", "seed": 0, "steps": 5, "kl": 0.0}
    lines = [
        line | {"layers": [a, b], "select": {"5": [kl, 0.0]}} for (a, b), kl in {(0, 1): 3.0, (1, 3): 1.0}.items()
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    assert list(truth.wanted_sets("t", 4, 0, [0, 2], tmp_path)) == [[], [0, 2], [0, 3], [1, 2], [2, 3]]
    assert list(truth.wanted_sets("t", 4, 0, [3], tmp_path))[:2] == [[0, 1, 3], [1, 2, 3]]
    assert list(truth.wanted_sets("t", 4, 1, [-1], tmp_path))[0] == [0, 1, 2]


def test_selectors_run_through_score_layers(data, tmp_path):
    teacher, _ = data
    student = student_of(teacher, students.fresh_values(NAME, 3))
    train = rows(TEACHERS[NAME].mix, "train", 0, STEPS * BATCH).dataset()
    held_out = rows(TEACHERS[NAME].mix, "score", 0, SELECT_ROWS).dataset().select(range(2))
    for label in ("zero-shot-linearise", "uniform-last", "ablation-recall"):
        found = methods.run_method(methods.METHODS[label], student, teacher, train, held_out, 0, "cpu")
        assert [len(found["sets"][k]) for k in methods.KS] == [1, 2, 3] and found["tokens"] == 0
        if label == "uniform-last":
            assert found["sets"] == {1: [5], 2: [2, 5], 3: [1, 3, 5]} and found["tokens_forward"] == 0
        else:
            assert set(found["values"]) == set(range(6)) and found["tokens_forward"] >= 6 * 2 * 128
            assert found["sets"][3] == sorted(found["order"])


def test_selectors_run_in_processes_and_resume(data, tmp_path, capfd):
    teacher, _ = data
    student = student_of(teacher, students.fresh_values(NAME, 3))
    (tmp_path / "aligned").mkdir()
    torch.save([p.detach() for p in mixer_parameters(student)], aligned_path(tmp_path, NAME, 3))
    aligned_path(tmp_path, NAME, 4).write_text("garbage")
    command = ["--cache", str(tmp_path), "--rows", str(tmp_path), "--train-rows", "8", "--processes", "2"]
    command += ["--teachers", NAME, "--methods", "block-influence", "zero-shot-linearise"]
    with pytest.raises(SystemExit, match="2 selectors failed"):
        methods.compute(methods.parser().parse_args([*command, "--seeds", "3", "4", "5"]))
    said = capfd.readouterr().out
    assert f"{NAME}, seed 4: block-influence failed" in said
    assert f"{NAME}, seed 5: 2 selectors not run, there is no {aligned_path(tmp_path, NAME, 5)}" in said
    kept = methods.results_path(tmp_path, NAME, 3).read_text()
    assert not methods.results_path(tmp_path, NAME, 4).exists()

    records = {line["method"]: line for line in read_lines(methods.results_path(tmp_path, NAME, 3))}
    assert set(records) == {"block-influence", "zero-shot-linearise"}
    held_out = rows(TEACHERS[NAME].mix, "score", 3, SELECT_ROWS).dataset()
    args = hh.DistillationConfig(output_dir=str(tmp_path / "x"), use_cpu=True, report_to="none")
    expected = hh.score_layers(student, teacher, None, held_out, args=args, method="zero-shot-linearise")
    for score in expected.scores:
        assert records["zero-shot-linearise"]["values"][str(score.layer)] == pytest.approx(score.value, abs=1e-5)

    methods.compute(methods.parser().parse_args([*command, "--seeds", "3"]))
    methods.compute(methods.parser().parse_args([*command, "--seeds", "3", "--seconds", "-1"]))
    assert methods.results_path(tmp_path, NAME, 3).read_text() == kept


def test_ga_s2_is_read_from_the_ground_truth_and_its_seconds_from_its_run(tmp_path):
    kls = {(0,): 0.5, (1,): 0.2, (2,): 0.4}
    lines = [
        {"seed": 0, "layers": list(s), "steps": 4, "kl": kl + 1, "select": {"2": [1 - kl, 0.0], "4": [kl, 0.0]}}
        for s, kl in kls.items()
    ]
    (tmp_path / f"{NAME}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets, values = {"1": [1], "2": [1, 2], "3": [0, 1, 2]}, {"0": 0.5, "1": 0.2, "2": 0.403}
    run = {"method": "ga-s2 (score_layers)", "sets": sets, "values": values, "tokens": 9, "tokens_forward": 9}
    append_line(methods.results_path(tmp_path, NAME, 0), run | {"seconds": 7.5})
    append_line(methods.results_path(tmp_path, NAME, 0), run | {"method": "zero-shot", "seconds": 1.0})
    ground = analysis.read_ground(tmp_path, NAME)
    ground.num_layers = 3
    found = {choice.method: choice for choice in analysis.choices(tmp_path, ground)}
    assert set(found) == {"zero-shot", "ga-s2", "ga-s2, 2 steps"}
    assert found["ga-s2"].seconds == 7.5 and found["ga-s2"].tokens == 3 * 4 * BATCH * 128
    assert found["ga-s2, 2 steps"].seconds is None and found["ga-s2, 2 steps"].sets[1] == (0,)
    assert analysis.agreement(tmp_path, ground) == [
        {"method": "ga-s2", "teacher": NAME, "seed": 0, "largest": 0.003, "same_sets": True}
    ]


def test_spread_is_split_into_initialisation_and_data():
    by_seed, by_data = (0.0, 3.0, 6.0), (0.0, 0.1, 0.2)
    kl = {(a, str(b)): [x + y, 1.0] for a, x in enumerate(by_seed) for b, y in enumerate(by_data)}
    found = ga_s2._effects(kl, [0, 1, 2], ["0", "1", "2"])
    assert found == pytest.approx((3.0 / 2**0.5, 0.1 / 2**0.5, 0.0), abs=1e-7)
    kl[2, "2"][0] += 0.9  # an interaction: 0.9 (1 - 1/3) (1 - 1/3) and so on, over four degrees of freedom
    assert ga_s2._effects(kl, [0, 1, 2], ["0", "1", "2"])[2] == pytest.approx((0.36 / 4 / 2) ** 0.5)


def test_the_recommended_selector_is_the_cheapest_of_the_good_ones():
    def row(method, regret, cost, test):
        both = {"cost": cost, "teachers": 2}
        dev, all_of_them = both | {"regret": regret, "teachers": 1}, both | {"regret": (regret + test) / 2}
        return {"method": method, "dev": dev} | all_of_them

    rows = [row("dear", 0.0, 0.2, 0.0), row("best", 0.01, 0.09, 0.0), row("near", 0.025, 0.05, 0.9)]
    assert analysis.recommend([*rows, row("bad", 0.05, 0.01, 0.9)], "dev") == "near"
    assert analysis.recommend(rows, "dev", noise=0.01) == "best"
    assert analysis.recommend(rows) == "best"
    assert analysis.recommend([*rows, row("hardly tried", 0.0, 0.0, 0.0) | {"teachers": 1}]) == "best"
    with pytest.raises(ValueError, match="no selector cost 0.01"):
        analysis.recommend(rows, limit=0.01)


def test_lineages_go_back_to_a_plain_initialisation():
    assert analysis.lineage("llama-10-either") == analysis.lineage("llama-9") == "llama-9-start"
    assert analysis.lineage("qwen3-10-either") == analysis.lineage("embedded") == "embedded"


def test_every_set_without_distillation_is_searched(tmp_path):
    kls = {"": 3.0, "0": 1.0, "1": 0.9, "2": 2.0, "0,1": 0.8, "0,2": 0.1, "1,2": 0.5, "0,1,2": 0.0}
    append_line(tmp_path / "zero_shot" / f"{NAME}.jsonl", {"teacher": NAME, "seed": 4, "zero_shot": kls})
    (choice,) = analysis._every_set(tmp_path, analysis.Ground(NAME, 3, {}), [1, 2])
    assert (choice.seed, choice.sets, choice.tokens) == (4, {1: (1,), 2: (0, 2)}, 0)
    assert choice.tokens_forward == 3 * SELECT_ROWS * 128
