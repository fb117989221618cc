"""What a folder of scores takes for its own, and where a killed run inside of one layer goes on."""

import copy
import dataclasses
import json
import shutil

import datasets
import pytest
import torch
from runs import copy_run
from scored import LAYERS, LENGTH, Stop, arguments, rows, score, step_of, weak_student
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe, score_part
from hf_hybrid.trainers.durable import held
from hf_hybrid.trainers.scoring.job import Job


STEPS = 4
BUDGET = {"tokens_per_layer": STEPS * 4 * LENGTH}


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_teacher("llama")
    return teacher, weak_student(teacher)


def values(scores):
    return [(s.layer, s.value, s.per_sequence, s.tokens, s.curve) for s in scores.scores]


class TestOrigin:
    def test_a_job_that_outlives_its_folder_does_not_write_into_the_next(self, pair, tmp_path):
        """A job for layer 2 is training while the folder is set aside and given to scores of four times the tokens."""
        folder, other = tmp_path / "scores", copy.deepcopy(pair)
        short, long = ({"tokens_per_layer": n * 4 * LENGTH, "output_dir": folder} for n in (1, 4))

        def set_aside(*event):
            if folder.exists() and not (tmp_path / "aside").exists():
                folder.rename(tmp_path / "aside")
                score(*other, tmp_path, "ga-s2", layers=[0, 1], **long)

        with pytest.raises(ValueError, match="was set aside, or has other scores, since this call began"):
            score(*pair, tmp_path, "ga-s2", layers=[2], steps=set_aside, **short)
        assert not (folder / "layer_002.json").exists() and not (tmp_path / "aside" / "layer_002.json").exists()
        found = score(*pair, tmp_path, "ga-s2", **long)
        assert [s.tokens for s in found.scores] == [4 * 4 * LENGTH] * LAYERS and found.notes == []

    def test_nor_does_a_job_of_the_command_line(self, finished, tmp_path, monkeypatch):
        """`--layers 2` is training while `--from score` makes scores of four times the tokens."""
        copy_run(finished.folder, tmp_path / "run", "score")
        short = Recipe.load(tmp_path / "run" / "recipe.yaml")
        long = dataclasses.replace(short, score=dataclasses.replace(short.score, tokens_per_layer=8 * 4 * 64))
        distil, outlived = Job.distil, []

        def outliving(job, name, **given):
            distil(job, name, **given)
            if not outlived:
                outlived.append(name)
                run_recipe(long, tmp_path / "run", start_from="score", stop_after="score")
                (tmp_path / "run" / "scores.json").unlink()
                (tmp_path / "run" / "scores" / "layer_002.json").unlink()

        monkeypatch.setattr(Job, "distil", outliving)
        (tmp_path / "run" / "scores").mkdir()  # so that there is something to set aside
        with pytest.raises(
            ValueError, match="was set aside, or has other scores, since this call began; its layer_002"
        ):
            score_part(short, tmp_path / "run", [2])
        result = run_recipe(long, tmp_path / "run", stop_after="score")
        assert [s.tokens for s in result.scores.scores] == [8 * 4 * 64] * 4

    def test_nor_is_it_taken_where_it_wrote_after_all(self, pair, tmp_path):
        for name, steps in (("short", 1), ("long", 4)):
            given = {"tokens_per_layer": steps * 4 * LENGTH, "output_dir": tmp_path / name}
            score(*pair, tmp_path, "ga-s2", layers=[1, 2], **given)
        shutil.copy(tmp_path / "short" / "layer_002.json", tmp_path / "long")
        found = score(*pair, tmp_path, "ga-s2", layers=[1, 2], **given)
        assert [s.tokens for s in found.scores] == [4 * 4 * LENGTH] * 2
        assert "layer_002.json came from other settings, rows or models, and was made again" in str(found)
        again = score(*pair, tmp_path, "ga-s2", layers=[1, 2], **given)
        assert values(again) == values(found) and again.notes == []

    def test_weights_of_other_settings_are_not_taken(self, pair, tmp_path):
        for name, steps in (("short", 1), ("long", 2)):
            given = {"tokens_per_layer": steps * 4 * LENGTH, "output_dir": tmp_path / name}
            score(*pair, tmp_path, "distilled-greedy", **given)
        shutil.copy(tmp_path / "short" / "distilled.safetensors", tmp_path / "long")
        with pytest.raises(ValueError, match="distilled.safetensors came from other settings, rows or models"):
            score(*pair, tmp_path, "distilled-greedy", **given)

    def test_results_of_before_are_taken_once_and_it_is_said(self, pair, tmp_path):
        """An earlier version wrote no digests; a file of its that comes later is nobody's."""
        given = {"output_dir": tmp_path / "kept"}
        found = score(*pair, tmp_path, "zero-shot", layers=[0, 1], **given)
        for path in (tmp_path / "kept").glob("*.json"):
            data = json.loads(path.read_text())
            new = ("origin", "origins", "unmarked", "held_out", "teacher", "student")
            path.write_text(json.dumps({name: value for name, value in data.items() if name not in new}))
        old = (tmp_path / "kept" / "layer_001.json").read_text()
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("layer*")}
        taken = score(*pair, tmp_path, "zero-shot", layers=[0, 1], **given)
        assert values(taken) == values(found) and len(taken.notes) == 1
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert "results of an earlier version" in str(taken) and "were taken" in str(taken)
        (tmp_path / "kept" / "layer_002.json").write_text(old)
        late = score(*pair, tmp_path, "zero-shot", layers=[2], **given)
        assert late.scores[0].layer == 2 and "layer_002.json came from other settings" in str(late)

    @pytest.mark.parametrize("what", ["train", "held_out", "teacher", "student"])
    def test_a_difference_that_the_baseline_does_not_show(self, what, pair, tmp_path):
        """A row in the middle, and weights that hardly change a KL."""
        teacher, student = copy.deepcopy(pair)
        train, held_out = ({"input_ids": list(rows(16, seed)["input_ids"])} for seed in (0, 9))

        def call():
            data = (datasets.Dataset.from_dict(columns) for columns in (train, held_out))
            given = {"args": arguments(tmp_path), "output_dir": tmp_path / "kept", "layers": [1], **BUDGET}
            return hh.score_layers(student, teacher, *data, **given)

        call()
        with torch.no_grad():
            if what == "train":
                train["input_ids"][7][3] += 1
            elif what == "held_out":
                held_out["input_ids"][7][LENGTH - 1] += 1
            else:
                model = teacher if what == "teacher" else student
                model.model.layers[0].mlp.down_proj.weight.mul_(1 + 1e-6)
        with pytest.raises(ValueError, match=f"has scores made with {what}=.*, this call has "):
            call()


