"""The table of docs/performance.md that says what is to be reached on one GPU: targets, both sides, ratios, floors.

A floor is the time that the card needs at its peak for the operations or the bytes that cannot be left out, whichever
is more: matrix products at the rate of dense bf16 products, and weights, states and logits at the rate of its memory.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_shared import SIZES


# Of the makers' data sheets: dense bf16 operations and bytes of memory, per second.
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
ROWS, TOKENS = 2, 4096
# Of an alignment step of 16 x 512 before there was a choice, on an H100: 13.4 GiB.
BEFORE_MB = 13.4 * 2**30 / 1e6
# Of a distillation step; all but the last two with gradient checkpointing.
VARIANTS = ("as it comes", "document_attention", "torch_compile", "torch_compile, document_attention")
VARIANTS += ("no checkpointing", "no checkpointing, document_attention")


def peaks_of(card: str) -> tuple[float, float] | None:
    return next((peaks for name, peaks in PEAKS.items() if name in card), None)


@dataclass
class Floor:
    """What cannot be left out: operations of matrix products, and bytes."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.operations + other.operations, self.bytes + other.bytes)

    def ms(self, card: str) -> float | None:
        peaks = peaks_of(card)
        return None if peaks is None else 1000 * max(self.operations / peaks[0], self.bytes / peaks[1])

    def bound(self, card: str) -> str:
        peaks = peaks_of(card)
        if peaks is None:
            return ""
        return "operations" if self.operations / peaks[0] > self.bytes / peaks[1] else "bytes"


class Shapes:
    """Parameters in the matrices of the benchmark's models, from their sizes."""

    def __init__(self, sizes: dict[str, int]) -> None:
        hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
        self.hidden, self.layers, self.heads = hidden, layers, sizes["num_attention_heads"]
        width = hidden // self.heads
        self.attention = hidden * (2 * hidden + 2 * sizes["num_key_value_heads"] * width)
        self.mixer = self.attention + hidden * hidden + 2 * hidden * self.heads  # gate, decay and write strength
        self.mlp = 3 * hidden * sizes["intermediate_size"]
        self.head = hidden * sizes["vocab_size"]
        self.vocabulary = sizes["vocab_size"]
        self.linear = layers - layers // 4
        self.teacher = layers * (self.attention + self.mlp)
        self.student = self.teacher + self.linear * (self.mixer - self.attention)

    def softmax(self, layers: int, rows: int, tokens: int, passes: float) -> Floor:
        """Causal softmax attention, half of its square: two products forward, five backward."""
        return Floor(passes * layers * rows * 2 * tokens**2 * self.hidden)

    def recurrence(self, layers: int, rows: int, tokens: int, passes: float) -> Floor:
        """A state of width x width per head that is read and written for each token: three products of its size."""
        width = self.hidden // self.heads
        return Floor(passes * layers * rows * tokens * 6 * self.heads * width**2)

    def teacher_forward(self, rows: int, tokens: int) -> Floor:
        products = Floor(2 * self.teacher * rows * tokens, 2 * self.teacher)
        return products + self.softmax(self.layers, rows, tokens, 1)

    def student_pass(self, rows: int, tokens: int, times: float, passes: float) -> Floor:
        """`times` the operations of a forward pass in products, `passes` that of its attention."""
        kept = self.layers - self.linear
        products = Floor(2 * times * self.student * rows * tokens, 4 * times * self.student)
        return products + self.softmax(kept, rows, tokens, passes) + self.recurrence(self.linear, rows, tokens, passes)

    def student_step(self, rows: int, tokens: int) -> Floor:
        """Forward, once more in the backward pass as checkpointing asks, and backward, which is two."""
        return self.student_pass(rows, tokens, 4, 1 + 1 + 2.5)

    def kl(self, tokens: int) -> Floor:
        """Logits of teacher and student, their gradient times head and states; in bf16 written once and read twice."""
        return Floor(8 * self.head * tokens, 2 * 3 * 2 * self.vocabulary * tokens + 4 * self.head)

    def next_token(self, tokens: int) -> Floor:
        return Floor(6 * self.head * tokens, 3 * 2 * self.vocabulary * tokens + 4 * self.head)

    def adamw(self) -> Floor:
        """Weight, gradient and two moments read, three of them written, in fp32."""
        return Floor(0, 28 * (self.student + self.head))


