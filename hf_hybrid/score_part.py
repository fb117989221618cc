"""Scores of some layers of a run, made by one of several jobs that share its folder."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_hybrid.trainers import LayerScores
from hf_hybrid.trainers.processes import is_main_process, on_main

from .folder import ARTEFACTS, claim
from .recipe import Recipe
from .run import _Run
from .score import needs_alignment, score_stage
from .stages import Listener, join


def parse_layers(text: str) -> list[int]:
    """The layers that `text` names, such as `0-6` or `0,3,8-11`."""
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        first, last = (0, -1) if found is None else (int(found[1]), int(found[2] or found[1]))
        if last < first:
            raise ValueError(f"--layers {text!r} is no list of layers; write indices and ranges such as 0-6,9.")
        layers.extend(range(first, last + 1))
    return layers


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
        progress (`Callable`, *optional*): called with each [`~hf_hybrid.stages.Event`], in the main process.
    """
    folder = Path(output_dir)
    if recipe.score is None or recipe.score.method != "ga-s2":
        method = None if recipe.score is None else recipe.score.method
        raise ValueError(f"--layers splits scores of method 'ga-s2', and the recipe has {method!r}; leave it out.")
    join(recipe, folder)
    needed = [name for name in ("data", "align") if name == "data" or needs_alignment(recipe)]
    missing = on_main(lambda: [name for name in needed if not (folder / ARTEFACTS[name]).exists()])
    if missing:
        raise ValueError(
            f"{folder} has no {ARTEFACTS[missing[0]]} yet; first make it: hf-hybrid run RECIPE --output {folder} "
            f"--stop-after {needed[-1]}."
        )
    on_main(lambda: claim(folder, recipe))
    run = _Run(recipe, folder, progress if progress and is_main_process() else (lambda event: None))
    student = run._student_of("align") if needs_alignment(recipe) else None
    kept = folder / "scores"
    return score_stage(recipe, student, run.teacher, run.tokenizer, run.rows, kept, run.listener, layers=layers)
