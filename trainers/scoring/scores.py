"""What scoring layers gives: a value with its noise for each layer, an order, and what they cost."""

import dataclasses
import io
import math
import os
from dataclasses import dataclass, field
from typing import Any

from ..durable import read_record, write_json
from ..held_out import standard_error


# Of scores with an order.
TOGETHER = "chosen together, in the order {}: values are of single layers, and need not agree"
KL_MEASURE, KL_UNIT = "held-out KL with the layer restored to softmax", "nats per token"


@dataclass
class LayerScore:
    """
    One layer's score.

    Args:
        layer (`int`): the layer.
        kl (`float`): where the score is a held-out `KL(teacher || student)`, that KL in nats per token; else NaN.
        sem (`float`): standard error of `value` over held-out rows.
        tokens (`int`): tokens trained on for this score alone.
        seconds (`float`): wall time of this score alone.
        per_sequence (`list[float]`): `value` of each held-out row, for paired comparisons between layers.
        value (`float`): the score, in the unit and direction that [`LayerScores`] names. By default `kl`.
        curve (`list[list[float]]`): `[tokens, value, standard error]` on the way, where it was measured.
        diverged (`str`): what was not finite, where the layer has no value for that.
    """

    layer: int
    kl: float
    sem: float
    tokens: int
    seconds: float
    per_sequence: list[float] = field(default_factory=list, repr=False)
    value: float = math.nan
    curve: list[list[float]] = field(default_factory=list, repr=False)
    diverged: str = ""

    def __post_init__(self) -> None:
        self.kl, self.value = number(self.kl), number(self.value)
        if math.isnan(self.value):
            self.value = self.kl

    @classmethod
    def of_rows(cls, layer: int, rows: list[float], *, is_kl: bool = True) -> "LayerScore":
        """The score whose value is the mean of `rows`, one number for each held-out row."""
        value = sum(rows) / len(rows)
        kl = value if is_kl else math.nan
        return cls(layer, kl, standard_error(rows), 0, 0.0, per_sequence=rows, value=value)

    @classmethod
    def of_diverged(cls, layer: int, reason: str) -> "LayerScore":
        """The score of a layer whose loss or measurement was not finite, as `reason` says."""
        return cls(layer, math.nan, 0.0, 0, 0.0, diverged=reason)

    def __str__(self) -> str:
        return "diverged" if self.diverged else f"{self.value:.4f}"


