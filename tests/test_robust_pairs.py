"""A run in two processes of which one is killed at any moment. Apart from test_robust.py, so that both run at once."""

import contextlib
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import FORKS, PATIENCE, contents, fork, recipe_to_kill, results, run_as_rank
from torch.distributed import TCPStore

from hf_hybrid.run.folder import ARTEFACTS


STAGES = list(ARTEFACTS)


def run_pair(recipe: dict[str, Any], folder: Path, stage: str, rng: random.Random | None, cost: Any = None) -> Any:
    """
    Runs `recipe` in two processes until `stage` is done; with `rng`, until one of the two is killed in it.

    Returns how it was killed, None where it was not; without `rng`, what the main process sent.
    """
    # Held here, as by a launcher's agent: a port that is only found free may be another's when process 0 takes it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    victim, by = (rng.randrange(2), rng.choice(["operation", "time"])) if rng else (0, "")
    by = "time" if by and victim == 1 else by  # only the main process writes to the folder all along
    operation = rng.randint(1, cost[0]) if rng and by == "operation" else None
    here, there = FORKS.Pipe()
    aside, other = FORKS.Pipe()
    pair = [
        fork(run_as_rank, rank, store.port, recipe, str(folder), stage, pipe, fate)
        for rank, pipe, fate in ((0, there, operation), (1, other, None))
    ]
    there.close()
    other.close()
    sent = []
    if by == "time":
        while here.recv() != stage:
            pass
        pair[victim].join(rng.uniform(0, 0.7 * cost[1]))
        pair[victim].kill()
    elif not by:
        with contextlib.suppress(EOFError):
            while True:
                sent.append(here.recv())
    pair[victim].join(PATIENCE)
    # As a launcher does with the others when one dies.
    if pair[victim].exitcode != 0:
        pair[1 - victim].kill()
    pair[1 - victim].join(PATIENCE)
    if not by:
        assert [process.exitcode for process in pair] == [0, 0]
        return sent
    if pair[victim].exitcode == 0:
        return None
    assert pair[victim].exitcode == -signal.SIGKILL
    return f"process {victim} killed by {by}"


def run_with_pairs_that_die(recipe: dict[str, Any], folder: Path, rng: random.Random, costs: dict[str, Any]) -> int:
    """Runs each stage in pairs of which one is killed, two at most, then in one that lives; counts the deaths."""
    deaths, whole = 0, []
    for stage in STAGES:
        for _ in range(2 if stage in ("align", "score", "distill", "finetune") else 1):
            before = contents(folder, whole)
            how = run_pair(recipe, folder, stage, rng, costs[stage])
            print(f"{stage}: {how or 'it ended before'}")
            deaths += how is not None
            assert before.items() <= contents(folder, whole).items()
            if (folder / ARTEFACTS[stage]).exists():
                break
        before = contents(folder, whole)
        run_pair(recipe, folder, stage, None)
        assert before.items() <= contents(folder, whole).items()
        whole = [*whole, ARTEFACTS[stage]]
    return deaths


@pytest.mark.slow
def test_two_processes_killed_at_random(tmp_path: Path, rng: random.Random) -> None:
    """One of two dies six times and more, and what they make is what two make that nobody kills."""
    recipe = recipe_to_kill(tmp_path)
    costs = {entry[0]: entry[1:] for entry in run_pair(recipe, tmp_path / "whole", "report", None) if len(entry) == 3}
    expected = results(tmp_path / "whole")
    deaths = rounds = 0
    while deaths < 6:
        rounds += 1
        # A kill may come late; of three runs with 13 kills each, few do.
        assert rounds <= 3, f"{deaths} deaths in {rounds - 1} runs; the seed is printed above"
        folder = tmp_path / f"run_{rounds}"
        deaths += run_with_pairs_that_die(recipe, folder, rng, costs)
        given = results(folder)
        assert given.keys() == expected.keys()
        for name in given:
            assert given[name] == expected[name], name
