"""Layer scores: how much of the teacher comes back when one layer gets its softmax attention back (GA-S2)."""

import dataclasses
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

from .distillation import DistillationConfig, DistillationTrainer
from .durable import read_json, read_record, write_json
from .held_out import HeldOutKL, held_out_kl


@dataclass
class LayerScore:
    """
    One layer's score.

    Args:
        layer (`int`): the layer restored to softmax attention.
        kl (`float`): held-out `KL(teacher || student)` afterwards, nats per token. Lower is better.
        sem (`float`): standard error of `kl` over held-out rows.
        tokens (`int`): tokens trained on for this score.
        seconds (`float`): wall time of this score.
        per_sequence (`list[float]`): `kl` of each held-out row, for paired comparisons between layers.
    """

    layer: int
    kl: float
    sem: float
    tokens: int
    seconds: float
    per_sequence: list[float] = field(default_factory=list, repr=False)


@dataclass
class LayerScores:
    """
    The scores of all layers of one teacher, with what they cost.

    Args:
        scores (`list[LayerScore]`): one for each layer, by index.
        method (`str`): how they were measured.
        seed (`int`): seed of the training runs.
        evaluation_tokens (`int`): tokens of the held-out rows that every layer was measured on.
        baseline (`float`): held-out KL of the aligned all-linear student, before any distillation.
    """

    scores: list[LayerScore]
    method: str = "ga-s2"
    seed: int = 0
    evaluation_tokens: int = 0
    baseline: float = float("nan")

    def __post_init__(self) -> None:
        # JSON gives dictionaries.
        self.scores = [LayerScore(**score) if isinstance(score, dict) else score for score in self.scores]

    @property
    def tokens(self) -> int:
        """Tokens trained on for all scores."""
        return sum(score.tokens for score in self.scores)

    @property
    def seconds(self) -> float:
        """Wall time of all scores."""
        return sum(score.seconds for score in self.scores)

    @property
    def ranking(self) -> list[int]:
        """Layers from the most to the least worth keeping as softmax."""
        return [score.layer for score in sorted(self.scores, key=lambda score: (score.kl, score.layer))]

    def top(self, k: int) -> list[int]:
        """The `k` best layers, ascending: what to pass as `full_attention_layers`."""
        if not 0 <= k <= len(self.scores):
            raise ValueError(
                f"k={k} layers were asked for, but {len(self.scores)} were scored; pass 0..{len(self.scores)}."
            )
        return sorted(self.ranking[:k])

    def gap(self, better: int, worse: int) -> tuple[float, float]:
        """How much lower the KL of layer `better` is than that of `worse`: mean and standard error, row by row."""
        rows = {score.layer: score.per_sequence for score in self.scores}
        differences = [b - a for a, b in zip(rows[better], rows[worse], strict=True)]
        paired = HeldOutKL(differences, self.evaluation_tokens)
        return paired.mean, paired.sem

    def save(self, path: str | os.PathLike) -> None:
        """Writes the scores as JSON; an existing file is replaced in one step or not at all."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LayerScores":
        """Reads what [`LayerScores.save`] wrote."""
        return read_record(cls, path)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.method}: held-out KL with one layer restored to softmax (nats per token)")
        for column in ("rank", "layer", "KL", "s.e.", "tokens", "seconds"):
            table.add_column(column, justify="right")
        by_layer = {score.layer: score for score in self.scores}
        for rank, layer in enumerate(self.ranking, start=1):
            score = by_layer[layer]
            cells = (rank, layer, f"{score.kl:.4f}", f"{score.sem:.4f}", f"{score.tokens:,}", f"{score.seconds:.1f}")
            table.add_row(*map(str, cells))
        text = io.StringIO()
        Console(file=text, width=88).print(table)
        return text.getvalue()


def score_layers(
    student: Any,
    teacher: Any,
    train_dataset: Any,
    eval_dataset: Any,
    *,
    args: DistillationConfig | None = None,
    tokens_per_layer: int | None = None,
    layers: Iterable[int] | None = None,
    method: str = "ga-s2",
    output_dir: str | os.PathLike | None = None,
    progress: Callable[[LayerScore], None] | None = None,
) -> LayerScores:
    """
    Scores every layer by the KL that remains after it is restored to softmax attention and briefly distilled.

    GA-S2 of arXiv 2512.20569, algorithm 1: from the aligned all-linear student, for each layer l, restore the
    teacher's attention in l, distil on the same batches in the same order, and measure `KL(teacher || student)` on
    the same held-out rows, `I(l) = -KL`. The paper's code ranks by training loss; this measures on held-out rows and
    reports the noise. One model is trained over and over, from one copy of the aligned weights in host memory.

    Args:
        student ([`HybridForCausalLM`]): aligned, with linear attention in every layer. It is given back as it was.
        teacher (`PreTrainedModel`): the softmax model the student came from.
        train_dataset, eval_dataset: rows with `input_ids`; the evaluation rows must not be among the training rows.
        args ([`DistillationConfig`], *optional*): learning rates, batch size, seed, precision of the short runs.
        tokens_per_layer (`int`, *optional*): tokens to distil on for each layer, rounded up to whole steps; by default
            what `args` says (`max_steps` or epochs).
        layers (`Iterable[int]`, *optional*): layers to score; by default all.
        method (`str`, *optional*, defaults to `"ga-s2"`): only `"ga-s2"` for now.
        output_dir (`str`, *optional*): keeps each layer's score as soon as it is there; a second call with the same
            folder goes on with the layers that are missing.
        progress (`Callable`, *optional*): called with each [`LayerScore`].

    Returns:
        [`LayerScores`].
    """
    wanted = _check(student, method, layers)
    args = args or DistillationConfig(output_dir=str(output_dir or "scores"))
    folder = None if output_dir is None else Path(output_dir)
    baseline = held_out_kl(student, teacher, eval_dataset, args.per_device_eval_batch_size)
    _check_finite("the aligned student", baseline.mean)
    if folder is not None:
        _claim(folder, _settings(args, method, tokens_per_layer, baseline.mean))
    aligned = {name: tensor.detach().to("cpu", copy=True) for name, tensor in student.state_dict().items()}
    scores = []
    for layer in wanted:
        kept = None if folder is None else folder / f"layer_{layer:03d}.json"
        if kept is not None and kept.is_file():
            score = read_record(LayerScore, kept)
        else:
            try:
                score = _score_layer(student, teacher, layer, train_dataset, eval_dataset, args, tokens_per_layer)
            finally:
                student.set_full_attention_layers([])
                student.load_state_dict(aligned)
            _check_finite(f"layer {layer}", score.kl)
            if kept is not None:
                write_json(kept, dataclasses.asdict(score))
        scores.append(score)
        if progress is not None:
            progress(score)
    return LayerScores(scores, method, args.seed, baseline.tokens, baseline.mean)


def _check(student: Any, method: str, layers: Iterable[int] | None) -> list[int]:
    """The layers to score, or a `ValueError` that says what is wrong with the request."""
    if method != "ga-s2":
        raise ValueError(f"method={method!r} is unknown; choose 'ga-s2'.")
    if student.full_attention_layers:
        raise ValueError(
            f"the student keeps softmax attention in {student.full_attention_layers}; GA-S2 starts from one that is "
            "linear everywhere. Convert with full_attention_layers=[] and align it first."
        )
    num_layers = student.config.num_hidden_layers
    wanted = sorted(set(range(num_layers) if layers is None else layers))
    outside = [layer for layer in wanted if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"layers={outside} are outside 0..{num_layers - 1}; the model has {num_layers} layers.")
    return wanted


def _check_finite(what: str, kl: float) -> None:
    if not math.isfinite(kl):
        raise ValueError(
            f"{what} has a held-out KL of {kl}, which ranks nothing, and is not kept; lower the learning rates of the "
            "scores, or look for nan in the weights that they start from."
        )


def _settings(
    args: DistillationConfig, method: str, tokens_per_layer: int | None, baseline: float
) -> dict[str, float | int | str | None]:
    """What decides a score; the KL before any training stands for the weights and the held-out rows."""
    names = ("seed", "learning_rate", "mixer_learning_rate", "train_batch_size", "max_steps", "num_train_epochs")
    given = {name: getattr(args, name) for name in names}
    return {"method": method, "tokens_per_layer": tokens_per_layer, "baseline": baseline, **given}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Marks `folder` as holding scores made with `settings`; a `ValueError` where it holds others."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return
    for name, there in read_json(path).items():
        here = settings[name]
        same = math.isclose(there, here, rel_tol=1e-3) if name == "baseline" else there == here
        if not same:
            raise ValueError(
                f"{folder} has scores made with {name}={there}, this call has {here}; choose another output_dir."
            )


def _score_layer(
    student: Any,
    teacher: Any,
    layer: int,
    train_dataset: Any,
    eval_dataset: Any,
    args: DistillationConfig,
    tokens_per_layer: int | None,
) -> LayerScore:
    start = time.perf_counter()
    set_seed(args.seed)
    student.set_full_attention_layers([layer], teacher)
    with tempfile.TemporaryDirectory() as scratch:
        changes: dict[str, Any] = {"output_dir": scratch, "save_strategy": "no", "eval_strategy": "no"}
        changes |= {"logging_strategy": "no", "disable_tqdm": True}
        if tokens_per_layer is not None:
            changes["max_steps"] = steps_for(tokens_per_layer, train_dataset, args)
        trainer = DistillationTrainer(
            model=student, teacher=teacher, args=dataclasses.replace(args, **changes), train_dataset=train_dataset
        )
        trainer.remove_callback(PrinterCallback)  # L runs would print L summaries; `progress` reports instead
        trainer.train()
    result = held_out_kl(student, teacher, eval_dataset, args.per_device_eval_batch_size)
    tokens = trainer.state.global_step * tokens_per_step(train_dataset, args)
    seconds = time.perf_counter() - start
    return LayerScore(layer, result.mean, result.sem, tokens, seconds, result.per_sequence)


def tokens_per_step(dataset: Any, args: Any) -> int:
    """Tokens of one optimizer step on all processes, for rows of one length."""
    row = next(iter(dataset))
    return len(row["input_ids"]) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_for(tokens: int, dataset: Any, args: Any) -> int:
    """Optimizer steps that cover `tokens`, rounded up."""
    return max(1, -(-tokens // tokens_per_step(dataset, args)))
