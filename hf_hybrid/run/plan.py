"""What a run would make, and what that takes: tokens, steps, rows, time, memory and disk of each stage."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from ..conversion import check_teacher, convert
from ..data.rows import TextEnd, too_few_rows
from ..data.text import check_sources, open_text
from ..demo_data import demo_rows
from ..places import check_place, find_files
from ..selection import uniform_layers
from ..teacher.loading import checked_revision, empty_teacher
from .folder import ARTEFACTS, check_claim
from .footprint import Footprint, device_memory, footprint
from .inputs import load_run_pair
from .pipeline import check_recipe, stages_of
from .recipe import Recipe, ScoreStage
from .score import needs_alignment
from .stages import check_arguments, launched_processes, rows_needed, steps_of, trainer_of, training_arguments


# Seconds that a timed step may take; for one that is longer by the device's rate, that is all that is asked.
_LONGEST_STEP = 1.0
_TIMED_STEPS = 3
_SAMPLE_BYTES = 200_000
# Training runs of `tokens_per_layer`, and passes over the held-out rows, of each method that is not free, for a model
# of L layers: the upper ends of docs/scoring.md.
_SCORING: dict[str, Callable[[int], tuple[float, float]]] = {
    "ga-s2": lambda layers: (layers, layers),
    "verified": lambda layers: (3, 2 * layers),
    "ga-s1": lambda layers: (0, 1),
    "zero-shot": lambda layers: (0, layers),
    "zero-shot-linearise": lambda layers: (0, layers),
    "zero-shot-removal": lambda layers: (0, layers**2 / 2),
    "ablation-kl": lambda layers: (0, layers),
}
# Passes of a model over the rows of the report: its KL with both models, and its perplexity and recall.
_EVALUATION_PASSES = 4
# In units of a forward pass of the model: a step's work, the teacher's pass included.
_PASSES = {"align": 2.0, "distill": 4.0, "finetune": 3.0}


@dataclass
class StagePlan:
    """
    What one stage makes and takes.

    Args:
        stage (`str`), makes (`str`): its name, and what it leaves in the run's folder.
        done (`bool`): whether that is there already.
        tokens, steps, rows (`int`, *optional*): that it trains on, takes and uses; of scores, at the most.
        seconds (`float`, *optional*): estimated; None where nothing is known, as for a text on the Hub.
        how (`str`): where the seconds come from.
        device_bytes (`int`): memory of the device at its peak, by the model of docs/memory.md.
        disk_bytes (`int`): what it leaves.
        checkpoint_bytes (`int`): what is on the disk beside, while it trains.
    """

    stage: str
    makes: str
    done: bool = False
    tokens: int | None = None
    steps: int | None = None
    rows: int | None = None
    seconds: float | None = 0.0
    how: str = ""
    device_bytes: int = 0
    disk_bytes: int = 0
    checkpoint_bytes: int = 0


@dataclass
class Plan:
    """
    The stages of a run in their order, and what they take together.

    Args:
        stages (`list[StagePlan]`): in the order in which they run.
        device (`str`), device_memory_bytes (`int`): where it would run, and what there is.
        teacher_parameters, student_parameters (`int`): of the teacher and of the all-linear student.
        notes (`list[str]`): what a reader should know besides.
    """

    stages: list[StagePlan]
    device: str
    device_memory_bytes: int
    teacher_parameters: int
    student_parameters: int
    notes: list[str] = field(default_factory=list)

    @property
    def to_do(self) -> list[StagePlan]:
        """The stages that are not done."""
        return [stage for stage in self.stages if not stage.done]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with `totals` of the stages that are to be done."""
        totals = {
            "tokens": sum(stage.tokens or 0 for stage in self.to_do),
            "steps": sum(stage.steps or 0 for stage in self.to_do),
            "seconds": sum(stage.seconds or 0.0 for stage in self.to_do),
            "device_bytes": max((stage.device_bytes for stage in self.to_do), default=0),
            "disk_bytes": sum(stage.disk_bytes for stage in self.to_do),
            "checkpoint_bytes": max((stage.checkpoint_bytes for stage in self.to_do), default=0),
        }
        return {**asdict(self), "totals": totals}

    def table(self) -> Any:
        """A `rich` table, with a row for each stage and one for all that is to be done."""
        from rich.table import Table

        table = Table(title=f"what is to be made, on {self.device}", padding=0)
        for column in ("stage", "makes"):
            table.add_column(column)
        for column in ("tokens", "steps", "rows", "time", "memory", "disk"):
            table.add_column(column, justify="right", no_wrap=True)
        for stage in self.stages:
            if stage.done:
                table.add_row(stage.stage, stage.makes, "", "", "", "done", "", "")
                continue
            numbers = [f"{n:,}" if n else "" for n in (stage.tokens, stage.steps, stage.rows)]
            memory = _bytes(stage.device_bytes) if stage.device_bytes else ""
            table.add_row(stage.stage, stage.makes, *numbers, _time(stage.seconds), memory, _bytes(stage.disk_bytes))
        totals = self.to_dict()["totals"]
        table.add_section()
        numbers = [f"{totals['tokens']:,}", f"{totals['steps']:,}", "", _time(totals["seconds"])]
        table.add_row("all", "", *numbers, _bytes(totals["device_bytes"]), _bytes(totals["disk_bytes"]))
        return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 2**10:,.0f} KiB"


