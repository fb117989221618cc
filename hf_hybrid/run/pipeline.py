"""The stages of a run, in their order, and what they share: the teacher, its tokenizer, the rows, the student."""

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_hybrid.modeling import HybridConfig
from hf_hybrid.modeling.modeling_hybrid import check_mixers
from hf_hybrid.trainers import LayerScores
from hf_hybrid.trainers.durable import read_json, read_record, write_json
from hf_hybrid.trainers.precision import Precision
from hf_hybrid.trainers.processes import on_main
from hf_hybrid.trainers.scoring.scores import without_nan
from hf_hybrid.trainers.sharding import is_sharded, keep_class_name

from .. import __version__
from ..card import save_model
from ..conversion import check_teacher, convert
from ..data.rows import CutRows, RowSets, build_rows, load_rows, named_source
from ..environment import describe_kernels
from ..evaluation import Evaluation, evaluate_model
from ..selection import select_layers
from ..teacher.loading import load_model
from .folder import ARTEFACTS, check_whole, publish
from .inputs import check_inputs, load_run_pair
from .kernel_tuning import tune_kernels
from .origin import ORIGIN, origin_of, read_artefact, write_artefact
from .plots import plot_scores
from .recipe import Recipe
from .score import check_score_stage, choose, choose_within, needs_alignment, score_stage
from .stages import (
    Event,
    Listener,
    check_finite,
    check_training,
    cut_for,
    keep_topk,
    outcome,
    rows_needed,
    start_of,
    steps_of,
    stream_for,
    streams,
    train,
    training_arguments,
)


ABOUT = {
    "data": "text becomes rows of tokens to train on, to choose layers on, and to report on",
    "align": "every layer linear, each learns what its softmax gave",
    "score": "what softmax attention is worth in each layer",
    "select": "the layers that keep softmax attention",
    "distill": "the hybrid learns what the teacher says, by KL in nats per token",
    "finetune": "the hybrid learns the text itself",
    "evaluate": "the hybrid and its teacher on held-out rows",
    "model": "the hybrid with its code, tokenizer and card, as others load it",
    "report": "all figures in one file",
}
# What the main process does alone while the others wait.
_ALONE = frozenset({"data", "select", "model", "report"})


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of `recipe` in their order; scores that need no aligned student come before the alignment."""
    stages = [name for name in ARTEFACTS if name not in ("score", "finetune") or name in recipe.stages()]
    if not needs_alignment(recipe):
        stages.remove("score")
        stages.insert(stages.index("align"), "score")
    return stages


def check_recipe(recipe: Recipe, folder: Path, teacher: Any) -> None:
    """Raises a `ValueError` where `recipe` does not suit `teacher`, whose weights need not be there."""
    check_training(recipe, folder, teacher)
    check_teacher(teacher)
    config = HybridConfig.from_teacher(teacher.config, [], mixer=recipe.mixer, mixer_options=recipe.mixer_options)
    check_mixers(config)
    if recipe.export_to is not None:
        from ..exporting import qwen3_5, windows  # and with them models of the library that no other run needs

        layout = windows if recipe.export_to == "windows" else qwen3_5
        if reasons := layout.family_obstacles(teacher.config):
            raise ValueError(
                f"the hybrid could not be exported (export_to: {recipe.export_to}): {'; '.join(reasons)}."
            )
    # Any scores will do: this is about the number of layers.
    selector = "uniform" if recipe.select.layers is None else recipe.select.layers
    if recipe.select.cache_bytes is None:
        select_layers(selector, recipe.select.count(config.num_hidden_layers), config.num_hidden_layers)
    check_score_stage(recipe, teacher)


def scores_in(folder: Path) -> LayerScores | None:
    """The layers' scores of the run in `folder`, where they were measured."""
    path = folder / ARTEFACTS["score"]
    return LayerScores.load(path) if path.is_file() else None


