"""A run from start to end, killed everywhere, and refused where it must be."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PATIENCE, contents, fork, run_and_die, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid.hub import provenance_of, push
from hf_hybrid.run import pipeline
from hf_hybrid.run.folder import ARTEFACTS, claim, locked, publish
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import RunResult, run_recipe
from hf_hybrid.run.stages import Event


# Where a process is killed, in the order in which it gets there: at each kind of moment, and in each stage once.
# test_robust.py kills at random.
DEATHS = [
    ("before", "data"),
    ("checkpoint", "align"),
    ("after", "aligned"),
    ("step", "score"),
    ("before", "scores.json"),
    ("start", "select"),
    ("checkpoint", "distill"),
    ("step", "finetune"),
    ("before", "model"),
    ("before", "report.json"),
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_leaves_a_model_a_report_and_no_checkpoints(finished: RunResult) -> None:
    assert finished.finished and not finished.already_finished and set(finished.stages) == set(ARTEFACTS)
    report = json.loads((finished.folder / "report.json").read_text())
    assert report["selected"] == finished.selected == finished.scores.top(2)
    assert report["tokens"] == {"align": 1024, "score": 4 * 512, "distill": 2048, "finetune": 1024}
    assert report["seconds"].keys() == ARTEFACTS.keys() - {"report"}
    assert 0 < report["evaluation"]["kl"] < finished.scores.baseline
    assert report["evaluation"]["cache_bytes"] < report["evaluation"]["teacher_cache_bytes"]
    assert (finished.folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.folder.glob("*_checkpoints")) and not list(finished.folder.glob("*.partial*"))
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "model")
    assert model.full_attention_layers == finished.selected
    assert model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


def test_the_card_holds_what_was_measured(finished: RunResult) -> None:
    card = (finished.folder / "model" / "README.md").read_text()
    evaluation = json.loads((finished.folder / "evaluation.json").read_text())
    assert f"{evaluation['kl']:.4f} ± {evaluation['kl_sem']:.4f}" in card
    assert "base_model" not in card and "license:" not in card  # a folder is no base model; the licence is not known
    for paper in ("2512.20569", "2505.03005", "2412.06464"):
        assert f"arxiv.org/abs/{paper}" in card


def test_a_finished_run_can_be_pushed(finished: RunResult) -> None:
    """What a push reads is what a run writes."""
    made, report = provenance_of(finished.folder), finished.report
    assert made.evaluation.to_dict() == report["evaluation"] and made.tokens == report["tokens"]
    assert made.version == report["hf_hybrid"] and [s.kl for s in made.scores.scores] == [
        s["kl"] for s in report["scores"]
    ]
    pushed = push(finished.folder, "me/mine", dry_run=True)
    assert push(finished.folder / "model", "me/mine", dry_run=True) == pushed and pushed.left_out == []
    assert {
        "README.md",
        "scores.png",
        "model.safetensors",
        "modeling_hybrid.py",
        "tokenizer.json",
    } <= pushed.files.keys()


def test_a_finished_run_says_so_and_does_nothing(finished: RunResult, sources: tuple[Path, Path]) -> None:
    before = contents(finished.folder, [*ARTEFACTS.values()])
    events: list[Event] = []
    again = run_recipe(Recipe.from_dict(tiny_recipe(*sources)), finished.folder, progress=events.append)
    assert again.already_finished and again.report == finished.report
    assert {event.kind for event in events} == {"found"}
    assert contents(finished.folder, [*ARTEFACTS.values()]) == before


def test_of_every_stage_is_told_what_it_does_how_far_it_is_and_what_came_of_it(
    finished: RunResult, told: list[Event]
) -> None:
    stages = ["data", "align", "score", "select", "distill", "finetune", "evaluate", "model", "report"]
    starts = [event for event in told if event.kind == "start"]
    assert [(event.stage, event.number, event.of) for event in starts] == [
        (name, i, len(stages)) for i, name in enumerate(stages, 1)
    ]
    assert all(event.text for event in starts)
    result = {event.stage: event.result for event in told if event.kind == "done"}
    assert re.fullmatch(r"rows of \d+ tokens: \d+ to train, \d+ to score, \d+ to report", result["data"])
    for name in ("align", "distill", "finetune"):
        assert re.fullmatch(r"loss \d\.\d{4} -> \d\.\d{4} in \d+ steps", result[name]), result[name]
    assert len(re.findall(r"layer +\d+  [\d.]+ ± [\d.]+", result["score"])) == 4
    assert re.match(r"softmax attention in \[\d.*\] of 4 layers, by ga-s2", result["select"])
    assert re.match(r"KL [\d.]+ ± [\d.]+ nats per token, perplexity [\d.]+ \(teacher [\d.]+\)", result["evaluate"])
    for name in ("data", "align", "score", "distill", "finetune", "evaluate"):
        steps = [event for event in told if event.kind == "step" and event.stage == name]
        shares = [event.done / event.total for event in steps]
        assert len(shares) > 1 and shares == sorted(shares) and shares[-1] == 1, name
        assert all(event.text for event in steps)
    inside = [event.text for event in told if event.stage == "score" and "step 1 of" in event.text]
    assert [text.split(":")[0] for text in inside] == [f"softmax in [{layer}]" for layer in range(4)]


def test_killed_everywhere_it_ends_the_same(finished: RunResult, sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(*sources)
    before: dict[str, Any] = {}
    for where, name in DEATHS:
        process = fork(run_and_die, recipe, str(tmp_path / "run"), where, name)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, f"was not killed at {where} {name}"
        now = contents(tmp_path / "run", [*ARTEFACTS.values()])
        assert before.items() <= now.items(), f"complete artefacts changed before {where} {name}"
        before = now
    result = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    assert before.items() <= contents(tmp_path / "run", [*ARTEFACTS.values()]).items()
    assert result.finished and result.selected == finished.selected
    expected, given = weights(finished.folder / "model"), weights(tmp_path / "run" / "model")
    for key, tensor in expected.items():
        assert torch.equal(tensor, given[key]), key
    assert result.report["evaluation"] == finished.report["evaluation"]


def test_stop_after(sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(tiny_recipe(*sources))
    result = run_recipe(recipe, tmp_path / "run", stop_after="data")
    assert result.stages == {"data": "done"} and not result.finished
    with pytest.raises(ValueError, match="stop_after='scores' is no stage; choose one of"):
        run_recipe(recipe, tmp_path / "run", stop_after="scores")


def test_a_folder_of_something_else_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="no run and not empty .it holds 'thesis.txt'.; choose a new folder"):
        run_recipe(Recipe.from_dict(tiny_recipe(*sources)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_recipe_may_be_corrected_before_there_is_any_work(sources: tuple[Path, Path], tmp_path: Path) -> None:
    wrong = tiny_recipe(sources[0], tmp_path / "nothing")
    with pytest.raises(ValueError, match="matches no file"):
        run_recipe(Recipe.from_dict(wrong), tmp_path / "run")
    run_recipe(Recipe.from_dict(tiny_recipe(*sources)), tmp_path / "run", stop_after="data")


def test_two_processes_cannot_share_a_folder(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        claim(folder, Recipe.from_dict(tiny_recipe(*sources)))
        before = (folder / "recipe.yaml").read_bytes()
        with pytest.raises(ValueError, match=rf"another process is running in .* \(process {os.getpid()} on "):
            run_recipe(Recipe.from_dict(tiny_recipe(*sources, seed=4)), folder)
        assert (folder / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {"k": 5}}, "k=5 layers cannot be chosen from a model with 4; pass an integer in 0..4"),
        ({"select": {"layers": [1, 4]}}, r"names a layer outside 0..3"),
        ({"mixer": "mamba3"}, "mixer='mamba3' is unknown; choose one of"),
        ({"mixer_options": {"ropee": True}}, r"mixer_options \['ropee'\] are unknown"),
        ({"training": {"bf17": True}}, "bf17"),
        ({"align": {"tokens": 10**9, "batch_size": 10_000}}, "training rows for align, less than its batch_size"),
        ({"teacher": "nobody/nothing"}, "was found neither as a folder nor as a model on the Hub"),
    ],
)
def test_what_cannot_work_fails_before_any_training(
    changes: dict, message: str, sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "train", lambda *args: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=message):
        run_recipe(Recipe.from_dict(tiny_recipe(*sources) | changes), tmp_path / "run")


def test_a_truncated_artefact_is_named(sources: tuple[Path, Path], finished: RunResult, tmp_path: Path) -> None:
    from hf_hybrid.teacher.loading import load_model

    folder = tmp_path / "model"
    folder.mkdir()
    for file in (finished.folder / "model").iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(ValueError, match="weights in .*model are damaged .*; delete that folder and make it again"):
        load_model(folder)


def test_a_failure_leaves_no_half_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), publish(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []
