"""A run's recipe, read strictly from YAML: what decides its result, and how it is executed."""

import dataclasses
import difflib
import functools
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_hybrid.trainers import AlignmentConfig, DistillationConfig
from hf_hybrid.trainers.durable import write_text
from hf_hybrid.trainers.scoring.methods import MOVED, method_of

from ..data.config import DataConfig
from ..exporting.native import options_for
from ..selection import POSITIONAL, check_selector
from .schema import parse, read_yaml, typed, unknown_key


# Set by the pipeline from a recipe's own fields; in `training` they would say the same thing twice.
_MANAGED = frozenset(
    {
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "seed",
        "data_seed",
        "learning_rate",
        "mixer_learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "auto_find_batch_size",
        "dataloader_drop_last",
        "average_tokens_across_devices",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "eval_strategy",
        "remove_unused_columns",
        "resume_from_checkpoint",
        "ignore_data_skip",
        "load_best_model_at_end",
        "save_only_model",
        "disable_tqdm",
        "teacher_topk",
    }
)
# Fields of TrainingArguments that change time, memory and what is told on the way, but not what is made.
_OF_EXECUTION = frozenset(
    {
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "chunk_tokens",
        "teacher_states_bytes",
        "layerwise_backward",
        "document_attention",
        "shard_teacher",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "include_num_input_tokens_seen",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "use_cpu",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "parallelism_config",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "skip_memory_metrics",
        "debug",
        "full_determinism",
        "hub_token",
        "local_rank",
    }
)
KERNELS = ("auto", "torch", "fla")
OUR_SCHEDULE = "stable-cosine-stable"
# Schedules that end at final_learning_rate.
_ENDING = frozenset({"cosine", OUR_SCHEDULE})


@dataclass(kw_only=True)
class StageConfig:
    """
    How one stage trains. Each stage adds `tokens`, the tokens to train on, rounded up to whole steps.

    Args:
        batch_size (`int`): rows of one optimizer step.
        micro_batch_size (`int`, *optional*): rows that are on the device at once, a divisor of `batch_size`, which is
            also the default. It belongs to the execution, see [`Recipe`].
        block_size (`int`, *optional*): tokens of a row, a divisor of `data.block_size`, which is also the default.
        learning_rate (`float`): of all parameters that train, or all but the mixers.
        mixer_learning_rate (`float`, *optional*): of the linear-attention mixers; by default `learning_rate`. With
            `training.learning_rate_groups: attention`, of all attention and the norms before it, as the paper's code.
        lr_scheduler_type (`str`): as in [`~transformers.TrainingArguments`], or `"stable-cosine-stable"` of RADLADS
            (arXiv 2505.03005, table 2): constant until 83.3% of the steps, then along a cosine to
            `final_learning_rate` at 87.5%, and constant again.
        final_learning_rate (`float`, *optional*): where that schedule, or `"cosine"`, ends, for mixers and all else;
            by default 0.
        warmup_steps (`float`): steps, or below 1 the share of all steps.
        checkpoints (`int`, *optional*): checkpoints written on the way, evenly spaced; a killed run loses at most that
            share. By default ten at most, a minute or more apart. It belongs to the execution, too.
    """

    batch_size: int = 8
    micro_batch_size: int | None = None
    block_size: int | None = None
    learning_rate: float = 1e-3
    mixer_learning_rate: float | None = None
    lr_scheduler_type: str = "constant"
    final_learning_rate: float | None = None
    warmup_steps: float = 0.0
    checkpoints: int | None = None

    @property
    def budget(self) -> int:
        """The tokens to train on, as the recipe says: `tokens`, or each layer's where the stage scores layers."""
        return getattr(self, "tokens_per_layer" if isinstance(self, ScoreStage) else "tokens")


@dataclass(kw_only=True)
class AlignStage(StageConfig):
    """
    [`StageConfig`] of the alignment; only the mixers train. arXiv 2505.03005, step 1: 1e-3 with a cosine.

    Args:
        calibrate (`bool`): first set the mixers' decays, write strengths, gates and scales from what the teacher's
            attention does on the first 16,384 of these tokens, see [`~hf_hybrid.calibrate`]; otherwise they start as
            they are drawn.
    """

    tokens: int
    lr_scheduler_type: str = "cosine"
    calibrate: bool = True


@dataclass(kw_only=True)
class DistillStage(StageConfig):
    """
    [`StageConfig`] of the distillation, with the rates of arXiv 2512.20569's released code.

    Args:
        teacher_topk (`int`, *optional*): run the teacher over the training rows once, keep the log-probabilities of
            this many tokens at each position on disk, and train on them without the teacher in memory; the loss is
            then a lower bound of the KL. See [`~hf_hybrid.write_teacher_topk`].
    """

    tokens: int
    learning_rate: float = 7e-6
    mixer_learning_rate: float | None = 1e-4
    teacher_topk: int | None = None


@dataclass(kw_only=True)
class ScoreStage(StageConfig):
    """
    [`StageConfig`] of the short distillations that score layers, with the rates of the distillation. `checkpoints` are
    those of each of them.

    Args:
        tokens_per_layer (`int`): tokens of one such run: `ga-s2` makes one for each layer, others one in all or none.
        method (`str`): how layers are scored, see docs/scoring.md.
        options (`dict`): options of the method.
    """

    tokens_per_layer: int
    learning_rate: float = 7e-6
    mixer_learning_rate: float | None = 1e-4
    method: str = "ga-s2"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class FinetuneStage(StageConfig):
    """[`StageConfig`] of plain next-token training after the distillation. arXiv 2505.03005, step 3: 1e-5."""

    tokens: int
    learning_rate: float = 1e-5


