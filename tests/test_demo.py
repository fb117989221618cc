"""The demo with a budget of a few steps: every stage runs, and the report has what it promises."""

import io
import json
from importlib.resources import files

import pytest
import torch
import yaml

import hf_hybrid as hh
from hf_hybrid import demo
from hf_hybrid.demo_data import demo_rows, is_held_out, standard_library_files
from hf_hybrid.synthetic import associative_recall, copying, ordinary_token_ids, task_accuracy


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    recipe = yaml.safe_load(demo.find_recipe("demo").read_text())
    recipe["data"] |= {"held_out_rows": 6, "report_rows": 6}
    for stage in ("align", "distill"):
        recipe[stage] |= {"tokens": 2 * 3 * 256, "batch_size": 3}
    recipe["score"] |= {"tokens_per_layer": 3 * 256, "batch_size": 3}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "find_recipe", lambda name: path)
        made = demo.run_demo(folder / "out", seed=3)
        assert demo.run_demo(folder / "out", seed=3) == made  # the second call finds it finished
    assert json.loads((folder / "out" / "report.json").read_text()) == made
    return made, folder / "out"


def test_report(report):
    made, folder = report
    assert [score["layer"] for score in made["scores"]] == list(range(6))
    assert all(score["kl"] > 0 and score["sem"] > 0 for score in made["scores"])
    assert len(made["selected"]) == 2 and made["uniform"] == [0, 3]
    assert made["selected"] == sorted(sorted(range(6), key=lambda i: made["scores"][i]["kl"])[:2])
    for name, layers in (("selected", made["selected"]), ("uniform", [0, 3]), ("all_linear", [])):
        hybrid = made["hybrids"][name]
        assert hybrid["layers"] == layers and hybrid["kl"] > 0 and 0 <= hybrid["recall"] <= 1
    assert made["teacher"]["recall"] > 0.95
    measured = json.loads((folder / "run" / "evaluation.json").read_text())
    selected = made["hybrids"]["selected"]
    # One measurement of a model, and one number of it everywhere.
    assert (selected["kl"], selected["recall"]) == (measured["kl"], measured["recall"])
    assert made["teacher"]["recall"] == measured["teacher_recall"]
    assert f"| {measured['recall']:.4f} ± " in (folder / "run" / "model" / "README.md").read_text()
    assert made["tokens"]["distill"] == 2 * 3 * 256 and made["tokens"]["score"] == 6 * 3 * 256
    assert (folder / "scores.png").stat().st_size > 10_000


def test_reload_without_the_package_is_exact(report):
    made, _ = report
    assert made["reload"]["max_abs_logit_diff"] == 0
    assert made["reload"]["same_generation"]
    assert made["reload"]["text"].startswith(demo.PROMPT)


def test_table(report):
    from rich.console import Console

    stream = io.StringIO()
    Console(width=100, file=stream).print(demo.comparison_table(report[0]))
    text = stream.getvalue()
    assert "all linear" in text and f"{report[0]['hybrids']['uniform']['kl']:.4f}" in text


class TestTeacher:
    def test_recalls_and_copies(self):
        teacher, ids = hh.embedded_teacher(), ordinary_token_ids(hh.embedded_tokenizer())
        generator = torch.Generator().manual_seed(77)
        for task in (associative_recall, copying):
            for length in (128, 256):
                assert task_accuracy(teacher, *task(8, length, ids, generator)) > 0.95, (task, length)

    def test_knows_python_better_than_chance(self):
        rows = demo_rows(hh.embedded_tokenizer(), 256, 24, 0, "report").with_format("torch")["input_ids"]
        text = torch.stack(list(rows))[::3]
        loss = hh.embedded_teacher()(text, labels=text).loss.item()
        assert loss < 2.6  # log(512) is 6.2

    def test_is_small(self):
        folder = files("hf_hybrid") / "embedded_teacher"
        assert sum(len(path.read_bytes()) for path in folder.iterdir()) < 4_000_000


class TestRows:
    def test_splits_share_nothing(self):
        tokenizer = hh.embedded_tokenizer()
        rows = {split: demo_rows(tokenizer, 64, 30, 0, split)["input_ids"] for split in ("train", "score", "report")}
        seen = [tuple(row) for split in rows.values() for row in split]
        assert len(set(seen)) == 90

    def test_same_seed_same_rows(self):
        tokenizer = hh.embedded_tokenizer()
        first, again, other = (demo_rows(tokenizer, 64, 9, seed, "score")["input_ids"] for seed in (5, 5, 6))
        assert first == again != other

    def test_held_out_files(self):
        names = [name for name, _ in standard_library_files()]
        assert 0.01 < sum(map(is_held_out, names)) / len(names) < 0.1

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="choose one of"):
            demo_rows(hh.embedded_tokenizer(), 64, 3, 0, "test")
