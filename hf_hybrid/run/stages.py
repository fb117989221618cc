"""The training stages of a run: arguments from the recipe, checkpoints to go on from, progress to whoever listens."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from hf_hybrid.trainers import (
    AlignmentConfig,
    AlignmentTrainer,
    DistillationConfig,
    DistillationTrainer,
    HybridTrainer,
    HybridTrainingArguments,
    calibrate,
    write_teacher_topk,
)
from hf_hybrid.trainers.checkpoints import (
    MOST_CHECKPOINTS,
    CheckedSteps,
    checkpoints_in,
    damage,
    newest_checkpoint,
)
from hf_hybrid.trainers.precision import Precision
from hf_hybrid.trainers.processes import num_processes, on_main
from hf_hybrid.trainers.scoring.methods import check_placement

from ..data.rows import CutRows, Packing
from ..data.stream import KeepPosition, PackedStream, go_on
from .recipe import DistillStage, Recipe, StageConfig


# What is enough to calibrate mixers on: each of their quantities is a mean over all tokens of a layer or a head.
_CALIBRATION_TOKENS = 2**14
# Fields of `training` for the stages with a teacher; the fine-tuning has none.


@dataclass
class Event:
    """
    Something that happened in a run.

    Args:
        stage (`str`): the stage's name.
        kind (`str`): `"found"` (done before), `"start"`, `"step"`, `"note"` or `"done"`.
        done, total (`float`): for `"step"`, how far the stage is: steps, or layers and parts of them.
        text (`str`): for the reader: at the start what the stage does, on the way where it is, at the end how long it
            took.
        result (`str`): for `"done"`, what came of it; in several lines where it is a table.
        number, of (`int`): the stage's place among those of the call; 0 for what is no stage.
    """

    stage: str
    kind: str
    done: float = 0
    total: float = 0
    text: str = ""
    result: str = ""
    number: int = 0
    of: int = 0


Listener = Callable[[Event], None]


def launched_processes() -> int:
    """How many processes a launcher such as `accelerate launch` or `torchrun` started together; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(recipe: Recipe, folder: Path) -> None:
    """Joins the launcher's other processes, if any; what `training` says about devices decides how they talk."""
    if launched_processes() == 1:
        return
    device = training_arguments(recipe, next(iter(recipe.stages())), folder).device
    if num_processes() != launched_processes():
        raise ValueError(
            f"the launcher started {launched_processes()} processes, but {num_processes()} found each other on "
            f"{device}; start with accelerate launch or torchrun."
        )


def steps_of(recipe: Recipe, name: str) -> int:
    """Optimizer steps of a stage."""
    stage = recipe.stages()[name]
    return math.ceil(stage.budget / (stage.batch_size * (stage.block_size or recipe.data.block_size)))


def rows_needed(recipe: Recipe) -> int:
    """Training rows of `data.block_size` tokens that give every stage what it needs without repetition."""
    block = recipe.data.block_size
    needed = {
        name: math.ceil(steps_of(recipe, name) * stage.batch_size * (stage.block_size or block) / block)
        for name, stage in recipe.stages().items()
        if not streams(recipe, name)
    }
    return max(needed.values(), default=1)


def streams(recipe: Recipe, name: str) -> bool:
    """Whether a stage's rows are made as it trains. Scores never are: all layers see the same rows in one order."""
    return recipe.data.on_the_fly and name != "score"


def stream_for(
    recipe: Recipe,
    name: str,
    tokenizer: Any,
    packing: Packing,
    at_end: Callable[[int, int | None], None] | None = None,
) -> PackedStream:
    """The rows of a stage that [`streams`], made as the held-out ones were; `at_end` as in [`PackedStream`]."""
    block, labels = recipe.stages()[name].block_size or recipe.data.block_size, name == "finetune"
    options: dict[str, Any] = {"labels": labels, "packing": packing, "at_end": at_end}
    return PackedStream(recipe.data, tokenizer, recipe.seed, block, **options)


def cut_for(recipe: Recipe, name: str, rows: Any, prefix: Sequence[int] = ()) -> CutRows:
    """`rows` as a stage wants them, each beginning with `prefix`; for the fine-tuning with labels."""
    block = recipe.stages()[name].block_size or recipe.data.block_size
    return LabelledRows(rows, block, prefix) if name == "finetune" else CutRows(rows, block, prefix)


class LabelledRows(CutRows):
    """[`CutRows`] with `labels`: the tokens, but for each document's first, which nothing predicts."""

    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray]:
        row = super().__getitem__(index)
        if isinstance(index, int):
            first = row["position_ids"] == 0 if "position_ids" in row else False
            row["labels"] = np.where(first, -100, row["input_ids"])
        return row