@dataclass
class Line:
    """A line of the table: a target, and what is to be compared."""

    what: str
    target: str
    measured: str = ""
    beside: str = ""
    ratio: float | None = None
    floor: str = ""
    least: float | None = None  # the ratio to reach, or ...
    most: float | None = None  # ... not to exceed

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return [self.what, self.target, self.measured, self.beside, ratio, self.reached(), self.floor]

    def reached(self) -> str:
        if self.ratio is None or self.least is self.most is None:
            return ""
        enough = self.least is None or self.ratio >= self.least
        return "yes" if enough and (self.most is None or self.ratio <= self.most) else "no"


def issue_table(results: dict[str, Any]) -> str:
    """The section; what was not measured is named below the table."""
    card = results["environment"]["device"]
    tell = (
        "`python benchmarks/gpu.py --part issue-training inference`: the shapes of Qwen2.5-1.5B with random weights; "
        "training in the precision of a recipe (fp32 masters, bf16 autocast, gradient checkpointing), inference in "
        "bf16; both sides of each ratio one after the other in one process. The floor is the time for the operations "
        "(ops) or bytes that cannot be left out at the card's peak, computed from the shapes."
    )
    lines = [line for make in LINES for line in make(results, Shapes(SIZES), card)]
    measured = [line.cells() for line in lines if line.measured]
    parts = [f"## What is to be reached: {card}", textwrap.fill(tell, 119)]
    if measured:
        head = ["what", "to reach", "measured", "beside", "ratio", "reached", "floor"]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *measured]))
    if left := [line for line in lines if not line.measured]:
        parts.append("Not measured yet, with what is to be reached and the floor:")
        parts.append(
            "\n".join(f"- {line.what}: {line.target}{f' ({line.floor})' if line.floor else ''}" for line in left)
        )
    reasons = results.get("reasons", {})
    if reasons:
        parts.append(bullets(f"{what}: {why}" for what, why in reasons.items()))
    return "\n\n".join(parts)


# --- lines


def find(results: dict[str, Any], part: str, **fields: Any) -> dict[str, Any] | None:
    """The row of `part` with these fields, or None."""
    rows = results.get(part, [])
    return next((row for row in rows if all(row.get(name) == value for name, value in fields.items())), None)


def rate(row: dict[str, Any] | None, *, busy: bool = True) -> str:
    if row is None:
        return ""
    peak, working = row.get("peak_mb"), row.get("busy_ms") if busy else None
    said = f"{row['tokens_per_second']:,.0f} tokens/s" + (f", {peak / 1e3:.1f} GB" if peak else "")
    return said + (f", GPU busy for {working:,.0f} of {row['ms']:,.0f} ms" if working else "")


def milliseconds(row: dict[str, Any] | None) -> str:
    busy = None if row is None else row.get("busy_ms")
    return "" if row is None else f"{row['ms']:,.1f} ms" + (f" (busy {busy:,.1f})" if busy else "")


def ratio_of(a: dict[str, Any] | None, b: dict[str, Any] | None, name: str) -> float | None:
    return None if a is None or b is None or not a.get(name) or not b.get(name) else a[name] / b[name]


def floor_text(floor: Floor, card: str, tokens: int | None = None) -> str:
    ms = floor.ms(card)
    if ms is None:
        return ""
    as_rate = "" if tokens is None else f", {1000 * tokens / ms:,.0f} tokens/s"
    return f"{ms:,.1f} ms ({'ops' if floor.bound(card) == 'operations' else 'bytes'}){as_rate}"


