"""Artefacts say what they came from, and are taken only where that is what the run has."""

import json
import shutil
from pathlib import Path

import pytest
from runs import copy_run, tiny_recipe

from hf_hybrid.hub import push
from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.run.origin import ORIGIN, artefact_digest, origin_of
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import RunResult, run_recipe, score_part


def origin_in(path: Path) -> dict[str, str]:
    return json.loads((path / ORIGIN).read_text()) if path.is_dir() else json.loads(path.read_text())["origin"]


def test_every_artefact_says_what_it_came_from(finished: RunResult, sources: tuple[Path, Path]) -> None:
    recipe = Recipe.from_dict(tiny_recipe(*sources))
    for stage, name in ARTEFACTS.items():
        assert origin_in(finished.folder / name) == origin_of(recipe, finished.folder, stage), stage
    names = origin_in(finished.folder / "distilled").keys()
    assert names == {"recipe", "teacher", "data", "aligned", "selection.json"}
    assert push(finished.folder, "me/mine", dry_run=True).files.keys() & {ORIGIN} == set()


def forget_origin(folder: Path) -> None:
    (folder / ORIGIN).unlink()
    listed = json.loads((folder / "files.json").read_text())
    del listed[ORIGIN]
    (folder / "files.json").write_text(json.dumps(listed))


def other_run(sources: tuple[Path, Path], folder: Path) -> Path:
    """A run that differs in the alignment alone."""
    recipe = tiny_recipe(*sources)
    recipe["align"]["mixer_learning_rate"] = 2e-3
    return run_recipe(Recipe.from_dict(recipe), folder, stop_after="align").folder


def test_artefacts_of_another_run_are_not_taken(
    finished: RunResult, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = Recipe.from_dict(tiny_recipe(*sources))
    other = other_run(sources, tmp_path / "other")
    copy_run(finished.folder, tmp_path / "run", "select")
    shutil.rmtree(tmp_path / "run" / "aligned")
    shutil.copytree(other / "aligned", tmp_path / "run" / "aligned")
    with pytest.raises(ValueError, match="aligned was made of other settings than this run's; .* with --from align"):
        run_recipe(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="aligned was made of other settings than this run's"):
        score_part(recipe, tmp_path / "run", [0])
    forget_origin(tmp_path / "run" / "aligned")  # as an earlier version left it
    with pytest.raises(ValueError, match="scores.json was made of another aligned than this run's; .* --from score"):
        run_recipe(recipe, tmp_path / "run")


def test_a_selection_that_was_changed_by_hand_is_noticed(
    finished: RunResult, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    copy_run(finished.folder, tmp_path / "run", "finetune")
    path = tmp_path / "run" / "selection.json"
    selection = json.loads(path.read_text())
    selection["layers"] = [layer for layer in range(4) if layer not in selection["layers"]]
    path.write_text(json.dumps(selection))
    with pytest.raises(ValueError, match="distilled was made of another selection.json than this run's"):
        run_recipe(Recipe.from_dict(tiny_recipe(*sources)), tmp_path / "run")


def test_runs_of_before_go_on(finished: RunResult, sources: tuple[Path, Path], tmp_path: Path) -> None:
    """What has no origin is taken as it is."""
    copy_run(finished.folder, tmp_path / "run", "evaluate")
    for path in (tmp_path / "run").rglob(ORIGIN):
        forget_origin(path.parent)
    for name in ("scores.json", "selection.json"):
        data = json.loads((tmp_path / "run" / name).read_text())
        del data["origin"]
        (tmp_path / "run" / name).write_text(json.dumps(data))
    result = run_recipe(Recipe.from_dict(tiny_recipe(*sources)), tmp_path / "run")
    assert result.report["evaluation"] == finished.report["evaluation"]
    assert artefact_digest(tmp_path / "run", "score") == artefact_digest(finished.folder, "score")
