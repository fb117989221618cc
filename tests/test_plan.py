"""The plan of a run: counts by hand, disk and done stages against a run, and nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import save_teacher, save_texts, tiny_recipe

from hf_hybrid.cli import main
from hf_hybrid.run import plan as planning
from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.run.plan import plan_recipe
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return save_teacher(folder / "teacher"), save_texts(folder / "texts")


def test_counts_are_those_of_the_recipe(sources: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_recipe(Recipe.from_dict(tiny_recipe(*sources)), tmp_path / "run")
    stages = {stage.stage: stage for stage in plan.stages}
    assert list(stages) == list(ARTEFACTS) and plan.to_do == plan.stages
    counts = {name: (stage.tokens, stage.steps, stage.rows) for name, stage in stages.items()}
    assert counts["align"] == (1024, 8, 32)  # rows of 32 tokens, 4 to a step
    assert counts["score"] == (4 * 2 * 256, 4 * 2, 4 * 2 * 4)  # GA-S2: two steps for each of four layers
    assert counts["distill"] == (2048, 8, 32)
    assert counts["finetune"] == (1024, 4, 16)
    assert counts["evaluate"] == (6 * 64, None, 6)
    assert counts["data"] == ((6 + 6 + 32) * 64, None, 6 + 6 + 32)  # 32 rows serve every stage
    for name in ("data", "align", "score", "distill", "finetune", "evaluate"):
        assert stages[name].seconds > 0 and stages[name].how, name
    assert stages["align"].how == "a step of the stage's own trainer, timed here on random tokens"
    assert not (tmp_path / "run").exists()
    totals = plan.to_dict()["totals"]
    assert totals["tokens"] == sum(stage.tokens or 0 for stage in plan.stages)
    assert totals["device_bytes"] == max(stage.device_bytes for stage in plan.stages)


def test_a_source_too_short_for_its_weight_is_told_by_its_size(sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(*sources)
    line = json.dumps({"text": "x = [f(y) for y in z]"}) + "\n"
    for name, count in (("long", 4_000), ("short", 8)):
        (tmp_path / f"{name}.jsonl").write_text(line * count)
    files = [[str(tmp_path / f"{name}.jsonl")] for name in ("long", "short")]
    for weights, ends in (((9, 1), True), ((999, 1), False)):
        weighted = [{"text_files": file, "weight": weight} for file, weight in zip(files, weights, strict=True)]
        recipe["data"] = {"sources": weighted, "block_size": 64, "held_out_rows": 6, "report_rows": 6}
        plan = plan_recipe(Recipe.from_dict(recipe), tmp_path / "run")
        told = [note for note in plan.notes if note.startswith("by the sizes of files, data.sources[1] (")]
        assert len(told) == ends and (plan.stages[0].rows < 6 + 6 + 32) == ends


def test_disk_and_done_stages_are_those_of_a_run(sources: tuple[Path, Path], tmp_path: Path) -> None:
    unscored = {"score": None, "select": {"selector": "uniform", "k": 2}}
    recipe, folder = Recipe.from_dict(tiny_recipe(*sources, **unscored)), tmp_path / "run"
    before = {stage.stage: stage for stage in plan_recipe(recipe, folder).stages}
    run_recipe(recipe, folder, stop_after="distill")
    for name in ("align", "distill"):
        weights = (folder / ARTEFACTS[name] / "model.safetensors").stat().st_size
        assert 0.5 < before[name].disk_bytes / weights < 2, name
    rows = sum(file.stat().st_size for file in (folder / "data").rglob("*.arrow"))
    assert 0.5 < before["data"].disk_bytes / rows < 2
    there = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    plan = plan_recipe(recipe, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == there
    assert [stage.stage for stage in plan.to_do] == ["finetune", "evaluate", "model", "report"]
    other = Recipe.from_dict(tiny_recipe(*sources, **unscored, seed=9))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        plan_recipe(other, folder)


def test_a_large_teacher_is_not_loaded(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(planning, "load_run_pair", load)
    monkeypatch.setattr(planning, "device_memory", lambda device: 10_000)
    monkeypatch.setattr(planning, "_matrix_rate", lambda device, half: 1e9)
    plan = plan_recipe(Recipe.from_dict(tiny_recipe(*sources)), tmp_path / "run")
    stages = {stage.stage: stage for stage in plan.stages}
    operations = 2 * plan.teacher_parameters + 6 * plan.student_parameters
    assert stages["distill"].seconds == pytest.approx(2048 * operations / 1e9)
    assert stages["distill"].how.startswith("reckoned from the parameters and 1 GFLOP/s")
    assert stages["data"].seconds is None
    assert any("lower micro_batch_size" in note for note in plan.notes)


def test_command(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    recipe = tiny_recipe(*sources, finetune=None)
    path.write_text(yaml.safe_dump(recipe))
    command = ["run", str(path), "--output", str(tmp_path / "run"), "--plan"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in found["stages"]] == [name for name in ARTEFACTS if name != "finetune"]
    assert found["totals"]["steps"] == 8 + 8 + 8
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "distilled" in shown and "timed here" in shown
    assert main([*command, "--stop-after", "align"]) == 2
    assert "leave out --stop-after" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(recipe | {"teacher": str(tmp_path / "absent")}))
    assert main(command) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