def step_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    tokens = ROWS * TOKENS
    whole = shapes.teacher_forward(ROWS, TOKENS) + shapes.student_step(ROWS, TOKENS) + shapes.kl(tokens)
    plain = shapes.student_step(ROWS, TOKENS) + shapes.next_token(tokens)
    for variant in VARIANTS:
        ours = find(results, "step", loss="distillation", packed=True, variant=variant)
        way = next((way for way in ("torch_compile", "no checkpointing") if variant.startswith(way)), "as it comes")
        theirs = find(results, "step", loss="next token", packed=True, variant=way)
        suffix = "" if variant == "as it comes" else f", {variant}"
        yield Line(
            f"distillation step, 2 x 4,096, packed rows{suffix}",
            "20,000 tokens/s",
            rate(ours),
            ratio=None if ours is None else ours["tokens_per_second"] / 20_000,
            least=1.0,
            floor=floor_text(whole, card, tokens),
        )
        yield Line(
            f"the same beside a next-token step of the student{suffix}",
            "at most 2.2 times",
            "" if theirs is None else milliseconds(ours),
            milliseconds(theirs),
            ratio_of(ours, theirs, "ms"),
            floor_text(plain, card),
            most=2.2,
        )
    alone = find(results, "step", loss="distillation", packed=False, variant="as it comes")
    for variant in ("as it comes", "document_attention"):
        packed = find(results, "step", loss="distillation", packed=True, variant=variant)
        yield Line(
            f"packed rows{'' if variant == 'as it comes' else f', {variant}'}; beside them, rows of one document",
            "at most 1.05 times",
            milliseconds(packed),
            milliseconds(alone),
            ratio_of(packed, alone, "ms"),
            most=1.05,
        )


def kl_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    twice = [row for row in results.get("kl", []) if row["form"] == "logits twice"]
    before = min(twice, key=lambda row: row["chunk_tokens"], default=None)
    for form, suffix in (("as it comes", ""), ("torch_compile", ", torch_compile")):
        ours = find(results, "kl", form=form)
        measured = ""
        if ours is not None:
            largest = 4 * ours["chunk_tokens"] * shapes.vocabulary / 1e6
            measured = (
                f"{ours['ms']:,.0f} ms, {(ours['peak_mb'] or 0) / 1e3:.1f} GB; a chunk's logits {largest:,.0f} MB"
            )
        yield Line(
            f"exact KL of it{suffix}, gradients included; beside it, logits made twice in small chunks",
            "80 ms",
            measured,
            "" if before is None else f"{before['ms']:,.0f} ms, {(before['peak_mb'] or 0) / 1e3:.1f} GB",
            None if ours is None else ours["ms"] / 80,
            floor_text(shapes.kl(ROWS * TOKENS), card),
            most=1.0,
        )


def alignment_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    tokens = 16 * 512
    mixers = Floor(6 * shapes.layers * shapes.mixer * tokens)
    mixers += shapes.recurrence(shapes.layers, 16, 512, 3.5)
    floor = floor_text(shapes.teacher_forward(16, 512) + mixers, card, tokens)
    for suffix in ("", ", torch_compile"):
        row = find(results, "alignment", choice=f"at once{suffix}")
        yield Line(
            f"alignment, 16 x 512, all layers at once{suffix}",
            "54,000 tokens/s",
            rate(row),
            ratio=None if row is None else row["tokens_per_second"] / 54_000,
            floor=floor,
            least=1.0,
        )
    for suffix in ("", ", torch_compile"):
        layerwise = find(results, "alignment", choice=f"layer by layer{suffix}")
        yield Line(
            f"alignment, a backward pass for each layer{suffix}: memory beside that of before",
            "a fifth of 13.4 GiB, where speed is not twice that of before",
            rate(layerwise),
            f"{BEFORE_MB / 1e3:.1f} GB",
            None if layerwise is None or not layerwise["peak_mb"] else layerwise["peak_mb"] / BEFORE_MB,
            floor,
            most=0.2,
        )


def held_out_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    rows = 4
    floor = shapes.teacher_forward(rows, TOKENS) + shapes.student_pass(rows, TOKENS, 1, 1)
    floor += Floor(4 * shapes.head * rows * TOKENS, 2 * 2 * 2 * shapes.vocabulary * rows * TOKENS)
    ours = find(results, "held_out", precision="bfloat16 autocast", teacher="computed")
    plain = find(results, "held_out", precision="that of the weights", teacher="computed")
    kept = find(results, "held_out", precision="bfloat16 autocast", teacher="kept")
    text = floor_text(floor, card, rows * TOKENS)
    for what, row in (("held-out KL", ours), ("held-out KL, the teacher's states kept", kept)):
        yield Line(
            f"{what}; beside it, without autocast",
            "4 times",
            rate(row),
            rate(plain),
            ratio_of(row, plain, "tokens_per_second"),
            text,
            least=4.0,
        )


