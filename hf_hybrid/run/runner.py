"""A recipe from start to end. A run is a folder: each stage leaves an artefact there, and is skipped where it has."""

import contextlib
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_hybrid.trainers import LayerScores
from hf_hybrid.trainers.durable import read_json
from hf_hybrid.trainers.processes import is_main_process, on_main

from ..data.text import check_sources
from ..places import check_place
from ..teacher.loading import checked_revision
from .folder import ARTEFACTS, claim, explained, keep_execution, locked, remove_partials
from .origin import check_origin
from .pipeline import Pipeline, scores_in, stages_of
from .recipe import Recipe
from .score import check_divisible, needs_alignment
from .stages import Event, Listener, check_arguments, join


@dataclass
class RunResult:
    """
    What is in a run's folder.

    Args:
        folder (`Path`): the run.
        stages (`dict[str, str]`): `"found"` (made by an earlier call) or `"done"`, by stage.
        finished (`bool`): whether all stages are there.
        already_finished (`bool`): whether they were before this call, which then did nothing.
        selected (`list[int]`, *optional*): the layers that keep softmax attention.
        report (`dict`, *optional*): the contents of `report.json`.
    """

    folder: Path
    stages: dict[str, str]
    finished: bool
    already_finished: bool
    selected: list[int] | None = None
    report: dict[str, Any] | None = None

    @property
    def scores(self) -> LayerScores | None:
        """The layers' scores, where they were measured."""
        return scores_in(self.folder)


def run_recipe(
    recipe: Recipe,
    output_dir: str | os.PathLike,
    *,
    stop_after: str | None = None,
    start_from: str | None = None,
    progress: Listener | None = None,
) -> RunResult:
    """
    Runs `recipe` in `output_dir`, from the first stage that is missing there.

    Killed at any moment, the same call goes on; what is lost is the work since the last checkpoint. A finished run is
    left as it is. Where a launcher started several processes, all of them call this: each has a share of every batch,
    and the main one writes to the folder, which all of them must see.

    Args:
        recipe ([`Recipe`]): what to do.
        output_dir (`str`): a folder that is new, empty, or holds a run of the same recipe.
        stop_after (`str`, *optional*): the last stage to run, one of `ARTEFACTS`.
        start_from (`str`, *optional*): the first stage to make again. What it and later stages left is moved into the
            run's folder `set_aside`, not deleted; `recipe` may differ from the run's in what decides these stages. To
            go on after a kill, leave it out.
        progress (`Callable`, *optional*): called with each [`~hf_hybrid.run.stages.Event`], in the main process.

    Returns:
        [`RunResult`].
    """
    for name, value in (("stop_after", stop_after), ("start_from", start_from)):
        if value is not None and value not in ARTEFACTS:
            raise ValueError(f"{name}={value!r} is no stage; choose one of {list(ARTEFACTS)}.")
    check_place(output_dir, recipe.teacher)
    stages, folder = stages_of(recipe), Path(output_dir)
    check_arguments(recipe, folder)
    if recipe.teacher != "embedded":
        checked_revision(recipe.teacher, recipe.revision)
    if stop_after is not None and stop_after not in stages:
        raise ValueError(f"stop_after={stop_after!r}, but the recipe has no {stop_after} stage; its stages: {stages}.")
    join(recipe, folder)
    with explained(folder), contextlib.ExitStack() as stack:
        moved = on_main(lambda: _enter(folder, recipe, start_from, stack))
        to_do = stages if stop_after is None else stages[: stages.index(stop_after) + 1]
        pipeline = Pipeline(recipe, folder, _numbered(_in_main(progress), to_do))
        if moved:
            pipeline.listener(Event(str(start_from), "note", text=f"made again; kept are {', '.join(moved)}"))
        there = on_main(lambda: {name for name in ARTEFACTS if (folder / ARTEFACTS[name]).exists()})
        already_finished = {"model", "report"} <= there
        if not already_finished:
            on_main(lambda: _check_order(folder, stages))
        if "data" not in there:
            on_main(lambda: check_sources(recipe.data))
        done: dict[str, str] = {}
        for name in to_do:
            done[name] = "found" if already_finished or name in there else "done"
            if done[name] == "found":
                # A kill may have come after the artefact and before this.
                on_main(functools.partial(pipeline.clean, name))
                if not already_finished:
                    on_main(functools.partial(check_origin, recipe, folder, name))
                pipeline.listener(Event(name, "found"))
            else:
                pipeline.make(name)
    finished = all((folder / ARTEFACTS[name]).exists() for name in ("model", "report"))
    selection, report = (read_json(folder / ARTEFACTS[name]) for name in ("select", "report"))
    selected = None if selection is None else selection["layers"]
    return RunResult(folder, done, finished, already_finished, selected, report)