class Pipeline:
    """
    One call's work on a run: a method for each stage, and what several stages need, loaded when first needed.

    Args:
        recipe ([`Recipe`]): what is made.
        folder (`Path`): the run, which the caller has claimed for `recipe`.
        listener (`Callable`): called with each [`~hf_hybrid.run.stages.Event`].
    """

    def __init__(self, recipe: Recipe, folder: Path, listener: Listener) -> None:
        self.recipe = recipe
        self.folder = folder
        self.listener = listener
        self.checked = False

    def make(self, name: str) -> None:
        """Makes the artefact of one stage, from those of the stages before it."""
        if not self.checked:
            self._check()
        self.listener(Event(name, "start", text=self._about(name)))
        start = time.perf_counter()
        set_seed(self.recipe.seed)
        stage = self._methods()[name]
        result = on_main(stage) if name in _ALONE else stage()
        seconds = time.perf_counter() - start
        on_main(lambda: self._tidy(name, seconds))
        self.listener(Event(name, "done", text=f"{seconds:.1f} s", result=result))

    def _about(self, name: str) -> str:
        """What a stage does, in words for whoever waits for it."""
        text, stage = ABOUT[name], self.recipe.stages().get(name)
        if name == "score" and self.recipe.score is not None:
            return f"{text}, by {self.recipe.score.method}"
        return text if stage is None else f"{text}; {self._tokens_of(name):,} tokens"

    def _methods(self) -> dict[str, Callable[[], str]]:
        return {
            "data": self._data,
            "align": self._align,
            "score": self._score,
            "select": self._select,
            "distill": self._distill,
            "finetune": self._finetune,
            "evaluate": self._evaluate,
            "model": self._model,
            "report": self._report,
        }

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
        self.say_kernels()
        check_recipe(recipe, self.folder, self.teacher)
        changed = on_main(lambda: check_inputs(self.folder, self.teacher, self.tokenizer))
        if changed is not None:
            self.listener(Event("run", "note", text=changed))
        self.checked = True

    def say_kernels(self) -> None:
        """Says what will run the recurrences; a `ValueError` where the recipe asks for what cannot."""
        self.listener(
            Event("run", "note", text=describe_kernels(self.device, self.recipe.kernel, [self.recipe.mixer]))
        )

    @functools.cached_property
    def device(self) -> torch.device:
        # A machine with an accelerator may still run on the CPU, where `training` says so.
        return training_arguments(self.recipe, "align", self.folder).device

    @functools.cached_property
    def _pair(self) -> tuple[Any, Any]:
        if self.recipe.teacher != "embedded":
            self.listener(Event("run", "note", text=f"loading {self.recipe.teacher}"))
        model, tokenizer = load_run_pair(self.recipe, self.folder)
        return model.to(self.device).requires_grad_(False), tokenizer

    @property
    def teacher(self) -> Any:
        return self._pair[0]

    @property
    def tokenizer(self) -> Any:
        return self._pair[1]

    @functools.cached_property
    def rows(self) -> RowSets:
        check_whole(self.folder / ARTEFACTS["data"], "data")
        return load_rows(self.folder / ARTEFACTS["data"])

    def _cut(self, stage: str, of: str) -> CutRows:
        """The rows of the set `of` as `stage` wants them."""
        return cut_for(self.recipe, stage, self.rows[of], self.rows.packing.prefix)

    @property
    def selected(self) -> list[int]:
        return read_json(self.folder / ARTEFACTS["select"])["layers"]

    @property
    def scores(self) -> LayerScores | None:
        return scores_in(self.folder)

    def _student_of(self, stage: str) -> Any:
        """The student as `stage` left it, always from disk, so that a run that was killed ends like any other."""
        return self._load(stage, self._training_dtype, self.recipe.kernel)

    @property
    def _training_dtype(self) -> torch.dtype:
        """That of the student's weights while it trains: never half precision, in which most updates are lost."""
        return torch.promote_types(self.teacher.dtype, torch.float32)

    def _load(self, stage: str, dtype: torch.dtype, kernel: str) -> Any:
        check_whole(self.folder / ARTEFACTS[stage], stage)
        return load_model(self.folder / ARTEFACTS[stage], dtype=dtype, kernel=kernel).to(self.device)

    def _checkpoints(self, name: str) -> Path:
        return self.folder / f"{name}_checkpoints"

    def _train(self, name: str, student: Any) -> str:
        needed = steps_of(self.recipe, name) * self.recipe.stages()[name].batch_size

        def has(there: int, ended: int | None = None) -> None:
            if needed > there:
                text = f"the text has {there} rows, {needed} are trained on: each is used {needed / there:.1f} times"
                text += "" if ended is None else f"; {named_source(self.recipe.data, ended)}, was the first to end"
                self.listener(Event(name, "note", text=text))

        rows: Any = None
        if streams(self.recipe, name):
            rows = stream_for(self.recipe, name, self.tokenizer, self.rows.packing, at_end=has)
        else:
            rows = self._cut(name, "train")
            has(len(rows))
        topk = keep_topk(self.recipe, name, self.teacher, rows, self._checkpoints(name), self.listener)
        teacher = self.teacher if topk is None else None
        if teacher is None:
            del self._pair  # what it says is on disk; the next stage loads it again
        self._tune_kernels(name, student)
        if name == "align":
            if is_sharded(self.teacher):
                del self._pair  # scores that came before may have shared it out
            teacher = self.teacher
            first = rows  # a stream is read from its beginning here, and once more by what trains
            if streams(self.recipe, name):
                first = stream_for(self.recipe, name, self.tokenizer, self.rows.packing)
            start_of(self.recipe, student, teacher, first, self._checkpoints(name), self.listener)
        trainer = train(self.recipe, name, student, teacher, rows, self._checkpoints(name), self.listener, topk)
        weights = trainer.whole_state_dict()
        on_main(lambda: self._publish_student(name, student, trainer.state, weights))
        if topk is None and is_sharded(self.teacher):
            del self._pair  # the next stage may want it whole
        return outcome(trainer.state)

    def _tune_kernels(self, name: str, student: Any) -> None:
        """Does at once, and says, what the first step of a stage would wait for in silence."""
        args = training_arguments(self.recipe, name, self.folder)
        kernels: dict[str, Any] = {"rows": args.per_device_train_batch_size, "precision": Precision.of(args)}
        kernels["tokens"] = self.recipe.stages()[name].block_size or self.recipe.data.block_size
        kernels["packed"] = self.recipe.data.respect_documents and self.recipe.data.source is None

        def say(text: str) -> None:
            self.listener(Event(name, "note", text=text))

        on_main(lambda: tune_kernels(student, **kernels, say=say))

    def _publish_student(self, name: str, student: Any, state: TrainerState, weights: dict[str, Any] | None) -> None:
        keep_class_name(student)
        with publish(self.folder / ARTEFACTS[name], listed=True) as partial:
            student.save_pretrained(partial, state_dict=weights)
            state.save_to_json(str(partial / TRAINER_STATE_NAME))
            check_finite(partial)
            self._sign(name, partial)

    def _sign(self, name: str, partial: Path) -> None:
        write_json(partial / ORIGIN, origin_of(self.recipe, self.folder, name))

    def _data(self) -> str:
        def report(done: int, total: int) -> None:
            self.listener(Event("data", "step", done, total, f"row {done:,} of {total:,}"))

        with publish(self.folder / ARTEFACTS["data"], listed=True) as partial:
            vocabulary = self.teacher.config.vocab_size
            needed = rows_needed(self.recipe)
            rows = build_rows(self.recipe.data, self.tokenizer, needed, self.recipe.seed, partial, vocabulary, report)
            if not rows.packing.documents_apart:
                text = (
                    "the text has too few documents to hold whole ones out, so one may go on from the held-out rows "
                )
                text += "into those that are trained on; give more files, or a .jsonl file with a document a line"
                self.listener(Event("data", "note", text=text))
            if rows.text_end is not None:
                self.listener(Event("data", "note", text=rows.text_end.told(self.recipe.data)))
            stored = {name: s for name, s in self.recipe.stages().items() if not streams(self.recipe, name)}
            for name, stage in stored.items():
                available = len(cut_for(self.recipe, name, rows["train"]))
                if available < stage.batch_size:
                    raise ValueError(
                        f"the text leaves {available} training rows for {name}, less than its "
                        f"batch_size={stage.batch_size}; give more text or a smaller batch_size."
                    )
            self._sign("data", partial)
            counts = {name: len(rows[name]) for name in ("train", "score", "report")}
        size = self.recipe.data.block_size
        return f"rows of {size:,} tokens: " + ", ".join(f"{count:,} to {name}" for name, count in counts.items())

    def _align(self) -> str:
        r = self.recipe
        student: Any = convert(self.teacher, [], mixer=r.mixer, mixer_options=r.mixer_options, kernel=r.kernel)
        student.config.teacher_name_or_path = r.teacher  # not where this machine keeps it
        student.to(self._training_dtype).requires_grad_(True)
        return self._train("align", student)

    def _score(self) -> str:
        scores = self.measure_scores()
        on_main(lambda: write_artefact(self.recipe, self.folder, "score", scores.to_dict()))
        return scores.short()

    def measure_scores(self, layers: Iterable[int] | None = None) -> LayerScores:
        """Scores all or some layers; what is measured is kept in the run's folder `scores` as it comes."""
        r, kept = self.recipe, self.folder / "scores"
        student = self._student_of("align") if needs_alignment(r) else None
        if student is not None:
            self._tune_kernels("score", student)
        return score_stage(r, student, self.teacher, self.tokenizer, self.rows, kept, self.listener, layers=layers)

    def _select(self) -> str:
        r, scores = self.recipe, self.scores
        if r.select.cache_bytes is None:
            layers = choose(r, scores, self.teacher.config.num_hidden_layers)
        else:
            layers = choose_within(r, scores, self.teacher, self._student_of("align"))
        if scores is not None:
            plot_scores(scores, layers, self.folder / "scores.png")
        write_artefact(r, self.folder, "select", {"selector": r.select.rule, "layers": layers})
        return f"softmax attention in {layers} of {self.teacher.config.num_hidden_layers} layers, by {r.select.rule}"

    def _distill(self) -> str:
        student = self._student_of("align")
        student.set_full_attention_layers(self.selected, self.teacher)
        return self._train("distill", student)

    def _finetune(self) -> str:
        return self._train("finetune", self._student_of("distill"))

    def _finished_student(self, kernel: str) -> Any:
        last = "distill" if self.recipe.finetune is None else "finetune"
        return self._load(last, self.teacher.dtype, kernel)

    def _evaluate(self) -> str:
        stage = self.recipe.distill

        def report(done: int, total: int, text: str) -> None:
            self.listener(Event("evaluate", "step", done, total, text))

        evaluation = evaluate_model(
            self._finished_student(self.recipe.kernel),
            self.teacher,
            self.tokenizer,
            self._cut("distill", "report"),
            batch_size=stage.micro_batch_size or stage.batch_size,
            seed=self.recipe.seed,
            progress=report,
        )
        if evaluation.kl is not None and not math.isfinite(evaluation.kl):
            raise ValueError(f"the finished model has a held-out KL of {evaluation.kl}; no card is written of that.")
        on_main(lambda: write_artefact(self.recipe, self.folder, "evaluate", evaluation.to_dict()))
        return evaluation.short()

    def _model(self) -> str:
        evaluation = read_record(Evaluation, self.folder / ARTEFACTS["evaluate"])
        with publish(self.folder / ARTEFACTS["model"]) as partial:
            card = {"evaluation": evaluation, "scores": self.scores, "recipe": self.recipe, "tokens": self._tokens()}
            card["rows"] = self._rows_found()
            # Which kernels ran here is no matter of the model's.
            save_model(self._finished_student("auto"), self.tokenizer, partial, **card)
            self._sign("model", partial)
        return f"in {self.folder / ARTEFACTS['model']}"

    def _rows_found(self) -> dict[str, Any]:
        """The training rows that there are, how many the stages need, and which source of the text ended it early."""
        found = {"found": len(self.rows["train"]), "needed": rows_needed(self.recipe)}
        end = self.rows.text_end
        return found if end is None else found | {"text_end": asdict(end)}

    def _tokens(self) -> dict[str, int]:
        """The tokens that each stage trained on."""
        r, scores = self.recipe, self.scores
        tokens = {name: self._tokens_of(name) for name in r.stages()}
        return tokens if scores is None else tokens | {"score": scores.tokens}

    def _tokens_of(self, name: str) -> int:
        stage = self.recipe.stages()[name]
        block = stage.block_size or self.recipe.data.block_size
        return steps_of(self.recipe, name) * stage.batch_size * block

    def _report(self) -> str:
        r, scores = self.recipe, self.scores
        found = [] if scores is None else scores.scores
        listed = [
            {"layer": s.layer, "kl": s.kl, "value": s.value, "sem": s.sem}
            | ({"diverged": s.diverged} if s.diverged else {})
            for s in found
        ]
        report = {
            "teacher": r.teacher,
            "num_layers": self.teacher.config.num_hidden_layers,
            "mixer": r.mixer,
            "selector": "explicit" if r.select.layers is not None else r.select.selector,
            "selected": self.selected,
            "scores": without_nan(listed),
            "evaluation": read_artefact(self.folder, "evaluate"),
            "tokens": self._tokens(),
            "hf_hybrid": __version__,
            "rows": self._rows_found(),
            "seconds": read_json(self.folder / "seconds.json"),
            "model": ARTEFACTS["model"],
        }
        write_artefact(r, self.folder, "report", report)
        return f"in {self.folder / ARTEFACTS['report']}"