METHODS = {
    "ga-s2": {},
    "ga-s2, rounds": {"options": {"rounds": 2}},
    "ga-s2, halving": {"options": {"rounds": 2, "halving": True, "noise": 0.0}, "k": 1},
    "verified": {"k": 1},
}


class TestCheckpoints:
    @pytest.mark.parametrize("name", METHODS)
    def test_a_run_of_one_layer_goes_on_from_its_last_checkpoint(self, name, pair, tmp_path):
        """Stopped at step 4 of 6 of the second run: steps 1 to 3 are not made again, and all numbers are the same."""
        budget = {"tokens_per_layer": 6 * 4 * LENGTH, "checkpoints": 6}
        case = {"output_dir": tmp_path / "kept", **METHODS[name], **budget}
        seen, last = [], 3 if "halving" in name else 6
        stop_at = 2 if "halving" in name else 4

        def stop(done, total, text):
            seen.append(step_of(text))
            if seen.count(last) == 1 and seen[-1] == stop_at:
                raise Stop

        with pytest.raises(Stop):
            score(*pair, tmp_path, name.split(",")[0], steps=stop, **case)
        assert seen[-1] == stop_at
        resumed_steps = []
        resumed = score(*pair, tmp_path, name.split(",")[0], steps=lambda *e: resumed_steps.append(e), **case)
        trained = [step_of(text) for _, _, text in resumed_steps if step_of(text)]
        assert trained[: last - stop_at + 1] == [*range(stop_at, last + 1)]
        whole = score(*pair, tmp_path, name.split(",")[0], **case | {"output_dir": None})
        assert values(resumed) == values(whole) and resumed.order == whole.order and resumed.options == whole.options
        assert (resumed.tokens, resumed.tokens_forward) == (whole.tokens, whole.tokens_forward)
        assert [path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()] == []

    def test_how_many_there_are_is_said_and_what_is_kept_is_done_with(self, pair, tmp_path):
        seen = []

        def look(done, total, text):
            seen.append(sorted(path.name for path in tmp_path.glob("kept/*_checkpoints_*/checkpoint-*")))

        score(*pair, tmp_path, "ga-s2", layers=[1], output_dir=tmp_path / "kept", checkpoints=2, steps=look, **BUDGET)
        assert max(seen, key=len) == ["checkpoint-2"] and not list(tmp_path.glob("kept/*_checkpoints_*"))
        with pytest.raises(ValueError, match="checkpoints=0 is too small; pass at least 1"):
            score(*pair, tmp_path, "ga-s2", checkpoints=0)

    @pytest.mark.parametrize(("apart", "steps"), [(60.0, []), (1e-6, [1, 2, 3])])
    def test_by_default_they_are_a_minute_apart(self, pair, tmp_path, monkeypatch, apart, steps):
        """A checkpoint of a small model costs more than the steps that it saves."""
        monkeypatch.setattr("hf_hybrid.trainers.checkpoints.SECONDS_APART", apart)
        saved = []
        monkeypatch.setattr("hf_hybrid.trainers.checkpoints.seal", lambda path: saved.append(path.name))
        kept = tmp_path / "kept"
        score(*pair, tmp_path, "ga-s2", layers=[1], output_dir=kept, tokens_per_layer=4 * 4 * LENGTH)
        assert saved == [f"checkpoint-{step}" for step in steps]

    def test_one_job_at_a_time_keeps_those_of_a_layer(self, pair, tmp_path):
        """A second one that was given the same layer trains without, and leaves them alone."""

        def stop(done, total, text):
            if step_of(text) == 3:
                raise Stop

        given = {"layers": [1], "output_dir": tmp_path / "kept", "checkpoints": STEPS, **BUDGET}
        with pytest.raises(Stop):
            score(*pair, tmp_path, "ga-s2", steps=stop, **given)
        (folder,) = tmp_path.glob("kept/layer_001_checkpoints_*")
        before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        steps = []

        def look(done, total, text):
            steps.append(step_of(text))
            assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before or not step_of(text)

        with held(folder / ".lock") as mine:
            assert mine
            second = score(*pair, tmp_path, "ga-s2", steps=look, **given)
        assert steps[:4] == [1, 2, 3, 4]
        assert values(second) == values(score(*pair, tmp_path, "ga-s2", layers=[1], **BUDGET))