def split_batch(stage: StageConfig, name: str, processes: int) -> tuple[int, int]:
    """
    Rows of one forward pass of each of `processes`, and how many such passes make a step, so that all of them together
    train on `batch_size` rows: how many share the work changes time and memory, not the result.
    """
    share, rest = divmod(stage.batch_size, processes)
    if rest:
        raise ValueError(
            f"{name}.batch_size={stage.batch_size} rows cannot be shared out to {processes} processes; make it a "
            f"multiple of {processes}, or start fewer."
        )
    limit = min(stage.micro_batch_size or share, share)
    micro = max(rows for rows in range(1, limit + 1) if share % rows == 0)
    return micro, share // micro


def training_arguments(recipe: Recipe, name: str, folder: Path) -> TrainingArguments:
    """The `TrainingArguments` of one stage of `recipe`, which writes its checkpoints to `folder`."""
    stage = recipe.stages()[name]
    steps = steps_of(recipe, name)
    micro, accumulation = split_batch(stage, name, launched_processes())
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "seed": recipe.seed,
        "learning_rate": stage.learning_rate,
        "mixer_learning_rate": stage.mixer_learning_rate,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "warmup_steps": stage.warmup_steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": math.ceil(steps / (stage.checkpoints or MOST_CHECKPOINTS)),
        "save_total_limit": 2,
        "logging_steps": max(1, steps // 50),
        "logging_nan_inf_filter": False,  # it shows a loss that is not finite as the mean of those before
        "disable_tqdm": True,
        "report_to": "none",
        "ignore_data_skip": streams(recipe, name),  # a stream goes on by itself
    }
    if stage.lr_scheduler_type == "stable-cosine-stable" or stage.final_learning_rate is not None:
        values["lr_scheduler_type"] = "constant_with_warmup"
        values["final_learning_rate"] = stage.final_learning_rate or 0.0
        if stage.lr_scheduler_type == "cosine":
            values["decay_window"] = [0.0, 1.0]
    if name == "finetune":
        kind: type[HybridTrainingArguments] = HybridTrainingArguments
    else:
        kind = AlignmentConfig if name == "align" else DistillationConfig
    known = {field.name for field in fields(kind)}  # some fields are of one stage's trainer alone
    general = {key: value for key, value in recipe.arguments().items() if key in known}
    try:
        return kind(**(values | general))
    except (TypeError, ValueError, ImportError) as error:
        said = " ".join(str(error).split("__init__() ")[-1].split())
        raise ValueError(f"training and execution do not hold together: {said}") from error


def check_arguments(recipe: Recipe, folder: Path) -> None:
    """Raises a `ValueError` where some stage's arguments do not hold, before anything is loaded."""
    if recipe.score is not None:
        check_placement(recipe.score.method, bool(recipe.arguments().get("shard_teacher")))
    for name in recipe.stages():
        args = training_arguments(recipe, name, folder)
        try:
            where = "training.optim"
            Trainer.get_optimizer_cls_and_kwargs(args)
            where = "execution.report_to"
            get_reporting_integration_callbacks(args.report_to)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{where} cannot be used as it is: {error}") from error


def check_training(recipe: Recipe, folder: Path, teacher: Any) -> None:
    """Raises a `ValueError` where some stage's arguments do not hold, or do not suit `teacher`."""
    check_arguments(recipe, folder)
    config = teacher.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    for name, stage in recipe.stages().items():
        block, where = stage.block_size or recipe.data.block_size, name if stage.block_size else "data"
        if positions is not None and block > positions:
            raise ValueError(
                f"{where}.block_size={block} makes rows for {name} that are longer than the {positions} positions of "
                "the teacher; pass less."
            )
    k, vocabulary = recipe.distill.teacher_topk, config.vocab_size
    if k is not None and k > vocabulary:
        raise ValueError(f"distill.teacher_topk={k} is more than the teacher's vocabulary of {vocabulary}; pass less.")


def keep_topk(recipe: Recipe, name: str, teacher: Any, rows: Any, folder: Path, listener: Listener) -> Path | None:
    """The folder below `folder` with what `teacher` says of `rows`, made now or found; None where none is wanted."""
    stage = recipe.stages()[name]
    k = stage.teacher_topk if isinstance(stage, DistillStage) else None
    if k is None:
        return None

    def report(done: int, total: int) -> None:
        listener(Event(name, "step", done, total, f"row {done:,} of {total:,} of the teacher's top k"))

    size = stage.micro_batch_size or stage.batch_size
    precision = Precision.of(training_arguments(recipe, name, folder))
    topk = folder / "teacher_topk"
    return write_teacher_topk(teacher, rows, topk, k, batch_size=size, progress=report, precision=precision)


