"""Layer scores: which layers are worth their softmax attention, by any of the methods below."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from ..digests import rows_digest, weights_digest
from ..distillation import DistillationConfig
from ..held_out import HeldOut
from ..losses import check_logit_function
from ..precision import Precision
from ..processes import on_main
from ..teacher_trainer import check_pair
from .distill import GA_S1, GA_S2
from .job import Job, Steps, check_finite, steps_for, tokens_per_step
from .rules import RULES
from .scores import LayerScore, LayerScores
from .scoring_method import Options, Range, ScoringMethod
from .teacher import ABLATION_KL, token_nll
from .verified import VERIFIED
from .zero_shot import ZERO_SHOT, ZERO_SHOT_LINEARISE, ZERO_SHOT_REMOVAL


__all__ = [
    "METHODS",
    "MOVED",
    "LayerScore",
    "LayerScores",
    "Range",
    "ScoringMethod",
    "check_request",
    "method_of",
    "score_layers",
    "steps_for",
    "tokens_per_step",
]

METHODS: dict[str, ScoringMethod] = {
    method.name: method
    for method in (GA_S2, VERIFIED, GA_S1, ZERO_SHOT, ZERO_SHOT_LINEARISE, ZERO_SHOT_REMOVAL, ABLATION_KL, *RULES)
}
# Were here before; they exist to be compared with, and are chosen by none who saw docs/selection.md.
MOVED: tuple[str, ...] = (
    *("gr-s2", "avg-s2", "shared", "distilled-greedy", "zero-shot-greedy", "gates", "path-gradient", "smart"),
    *("ablation-ppl", "ablation-recall", "attention-mse", "block-influence"),
)


def method_of(method: str | ScoringMethod, given_as: str = "method") -> ScoringMethod:
    """The record of a method, which is that record or the name of one in `METHODS`; else a `ValueError`."""
    if isinstance(method, ScoringMethod):
        return method
    if method in MOVED:
        raise ValueError(
            f"{given_as}={method!r} is no longer in the package but with its benchmark, in "
            f"benchmarks/selection/compared: from Python, pass COMPARED[{method!r}] of that folder to score_layers. "
            f"Or choose one of {list(METHODS)}."
        )
    if method not in METHODS:
        raise ValueError(f"{given_as}={method!r} is unknown; choose one of {list(METHODS)}.")
    return METHODS[method]


def score_layers(
    student: Any,
    teacher: Any,
    train_dataset: Any,
    eval_dataset: Any,
    *,
    args: DistillationConfig | None = None,
    tokens_per_layer: int | None = None,
    layers: Iterable[int] | None = None,
    method: str | ScoringMethod = "ga-s2",
    k: int | None = None,
    options: dict[str, Any] | None = None,
    output_dir: Any = None,
    checkpoints: int | None = None,
    progress: Callable[[LayerScore], None] | None = None,
    steps: Steps | None = None,
) -> LayerScores:
    """
    Scores the layers of a model by what each is worth as softmax attention.

    By default with GA-S2 of arXiv 2512.20569: each layer in turn is restored to softmax attention in the aligned
    all-linear student, which is then briefly distilled and measured by its held-out KL. The other methods, with what
    they measure and cost, are in docs/scoring.md; each is a [`ScoringMethod`], whose function's docstring has its
    equation and its source.

    Under `accelerate launch`, call it in every process with the same arguments: training is distributed by the
    Trainer, held-out rows are shared out and gathered, and files are written by the main process.

    Args:
        student ([`HybridForCausalLM`], *optional*): aligned, with linear attention in every layer. It is given back as
            it was. None for methods that look at the teacher alone.
        teacher (`PreTrainedModel`): the softmax model the student came from.
        train_dataset (*optional*): rows with `input_ids`. None for methods that train nothing.
        eval_dataset: rows with `input_ids` to measure on; they must not be among the training rows.
        args ([`DistillationConfig`], *optional*): learning rates, batch size, seed, precision of the short runs.
        tokens_per_layer (`int`, *optional*): tokens of a training run, rounded up to whole steps; by default what
            `args` says (`max_steps` or epochs). `ga-s2` makes such a run for each layer; methods that train once make
            one in all.
        layers (`Iterable[int]`, *optional*): layers to score; by default all.
        method (`str` or [`ScoringMethod`], *optional*, defaults to `"ga-s2"`): one of `METHODS`, or one of your own.
        k (`int`, *optional*): how many layers are wanted, for methods that choose them together.
        options (`dict`, *optional*): keyword arguments of the method's function.
        output_dir (`str`, *optional*): keeps each result as soon as it is there; a second call with the same folder
            goes on with what is missing. A result is taken only where it came from the same settings, rows and models.
        checkpoints (`int`, *optional*): parts of each training run, between which `output_dir` has a checkpoint: a
            kill loses one of them at most. By default ten at most, of a minute or more.
        progress (`Callable`, *optional*): called with each [`LayerScore`].
        steps (`Callable`, *optional*): called with `(done, total, text)` as work goes on between those.

    Returns:
        [`LayerScores`].
    """
    options, args = options or {}, args or DistillationConfig(output_dir=str(output_dir or "scores"))
    method = method_of(method)
    check_request(method, options, k)
    _check_given(method, student, train_dataset, tokens_per_layer, checkpoints)
    wanted = _check_layers(method, layers, k, num_layers := len(decoder_layers(teacher)))
    precision = Precision.of(args)
    _prepare_models(student, teacher, args, method)
    job = Job(
        method=method,
        student=student,
        teacher=teacher,
        train_dataset=train_dataset,
        args=args,
        held_out=HeldOut(eval_dataset, teacher, args.per_device_eval_batch_size, precision),
        layers=wanted,
        num_layers=num_layers,
        tokens_per_layer=tokens_per_layer,
        k=k,
        folder=None if output_dir is None else Path(output_dir),
        checkpoints=checkpoints,
        progress=progress,
        steps=steps,
    )
    _claim(job, options, eval_dataset)
    return method.score(job, **options)


def _prepare_models(student: Any, teacher: Any, args: DistillationConfig, method: ScoringMethod) -> None:
    """Puts the models where `args` wants them; a `ValueError` where they do not fit together."""
    check_placement(method, args.shard_teacher)
    if student is not None:
        check_pair(student, teacher)
    for model in (teacher, student):
        if model is not None:
            if model.device != args.device:
                model.to(args.device)
            check_logit_function(model, Precision.of(args))


def _claim(job: Job, options: Options, eval_dataset: Any) -> None:
    """Measures where the models start, and marks the folder as holding scores made from there."""
    if job.student is not None:
        known, what = job.held_out.kl(job.student), "the aligned student"
        job.baseline = sum(known) / len(known)
    else:
        known, what = token_nll(job.held_out, job.teacher), "the teacher"
    check_finite(what, known)
    method = job.method
    settings = _settings(job.args, method.name, job.tokens_per_layer) | {"baseline": sum(known) / len(known)}
    if method.together(options):
        settings["layers"] = job.layers
    if method.trains:
        settings["train_rows"] = _digest(job.train_dataset)
    if method.depends_on_k(options):
        settings["k"] = job.k
    settings |= {"options": _described(options), "held_out": on_main(lambda: rows_digest(eval_dataset))}
    if method.trains:
        settings["train"] = on_main(lambda: rows_digest(job.train_dataset))
    settings["teacher"] = weights_digest(job.teacher)
    if job.student is not None:
        settings["student"] = weights_digest(job.student)
    job.claim(settings)


def check_request(method: str | ScoringMethod, options: Options, k: int | None) -> None:
    """Raises a `ValueError` where there is no such method, or it cannot be asked with these options and `k`."""
    method = method_of(method)
    method.check_options(options)
    method.check_k(options, k)


def _check_given(
    method: ScoringMethod, student: Any, train_dataset: Any, tokens_per_layer: int | None, checkpoints: int | None
) -> None:
    """Raises a `ValueError` where the method lacks student, rows or tokens, or the student has softmax attention."""
    if checkpoints is not None and checkpoints < 1:
        raise ValueError(f"checkpoints={checkpoints} is too small; pass at least 1.")
    if tokens_per_layer is not None and tokens_per_layer < 1:
        raise ValueError(f"tokens_per_layer={tokens_per_layer} trains on nothing; pass at least 1.")
    if method.trains and train_dataset is None:
        others = [other.name for other in METHODS.values() if not other.trains]
        raise ValueError(f"method={method.name!r} trains and needs train_dataset; without one choose from {others}.")
    if not method.needs_student:
        return
    if student is None:
        others = [other.name for other in METHODS.values() if not other.needs_student]
        raise ValueError(f"method={method.name!r} needs an aligned student; without one choose from {others}.")
    if student.full_attention_layers:
        raise ValueError(
            f"the student keeps softmax attention in {student.full_attention_layers}; {method.name} starts from one "
            "that is linear everywhere. Convert with full_attention_layers=[] and align it first."
        )


def check_placement(method: str | ScoringMethod, shard_teacher: bool) -> None:
    """Raises a `ValueError` where the short distillations would shard what the method needs whole."""
    method = method_of(method)
    engines = {"ACCELERATE_USE_FSDP": "FSDP2", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    engine = [name for variable, name in engines.items() if os.environ.get(variable) == "true"]
    if engine and shard_teacher and method.trains:
        others = [other.name for other in METHODS.values() if not other.trains]
        raise ValueError(
            f"shard_teacher is on under {engine[0]}, but method={method.name!r} restores layers from a teacher that "
            f"is whole; switch it off, score in a run of its own, or choose a method that trains nothing: {others}."
        )
    if engine == ["FSDP2"] and method.keeps_student:
        raise ValueError(
            f"method={method.name!r} goes on with the student that it trained, whose weights FSDP2 shards; use DDP, "
            "or choose ga-s2 or verified."
        )


def _check_layers(method: ScoringMethod, layers: Iterable[int] | None, k: int | None, num_layers: int) -> list[int]:
    """The layers to score, ascending. Those of a job that scores a part of the model may be fewer than `k`."""
    wanted = sorted(set(range(num_layers) if layers is None else layers))
    outside = [layer for layer in wanted if not _is_count(layer) or not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"layers={outside} are outside 0..{num_layers - 1}; the model has {num_layers} layers.")
    if not wanted:
        raise ValueError("layers=[] leaves nothing to score; pass one or more, or leave layers out for all.")
    if len(wanted) < num_layers and method.among_all:
        raise ValueError(f"method={method.name!r} chooses among all layers; leave out layers=.")
    most = len(wanted) if method.needs_k else num_layers
    if k is not None and (not _is_count(k) or not 0 <= k <= most):
        raise ValueError(f"k={k} layers cannot be chosen from {most}; pass an integer in 0..{most}.")
    return wanted


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _settings(args: DistillationConfig, method: str, tokens_per_layer: int | None) -> dict[str, Any]:
    """What of the arguments decides a score."""
    names: tuple[str, ...] = ("seed", "learning_rate", "mixer_learning_rate", "max_steps", "num_train_epochs")
    names += ("warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16", "final_learning_rate", "decay_window")
    names += (
        "learning_rate_groups",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "data_seed",
        "train_sampling_strategy",
    )
    # However many processes share it.
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = {"method": method, "tokens_per_layer": tokens_per_layer, "batch_size": batch_size}
    settings |= {"lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))}
    settings |= {name: getattr(args, name) for name in names}
    return settings | {"precision": str(Precision.of(args))}


def _digest(dataset: Any) -> str:
    """How many rows there are, with a digest of the first and the last: what earlier versions wrote down."""
    if len(dataset) == 0:
        raise ValueError("the training dataset is empty; pass rows of input_ids.")
    rows = [list(map(int, dataset[i]["input_ids"])) for i in (0, len(dataset) - 1)]
    return f"{len(dataset)} rows, {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]}"


def _described(options: Options) -> dict[str, Any]:
    """The options as plain data, tensors by a digest of their contents."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()
        return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value

    return json.loads(json.dumps({name: plain(value) for name, value in options.items()}))