@dataclass
class LayerScores:
    """
    The scores of all layers of one teacher, with what they cost.

    Args:
        scores (`list[LayerScore]`): one for each layer, by index.
        method (`str`): how they were measured.
        seed (`int`): seed of everything random.
        evaluation_tokens (`int`): tokens of the held-out rows that every layer was measured on.
        baseline (`float`): held-out KL of the aligned all-linear student, before any distillation; NaN without one.
        order (`list[int]`): layers in the order in which they were chosen, where they were chosen together; `top(k)`
            are then its first k. Empty where each layer has a score of its own and the values decide.
        k (`int`, *optional*): the only number of layers that `order` is good for; None where it is good for any.
        measure, unit (`str`): what a value is, and its unit.
        higher_is_better (`bool`): whether a large value means that the layer should keep softmax attention.
        tokens_forward_backward (`int`): tokens that went through the student forward and backward, each of them also
            forward through the teacher.
        tokens_forward (`int`): tokens that went through a model without gradients, for measuring; without one pass of
            the teacher over the held-out rows, which all measurements share, and one for `baseline`.
        total_seconds (`float`): wall time of the work that was kept; of a training run that was killed, the part since
            the checkpoint from which it went on.
        peak_memory_bytes (`int`), memory_kind (`str`): peak of the memory, and which: `"cuda"` for what was allocated
            on the GPU, `"rss growth"` for the growth of the process on the CPU, which is 0 where it was larger before.
        measured_on (`dict[str, int]`): rows and tokens there were to train on and to measure on.
        precision (`str`): what the models ran in as they were measured, see [`Precision`]; empty where that was not
            written down.
        options (`dict`): options of the method, as used.
        notes (`list[str]`): what a reader of the table should know besides.
    """

    scores: list[LayerScore]
    method: str = "ga-s2"
    seed: int = 0
    evaluation_tokens: int = 0
    baseline: float = math.nan
    order: list[int] = field(default_factory=list)
    k: int | None = None
    measure: str = KL_MEASURE
    unit: str = KL_UNIT
    higher_is_better: bool = False
    tokens_forward_backward: int | None = None
    tokens_forward: int = 0
    total_seconds: float | None = None
    peak_memory_bytes: int = 0
    memory_kind: str = ""
    measured_on: dict[str, int] = field(default_factory=dict)
    precision: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # JSON gives dictionaries, and null for NaN.
        self.scores = [LayerScore(**score) if isinstance(score, dict) else score for score in self.scores]
        self.baseline = number(self.baseline)

    @property
    def tokens(self) -> int:
        """Tokens trained on for all scores."""
        own = sum(score.tokens for score in self.scores)
        return own if self.tokens_forward_backward is None else self.tokens_forward_backward

    @property
    def seconds(self) -> float:
        """Wall time of all scores."""
        own = sum(score.seconds for score in self.scores)
        return own if self.total_seconds is None else self.total_seconds

    @property
    def ranking(self) -> list[int]:
        """
        Layers from the most to the least worth keeping as softmax: `order`, then the others by value, and last those
        that diverged.
        """
        sign = -1 if self.higher_is_better else 1
        known = sorted((s for s in self.scores if not s.diverged), key=lambda s: (sign * s.value, s.layer))
        by_value = [*known, *(score for score in self.scores if score.diverged)]
        return [*self.order, *(score.layer for score in by_value if score.layer not in self.order)]

    @property
    def diverged(self) -> list[int]:
        """The layers whose loss or measurement was not finite: of what they are worth, nothing is known."""
        return [score.layer for score in self.scores if score.diverged]

    def top(self, k: int) -> list[int]:
        """The `k` best layers, ascending: what to pass as `full_attention_layers`."""
        if not 0 <= k <= len(self.scores):
            raise ValueError(
                f"k={k} layers were asked for, but {len(self.scores)} were scored; pass 0..{len(self.scores)}."
            )
        if self.k is not None and k not in (self.k, 0, len(self.scores)):
            raise ValueError(
                f"{self.method} chose its layers for k={self.k}, which says nothing about k={k}; score with k={k}."
            )
        if self.order and len(self.order) < k < len(self.scores):
            raise ValueError(
                f"{self.method} chose {len(self.order)} layers one after the other, and none after those; score with "
                f"k={k}."
            )
        chosen = sorted(self.ranking[:k])
        lost = [layer for layer in chosen if layer in self.diverged]
        if lost and k < len(self.scores):
            raise ValueError(
                f"layers {lost} of {self.method} diverged and come last, and the best {k} would have them; score them "
                f"again with lower learning rates, or keep at most {k - len(lost)}."
            )
        return chosen

    def gap(self, better: int, worse: int) -> tuple[float, float]:
        """
        How much better the value of layer `better` is than that of `worse`, in whichever direction is better: mean
        and standard error of the difference, row by row. Negative where it is the worse of the two.

        Values of layers that were chosen one after the other are of different sets, and so is their difference. Gates,
        ranks and positions have no rows: a `ValueError`.
        """
        rows = {score.layer: score.per_sequence for score in self.scores}
        for layer in (better, worse):
            if layer not in rows:
                raise ValueError(f"layer {layer} was not scored; choose from {sorted(rows)}.")
        if lost := [layer for layer in (better, worse) if layer in self.diverged]:
            raise ValueError(f"layers {lost} diverged, so there is no gap; choose from the others.")
        if not rows[better] or not rows[worse]:
            raise ValueError(
                f"{self.method} has no values of single rows, so no gap; use a method that measures them."
            )
        sign = -1 if self.higher_is_better else 1
        differences = [sign * (b - a) for a, b in zip(rows[better], rows[worse], strict=True)]
        return sum(differences) / len(differences), standard_error(differences)

    def short(self, most: int = 8) -> str:
        """The `most` best layers, a line each, for whoever follows a run."""
        direction = "higher" if self.higher_is_better else "lower"
        by_layer = {score.layer: score for score in self.scores}
        best = [by_layer[layer] for layer in self.ranking[:most]]
        lines = [f"{self.measure}, {self.unit}; {direction} is worth more"]
        lines += [f"  layer {s.layer:>3}  {s}" + ("" if s.diverged else f" ± {s.sem:.4f}") for s in best]
        if self.order:
            lines[0] += f"; {TOGETHER.format(self.order)}"
        left = len(self.scores) - len(best)
        return "\n".join(lines if left == 0 else [*lines, f"  and {left} more"])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the scores as JSON; an existing file is replaced in one step or not at all."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; what was not measured is None."""
        return without_nan(dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LayerScores":
        """Reads what [`LayerScores.save`] wrote."""
        return read_record(cls, path)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        direction = "higher" if self.higher_is_better else "lower"
        table = Table()
        for column in (
            "rank",
            "layer",
            "value" if all(math.isnan(score.kl) for score in self.scores) else "KL",
            "s.e.",
            "tokens",
            "seconds",
        ):
            table.add_column(column, justify="right")
        by_layer = {score.layer: score for score in self.scores}
        for rank, layer in enumerate(self.ranking, start=1):
            score = by_layer[layer]
            chosen = f"{rank}*" if layer in self.order else str(rank)
            cells = (str(score), f"{score.sem:.4f}", f"{score.tokens:,}", f"{score.seconds:.1f}")
            table.add_row(chosen, str(layer), *cells)
        text = io.StringIO()
        text.write(f"{self.method}: {self.measure} ({self.unit}; {direction} is worth more)\n")
        Console(file=text, width=88).print(table)
        if self.order:
            text.write(f"* chosen together, in this order{'' if self.k is None else f', for k={self.k} only'}; ")
            text.write("values are of single layers, and need not agree\n")
        text.write("".join(f"{note}\n" for note in self.notes))
        memory = f", {self.peak_memory_bytes / 2**20:,.0f} MiB {self.memory_kind}" if self.memory_kind else ""
        text.write(
            f"{self.tokens:,} tokens forward and backward, {self.tokens_forward:,} forward only, "
            f"{self.seconds:.1f} s{memory}\n"
        )
        return text.getvalue()


def number(value: float | None) -> float:
    """`value`, or NaN for None."""
    return math.nan if value is None else value


def without_nan(data: Any) -> Any:
    """`data` with None in the place of NaN, which JSON does not have."""
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data
