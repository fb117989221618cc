"""What every scoring method works with: the models, held-out rows, short distillations, and work that is kept."""

import contextlib
import copy
import dataclasses
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling.modeling_hybrid import decoder_layers
from .checkpoints import newest_checkpoint, seal
from .distillation import DistillationConfig, DistillationTrainer
from .durable import PARTIAL, read_json, settle, write_json
from .held_out import HeldOut
from .modes import modes_kept
from .processes import on_main
from .scores import LayerScore, LayerScores, without_nan


Steps = Callable[[int, int, str], None]


@dataclass
class Job:
    """
    One call of [`score_layers`]: what the methods need, and the record of what they spent.

    Work goes through [`Job.once`], which keeps each result in `folder` and takes it from there in a later call.
    """

    student: Any
    teacher: Any
    train_dataset: Any
    args: DistillationConfig
    held_out: HeldOut
    layers: list[int]
    num_layers: int
    tokens_per_layer: int | None = None
    k: int | None = None
    folder: Path | None = None
    progress: Callable[[LayerScore], None] | None = None
    steps: Steps | None = None
    baseline: float = math.nan
    tokens_forward: int = 0
    tokens_forward_backward: int = 0
    spent: list[dict[str, Any]] = field(default_factory=list)
    whole: Any = None
    mixers: list[Any] = field(default_factory=list)

    @property
    def all_layers(self) -> range:
        """Every layer of the model."""
        return range(self.num_layers)

    @property
    def wanted(self) -> int:
        """`k`, in a method that was not begun without it, see [`check_request`]."""
        if self.k is None:
            raise ValueError("k was not given; pass how many layers are wanted.")
        return self.k

    def kl(self) -> list[float]:
        """Held-out KL of the student as it is now, by row."""
        self.tokens_forward += self.held_out.tokens
        rows = self.held_out.kl(self.student)
        check_finite(f"softmax in layers {self.student.full_attention_layers}", rows)
        return rows

    def say(self, done: int, total: int, text: str) -> None:
        """Tells whoever listens how far the work is; only the main process speaks."""
        if self.steps is not None and PartialState().is_main_process:
            self.steps(done, total, text)

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, plain data: from an earlier call that used the same folder, or made now and kept."""
        kept = self._read(name)
        if kept is None:
            start, forward, trained = time.perf_counter(), self.tokens_forward, self.tokens_forward_backward
            memory = _Memory(self.teacher.device)
            result = work()
            check_numbers(name, result)
            kept = {
                "result": result,
                "seconds": time.perf_counter() - start,
                "tokens_forward": self.tokens_forward - forward,
                "tokens_forward_backward": self.tokens_forward_backward - trained,
                "peak_memory_bytes": memory.peak(),
            }
            self.write(name, kept)
        self.spent.append({key: value for key, value in kept.items() if key != "result"})
        return kept["result"]

    def trained_once(self, name: str, work: Callable[[Path | None], None]) -> None:
        """
        As [`Job.once`], for work that trains the student: in a later call its weights come from the folder. `work` is
        given the folder to keep checkpoints in, which is there only until it is done.
        """
        checkpoints = None if self.folder is None else self.folder / f"{name}_checkpoints"
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        made = []

        def train() -> None:
            work(checkpoints)
            made.append(name)
            if path is not None and PartialState().is_main_process:
                save_model(self.student, str(path) + PARTIAL)
                settle(Path(str(path) + PARTIAL), path)

        self.once(name, train)
        self.discard(f"{name}_checkpoints")
        if not made:
            try:
                load_model(self.student, str(path), device=str(self.student.device))
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged ({error}); delete it and {name}.json, and the same call makes them again."
                ) from error

    def discard(self, name: str) -> None:
        """Removes a subfolder whose work is done."""
        if self.folder is not None and PartialState().is_main_process:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def score(self, layer: int, work: Callable[[], LayerScore], prefix: str = "layer") -> LayerScore:
        """The score of one layer, as [`Job.once`]; `work` leaves its tokens and seconds to this."""

        def measured() -> dict[str, Any]:
            found = work()
            check_numbers(f"{prefix} {layer}", [found.value, found.per_sequence])
            return without_nan(dataclasses.asdict(found))

        found = self.once(f"{prefix}_{layer:03d}", measured)
        spent = self.spent[-1]
        cost = {"tokens": spent["tokens_forward_backward"], "seconds": spent["seconds"]}
        score = LayerScore(**{**found, **cost})
        self.report(score)
        return score

    def report(self, score: LayerScore) -> None:
        """Hands one layer's score to whoever listens."""
        if self.progress is not None:
            self.progress(score)

    def finish(self, method: str, scores: list[LayerScore], **fields: Any) -> LayerScores:
        """The scores with everything that was spent on them."""
        return LayerScores(
            scores=sorted(scores, key=lambda score: score.layer),
            method=method,
            seed=self.args.seed,
            evaluation_tokens=self.held_out.tokens,
            baseline=self.baseline,
            tokens_forward_backward=sum(entry["tokens_forward_backward"] for entry in self.spent),
            tokens_forward=sum(entry["tokens_forward"] for entry in self.spent),
            total_seconds=sum(entry["seconds"] for entry in self.spent),
            peak_memory_bytes=max((entry["peak_memory_bytes"] for entry in self.spent), default=0),
            memory_kind=_Memory.kind(self.teacher.device),
            measured_on=self.measured_on(),
            **fields,
        )

    def measured_on(self) -> dict[str, int]:
        """Rows and tokens to train on and to measure on."""
        measured = {"eval_rows": self.held_out.rows, "eval_tokens": self.held_out.tokens}
        if self.train_dataset is not None:
            rows = len(self.train_dataset)
            measured |= {"train_rows": rows, "train_tokens": rows * len(self.train_dataset[0]["input_ids"])}
        return measured

    def step_points(self, rounds: int) -> list[int]:
        """The steps at the ends of `rounds` equal parts of a training run."""
        total = self.args.max_steps
        if self.tokens_per_layer is not None:
            total = steps_for(self.tokens_per_layer, self.train_dataset, self.args)
        if total < rounds:
            raise ValueError(
                f"a run of {max(total, 0)} steps has no {rounds} rounds; pass more tokens_per_layer, or fewer rounds."
            )
        return [-(-total * number // rounds) for number in range(1, rounds + 1)]

    def distil(
        self,
        *,
        kind: Callable[..., DistillationTrainer] = DistillationTrainer,
        checkpoints: Path | None = None,
        resume_from_checkpoint: str | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **changes: Any,
    ) -> None:
        """
        Distils the student as it is now on `tokens_per_layer` tokens, rounded up to whole steps (or for as long as
        `args` says), from the seed on: the same batches in the same order each time.

        Args:
            kind (`Callable`): makes the trainer.
            checkpoints (`Path`, *optional*): where to keep ten on the way; training goes on from the newest there.
            resume_from_checkpoint (`str`, *optional*): the one to go on from.
            callbacks (`Sequence`, *optional*), changes: for the trainer, and of its arguments.
        """
        with tempfile.TemporaryDirectory() as scratch:
            settings: dict[str, Any] = {"output_dir": scratch, "save_strategy": "no", "eval_strategy": "no"}
            settings |= {"logging_strategy": "no", "disable_tqdm": True, "load_best_model_at_end": False}
            if self.tokens_per_layer is not None:
                settings["max_steps"] = steps_for(self.tokens_per_layer, self.train_dataset, self.args)
            newest = None
            if checkpoints is not None:
                settings |= {"output_dir": str(checkpoints), "save_strategy": "steps", "save_steps": 0.1}
                settings |= {"save_total_limit": 2, "save_only_model": False}
                newest = on_main(lambda: newest_checkpoint(checkpoints, lambda text: self.say(0, 0, text)))
            args = dataclasses.replace(self.args, **settings | changes)
            if newest is not None:
                done = int(newest.name.split("-")[-1])
                self.tokens_forward_backward += done * tokens_per_step(self.train_dataset, args)
                resume_from_checkpoint = str(newest)
            set_seed(args.seed)
            trainer = kind(
                model=self.student,
                teacher=self.teacher,
                args=args,
                train_dataset=self.train_dataset,
                callbacks=[*callbacks, _Count(self)],
            )
            trainer.remove_callback(PrinterCallback)  # L runs would print L summaries; `progress` reports instead
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)

    @contextlib.contextmanager
    def restored_afterwards(self) -> Iterator[dict[str, torch.Tensor]]:
        """Gives the aligned weights, a copy in host memory, and puts them and all linear layers back at the end."""
        aligned = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.student.state_dict().items()}
        given = self.student
        self.mixers = [layer.self_attn for layer in decoder_layers(given)]
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # What FSDP2 shards stays sharded, so a copy is trained, and the student waits in host memory.
            self.whole = given.to("cpu")
            self.student = copy.deepcopy(given)
        with modes_kept(given):
            try:
                yield aligned
            finally:
                if self.whole is None:
                    self.reset(aligned)
                else:
                    self.student, self.whole = given.to(self.teacher.device), None

    def reset(self, aligned: dict[str, torch.Tensor]) -> None:
        """Makes the student what it was: with its own mixers in every layer, and the weights `aligned`."""
        if self.whole is not None:
            self.student = copy.deepcopy(self.whole)
            return
        for layer, mixer in zip(decoder_layers(self.student), self.mixers, strict=True):
            layer.self_attn = mixer
        self.student.config.full_attention_layers = []
        self.student.set_full_attention_layers([])  # what follows from it in the model
        self.student.load_state_dict(aligned)
        self.student.zero_grad(set_to_none=True)

    def claim(self, settings: dict[str, Any]) -> None:
        """Marks the folder, if there is one, as holding scores of `settings`; a `ValueError` where it holds others."""
        found = self._read("settings")
        if found is None:
            self.write("settings", without_nan(settings))
            return
        for name, here in without_nan(settings).items():
            there = found.get(name, here)  # a version that did not write it down
            near = name == "baseline" and None not in (here, there)
            if not (math.isclose(there, here, rel_tol=1e-3) if near else there == here):
                raise ValueError(
                    f"{self.folder} has scores made with {name}={there}, this call has {here}; choose another "
                    "output_dir."
                )

    def _read(self, name: str) -> Any:
        """What the main process finds under `name`, on every process: a file may appear while others look."""
        if self.folder is None:
            return None
        path, state = self.folder / f"{name}.json", PartialState()
        found = [read_json(path) if state.is_main_process else None]
        if state.num_processes > 1:
            broadcast_object_list(found)
        if found[0] is not None and "layer" in found[0]:  # written by a version that kept the score alone
            old = found[0]
            cost = {"tokens_forward": 0, "tokens_forward_backward": old["tokens"], "peak_memory_bytes": 0}
            found = [{"result": old, "seconds": old["seconds"], **cost}]
        if found[0] is not None and name != "settings" and "result" not in found[0]:
            raise ValueError(f"{path} holds no result; delete it, and the same call makes it again.")
        return found[0]

    def write(self, name: str, data: Any) -> None:
        """Keeps `data` under `name`, on the main process, where there is a folder."""
        if self.folder is not None and PartialState().is_main_process:
            write_json(self.folder / f"{name}.json", data)


