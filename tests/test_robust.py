"""A plug pulled at any moment: kills in every stage at random, and what a run makes of them."""

import copy
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import FORKS, PATIENCE, contents, copy_run, fork, recipe_to_kill, results, run_and_report

from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.stages import Event


STAGES = list(ARTEFACTS)


class Reference:
    """A run that nothing killed, with the changes of files that each stage makes, and its seconds."""

    def __init__(self, folder: Path) -> None:
        self.recipe = recipe_to_kill(folder)
        self.folder = folder / "run"
        self.cost: dict[str, tuple[int, float]] = {}
        here, process = start(self.recipe, self.folder, "report")
        for stage in STAGES:
            assert here.recv() == stage
            self.cost[stage] = here.recv()[1:]
        process.join()
        self.results = results(self.folder)


def start(recipe: dict[str, Any], folder: Path, stage: str, *fate: Any) -> tuple[Any, Any]:
    """A process that runs `recipe`, and the end of its pipe."""
    here, there = FORKS.Pipe()
    process = fork(run_and_report, recipe, str(folder), stage, there, *fate)
    there.close()
    return here, process


def say_whether_warm(pipe: Any) -> None:
    pipe.send("warm" in sys.modules)


def test_forks_begin_with_what_a_run_needs() -> None:
    here, there = FORKS.Pipe()
    fork(say_whether_warm, there).join(PATIENCE)
    assert here.recv()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("robust"))


def kill(reference: Reference, folder: Path, stage: str, rng: random.Random, by: str) -> str | None:
    """Runs in `folder` until it is killed in `stage`; says how, or None where the stage was over before."""
    changes, seconds = reference.cost[stage]
    operation, delay, tear = rng.randint(1, changes), rng.uniform(0, seconds), rng.random() < 0.5
    here, process = start(reference.recipe, folder, stage, operation if by == "operation" else None, tear)
    if by == "time":
        assert here.recv() == stage
        process.join(delay)
        process.kill()
    process.join(PATIENCE)
    if process.exitcode == 0:
        return None
    assert process.exitcode == -signal.SIGKILL
    return f"before change {operation} of {changes}, torn: {tear}" if by == "operation" else f"after {delay:.3f} s"


def kill_and_finish(reference: Reference, folder: Path, stage: str, rng: random.Random, kinds: list[str]) -> int:
    """Kills `stage` once for each of `kinds`, one upon the other, then lets it end; returns how often it died."""
    copy_run(reference.folder, folder, stage)
    whole = [ARTEFACTS[name] for name in STAGES[: STAGES.index(stage)]]
    before = contents(folder, whole)
    deaths = 0
    for by in kinds:
        how = kill(reference, folder, stage, rng, by)
        print(f"{stage}: {f'killed {how}' if how else 'it ended before'}")
        deaths += how is not None
        assert before.items() <= contents(folder, whole).items(), f"artefacts from before {stage} changed"
        if (folder / ARTEFACTS[stage]).exists():
            # Complete, as its name says, whether the kill came right after it or not at all.
            whole = [*whole, ARTEFACTS[stage]]
            before = contents(folder, whole)
            break
        assert how is not None
    run_recipe(Recipe.from_dict(reference.recipe), folder, stop_after=stage)
    assert contents(folder, whole) == before
    given = results(folder)
    made = {"inputs.json", *whole, ARTEFACTS[stage]}
    assert set(given) == {name for name in reference.results if Path(name).parts[0] in made}
    for name in given:
        assert given[name] == reference.results[name], name
    assert [*folder.glob("*_checkpoints"), *folder.glob("*.partial*")] == []
    return deaths


@pytest.mark.slow
def test_killed_at_random_a_dozen_times_and_more(reference: Reference, tmp_path: Path, rng: random.Random) -> None:
    deaths = rounds = 0
    while deaths < 12:
        rounds += 1
        assert rounds <= 10, f"{deaths} deaths in {rounds - 1} rounds of every stage; the seed is printed above"
        for stage in STAGES:
            kinds = rng.choice([["operation", "time"], ["time", "operation"], ["operation", "operation", "operation"]])
            deaths += kill_and_finish(reference, tmp_path / f"{stage}_{rounds}", stage, rng, kinds)
    print(f"{deaths} kills")