@dataclass
class SelectStage:
    """
    Which layers keep softmax attention.

    Args:
        selector (`str`): the score stage's method, or a rule that goes by position, see `select_layers`.
        k (`int`, *optional*), fraction (`float`, *optional*), layers (`list[int]`, *optional*):
            exactly one, or `cache_bytes`: how many layers, which share of them (rounded to the nearest, a half
            upwards), or which.
        cache_bytes (`int`, *optional*): as many of the best as keep the cache of a sequence within this, see
            `layers_within`.
        context (`int`, *optional*): tokens of that sequence.
    """

    selector: str = "ga-s2"
    k: int | None = None
    fraction: float | None = None
    layers: list[int] | None = None
    cache_bytes: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.selector not in MOVED:
            check_selector(self.selector)
        ways = ("k", "fraction", "layers", "cache_bytes")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"select gives {' and '.join(given) or 'no layers'}; give one of k, fraction, layers, cache_bytes."
            )
        for name, least in (("k", 0), ("cache_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"select.{name}={value} is too small; pass at least {least}.")
        if self.layers is not None and (min(self.layers, default=0) < 0 or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"select.layers={self.layers} names a layer twice or below 0; list each once, from 0.")
        if (self.cache_bytes is None) != (self.context is None):
            raise ValueError("select.cache_bytes and select.context go together: bytes, and at how many tokens.")
        if self.context is not None and self.context < 1:
            raise ValueError(f"select.context={self.context} is no sequence; pass at least 1 token.")
        if self.cache_bytes is not None and self.selector in POSITIONAL:
            raise ValueError(
                f"select.selector={self.selector!r} goes by position, not by size; give k, or choose another."
            )
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"select.fraction={self.fraction} is outside 0..1; 0.25 keeps a quarter of the layers.")

    @property
    def rule(self) -> str | list[int]:
        """What says which layers are kept, as `select_layers` takes it: `layers`, or without them the selector."""
        return self.selector if self.layers is None else self.layers

    def count(self, num_layers: int) -> int | None:
        """How many layers of `num_layers` keep softmax attention; None where that is not said."""
        return self.k if self.fraction is None else int(self.fraction * num_layers + 0.5)


@dataclass
class Recipe:
    """
    What [`~hf_hybrid.run.runner.run_recipe`] makes, and how.

    A recipe has two parts. What decides the result is the identity of a run. How it is executed changes time, memory
    and what is told on the way, and the result by no more than rounding: it may be another one each time that a run
    goes on. It is `execution`, and `trust_remote_code`, `data.streaming`, and each stage's `micro_batch_size` and
    `checkpoints`; what stands in `training` of the fields that belong in `execution` counts as if it stood there.

    Args:
        teacher (`str`): Hub id or folder of the softmax model, or its GGUF file, or `"embedded"`.
        data, align, score, select, distill, finetune: the stages. Without `finetune` there is none; `score` may be
            left out where the selector needs no scores.
        revision (`str`, *optional*): branch, tag or commit of a teacher on the Hub; by default its main branch. A run
            stays with the commit that it was started with.
        gguf_file (`str`, *optional*): the teacher's GGUF file, in a folder that holds several or on the Hub.
        dtype (`str`): of the teacher; the finished model has it too. The student always trains in fp32, with `bf16` or
            `fp16` in `training` under autocast, in which scores and the teacher's top k are measured too.
        trust_remote_code (`bool`): whether the teacher may run code of its own.
        mixer (`str`), mixer_options (`dict`): see [`convert`].
        export_to (`str`, *optional*): a layout that the finished model is to fit, see [`~hf_hybrid.export`]: the
            mixers get the options that it needs, from the start, and what would not fit is refused.
        seed (`int`): of everything random.
        training (`dict`): more fields of [`~transformers.TrainingArguments`] and of the trainers' own that decide the
            result, such as precision and optimizer, the same for all stages.
        execution (`dict`): `kernel` (`auto`, `torch` or `fla`, see [`convert`]), `micro_batch_size` (rows at once in
            every stage, or a number for each stage by its name), and those fields of
            [`~transformers.TrainingArguments`] that do not decide the result: `gradient_checkpointing`,
            `torch_compile`, `logging_*`, `dataloader_*`, `use_cpu`, `ddp_*`, `fsdp*`, ...
    """

    teacher: str
    data: DataConfig
    align: AlignStage
    select: SelectStage
    distill: DistillStage
    score: ScoreStage | None = None
    finetune: FinetuneStage | None = None
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    mixer: str = "gated_deltanet"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    export_to: str | None = None
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.teacher.strip():
            raise ValueError("teacher is empty; give a Hub id, a folder, or 'embedded'.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is no seed; pass a whole number from 0 to {2**32 - 1}.")
        check_dtype(self.dtype)
        if self.export_to is not None:
            self.mixer_options = options_for(self.export_to, self.mixer, self.mixer_options)
            if self.export_to != "windows" and (self.select.k == 0 or self.select.layers == []):
                raise ValueError(f"select keeps no layer, and export_to: {self.export_to} needs one with softmax.")
        self._check_scores()
        self._check_arguments()
        self._share_micro_batch_size()
        for name, stage in self.stages().items():
            _check_stage(name, stage, self.data.block_size)
            _check_schedule(name, stage, self.training.get("lr_scheduler_kwargs"))
        if self.data.on_the_fly and self.arguments().get("dataloader_num_workers"):
            raise ValueError("dataloader_num_workers is set, but data.on_the_fly reads in the main process.")
        if self.distill.teacher_topk is not None and self.data.on_the_fly:
            raise ValueError(
                "distill.teacher_topk goes by the rows' indices, and rows made by data.on_the_fly have none."
            )

    @property
    def kernel(self) -> str:
        """Which kernels the linear layers run: `auto`, `torch` or `fla`."""
        return self.execution.get("kernel", "auto")

    def arguments(self) -> dict[str, Any]:
        """What `training` and `execution` say together, as fields of the trainers' arguments."""
        return self.training | {name: value for name, value in self.execution.items() if name in _OF_EXECUTION}

    def _check_arguments(self) -> None:
        hints = _argument_hints()
        self.training = {name: _argument("training", name, value, hints) for name, value in self.training.items()}
        own: dict[str, Any] = {"kernel": str, "micro_batch_size": int | dict[str, int]}
        of_execution = own | {name: hint for name, hint in hints.items() if name in _OF_EXECUTION}
        for name in self.execution:
            if name in hints and name not in of_execution and name not in _MANAGED:
                raise ValueError(f"execution.{name} decides the result; set it in training.")
            if name in self.training:
                raise ValueError(f"training.{name} and execution.{name} are both set; keep the latter.")
        self.execution = {
            name: _argument("execution", name, value, of_execution) for name, value in self.execution.items()
        }
        if self.kernel not in KERNELS:
            raise ValueError(f"execution.kernel={self.kernel!r} is unknown; choose one of {list(KERNELS)}.")
        if self.training.get("bf16") and self.training.get("fp16"):
            raise ValueError("training.bf16 and training.fp16 are both true; choose one.")

    def _share_micro_batch_size(self) -> None:
        """Gives each stage what `execution.micro_batch_size` says of it."""
        given = self.execution.get("micro_batch_size")
        if given is None:
            return
        stages = self.stages()
        each = given if isinstance(given, dict) else dict.fromkeys(stages, given)
        for name, rows in each.items():
            where = f"execution.micro_batch_size.{name}" if isinstance(given, dict) else "execution.micro_batch_size"
            if name not in stages:
                raise ValueError(unknown_key(name, stages, "execution.micro_batch_size."))
            if rows < 1:
                raise ValueError(f"{where}={rows} is too small; pass at least 1.")
            stage = stages[name]
            if not isinstance(given, dict):  # for all stages alike: as near as each one's batch allows
                most = range(1, min(rows, max(stage.batch_size, 1)) + 1)
                rows = max(count for count in most if stage.batch_size % count == 0)
            if stage.micro_batch_size not in (None, rows):
                raise ValueError(
                    f"{name}.micro_batch_size={stage.micro_batch_size} and {where}={rows} differ; keep the latter."
                )
            setattr(self, name, dataclasses.replace(stage, micro_batch_size=rows))
        self.execution = {name: value for name, value in self.execution.items() if name != "micro_batch_size"}

    def _check_scores(self) -> None:
        method = None if self.score is None else self.score.method
        if method is not None and method not in MOVED:  # what an earlier version ran can be told, and not run
            method_of(method, "score.method")
        selector = self.select.selector
        if self.select.layers is not None or selector in POSITIONAL or selector == method:
            return
        if method is None:
            raise ValueError(
                f"select.selector is {selector!r}, but there is no score stage; add one or choose 'uniform'."
            )
        raise ValueError(f"select.selector is {selector!r}, but score.method is {method!r}; name one method in both.")

    def stages(self) -> dict[str, StageConfig]:
        """The training stages there are, by name, in order."""
        found = {name: getattr(self, name) for name in ("align", "score", "distill", "finetune")}
        return {name: stage for name, stage in found.items() if stage is not None}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Recipe":
        """Reads a YAML file; unknown keys, keys that stand twice and values of a wrong type are errors."""
        try:
            return cls.from_dict(read_yaml(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> "Recipe":
        """Makes a recipe of nested dictionaries."""
        return parse(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dictionaries, without the permission to run code, which is given anew each time."""
        data = dataclasses.asdict(self)
        del data["trust_remote_code"]
        return data

    def identity(self) -> dict[str, Any]:
        """What decides the result, as nested dictionaries: all of the recipe but how it is executed."""
        data = self.to_dict()
        del data["execution"], data["export_to"]  # what that changes stands in the mixers' options
        data["training"] = {name: value for name, value in self.training.items() if name not in _OF_EXECUTION}
        for name in self.stages():
            data[name] = {
                key: value for key, value in data[name].items() if key not in ("micro_batch_size", "checkpoints")
            }
        for source in (data["data"], *data["data"]["sources"]):
            del source["streaming"]
        return data

    def save(self, path: str | os.PathLike, header: str = "") -> None:
        """Writes the recipe with all of its values as YAML, in one step or not at all; `header` is a comment."""
        write_text(path, header + yaml.safe_dump(self.to_dict(), sort_keys=False))

    def fingerprint(self) -> str:
        """Canonical JSON of what decides the result: equal for equal recipes."""
        return json.dumps(self.identity(), sort_keys=True)

    def difference(self, other: "Recipe", here: str = "here", there: str = "there") -> list[str]:
        """What differs in what decides the result, one line a value: `align.tokens: 1000 here, 2000 there`."""
        ours, theirs = self.identity(), other.identity()
        # A stage that only one of them has is one line, not one for each of its values.
        words = ("none", "some")
        whole = [
            f"{key}: {words[ours[key] is not None]} {here}, {words[theirs[key] is not None]} {there}"
            for key in sorted(ours)
            if {type(ours[key]), type(theirs[key])} == {dict, type(None)}
        ]
        alone = {line.split(":")[0] for line in whole}
        ours, theirs = (_flat({k: v for k, v in side.items() if k not in alone}) for side in (ours, theirs))
        return whole + [
            f"{key}: {ours.get(key)!r} {here}, {theirs.get(key)!r} {there}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]


def check_dtype(dtype: str) -> None:
    """Raises a `ValueError` where no model is loaded in `dtype`."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is unknown; choose auto, float32, bfloat16 or float16.")


@functools.cache
def _argument_hints() -> Mapping[str, Any]:
    """The type of each field of the trainers' arguments."""
    return typing.get_type_hints(AlignmentConfig) | typing.get_type_hints(DistillationConfig)


@functools.cache
def _argument_choices() -> dict[str, list[str]]:
    """What the library takes for those of its fields that are one of several words."""
    fields = dataclasses.fields(DistillationConfig)
    return {field.name: list(field.metadata["choices"]) for field in fields if field.metadata.get("choices")}


def _argument(where: str, name: str, value: Any, hints: Mapping[str, Any]) -> Any:
    """The value of one field of `training` or `execution`, or a `ValueError` that names it."""
    if name in _MANAGED:
        raise ValueError(f"{where}.{name} is set from the recipe's own stages; set it there.")
    if name not in hints:
        known = sorted(set(hints) - _MANAGED)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {where}.{near[0]}?" if near else ""
        raise ValueError(f"unknown key in {where}: {name!r}; it takes fields of TrainingArguments.{hint}")
    # A text in their place would be a file, which is no part of the recipe.
    kind = dict[str, Any] | None if name.endswith("_kwargs") else hints[name]
    value = typed(kind, value, f"{where}.{name}")
    choices = _argument_choices().get(name)
    if choices is not None and value not in (None, *choices):
        raise ValueError(f"{where}.{name}={value!r} is unknown; choose one of {choices}.")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    low, high = _BOUNDS.get(name, (0, math.inf))
    if number and name != "local_rank" and not low <= value <= high:
        to = "" if high == math.inf else f" to {high}"
        raise ValueError(f"{where}.{name}={value} is out of range; pass a number from {low}{to}.")
    return value


# Where a number may lie, ends included; the others from 0.
_BOUNDS: dict[str, tuple[float, float]] = {
    "adam_beta1": (0, 0.99999),
    "adam_beta2": (0, 0.9999999),
    "label_smoothing_factor": (0, 1),
    "logging_steps": (1e-6, math.inf),
    "torch_empty_cache_steps": (1, math.inf),
    "chunk_tokens": (1, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_timeout": (1, math.inf),
}


def _check_schedule(name: str, stage: StageConfig, kwargs: Any) -> None:
    """Raises a `ValueError` where there is no such schedule, or it lacks what it needs."""
    kind = stage.lr_scheduler_type
    known = [OUR_SCHEDULE, *(member.value for member in SchedulerType if member.value not in _NEEDS_EVALUATION)]
    if kind not in known:
        raise ValueError(f"{name}.lr_scheduler_type={kind!r} is unknown; choose one of {known}.")
    if kind == OUR_SCHEDULE:
        return
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    try:
        get_scheduler(kind, optimizer, 1, 10, kwargs if isinstance(kwargs, dict) else None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}.lr_scheduler_type={kind!r} needs more than it has ({error}); give that in "
            "training.lr_scheduler_kwargs, or choose another."
        ) from error


# Schedules that follow a measurement, which no stage makes as it trains.
_NEEDS_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def _check_stage(name: str, stage: StageConfig, block_size: int) -> None:
    tokens = "tokens_per_layer" if isinstance(stage, ScoreStage) else "tokens"
    for key in (tokens, "batch_size", "checkpoints", "micro_batch_size", "block_size", "teacher_topk"):
        value = getattr(stage, key, None)
        if value is not None and value < 1:
            raise ValueError(f"{name}.{key}={value} is too small; pass at least 1.")
    for key in ("learning_rate", "mixer_learning_rate", "final_learning_rate"):
        value = getattr(stage, key)
        if value is not None and not 0 <= value < 10:
            raise ValueError(f"{name}.{key}={value} is no learning rate; pass a number from 0 up to 10.")
    if stage.final_learning_rate is not None and stage.lr_scheduler_type not in _ENDING:
        raise ValueError(
            f"{name}.final_learning_rate is set, but lr_scheduler_type={stage.lr_scheduler_type!r} does not end "
            f"there; choose one of {sorted(_ENDING)}."
        )
    warmup = stage.warmup_steps
    if not 0 <= warmup < math.inf or (warmup > 1 and warmup != int(warmup)):
        raise ValueError(f"{name}.warmup_steps={warmup} is no warm-up; pass 0, a share below 1, or whole steps.")
    if stage.micro_batch_size and stage.batch_size % stage.micro_batch_size:
        raise ValueError(
            f"{name}.micro_batch_size={stage.micro_batch_size} does not divide batch_size={stage.batch_size}; pass a "
            "divisor."
        )
    if stage.block_size == 1:
        raise ValueError(f"{name}.block_size=1 makes rows of one token, in which nothing is predicted; pass more.")
    if stage.block_size and block_size % stage.block_size:
        raise ValueError(
            f"{name}.block_size={stage.block_size} does not divide data.block_size={block_size}; rows are cut into "
            "equal parts, so pass a divisor."
        )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
