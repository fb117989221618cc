"""A recipe from start to end. A run is a folder: each stage leaves an artefact there, and is skipped where it has."""

import contextlib
import functools
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_hybrid.modeling import HybridConfig
from hf_hybrid.modeling.modeling_hybrid import check_mixers
from hf_hybrid.trainers import LayerScores
from hf_hybrid.trainers.durable import read_json, read_record, write_json
from hf_hybrid.trainers.processes import is_main_process, on_main
from hf_hybrid.trainers.scores import without_nan
from hf_hybrid.trainers.sharding import is_sharded, keep_class_name

from . import __version__
from .card import save_model
from .conversion import check_teacher, convert
from .data import build_rows, load_rows
from .evaluation import Evaluation, evaluate_model
from .folder import ARTEFACTS, check_whole, claim, explained, locked, publish, remove_partials
from .inputs import check_inputs
from .loading import load_model, load_pair
from .plots import plot_scores
from .recipe import Recipe
from .score import choose, needs_alignment, score_stage
from .selection import select_layers
from .stages import (
    Event,
    Listener,
    check_finite,
    check_training,
    cut_for,
    join,
    keep_topk,
    rows_needed,
    steps_of,
    stream_for,
    streams,
    train,
    training_arguments,
)


# What the main process does alone while the others wait.
_ALONE = frozenset({"data", "select", "model", "report"})


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
        path = self.folder / ARTEFACTS["score"]
        return LayerScores.load(path) if path.is_file() else None


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
        progress (`Callable`, *optional*): called with each [`~hf_hybrid.stages.Event`], in the main process.

    Returns:
        [`RunResult`].
    """
    for name, value in (("stop_after", stop_after), ("start_from", start_from)):
        if value is not None and value not in ARTEFACTS:
            raise ValueError(f"{name}={value!r} is no stage; choose one of {list(ARTEFACTS)}.")
    folder = Path(output_dir)
    join(recipe, folder)
    with explained(folder), contextlib.ExitStack() as stack:
        moved = on_main(lambda: _enter(folder, recipe, start_from, stack))
        run = _Run(recipe, folder, progress if progress and is_main_process() else (lambda event: None))
        if moved:
            run.listener(Event(str(start_from), "note", text=f"made again; kept are {', '.join(moved)}"))
        stages = _stages(recipe)
        there = on_main(lambda: {name for name in ARTEFACTS if (folder / ARTEFACTS[name]).exists()})
        already_finished = {"model", "report"} <= there
        if not already_finished:
            on_main(lambda: _check_order(folder, stages))
        done: dict[str, str] = {}
        for name in stages:
            done[name] = "found" if already_finished or name in there else "done"
            if done[name] == "found":
                on_main(functools.partial(run.clean, name))  # a kill may have come after the artefact and before this
                run.listener(Event(name, "found"))
            else:
                run.make(name)
            if name == stop_after:
                break
    finished = all((folder / ARTEFACTS[name]).exists() for name in ("model", "report"))
    selection, report = (read_json(folder / ARTEFACTS[name]) for name in ("select", "report"))
    selected = None if selection is None else selection["layers"]
    return RunResult(folder, done, finished, already_finished, selected, report)


def _enter(folder: Path, recipe: Recipe, start_from: str | None, stack: contextlib.ExitStack) -> list[str]:
    """Locks the folder and makes it the run of `recipe`; returns what was set aside for that."""
    stack.enter_context(locked(folder))
    moved = claim(folder, recipe, start_from)
    remove_partials(folder)
    return moved


def _stages(recipe: Recipe) -> list[str]:
    """The stages of `recipe` in their order; scores that need no aligned student come before the alignment."""
    stages = [name for name in ARTEFACTS if name not in ("score", "finetune") or name in recipe.stages()]
    if not needs_alignment(recipe):
        stages.remove("score")
        stages.insert(stages.index("align"), "score")
    return stages


def _check_order(folder: Path, stages: list[str]) -> None:
    """Raises a `ValueError` where an artefact is missing from which a later one was made."""
    missing = [name for name in stages if not (folder / ARTEFACTS[name]).exists()]
    later = stages[stages.index(missing[0]) :] if missing else []
    there = [ARTEFACTS[name] for name in later if name not in missing]
    if there:
        raise ValueError(
            f"{folder} has {there[0]}, but not {ARTEFACTS[missing[0]]}, from which it was made; put that back, or "
            f"make it and what follows again with --from {missing[0]}."
        )


class _Run:
    """One call of [`run_recipe`]: a method for each stage, and what several stages need, loaded when first needed."""

    def __init__(self, recipe: Recipe, folder: Path, listener: Listener) -> None:
        self.recipe = recipe
        self.folder = folder
        self.listener = listener
        self.checked = False

    def make(self, name: str) -> None:
        if not self.checked:
            self._check()
        self.listener(Event(name, "start"))
        start = time.perf_counter()
        set_seed(self.recipe.seed)
        stage = getattr(self, f"_{name}")
        if name in _ALONE:
            on_main(stage)
        else:
            stage()
        seconds = time.perf_counter() - start
        on_main(lambda: self._tidy(name, seconds))
        self.listener(Event(name, "done", text=f"{seconds:.1f} s"))

    def _tidy(self, name: str, seconds: float) -> None:
        self.clean(name)
        before = read_json(self.folder / "seconds.json") or {}
        write_json(self.folder / "seconds.json", before | {name: round(seconds, 2)})

    def clean(self, name: str) -> None:
        """Removes the checkpoints of a stage whose artefact is there."""
        if self._checkpoints(name).exists():
            shutil.rmtree(self._checkpoints(name))

    def _check(self) -> None:
        """Finds what cannot work before hours are spent on the stages before it."""
        recipe = self.recipe
        check_training(recipe, self.folder, self.teacher)
        check_teacher(self.teacher)
        changed = on_main(lambda: check_inputs(self.folder, self.teacher, self.tokenizer))
        if changed is not None:
            self.listener(Event("run", "note", text=changed))
        config = HybridConfig.from_teacher(
            self.teacher.config, [], mixer=recipe.mixer, mixer_options=recipe.mixer_options
        )
        check_mixers(config)
        # Any scores will do: this is about the number of layers.
        selector = "uniform" if recipe.select.layers is None else recipe.select.layers
        if recipe.select.cache_bytes is None:
            select_layers(selector, recipe.select.count(config.num_hidden_layers), config.num_hidden_layers)
        self.checked = True

    @functools.cached_property
    def device(self) -> torch.device:
        # A machine with an accelerator may still run on the CPU, where `training` says so.
        return training_arguments(self.recipe, "align", self.folder).device

    @functools.cached_property
    def _pair(self) -> tuple[Any, Any]:
        r = self.recipe
        model, tokenizer = load_pair(
            r.teacher, trust_remote_code=r.trust_remote_code, dtype=r.dtype, revision=r.revision
        )
        return model.to(self.device).requires_grad_(False), tokenizer

    @property
    def teacher(self) -> Any:
        return self._pair[0]

    @property
    def tokenizer(self) -> Any:
        return self._pair[1]

    @functools.cached_property
    def rows(self) -> dict[str, Any]:
        check_whole(self.folder / ARTEFACTS["data"], "data")
        return load_rows(self.folder / ARTEFACTS["data"])

    @property
    def selected(self) -> list[int]:
        return read_json(self.folder / ARTEFACTS["select"])["layers"]

    @property
    def scores(self) -> LayerScores | None:
        path = self.folder / ARTEFACTS["score"]
        return LayerScores.load(path) if path.is_file() else None

    def _student_of(self, stage: str) -> Any:
        """The student as `stage` left it, always from disk, so that a run that was killed ends like any other."""
        mixed = self.recipe.training.get("bf16") or self.recipe.training.get("fp16")
        dtype = torch.float32 if mixed else self.teacher.dtype
        return self._load(stage, dtype)

    def _load(self, stage: str, dtype: torch.dtype) -> Any:
        check_whole(self.folder / ARTEFACTS[stage], stage)
        return load_model(self.folder / ARTEFACTS[stage], dtype=dtype).to(self.device)

    def _checkpoints(self, name: str) -> Path:
        return self.folder / f"{name}_checkpoints"

    def _train(self, name: str, student: Any) -> None:
        rows: Any = None
        if streams(self.recipe, name):
            rows = stream_for(self.recipe, name, self.tokenizer)
        else:
            rows = cut_for(self.recipe, name, self.rows["train"])
            needed, there = steps_of(self.recipe, name) * self.recipe.stages()[name].batch_size, len(rows)
            if needed > there:
                text = f"the text has {there} rows, {needed} are trained on: each is used {needed / there:.1f} times"
                self.listener(Event(name, "note", text=text))
        topk = keep_topk(self.recipe, name, self.teacher, rows, self._checkpoints(name), self.listener)
        teacher = self.teacher if topk is None else None
        if teacher is None:
            del self._pair  # what it says is on disk; the next stage loads it again
        trainer = train(self.recipe, name, student, teacher, rows, self._checkpoints(name), self.listener, topk)
        weights = trainer.whole_state_dict()
        on_main(lambda: self._publish_student(name, student, trainer.state, weights))
        if topk is None and is_sharded(self.teacher):
            del self._pair  # the next stage may want it whole

    def _publish_student(self, name: str, student: Any, state: TrainerState, weights: dict[str, Any] | None) -> None:
        keep_class_name(student)
        with publish(self.folder / ARTEFACTS[name], listed=True) as partial:
            student.save_pretrained(partial, state_dict=weights)
            state.save_to_json(str(partial / TRAINER_STATE_NAME))
            check_finite(partial)

    def _data(self) -> None:
        with publish(self.folder / ARTEFACTS["data"], listed=True) as partial:
            vocabulary = self.teacher.config.vocab_size
            needed = rows_needed(self.recipe)
            rows = build_rows(self.recipe.data, self.tokenizer, needed, self.recipe.seed, partial, vocabulary)
            stored = {name: s for name, s in self.recipe.stages().items() if not streams(self.recipe, name)}
            for name, stage in stored.items():
                available = len(cut_for(self.recipe, name, rows["train"]))
                if available < stage.batch_size:
                    raise ValueError(
                        f"the text leaves {available} training rows for {name}, less than its "
                        f"batch_size={stage.batch_size}; give more text or a smaller batch_size."
                    )

    def _align(self) -> None:
        r = self.recipe
        student = convert(self.teacher, [], mixer=r.mixer, mixer_options=r.mixer_options)
        student.config.teacher_name_or_path = r.teacher  # not where this machine keeps it
        if r.training.get("bf16") or r.training.get("fp16"):
            student.float()
        student.requires_grad_(True)
        self._train("align", student)

    def _score(self) -> None:
        if self.recipe.score is None:
            return
        student = self._student_of("align") if needs_alignment(self.recipe) else None
        kept = self.folder / "scores"
        scores = score_stage(self.recipe, student, self.teacher, self.tokenizer, self.rows, kept, self.listener)
        on_main(lambda: scores.save(self.folder / ARTEFACTS["score"]))

    def _select(self) -> None:
        select = self.recipe.select
        selector = select.selector if select.layers is None else select.layers
        student = None if select.cache_bytes is None else self._student_of("align")
        layers = choose(self.recipe, self.scores, self.teacher, student)
        if self.scores is not None:
            plot_scores(self.scores, layers, self.folder / "scores.png")
        write_json(self.folder / ARTEFACTS["select"], {"selector": selector, "layers": layers})

    def _distill(self) -> None:
        student = self._student_of("align")
        student.set_full_attention_layers(self.selected, self.teacher)
        self._train("distill", student)

    def _finetune(self) -> None:
        self._train("finetune", self._student_of("distill"))

    def _finished_student(self) -> Any:
        last = "distill" if self.recipe.finetune is None else "finetune"
        return self._load(last, self.teacher.dtype)

    def _evaluate(self) -> None:
        stage = self.recipe.distill
        evaluation = evaluate_model(
            self._finished_student(),
            self.teacher,
            self.tokenizer,
            cut_for(self.recipe, "distill", self.rows["report"]),
            batch_size=stage.micro_batch_size or stage.batch_size,
            seed=self.recipe.seed,
        )
        if evaluation.kl is not None and not math.isfinite(evaluation.kl):
            raise ValueError(f"the finished model has a held-out KL of {evaluation.kl}; no card is written of that.")
        on_main(lambda: evaluation.save(self.folder / ARTEFACTS["evaluate"]))

    def _model(self) -> None:
        evaluation = read_record(Evaluation, self.folder / ARTEFACTS["evaluate"])
        with publish(self.folder / ARTEFACTS["model"]) as partial:
            card = {"evaluation": evaluation, "scores": self.scores, "recipe": self.recipe, "tokens": self._tokens()}
            save_model(self._finished_student(), self.tokenizer, partial, **card)

    def _tokens(self) -> dict[str, int]:
        """The tokens that each stage trained on."""
        r, scores = self.recipe, self.scores
        tokens = {
            name: steps_of(r, name) * stage.batch_size * (stage.block_size or r.data.block_size)
            for name, stage in r.stages().items()
        }
        return tokens if scores is None else tokens | {"score": scores.tokens}

    def _report(self) -> None:
        r, scores = self.recipe, self.scores
        found = [] if scores is None else scores.scores
        listed = [{"layer": s.layer, "kl": s.kl, "value": s.value, "sem": s.sem} for s in found]
        report = {
            "teacher": r.teacher,
            "num_layers": self.teacher.config.num_hidden_layers,
            "mixer": r.mixer,
            "selector": "explicit" if r.select.layers is not None else r.select.selector,
            "selected": self.selected,
            "scores": without_nan(listed),
            "evaluation": read_json(self.folder / ARTEFACTS["evaluate"]),
            "tokens": self._tokens(),
            "hf_hybrid": __version__,
            "rows": {"found": len(self.rows["train"]), "needed": rows_needed(r)},
            "seconds": read_json(self.folder / "seconds.json"),
            "model": ARTEFACTS["model"],
        }
        write_json(self.folder / ARTEFACTS["report"], report)