def start_of(recipe: Recipe, student: Any, teacher: Any, rows: Any, folder: Path, listener: Listener) -> None:
    """
    Sets where the mixers of `student` start to be aligned, from the first of `rows`; not where the alignment goes on
    from a checkpoint in `folder`.
    """

    def say(text: str) -> None:
        listener(Event("align", "note", text=text))

    if not recipe.align.calibrate or on_main(lambda: newest_checkpoint(folder, say)) is not None:
        return
    if recipe.mixer == "sliding_window":
        say("sliding_window has no recurrence, so nothing of it is calibrated")
        return
    block = recipe.align.block_size or recipe.data.block_size
    chosen = list(islice(iter(rows), max(1, min(_CALIBRATION_TOKENS, recipe.align.tokens) // block)))
    columns = {name: [row[name] for row in chosen] for name in chosen[0]}
    args: Any = training_arguments(recipe, "align", folder)
    how: dict[str, Any] = {"batch_size": args.per_device_train_batch_size, "precision": Precision.of(args)}
    for line in calibrate(student, teacher, Dataset.from_dict(columns), **how).lines():
        say(f"calibration: {line}")


def train(
    recipe: Recipe,
    name: str,
    student: Any,
    teacher: Any,
    rows: Any,
    folder: Path,
    listener: Listener,
    topk: Path | None = None,
) -> HybridTrainer:
    """
    Trains `student` through the stage `name`, from the newest complete checkpoint in `folder` if there is one.
    `teacher` is None where `topk` has what it says of `rows`.

    Returns the Trainer, whose `state.log_history` holds the losses since the stage's start, whatever killed it in
    between, as if nothing had. A loss or gradient that is not finite raises a `ValueError`.
    """
    args: Any = training_arguments(recipe, name, folder)
    if topk is not None:
        args.teacher_topk = str(topk)
    set_seed(recipe.seed)
    trainer = trainer_of(name, student, teacher, args, rows)
    if isinstance(rows, PackedStream):
        trainer.add_callback(KeepPosition(rows, recipe.stages()[name].batch_size))
    trainer.add_callback(_Steps(recipe, name, listener))  # seals checkpoints, so it comes last
    checkpoint = on_main(lambda: newest_checkpoint(folder, lambda text: listener(Event(name, "note", text=text))))
    if checkpoint is not None:
        listener(Event(name, "note", text=f"going on from {checkpoint.name}"))
        if isinstance(rows, PackedStream):
            go_on(rows, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def outcome(state: TrainerState) -> str:
    """What came of a training, in a line: the mean loss of its first and of its last tenth."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    tenth = -(-len(losses) // 10)
    first, last = (sum(some) / max(1, tenth) for some in (losses[:tenth], losses[len(losses) - tenth :]))
    loss = f"loss {first:.4f} -> {last:.4f} in " if losses else ""
    return f"{loss}{state.global_step:,} steps"


def trainer_of(name: str, student: Any, teacher: Any, args: Any, rows: Any) -> HybridTrainer:
    """The Trainer of the stage `name`, which prints nothing."""
    if name == "finetune":
        trainer: HybridTrainer = HybridTrainer(model=student, args=args, train_dataset=rows)
    else:
        kind: Any = AlignmentTrainer if name == "align" else DistillationTrainer
        trainer = kind(model=student, teacher=teacher, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Steps(CheckedSteps):
    """Reports steps, stops at a loss that is not finite before it reaches a checkpoint, and seals checkpoints."""

    def __init__(self, recipe: Recipe, name: str, listener: Listener) -> None:
        super().__init__(recipe.stages()[name].checkpoints)
        self.name = name
        self.listener = listener
        self.loss = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        if logs and "loss" in logs:
            self.loss = f", loss {float(logs['loss']):.4f}"
            self._tell(state)

    def not_finite(self, what: str, value: float, args: Any, state: Any) -> NoReturn:
        whole = [path for path in checkpoints_in(Path(args.output_dir)) if damage(path) is None]
        kept = f"{whole[0].name}, from before it, is kept" if whole else "there is no checkpoint from before it"
        raise ValueError(
            f"{self.name}: the {what} is {value} at step {state.global_step} of {state.max_steps}; nothing is saved "
            f"of it, and {kept}. Try a lower {self.name}.learning_rate, more {self.name}.warmup_steps, or another "
            "precision; where it is so from the first step, look for nan in the teacher's weights."
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._tell(state)

    def _tell(self, state: Any) -> None:
        text = f"step {state.global_step:,} of {state.max_steps:,}{self.loss}"
        self.listener(Event(self.name, "step", state.global_step, state.max_steps, text))


def check_finite(folder: Path) -> None:
    """Raises a `ValueError` where a weight among the safetensors files in `folder` is not finite."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  no mapping
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise ValueError(
                        f"{name} has weights that are not finite after the last step; no model is made of them. Try a "
                        "lower learning rate, or another precision."
                    )