def plan_recipe(recipe: Recipe, output_dir: str | os.PathLike) -> Plan:
    """
    Returns what [`~hf_hybrid.run.runner.run_recipe`] would make of `recipe` in `output_dir`; nothing is written there.

    Steps of each kind are timed on this machine with the run's own trainers, on random tokens: of one row, and then
    of as many rows as the recipe has at once, where these are short. For a teacher too large for that, or that does
    not fit into memory, nothing is loaded, and time is reckoned from its parameters and a measured rate of matrix
    products. What the run would refuse is refused here too.
    """
    folder = Path(output_dir)
    if launched_processes() > 1:
        raise ValueError("--plan measures on one device; start it without a launcher.")
    check_place(folder, recipe.teacher)
    stages = stages_of(recipe)
    check_arguments(recipe, folder)
    if recipe.teacher != "embedded":
        checked_revision(recipe.teacher, recipe.revision)
    if folder.exists():
        check_claim(folder, recipe)
    done = {name for name in stages if (folder / ARTEFACTS[name]).exists()}
    if "data" not in done:
        check_sources(recipe.data)
    return _Planner(recipe, folder).plan(stages, done)


class _Planner:
    """One recipe on one machine: sizes first, then times where they are wanted."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        empty = empty_teacher(
            recipe.teacher,
            trust_remote_code=recipe.trust_remote_code,
            revision=recipe.revision,
            gguf_file=recipe.gguf_file,
        )
        check_teacher(empty)
        check_recipe(recipe, folder, empty)
        stored = getattr(empty.config, "dtype", None) or torch.float32
        self.dtype = stored if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        self.sizes: Footprint = footprint(empty, self.dtype, recipe)
        self.folder = folder
        with tempfile.TemporaryDirectory() as place:
            self.args = {name: cast(Any, training_arguments(recipe, name, Path(place))) for name in recipe.stages()}
        self.device: torch.device = self.args["align"].device
        self.block = {name: stage.block_size or recipe.data.block_size for name, stage in recipe.stages().items()}
        self.notes: list[str] = []
        self.whole_text = False  # whether all of it was tokenised, not a sample
        self.per_token: dict[str, float] = {}
        self.how: dict[str, str] = {}

    def plan(self, stages: list[str], done: set[str]) -> Plan:
        sizes, recipe = self.sizes, self.recipe
        notes = self.notes
        self._measure([name for name in stages if name not in done])
        planned = [
            self._stage(name) if name not in done else StagePlan(name, ARTEFACTS[name], True) for name in stages
        ]
        plan = Plan(
            planned,
            str(self.device),
            device_memory(self.device),
            sizes.teacher_parameters,
            sizes.student_parameters,
            notes,
        )
        most = max((stage.device_bytes for stage in plan.to_do), default=0)
        if most > plan.device_memory_bytes:
            there = _bytes(plan.device_memory_bytes)
            notes.append(
                f"a step is estimated to take {_bytes(most)}, and {self.device} has {there}: lower micro_batch_size "
                "in execution, set gradient_checkpointing, or take several devices (docs/scaling.md)"
            )
        for how in dict.fromkeys(stage.how for stage in plan.to_do if stage.how):
            names = ", ".join(stage.stage for stage in plan.to_do if stage.how == how)
            notes.append(f"time of {names}: {how}")
        beside = max((stage.checkpoint_bytes for stage in plan.to_do), default=0)
        if beside:
            notes.append(f"while a stage trains, its checkpoints take up to {_bytes(beside)} of disk beside")
        if recipe.score is not None and "score" not in done:
            notes.append("tokens and time of score are the most that its method may take")
        return plan

    def _stage(self, name: str) -> StagePlan:
        recipe, sizes = self.recipe, self.sizes
        plan = StagePlan(name, ARTEFACTS[name])
        student = 4 * sizes.student_parameters
        if name in self.args:
            micro = self.args[name].per_device_train_batch_size
            plan.device_bytes = self._device_bytes(name, micro)
        if name in ("align", "distill", "finetune"):
            stage = recipe.stages()[name]
            plan.steps = steps_of(recipe, name)
            plan.rows = plan.steps * stage.batch_size
            plan.tokens = plan.rows * self.block[name]
            plan.seconds, plan.how = plan.tokens * self.per_token[name], self.how[name]
            trained = sizes.mixer_parameters if name == "align" else sizes.student_parameters
            plan.disk_bytes = student
            plan.checkpoint_bytes = 2 * (student + 8 * trained)
            if name == "distill" and recipe.distill.teacher_topk is not None:
                plan.checkpoint_bytes += plan.tokens * (8 * recipe.distill.teacher_topk + 4)
        elif name == "score":
            self._score(plan, cast(ScoreStage, recipe.score))
        elif name == "data":
            held_out = recipe.data.held_out_rows + recipe.data.report_rows
            wanted = (held_out + rows_needed(recipe)) * recipe.data.block_size
            plan.seconds, plan.how, there = self._data(wanted)
            found = there // recipe.data.block_size
            if found <= held_out and (self.whole_text or 1.2 * found <= held_out):
                raise too_few_rows(found, held_out, recipe.data, "" if self.whole_text else "about ")
            if (reused := rows_needed(recipe) / max(1, found - held_out)) > 1 and not recipe.data.sources:
                self.notes.append(f"the text has about {found:,} rows; each to train on is used {reused:.1f} times")
            plan.rows = min(wanted, there) // recipe.data.block_size
            plan.tokens = plan.rows * recipe.data.block_size
            columns = 2 if recipe.data.respect_documents and recipe.data.source is None else 1
            plan.disk_bytes = 4 * columns * plan.tokens
        elif name == "evaluate":
            plan.rows = recipe.data.report_rows * recipe.data.block_size // self.block["distill"]
            plan.tokens = plan.rows * self.block["distill"]
            plan.seconds = plan.tokens * _EVALUATION_PASSES * self.per_token["distill"] / _PASSES["distill"]
            plan.how = self.how["distill"]
            plan.device_bytes = sizes.teacher_bytes * sizes.teacher_parameters + student
        elif name == "model":
            plan.disk_bytes = sizes.teacher_bytes * sizes.student_parameters
        return plan

    def _score(self, plan: StagePlan, stage: ScoreStage) -> None:
        runs, passes = _SCORING.get(stage.method, lambda layers: (0, 0))(self.sizes.layers)
        steps, rate = steps_of(self.recipe, "score"), self.per_token["distill"]
        plan.steps = int(runs * steps)
        plan.rows = plan.steps * stage.batch_size
        plan.tokens = plan.rows * self.block["score"]
        measured = passes * self.recipe.data.held_out_rows * self.recipe.data.block_size
        plan.seconds = plan.tokens * rate + measured * rate / _PASSES["distill"]
        plan.how = self.how["distill"]
        if not runs:
            models = 4 * self.sizes.student_parameters * needs_alignment(self.recipe)
            plan.device_bytes = self.sizes.teacher_bytes * self.sizes.teacher_parameters + models
        plan.checkpoint_bytes = 24 * self.sizes.student_parameters if runs else 0

    def _device_bytes(self, name: str, micro: int) -> int:
        args = self.args[name]
        how = {"half": args.bf16 or args.fp16, "checkpointing": args.gradient_checkpointing}
        return self.sizes.stage_bytes(name, micro, self.block[name], **how)

    def _measure(self, to_do: list[str]) -> None:
        """Sets the seconds of a token of each kind of training that is to be done, and says how they were found."""
        kinds: list[str] = [name for name in ("align", "distill", "finetune") if name in to_do]
        if "distill" not in kinds and {"score", "evaluate"} & set(to_do):
            kinds.append("distill")
        if not kinds and "data" not in to_do:
            return
        rate = _matrix_rate(self.device, self.args["align"].bf16)
        row = {name: self._operations(name) * self.block[name] / rate for name in kinds}
        weights = (self.sizes.teacher_bytes * self.sizes.teacher_parameters) + 20 * self.sizes.student_parameters
        if max(row.values(), default=0) > _LONGEST_STEP or weights > 0.6 * device_memory(self.device):
            said = f"reckoned from the parameters and {rate / 1e9:,.0f} GFLOP/s of matrix products, measured here"
            self.per_token = {name: seconds / self.block[name] for name, seconds in row.items()}
            self.how = dict.fromkeys(kinds, said)
            self.tokenizer = None
            return
        teacher, self.tokenizer = load_run_pair(self.recipe, self.folder)
        teacher = teacher.to(self.device).requires_grad_(False)
        if kinds:
            self._time_steps(kinds, teacher)

    def _operations(self, name: str) -> float:
        """Multiplications and additions of one token of a step."""
        sizes, again = self.sizes, self.args[name].gradient_checkpointing
        if name == "align":
            return 2 * sizes.teacher_parameters + (8 if again else 6) * sizes.mixer_parameters
        teacher = 0 if name == "finetune" else 2 * sizes.teacher_parameters
        return teacher + (8 if again else 6) * sizes.student_parameters

    def _time_steps(self, kinds: list[str], teacher: Any) -> None:
        recipe = self.recipe
        options: dict[str, Any] = {"mixer": recipe.mixer, "mixer_options": recipe.mixer_options}
        student: Any = convert(teacher, [], kernel=recipe.kernel, **options)
        student.to(torch.promote_types(teacher.dtype, torch.float32)).requires_grad_(True)
        for name in kinds:
            if name != "align" and not student.full_attention_layers:
                layers, num_layers = recipe.select.layers, self.sizes.layers
                count = recipe.select.count(num_layers)
                if layers is None:
                    layers = uniform_layers(num_layers, num_layers // 4 if count is None else count)
                student.set_full_attention_layers(layers, teacher)
            rows = 1
            seconds = self._timed(name, student, teacher, rows)
            micro = self.args[name].per_device_train_batch_size
            if micro > 1 and seconds * micro < _LONGEST_STEP:
                rows = micro
                seconds = self._timed(name, student, teacher, rows)
            self.per_token[name] = seconds / (rows * self.block[name])
            self.how[name] = "a step of the stage's own trainer, timed here on random tokens" + (
                "" if rows == micro else ", of one row"
            )

    def _timed(self, name: str, student: Any, teacher: Any, rows: int) -> float:
        """Seconds of a step of `rows` rows, the median of those after the first, which compiles and allocates."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            self.sizes.vocabulary, ((1 + _TIMED_STEPS) * rows, self.block[name]), generator=generator
        ).tolist()
        table = {"input_ids": ids} | ({"labels": ids} if name == "finetune" else {})
        data, clock = Dataset.from_dict(table), _Clock()
        with tempfile.TemporaryDirectory() as place:
            args = cast(Any, training_arguments(self.recipe, name, Path(place)))
            args.max_steps, args.save_strategy, args.logging_strategy = 1 + _TIMED_STEPS, "no", "no"
            args.gradient_accumulation_steps, args.per_device_train_batch_size = 1, rows
            # A rate of 0: the next step's weights are finite, whatever random tokens would teach them.
            args.learning_rate, args.mixer_learning_rate, args.weight_decay = 0.0, 0.0, 0.0
            args.report_to = []  # this is no run that anyone follows
            set_seed(0)
            trainer = trainer_of(name, student, teacher, args, data)
            trainer.add_callback(clock)
            trainer.train()
        return statistics.median(clock.seconds[1:])

    def _data(self, tokens: int) -> tuple[float | None, str, int]:
        """Seconds to make rows of `tokens` tokens, where they are from, and as many as there are, by a sample."""
        data = self.recipe.data
        if self.tokenizer is None or any(source.dataset for source in ([] if data.source else data.all_sources())):
            return None, "not known before the text is read", tokens
        start = time.perf_counter()
        if data.source:  # reading its corpus takes most of the time, however many rows are made
            demo_rows(self.tokenizer, data.block_size, 256, seed=self.recipe.seed, split="train")
            return time.perf_counter() - start, "256 rows of it, made here", tokens
        length = found = 0
        for text, _ in islice(open_text(data, self.recipe.seed), 256):
            found += len(self.tokenizer(text)["input_ids"])
            length += len(text.encode())
            if length > _SAMPLE_BYTES:
                break
        sources = data.all_sources()
        total = sum(file.stat().st_size for one in sources for file in find_files(one.text_files))
        self.whole_text = len(sources) == 1 and length >= 0.98 * total
        # The text ends with the source whose files are shortest for its weight.
        sizes = [sum(file.stat().st_size for file in find_files(one.text_files)) / one.weight for one in sources]
        there = int(min(sizes) * sum(one.weight for one in sources)) * found // max(1, length)
        if there < tokens and len(sources) > 1:
            held_out = data.held_out_rows + data.report_rows
            rows, needed = (max(1, number // data.block_size - held_out) for number in (there, tokens))
            end = TextEnd.of(data, sizes.index(min(sizes)), rows, needed)
            self.notes.append(f"by the sizes of files, {end.told(data, 'about ')}")
        seconds = (time.perf_counter() - start) / max(1, found)
        return min(tokens, there) * seconds, "a sample of the text, tokenised here", there


class _Clock(TrainerCallback):
    """Seconds of each step of a training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(args.device)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(args.device)
        self.seconds.append(time.perf_counter() - self.start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrix_rate(device: torch.device, half: bool) -> float:
    """Operations a second of matrix products on `device`: the best of a few, each of milliseconds."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = math.inf
    for _ in range(4):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
