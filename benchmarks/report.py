"""Writes docs/performance.md from the JSON of the benchmarks; `make benchmarks` runs them and then this.

python benchmarks/delta_rule.py --output benchmarks/results/delta_rule.json
python benchmarks/decode.py --output benchmarks/results/decode.json
python benchmarks/report.py
"""

import json
import platform
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
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


def main() -> None:
    load = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    head = (
        "# Performance\n\nWritten by `make benchmarks` on a machine with two shared cores "
        f"({platform.machine()}, torch {torch.__version__}). Times on it vary by tens of percent: read the ratios.\n"
        "No GPU was measured; rows that were not measured are left out."
    )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n\n".join([head, delta_rule(load["delta_rule"]), decode(load["decode"])]) + "\n")


if __name__ == "__main__":
    main()