class _Count(TrainerCallback):
    """Counts the tokens of every optimizer step, says how far a training run is, and seals its checkpoints."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.tokens_forward_backward += tokens_per_step(self.job.train_dataset, args)
        if state.global_step >= state.max_steps:
            # What is made of the weights follows at once; and resumed from here, the Trainer would train a step more.
            control.should_save = False
        self.job.say(state.global_step, state.max_steps, "training")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class _Memory:
    """Peak of the memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self._largest()

    def peak(self) -> int:
        return self._largest() - (0 if self.device.type == "cuda" else self.before)

    @staticmethod
    def kind(device: torch.device) -> str:
        return "cuda" if device.type == "cuda" else "rss growth"

    def _largest(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_finite(what: str, rows: list[float]) -> None:
    """Raises a `ValueError` where a measurement is not finite."""
    kl = sum(rows) / len(rows)
    if not math.isfinite(kl):
        raise ValueError(
            f"{what} has a held-out KL of {kl}, which ranks nothing, and is not kept; lower the learning rates of the "
            "scores, or look for nan in the weights that they start from."
        )


def check_numbers(name: str, found: Any) -> None:
    """Raises a `ValueError` where a number in `found`, plain data, is not finite."""
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    for part in parts:
        check_numbers(name, part)
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(
            f"{name}: a measurement is {found}, which ranks nothing, and is not kept; look for nan in the weights, "
            "score in a wider dtype, or lower the learning rates."
        )


def tokens_per_step(dataset: Any, args: Any) -> int:
    """Tokens of one optimizer step on all processes, for rows of one length."""
    row = next(iter(dataset))
    return len(row["input_ids"]) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_for(tokens: int, dataset: Any, args: Any) -> int:
    """Optimizer steps that cover `tokens`, rounded up."""
    return max(1, -(-tokens // tokens_per_step(dataset, args)))