def score_part(
    recipe: Recipe, output_dir: str | os.PathLike, layers: Iterable[int], *, progress: Listener | None = None
) -> LayerScores:
    """
    Scores some layers of the run in `output_dir`, beside other jobs that score others: each layer's score is a file
    there, and the run's score stage takes those that it finds. No lock is held, so two jobs given one layer both
    score it.

    Args:
        recipe ([`Recipe`]): the run's. Its method must score each layer by itself, as `"ga-s2"` does.
        output_dir (`str`): a run whose data and, where the method needs it, alignment are made.
        layers (`Iterable[int]`): the layers of this job.
        progress (`Callable`, *optional*): called with each [`~hf_hybrid.run.stages.Event`], in the main process.
    """
    folder = Path(output_dir)
    check_divisible(recipe)
    join(recipe, folder)
    needed = [name for name in ("data", "align") if name == "data" or needs_alignment(recipe)]
    missing = on_main(lambda: [name for name in needed if not (folder / ARTEFACTS[name]).exists()])
    if missing:
        raise ValueError(
            f"{folder} has no {ARTEFACTS[missing[0]]} yet; first make it: hf-hybrid run RECIPE --output {folder} "
            f"--stop-after {needed[-1]}."
        )
    on_main(lambda: claim(folder, recipe))
    for name in needed:
        on_main(functools.partial(check_origin, recipe, folder, name))
    pipeline = Pipeline(recipe, folder, _in_main(progress))
    pipeline.say_kernels()
    return pipeline.measure_scores(layers)


def _enter(folder: Path, recipe: Recipe, start_from: str | None, stack: contextlib.ExitStack) -> list[str]:
    """Locks the folder and makes it the run of `recipe`; returns what was set aside for that."""
    stack.enter_context(locked(folder))
    moved = claim(folder, recipe, start_from)
    remove_partials(folder)
    if not all((folder / ARTEFACTS[name]).exists() for name in ("model", "report")):
        keep_execution(folder, recipe)
    return moved


def _check_order(folder: Path, stages: list[str]) -> None:
    """Raises a `ValueError` where an artefact is missing from which a later one was made."""
    missing = [name for name in stages if not (folder / ARTEFACTS[name]).exists()]
    later = stages[stages.index(missing[0]) :] if missing else []
    if missing[:1] == ["score"]:  # scores of the teacher alone come first, but the alignment is not made from them
        later = [name for name in later if name != "align"]
    there = [ARTEFACTS[name] for name in later if name not in missing]
    if there:
        raise ValueError(
            f"{folder} has {there[0]}, but not {ARTEFACTS[missing[0]]}, from which it was made; put that back, or "
            f"make it and what follows again with --from {missing[0]}."
        )


def _numbered(listener: Listener, stages: list[str]) -> Listener:
    """`listener`, which hears of each stage of `stages` which of how many it is."""
    places = {name: number for number, name in enumerate(stages, 1)}
    return lambda event: listener(replace(event, number=places.get(event.stage, 0), of=len(stages)))


def _in_main(progress: Listener | None) -> Listener:
    """`progress`, or in other processes than the main one, and where there is none, what ignores events."""
    return progress if progress and is_main_process() else (lambda event: None)
