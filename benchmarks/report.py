"""Writes docs/performance.md from the JSON of the benchmarks; `make benchmarks` runs those on the CPU and then this.

python benchmarks/delta_rule.py --output benchmarks/results/delta_rule.json
python benchmarks/decode.py --output benchmarks/results/decode.json
python benchmarks/gpu.py --output benchmarks/results/gpu.json      # where there is a GPU
python benchmarks/report.py
"""

import json
import platform
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_table import bullets, efficiency, issue_table, training_details


RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SCALING = PAGE.with_name("scaling.md")
# What lies between these lines of docs/scaling.md is written here.
BEGIN, END = "<!-- benchmarks/report.py: efficiency -->", "<!-- end -->"
IMPLEMENTATIONS = {"ours": "ours", "transformers": "transformers", "fla_naive": "fla, naive", "sdpa": "SDPA (softmax)"}


def delta_rule(rows: list[dict[str, Any]]) -> str:
    """One line per length and direction, the implementations side by side, with what ours gains on transformers'."""
    cells = {(row["tokens"], row["mode"], row["impl"]): row for row in rows}
    measured = [name for name in IMPLEMENTATIONS if any(row["impl"] == name for row in rows)]
    names = [IMPLEMENTATIONS[name] for name in measured]
    lines = [
        "## The gated delta rule",
        "",
        "`python benchmarks/delta_rule.py`: one sequence, 8 heads of width 64, fp32, one thread; median milliseconds",
        "of runs that take turns, and peak extra MB in a fresh process. The last columns: transformers' over ours.",
        "",
        "| tokens | | " + " | ".join(f"{name}, ms (MB)" for name in names) + " | speed | memory |",
        "|---|---|" + "---|" * (len(measured) + 2),
    ]
    for tokens, mode in dict.fromkeys((row["tokens"], row["mode"]) for row in rows):
        found = [cells[tokens, mode, name] for name in measured]
        ours, theirs = cells[tokens, mode, "ours"], cells[tokens, mode, "transformers"]
        columns = [f"{row['ms']:.0f} ({row['peak_mb']:.0f})" for row in found]
        columns += [f"{theirs['ms'] / ours['ms']:.1f}", f"{theirs['peak_mb'] / ours['peak_mb']:.1f}"]
        lines.append(f"| {tokens:,} | {mode.replace('_', ' + ')} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def decode(rows: list[dict[str, Any]]) -> str:
    """One line per context, the models side by side."""
    cells = {(row["context"], row["model"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        "## Decoding",
        "",
        "`python benchmarks/decode.py`: 8 layers, hidden size 512, 2 key/value heads, random weights, fp32, one",
        "thread; hybrids keep softmax in a quarter of the layers. Median milliseconds per token, and MB of cache of",
        "one sequence.",
        "",
        "| context | " + " | ".join(f"{model}, ms (MB)" for model in models) + " |",
        "|---|" + "---|" * len(models),
    ]
    for context in dict.fromkeys(row["context"] for row in rows):
        found = [cells[context, model] for model in models]
        columns = [f"{row['ms_per_token']:.0f} ({row['cache_bytes'] / 1e6:.1f})" for row in found]
        lines.append(f"| {context:,} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


EXACT = (
    "How exact fla's kernels are beside float64, gradients, packed rows and decoding included, is what `make "
    "gpu-check`\nshows ([results](../benchmarks/results/gpu_check/README.md))."
)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def gpu(results: dict[str, Any], *, earlier: bool = False) -> str:
    """The parts that were measured on a GPU, each as a table; cells that were not measured are empty."""
    found = dict(results["environment"])
    card = found.pop("device")
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    text = (
        f"`python benchmarks/gpu.py`, {versions}; bf16, the shapes of Qwen2.5-1.5B with random weights. Hybrids keep "
        "softmax in 7 of 28 layers; sdpa is torch's own softmax attention. Empty: not measured."
    )
    head = f"## {'Earlier, on another' if earlier else 'On a'} GPU: {card}\n\n{textwrap.fill(text, 119)}"
    parts = ["\n\n".join(filter(None, [head, bullets(results.get("notes", []))]))]
    renderers = {
        "recurrence": gpu_recurrence,
        "training": gpu_training,
        "inference": gpu_inference,
        "prefill": gpu_prefill,
        "decoding": gpu_decoding,
        "layers": gpu_layers,
    }
    parts += [render(results[part]) for part, render in renderers.items() if results.get(part)]
    parts += [text for text in [training_details(results)] if text]
    return "\n\n".join([*([] if earlier else [issue_table(results)]), *parts])


def pivot(rows: list[dict[str, Any]], down: list[str], across: str, show: Callable[[dict[str, Any]], str]) -> str:
    """A table with a line for each combination of `down`, and a column for each value of `across`."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    lines = dict.fromkeys(tuple(row[key] for key in down) for row in rows)
    cells = {(*(row[key] for key in down), row[across]): show(row) for row in rows}
    labels = [[f"{x:,}" if isinstance(x, int) else str(x).replace("_", " + ") for x in line] for line in lines]
    body = [
        label + [cells.get((*line, column), "") for column in columns]
        for label, line in zip(labels, lines, strict=True)
    ]
    return table([*down, *columns], body)


def gpu_recurrence(rows: list[dict[str, Any]]) -> str:
    text = "### Recurrence of one layer\n\nOne sequence, 12 heads of width 128; ms, and MB beyond the inputs.\n\n"
    rows = sorted(rows, key=lambda row: (row["tokens"], row["mode"]))
    return text + pivot(rows, ["tokens", "mode"], "impl", lambda row: f"{row['ms']:.1f} ({row['peak_mb']:,.0f})")


def gpu_training(rows: list[dict[str, Any]]) -> str:
    text = (
        "### Distillation step\n\nTeacher forward, student forward and backward, KL of all tokens, no optimizer, no "
        "gradient checkpointing; rows of\n4,096 tokens. Tokens per second, and GB at the peak with both models.\n\n"
    )
    return text + pivot(
        rows, ["batch"], "model", lambda row: f"{row['tokens_per_second']:,.0f} ({row['peak_mb'] / 1e3:.1f})"
    )


def gpu_inference(rows: list[dict[str, Any]]) -> str:
    text = (
        "### Prefill and decoding\n\nOne sequence, eager mode. Prefill in milliseconds; decoding in milliseconds per "
        "token; MB of cache.\n\n"
    )
    rows = sorted(rows, key=lambda row: row["context"])
    return text + pivot(
        rows,
        ["context"],
        "model",
        lambda row: f"{row['prefill_ms']:,.0f}; {row['decode_ms']:.0f}; {row['cache_bytes'] / 1e6:,.0f}",
    )


def gpu_prefill(rows: list[dict[str, Any]]) -> str:
    """A line per context: both models, their ratio, and the ratio if linear layers took no time for what they do."""
    text = (
        "### Prefill\n\nOne sequence into an empty cache; the models take turns. Regions: norms and MLPs of both are "
        "compiled. Milliseconds; GB at peak\nwith both models, and MB of cache. At most: what the ratio would be if "
        "the recurrence of the linear layers, with all that is around\nit, took no time.\n\n"
    )
    head = ["", "context", "teacher", "hybrid", "teacher / hybrid", "at most"]
    found = {(row["how"], row["context"], row["model"]): row for row in rows}
    lines = []
    for how, context in sorted({(row["how"], row["context"]) for row in rows}):
        teacher, hybrid = found[how, context, "teacher"], found[how, context, "hybrid"]
        cells = [
            f"{row['ms']:,.0f} ({(row['peak_mb'] or 0) / 1e3:.1f}; {row['cache_bytes'] / 1e6:,.0f})"
            for row in (teacher, hybrid)
        ]
        ratios = [f"{teacher['ms'] / hybrid['ms']:.2f}", f"{teacher['ms'] / hybrid['floor_ms']:.2f}"]
        lines.append([how, f"{context:,}", *cells, *ratios])
    return text + table(head, lines)


def gpu_decoding(rows: list[dict[str, Any]]) -> str:
    """A line per way, context and batch of the hybrid, beside the teacher at that batch, or at its largest."""
    text = (
        "### Decoding\n\nStatic caches, full. Compiled: as `generate` compiles it, with CUDA graphs. Recorded: the "
        "operations of the eager step, as a CUDA\ngraph. Milliseconds of a step (floor: weights and cache at the rate "
        "at which this card copies), and tokens per second.\nTwo batches: of the teacher and of the hybrid, each as "
        "large as memory allows.\n\n"
    )
    head = ["step", "context", "batch", "teacher", "hybrid", "hybrid / teacher, tokens/s"]
    ways = sorted({(row["how"], row["attention"], row["context"]) for row in rows})
    lines = []
    for how, attention, context in ways:
        cell = [row for row in rows if (row["how"], row["attention"], row["context"]) == (how, attention, context)]
        teachers = {row["batch"]: row for row in cell if row["model"] == "teacher"}
        hybrids = sorted((row for row in cell if row["model"] == "hybrid"), key=lambda row: row["batch"])
        for row in hybrids:
            teacher = teachers.get(row["batch"]) or (teachers[max(teachers)] if teachers else None)
            batches = dict.fromkeys(str(x["batch"]) for x in (teacher, row) if x is not None)
            cells = [
                "" if x is None else f"{x['ms']:.2f} ({x['floor_ms']:.2f}); {x['tokens_per_second']:,.0f}"
                for x in (teacher, row)
            ]
            ratio = "" if teacher is None else f"{row['tokens_per_second'] / teacher['tokens_per_second']:.2f}"
            way = how if attention == "sdpa" else f"{how}, attention as sums"
            lines.append([way, f"{context:,}", ", ".join(batches), *cells, ratio])
    return text + table(head, lines)


def gpu_layers(rows: list[dict[str, Any]]) -> str:
    text = (
        "### One layer\n\nA Gated DeltaNet layer of one sequence, all of one shape: ours, that of the library's "
        "Qwen3-Next, and fla's. Milliseconds of a\nforward pass, and of a step after it.\n\n"
    )
    tokens = {row["tokens"] for row in rows}
    rows = [
        row | {"mode": f"{row['mode']}, {max(tokens):,}" if row["mode"] == "forward" else row["mode"]} for row in rows
    ]
    return text + pivot(rows, ["mode"], "impl", lambda row: f"{row['ms']:.3f}")


def main() -> None:
    load = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    head = (
        "# Performance\n\nThe CPU's numbers are written by `make benchmarks`, on a machine with two shared cores "
        f"({platform.machine()}, torch {torch.__version__}).\nTimes on it vary by tens of percent: read the ratios."
    )
    parts = [head, delta_rule(load["delta_rule"]), decode(load["decode"])]
    parts += [gpu(load["gpu"]), gpu(load["gpu_h100"], earlier=True), EXACT]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n\n".join(parts) + "\n")
    before, rest = SCALING.read_text().split(BEGIN)
    SCALING.write_text(f"{before}{BEGIN}\n{efficiency(load.get('gpu_scale'))}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