@pytest.mark.parametrize("tear", [False, True])
def test_killed_while_it_claims_a_new_folder(reference: Reference, tmp_path: Path, tear: bool) -> None:
    for operation in range(1, 7):
        folder = tmp_path / str(operation)
        for _ in range(2):
            _, process = start(reference.recipe, folder, "", operation, tear)
            process.join(PATIENCE)
            assert process.exitcode == -signal.SIGKILL
        run_recipe(Recipe.from_dict(reference.recipe), folder, stop_after="data")
        assert results(folder)["data"] == reference.results["data"]


# The command line, whose training waits for a signal before its sixth step. A signal to one that does not wait finds
# the stage done where the machine is busy with that process and not with the one that sends it. What a shell starts in
# the background ignores SIGINT, and so does all that it starts; this one is as if started in a terminal.
WAITING = """
import signal
import time
from hf_hybrid.__main__ import run_and_exit
from hf_hybrid.trainers import HybridTrainer

step = HybridTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == 5:
        print("it waits", flush=True)
        time.sleep(900)
    return step(self, *args, **kwargs)

HybridTrainer.training_step = training_step
signal.signal(signal.SIGINT, signal.default_int_handler)
run_and_exit()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_stopped_by_a_signal_goes_on(reference: Reference, tmp_path: Path, number: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(reference.recipe))
    copy_run(reference.folder, tmp_path / "run", "align")
    command = [sys.executable, "-c", WAITING, "run", str(recipe), "--output", str(tmp_path / "run")]
    command += ["--stop-after", "align"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert "it waits\n" in process.stdout, process.communicate()
    process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "hf-hybrid: interrupted; the same command goes on with a run."
    else:
        assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run" / "aligned").exists()
    events: list[Event] = []
    run_recipe(Recipe.from_dict(reference.recipe), tmp_path / "run", stop_after="align", progress=events.append)
    assert any(event.text.startswith("going on from checkpoint-") for event in events)
    given = results(tmp_path / "run")
    assert all(given[name] == reference.results[name] for name in given)


def test_killed_while_it_sets_stages_aside(reference: Reference, tmp_path: Path) -> None:
    """Nothing is lost between the two places, and no artefact is left without what it was made from."""
    before = contents(reference.folder, list(ARTEFACTS.values()))
    changed = reference.recipe | {"mixer_options": {"rope": False}}
    for operation in range(1, 100, 2):  # every other one: each costs a process
        folder = tmp_path / str(operation)
        shutil.copytree(reference.folder, folder)
        _, process = start(changed, folder, "", operation, False, "align")
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        there = [name for name in ARTEFACTS.values() if (folder / name).exists()]
        assert there == list(ARTEFACTS.values())[: len(there)]
        moved = contents(folder / "set_aside" / "1", list(ARTEFACTS.values()))
        assert contents(folder, list(ARTEFACTS.values())) | moved == before
        if Recipe.load(folder / "recipe.yaml").mixer_options:
            break
        with pytest.raises(ValueError, match=r"mixer_options.rope: None in the folder, False now.*add --from align"):
            run_recipe(Recipe.from_dict(changed), folder)
    assert operation > 10
    (folder / "seconds.json.partial").write_text("{")  # what a kill at the very end leaves
    (folder / "model.partial").mkdir()
    result = run_recipe(Recipe.from_dict(changed), folder, stop_after="align")
    assert result.stages == {"data": "found", "align": "done"} and not list(folder.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["verified", "zero-shot-removal"])
def test_scores_of_methods_killed_at_random(
    method: str, reference: Reference, tmp_path: Path, rng: random.Random
) -> None:
    changed = copy.copy(reference)
    score = {"method": method, "tokens_per_layer": 6 * 4 * 64}
    changes = {"score": reference.recipe["score"] | score, "select": {"selector": method, "k": 2}}
    changed.recipe = reference.recipe | changes
    changed.folder = tmp_path / "whole"
    copy_run(reference.folder, changed.folder, "score")
    here, process = start(changed.recipe, changed.folder, "score", None, False, "score")
    assert here.recv() == "score"
    changed.cost = {"score": here.recv()[1:]}
    process.join()
    expected = results(changed.folder)["scores.json"]
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        copy_run(changed.folder, folder, "score")
        for by in ("operation", "time"):
            if (folder / "scores.json").exists():  # the kill came right after
                break
            print(f"{method}: {kill(changed, folder, 'score', rng, by)}")
        run_recipe(Recipe.from_dict(changed.recipe), folder, stop_after="score")
        assert results(folder)["scores.json"] == expected
        assert [path for path in folder.rglob("*") if ".partial" in path.name or "checkpoint" in path.name] == []
