"""What every scoring method works with: the models, held-out rows, short distillations, and work that is kept."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import psutil
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from ..checkpoints import MOST_CHECKPOINTS, CheckedSteps, newest_checkpoint
from ..distillation import DistillationConfig, DistillationTrainer
from ..durable import PARTIAL, held, read_json, settle, write_json
from ..held_out import HeldOut
from ..modes import modes_kept
from ..precision import AS_LOADED, Precision
from ..processes import on_main
from ..teacher_states import TeacherStates
from .scores import LayerScore, LayerScores, without_nan
from .scoring_method import ScoringMethod


Steps = Callable[[float, float, str], None]
_CLAIM = "settings"


class NotFinite(ValueError):
    """A loss or a measurement is not finite; `reason` says which, where and when."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}, and nothing is kept of it; lower the learning rates of the scores, score in a wider dtype, or "
            "look for nan in the weights that they start from."
        )
        self.reason = reason


@dataclass
class Job:
    """
    One call of [`score_layers`]: what the methods need, and the record of what they spent.

    Work goes through [`Job.once`], which keeps each result in `folder` and takes it from there in a later call. Each
    file says by `origin`, a digest, from which settings, rows and models it came, and is taken only where these are
    the call's: a job that began before the folder was given to other scores may still write into it.

    `part` says which of how many distillations the next one is, for whoever listens. `states` is what the teacher said
    of batches that several of them train on.
    """

    method: ScoringMethod
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
    checkpoints: int | None = None
    part: tuple[int, int] = (0, 1)
    baseline: float = math.nan
    origin: str = ""
    notes: list[str] = field(default_factory=list)
    tokens_forward: int = 0
    tokens_forward_backward: int = 0
    spent: list[dict[str, Any]] = field(default_factory=list)
    states: TeacherStates | None = None
    whole: Any = None
    mixers: list[Any] = field(default_factory=list)

    @property
    def all_layers(self) -> range:
        """Every layer of the model."""
        return range(self.num_layers)

    @property
    def precision(self) -> Precision:
        """What every model runs in, whatever is measured of it: as the short distillations train."""
        return self.held_out.precision

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

    def say(self, done: float, total: float, text: str) -> None:
        """Tells whoever listens how far the work is; only the main process speaks."""
        if self.steps is not None and PartialState().is_main_process:
            self.steps(done, total, text)

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """
        The result of `work`, plain data: from an earlier call that used the same folder, or made now and kept. What
        [`Job.distil`] left under the same name to go on from is then removed.
        """
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
        self._discard_checkpoints(name)
        self.spent.append({key: value for key, value in kept.items() if key != "result"})
        return kept["result"]

    def trained_once(self, name: str, work: Callable[[], None]) -> None:
        """As [`Job.once`], for work that trains the student: in a later call its weights come from the folder."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        made = []

        def train() -> None:
            work()
            made.append(name)
            if path is not None and PartialState().is_main_process:
                self.check_claim(path.name)
                save_model(self.student, str(path) + PARTIAL, metadata={"origin": self.origin})
                settle(Path(str(path) + PARTIAL), path)

        self.once(name, train)
        if made or path is None:
            return
        try:
            with safe_open(path, "pt") as tensors:
                origin = (tensors.metadata() or {}).get("origin", self.origin)  # an earlier version did not write it
            load_model(self.student, str(path), device=str(self.student.device))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it and {name}.json, and the same call makes them again."
            ) from error
        if origin != self.origin:
            raise ValueError(
                f"{path} came from other settings, rows or models than {name}.json; delete both, and the same call "
                "makes them again."
            )

    def _checkpoints_of(self, name: str) -> Path | None:
        """Where the run that makes `name` keeps its checkpoints: for other settings, rows or models elsewhere."""
        return None if self.folder is None else self.folder / f"{name}_checkpoints_{self.origin}"

    def _discard_checkpoints(self, name: str) -> None:
        path = self._checkpoints_of(name)
        if path is not None and path.exists() and PartialState().is_main_process:
            shutil.rmtree(path, ignore_errors=True)

    def score(self, layer: int, work: Callable[[], LayerScore], prefix: str = "layer") -> LayerScore:
        """
        The score of one layer, as [`Job.once`]; `work` leaves its tokens and seconds to this. A layer whose loss or
        measurement is not finite has that for its score, and the others go on.
        """
        name = f"{prefix}_{layer:03d}"

        def measured() -> dict[str, Any]:
            try:
                found = work()
                check_numbers(f"{prefix} {layer}", [found.value, found.per_sequence])
            except NotFinite as error:
                found = LayerScore.of_diverged(layer, error.reason)
            return without_nan(dataclasses.asdict(found))

        found = self.once(name, measured)
        spent = self.spent[-1]
        cost = {"tokens": spent["tokens_forward_backward"], "seconds": spent["seconds"]}
        score = LayerScore(**{**found, **cost})
        if score.diverged:
            self.note_diverged(f"layer {layer}", score.diverged, name)
        self.report(score)
        return score

    def note_diverged(self, what: str, reason: str, name: str) -> None:
        """Says with the scores that `what` diverged, and how it is tried again."""
        again = "" if self.folder is None else f"; to try it again, delete {self.folder / name}.json"
        self.notes.append(f"{what} diverged and comes last: {reason}{again}")

    def report(self, score: LayerScore) -> None:
        """Hands one layer's score to whoever listens."""
        if self.progress is not None:
            self.progress(score)

    def finish(self, scores: list[LayerScore], **fields: Any) -> LayerScores:
        """The scores with everything that was spent on them; a `ValueError` where all layers diverged."""
        if scores and all(score.diverged for score in scores):
            kept = "" if self.folder is None else f" Delete the layers' files in {self.folder} to try it again."
            raise ValueError(
                f"all {len(scores)} layers diverged, which ranks nothing: layer {scores[0].layer}: "
                f"{scores[0].diverged}; lower the learning rates of the scores, or look for nan in the weights that "
                f"they start from.{kept}"
            )
        about = {name: getattr(self.method, name) for name in ("measure", "unit", "higher_is_better")}
        fields = {**about, **fields, "notes": [*self.notes, *fields.get("notes", [])]}
        return LayerScores(
            scores=sorted(scores, key=lambda score: score.layer),
            method=self.method.name,
            seed=self.args.seed,
            evaluation_tokens=self.held_out.tokens,
            baseline=self.baseline,
            tokens_forward_backward=sum(entry["tokens_forward_backward"] for entry in self.spent),
            tokens_forward=sum(entry["tokens_forward"] for entry in self.spent),
            total_seconds=sum(entry["seconds"] for entry in self.spent),
            peak_memory_bytes=max((entry["peak_memory_bytes"] for entry in self.spent), default=0),
            memory_kind=_Memory.kind(self.teacher.device),
            measured_on=self.measured_on(),
            precision=self.precision.of_models(teacher=self.teacher, student=self.student),
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
        total = self.length.get("max_steps", self.args.max_steps)
        if total < rounds:
            raise ValueError(
                f"a run of {max(total, 0)} steps has no {rounds} rounds; pass more tokens_per_layer, or fewer rounds."
            )
        return [-(-total * number // rounds) for number in range(1, rounds + 1)]

    def distil(
        self,
        name: str,
        *,
        kind: Callable[..., DistillationTrainer] = DistillationTrainer,
        callbacks: Sequence[TrainerCallback] = (),
        folder: Path | None = None,
        start: int = 0,
        **changes: Any,
    ) -> None:
        """
        Distils the student as it is now on `tokens_per_layer` tokens, rounded up to whole steps (or for as long as
        `args` says), from the seed on: the same batches in the same order each time.

        Where there is a folder, `checkpoints` are kept on the way; training goes on from the newest.

        Args:
            name (`str`): of the result that the run is for, see [`Job.once`].
            kind (`Callable`): makes the trainer.
            folder (`Path`, *optional*): for the checkpoints, in the place of one that goes when the result is kept.
            start (`int`): the step at which this piece of the training begins: the tokens from there on count.
            callbacks (`Sequence`, *optional*), changes: for the trainer, and of its arguments.
        """
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            settings: dict[str, Any] = {"output_dir": scratch, "save_strategy": "no", "eval_strategy": "no"}
            settings |= {"disable_tqdm": True, "load_best_model_at_end": False}
            # A loss that is not finite ends the run at the next of these steps.
            share = self._share_of_steps()
            settings |= {"logging_strategy": "steps", "logging_steps": share, "logging_nan_inf_filter": False}
            if folder is None:
                folder = on_main(lambda: self._own_checkpoints(name, stack))
            if folder is not None:
                settings |= {"output_dir": str(folder), "save_strategy": "steps", "save_steps": share}
                settings |= {"save_total_limit": 2, "save_only_model": False}
            newest = None if folder is None else on_main(partial(newest_checkpoint, folder, partial(self.say, 0, 0)))
            args = dataclasses.replace(self.args, **self.length | settings | changes)
            if newest is not None:
                done = int(newest.name.split("-")[-1]) - start
                self.tokens_forward_backward += done * tokens_per_step(self.train_dataset, args)
            set_seed(args.seed)
            trainer = kind(
                model=self.student,
                teacher=self.teacher,
                args=args,
                train_dataset=self.train_dataset,
                callbacks=[*callbacks, _Count(self)],
            )
            trainer.states = self.states
            trainer.remove_callback(PrinterCallback)  # L runs would print L summaries; `progress` reports instead
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))

    def keep_states(self) -> None:
        """
        From here on, keeps what the teacher says of the batches of [`Job.distil`], for other layers that are distilled
        on the same; forgets what it kept before.
        """
        most = self.args.teacher_states_bytes
        self.states = TeacherStates(most) if most and len(self.layers) > 1 else None

    @property
    def length(self) -> dict[str, int]:
        """What of a trainer's arguments says how long a run is."""
        if self.tokens_per_layer is None:
            return {}  # as `args` says
        return {"max_steps": steps_for(self.tokens_per_layer, self.train_dataset, self.args)}

    def _share_of_steps(self) -> float:
        """The steps between two checkpoints; a share of all of them where `args` counts epochs."""
        total, parts = self.length.get("max_steps", self.args.max_steps), self.checkpoints or MOST_CHECKPOINTS
        return -(-total // parts) if total > 0 else 1 / (parts + 1)

    def _own_checkpoints(self, name: str, stack: contextlib.ExitStack) -> Path | None:
        """The folder for the checkpoints of `name`; None without one, or where another job trains the same there."""
        path = self._checkpoints_of(name)
        if path is None:
            return None
        self.check_claim(name)  # before it costs a run
        path.mkdir(parents=True, exist_ok=True)
        return path if stack.enter_context(held(path / ".lock")) else None

    @contextlib.contextmanager
    def restored_afterwards(self) -> Iterator[dict[str, torch.Tensor]]:
        """Gives the aligned weights, a copy in host memory, and puts them and all linear layers back at the end."""
        aligned = _in_host_memory(self.student.state_dict())
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
        """
        Marks the folder, if there is one, as holding scores of `settings`, which are all that decides them; a
        `ValueError` where it holds others.
        """
        settings = without_nan(settings)
        # The baseline is a measurement, which comes out a little otherwise on another machine.
        decides = json.dumps({name: value for name, value in settings.items() if name != "baseline"}, sort_keys=True)
        self.origin = hashlib.sha256(decides.encode()).hexdigest()[:16]
        if self.folder is not None:
            on_main(lambda: self._claim(settings))

    def _claim(self, settings: dict[str, Any]) -> None:
        folder = cast(Path, self.folder)
        found = read_json(folder / f"{_CLAIM}.json")
        if found is None:
            write_json(folder / f"{_CLAIM}.json", settings | {"origins": [self.origin], "unmarked": []})
            return
        found.setdefault("precision", str(AS_LOADED))  # which every measurement had before it was written down
        for name, here in settings.items():
            there = found.get(name, here)  # a version that did not write it down
            near = name == "baseline" and None not in (here, there)
            if not (math.isclose(there, here, rel_tol=1e-3) if near else there == here):
                raise ValueError(
                    f"{self.folder} has scores made with {name}={there}, this call has {here}; choose another "
                    "output_dir."
                )
        if self.origin in found.get("origins", []):
            return
        # Of a version that wrote down less: what it kept until now is taken, for as far as one can tell it fits.
        if "origins" not in found:
            found["unmarked"] = [path.stem for path in sorted(folder.glob("*.json")) if path.stem != _CLAIM]
        origins = [*found.get("origins", []), self.origin]
        write_json(folder / f"{_CLAIM}.json", settings | found | {"origins": origins})

    def check_claim(self, name: str) -> None:
        """Raises a `ValueError` where the folder is no longer that of this call's scores."""
        if self.folder is None or not self.origin:
            return
        found = read_json(self.folder / f"{_CLAIM}.json") or {}
        if self.origin not in found.get("origins", []):
            raise ValueError(
                f"{self.folder} was set aside, or has other scores, since this call began; its {name} is not kept "
                "there. Start it again if it is still wanted."
            )

    def _read(self, name: str) -> Any:
        """What the main process finds under `name`, on every process: a file may appear while others look."""
        if self.folder is None:
            return None
        found, note = on_main(lambda: self._fitting(cast(Path, self.folder) / f"{name}.json"))
        if note is not None and note not in self.notes:
            self.notes.append(note)
        return found

    def _fitting(self, path: Path) -> tuple[Any, str | None]:
        """What `path` holds, if it came from what this call works with; else None. And what is to be said of it."""
        found = read_json(path)
        if found is None:
            return None, None
        if "layer" in found:  # written by a version that kept the score alone
            cost = {"tokens_forward": 0, "tokens_forward_backward": found["tokens"], "peak_memory_bytes": 0}
            found = {"result": found, "seconds": found["seconds"], **cost}
        if "result" not in found:
            raise ValueError(f"{path} holds no result; delete it, and the same call makes it again.")
        claim = read_json(path.with_name(f"{_CLAIM}.json")) or {}
        origin = found.pop("origin", None)
        if origin in claim.get("origins", [None]):
            return found, None
        if origin is None and path.stem in claim.get("unmarked", []):
            return found, (
                "results of an earlier version, which do not say from which rows and weights they came, were taken, "
                f"as the settings in {path.parent} fit"
            )
        return None, f"{path} came from other settings, rows or models, and was made again"

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Keeps `data` under `name`, on the main process, where there is a folder that is still this call's."""
        if self.folder is not None and PartialState().is_main_process:
            self.check_claim(name)
            write_json(self.folder / f"{name}.json", {**data, "origin": self.origin})


def _in_host_memory(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A copy of `state`. What lies on a GPU is copied into pinned memory, from where it comes back several times as fast,
    unless it takes more than a quarter of what is free.
    """
    pin = sum(tensor.nbytes for tensor in state.values()) <= psutil.virtual_memory().available // 4
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin and tensor.is_cuda).copy_(tensor)
        for name, tensor in state.items()
    }


class _Count(CheckedSteps):
    """Counts the tokens of every optimizer step, says how far a training run is, and looks after its checkpoints."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.checkpoints)
        self.job = job
        self.loss = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        if logs and "loss" in logs:
            self.loss = f", loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.tokens_forward_backward += tokens_per_step(self.job.train_dataset, args)
        super().on_step_end(args, state, control, **kwargs)
        done, total = self.job.part
        # What it is measured by at its end counts as one step more.
        share = state.global_step / (state.max_steps + 1)
        softmax = self.job.student.full_attention_layers
        text = f"softmax in {softmax}: step {state.global_step:,} of {state.max_steps:,}{self.loss}"
        self.job.say(done + share, total, text)

    def not_finite(self, what: str, value: float, args: Any, state: Any) -> NoReturn:
        raise NotFinite(f"the {what} is {value} at step {state.global_step} of {state.max_steps}")


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
    """Raises [`NotFinite`] where a measurement is not finite."""
    kl = sum(rows) / len(rows)
    if not math.isfinite(kl):
        why = ": the teacher says tokens that it cannot, as where its vocabulary is masked" if kl == math.inf else ""
        raise NotFinite(f"{what} has a held-out KL of {kl}, which ranks nothing{why}")


def check_numbers(name: str, found: Any) -> None:
    """Raises [`NotFinite`] where a number in `found`, plain data, is not finite."""
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    for part in parts:
        check_numbers(name, part)
    if isinstance(found, float) and not math.isfinite(found):
        raise NotFinite(f"{name}: a measurement is {found}, which ranks nothing")


def tokens_per_step(dataset: Any, args: Any) -> int:
    """Tokens of one optimizer step on all processes, for rows of one length."""
    row = next(iter(dataset))
    return len(row["input_ids"]) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_for(tokens: int, dataset: Any, args: Any) -> int:
    """Optimizer steps that cover `tokens`, rounded up."""
    return max(1, -(-tokens // tokens_per_step(dataset, args)))