def ga_s2_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    kept = find(results, "ga_s2", states="kept")
    anew = find(results, "ga_s2", states="computed for each layer, weights from pageable memory")

    def show(row: dict[str, Any] | None) -> str:
        return "" if row is None else f"{row['seconds_per_layer']:.1f} s for {row['steps']} steps"

    step = shapes.student_step(ROWS, TOKENS) + shapes.kl(ROWS * TOKENS)
    ms = [part.ms(card) for part in (step, shapes.adamw())]
    floor = (
        "" if kept is None or None in ms else f"{kept['steps'] * sum(x or 0 for x in ms) / 1000:.1f} s (ops, bytes)"
    )
    yield Line(
        "GA-S2, a layer, the teacher's states kept, weights from pinned memory; beside it, neither, as before",
        "1.3 times",
        show(kept),
        show(anew),
        ratio_of(anew, kept, "seconds_per_layer"),
        floor,
        least=1.3,
    )


def layer_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    tokens = ROWS * TOKENS
    floor = Floor(6 * (5 * shapes.hidden**2) * tokens) + shapes.recurrence(1, ROWS, TOKENS, 3.5)
    for size in (0, 4):
        ours, theirs = (find(results, "training_layer", layer=name, convolution=size) for name in ("hf_hybrid", "fla"))
        yield Line(
            f"Gated DeltaNet layer, training, {'convolutions of 4' if size else 'no convolution'}; beside it, fla's",
            "at most 1.1 times",
            milliseconds(ours),
            milliseconds(theirs),
            ratio_of(ours, theirs, "ms"),
            floor_text(floor, card),
            most=1.1,
        )


def prefill_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    cells = [(how, *cell) for how in ("eager", "regions") for cell in ((4096, 0.95), (65536, 2.0), (131072, 2.5))]
    for how, context, least in cells:
        teacher, hybrid = (
            find(results, "prefill", model=model, how=how, context=context) for model in ("teacher", "hybrid")
        )
        if how == "regions" and hybrid is None:
            continue
        products = Floor(2 * shapes.student * context, 2 * shapes.student)
        kept = shapes.layers - shapes.linear
        floor = products + shapes.softmax(kept, 1, context, 1) + shapes.recurrence(shapes.linear, 1, context, 1)
        text = floor_text(floor, card)
        if teacher is not None and hybrid is not None:  # the teacher's time without the softmax of 21 layers
            text += f"; if linear layers took no time, {teacher['ms'] / hybrid['floor_ms']:.2f} times"
        yield Line(
            f"prefill of {context:,} tokens{', norms and MLPs compiled' * (how == 'regions')}; beside it, the teacher",
            f"{least:g} times",
            milliseconds(hybrid),
            milliseconds(teacher),
            ratio_of(teacher, hybrid, "ms"),
            text,
            least=least,
        )


def decoding_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    """At the longest context also as many sequences as memory holds: of the teacher's for both, and of each one's."""
    rows = [row for row in results.get("decoding", []) if row["how"] == "compiled"]
    ways = sorted({(row["attention"], row["context"]) for row in rows}) or [("sdpa", 131072)]
    for attention, context in ways:
        of = {"attention": attention, "context": context}
        batches = {
            model: sorted(row["batch"] for row in rows if row["model"] == model and of.items() <= row.items())
            for model in ("teacher", "hybrid")
        }
        most = max(batches["teacher"], default=1)
        pairs = {(1, 1): "batch 1"}
        if most > 1:
            pairs[most, most] = f"the teacher's largest batch, {most}"
        if max(batches["hybrid"], default=1) > most:
            pairs[most, batches["hybrid"][-1]] = f"a batch that fills memory, {batches['hybrid'][-1]} beside {most}"
        for (theirs, ours), what in pairs.items():
            teacher = find({"decoding": rows}, "decoding", model="teacher", batch=theirs, **of)
            hybrid = find({"decoding": rows}, "decoding", model="hybrid", batch=ours, **of)
            least = 3.5 if context == 131072 else 0.95
            sums = ", attention as sums" if attention == "sums" else ""
            yield Line(
                f"decoding at {context:,} tokens{sums}, {what}; beside it, the teacher",
                f"{least:g} times",
                rate(hybrid and {**hybrid, "peak_mb": None}),
                rate(teacher and {**teacher, "peak_mb": None}),
                ratio_of(hybrid, teacher, "tokens_per_second"),
                "" if hybrid is None else f"{hybrid['floor_ms']:.2f} ms of {hybrid['ms']:.2f} (bytes)",
                least=least,
            )


def start_lines(results: dict[str, Any], shapes: Shapes, card: str) -> Iterator[Line]:
    start = find(results, "cold_start", cache="empty")
    yield Line(
        "cold start to the end of the first step, empty Triton cache",
        "60 s on 16 cores",
        ""
        if start is None
        else f"{start['seconds']:.0f} s on {start['cores']} cores ({start['kernels']:.0f} s kernels)",
        ratio=None if start is None else start["seconds"] / 60,
        most=1.0,
    )
    rows = sorted(results.get("text", []), key=lambda row: row["workers"])
    one, many = (rows[0], rows[-1]) if len(rows) > 1 else (None, None)
    yield Line(
        f"rows from text on {many['workers'] if many else 16} threads; beside it, one",
        "5 times on 16 cores",
        rate(many),
        rate(one),
        ratio_of(many, one, "tokens_per_second"),
        least=5.0,
    )


LINES: tuple[Callable[[dict[str, Any], Shapes, str], Iterator[Line]], ...] = (
    step_lines,
    kl_lines,
    alignment_lines,
    held_out_lines,
    ga_s2_lines,
    prefill_lines,
    decoding_lines,
    start_lines,
    layer_lines,
)


# --- more of training


def training_details(results: dict[str, Any]) -> str:
    """What a distillation's step is made of, and what each choice costs."""
    parts = []
    steps = [
        [
            row["loss"],
            "packed" if row["packed"] else "one document",
            row["variant"],
            milliseconds(row),
            rate(row, busy=False),
        ]
        for row in results.get("step", [])
    ]
    pieces = [
        [row["piece"], "packed" if row["packed"] else "one document", "", milliseconds(row), rate(row, busy=False)]
        for row in results.get("pieces", [])
    ]
    if steps or pieces:
        head = ["step or piece", "rows", "variant", "time", "tokens per second, memory at the peak"]
        body = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * 5, *steps, *pieces])
        parts.append(f"### A training step of 2 x 4,096 tokens and its pieces\n\n{body}")
    return "\n\n".join(parts)


def bullets(notes: Iterable[str]) -> str:
    """A list of notes, wrapped; words that hyphens join, as commands are, stay whole."""
    fill = textwrap.TextWrapper(119, subsequent_indent="  ", break_on_hyphens=False).fill
    return "\n".join(fill(f"- {note}") for note in notes)


def efficiency(results: dict[str, Any] | None) -> str:
    """Tokens per second on several GPUs, for docs/scaling.md; says that it was not measured where it was not."""
    rows = [] if results is None else results.get("scale", [])
    if not rows:
        return (
            "Not measured: `python benchmarks/gpu.py --part scale --output FILE` on a machine with several GPUs does."
        )
    card = (results or {})["environment"]["device"]
    head = ["engine", "machine", "GPUs", "rows of a step", "tokens/s", "efficiency"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["engine"], row["machine"], row["rows_per_step"], row["gpus"])):
        alone = find(results or {}, "scale", engine=row["engine"], machine=row["machine"], gpus=1)
        share = "" if alone is None else f"{row['tokens_per_second'] / alone['tokens_per_second'] / row['gpus']:.2f}"
        about = [row["engine"], row["machine"], str(row["gpus"]), str(row["rows_per_step"])]
        lines.append([*about, f"{row['tokens_per_second']:,.0f}", share])
    body = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])
    tell = (
        f"`python benchmarks/gpu.py --part scale` on {card}: the distillation of recipes/smollm2-135m.yaml, with "
        "random weights of those shapes, rows of 2,048 tokens, optimizer and all; a step of the recipe's 8 rows in "
        "all, and of 8 on each GPU. Efficiency: tokens per second over those of one GPU with the same engine on the "
        "same machine times the number of GPUs."
    )
    notes = bullets((results or {}).get("notes", []))
    return "\n\n".join([textwrap.fill(tell, 119), body, *filter(None, [notes])])
