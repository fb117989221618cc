"""Which model types can be converted: a tiny random model of each is turned into hybrids and every path is checked.

    python -m benchmarks.families
    python -m benchmarks.families --only llama,phi3,deepseek_v3 --json families.json

Covers each causal language model type of the installed transformers. Writes docs/supported_models.md (not with --only)
and prints what passes and, for the rest, why not. Needs no network and no GPU.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from .checks import CHECKS, check_type
from .models import causal_types


_NO_ATTENTION = "decoder layers with a self_attn"
_PER_PROCESS = 16


def passed(result: dict) -> bool:
    return result["refused"] is None and all(check in ("pass", "n/a") for check in result["checks"].values())


def run_types(types: list[str], console: Console) -> list[dict]:
    """Checks the types in processes of a few types each, so that memory is given back; prints as they come."""
    results = []
    for start in range(0, len(types), _PER_PROCESS):
        left = types[start : start + _PER_PROCESS]
        while left:
            command = [sys.executable, "-m", "benchmarks.families", "--worker", "--only", ",".join(left)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                for line in process.stdout:
                    results.append(json.loads(line))
                    left = left[1:]
                    show_line(results[-1], console)
            if left:  # the process died on this one
                reason = f"the process ended with status {process.returncode}"
                results.append({"type": left[0], "checks": {}, "notes": [], "refused": reason})
                left = left[1:]
    return results


def show_line(result: dict, console: Console) -> None:
    failed = {name: reason for name, reason in result["checks"].items() if reason not in ("pass", "n/a")}
    word = "pass" if passed(result) else "refused" if result["refused"] else "FAIL"
    detail = result["refused"] or "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    console.print(f"{result['type']:26} {word:8} {result.get('seconds', 0):5.1f} s  {detail}", markup=False)


def work(types: list[str]) -> None:
    """The worker: a JSON line for each type."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for model_type in types:
        start = time.perf_counter()
        result = check_type(model_type)
        result["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(result), flush=True)
        gc.collect()


def summary(results: list[dict], console: Console) -> None:
    table = Table(title=f"transformers {transformers.__version__}: what can be converted")
    for column in ("outcome", "types"):
        table.add_column(column, justify="right" if column == "types" else "left")
    for title, group in groups(results).items():
        table.add_row(title, str(len(group)))
    console.print(table)


def groups(results: list[dict]) -> dict[str, list[dict]]:
    """The results by outcome: passing, failing a check, refused although layers have `self_attn`, and the rest."""
    done = [result for result in results if passed(result)]
    failing = [result for result in results if result["refused"] is None and not passed(result)]
    refused = [result for result in results if result["refused"] and _NO_ATTENTION not in result["refused"]]
    other = [result for result in results if result["refused"] and _NO_ATTENTION in result["refused"]]
    return {"pass": done, "fail a check": failing, "refused": refused, "no self_attn in their layers": other}


def page(results: list[dict]) -> str:
    done, failing, refused, other = groups(results).values()
    columns = [name for name in CHECKS if name not in ("softmax copy", "tensors")]
    lines = [
        "# Supported models",
        "",
        f"Written by `make families` with transformers {transformers.__version__}: of {len(results)} causal language "
        f"model types, {len(done)} can be converted and pass every check below. Each was a tiny random model; hybrids "
        "alternate linear and softmax layers.",
        "",
        "- softmax copy: a hybrid that keeps every softmax layer gives the teacher's logits, difference 0 in float32;",
        "- tensors: the conversion report accounts for every tensor, and copies are exact;",
        "- transfer: softmax over the mixer's q, k, v gives the teacher's attention output;",
        "- backward: finite gradients, and one for every parameter of the linear layers;",
        "- cache: decoding token by token and in pieces gives the full forward's logits;",
        "- left and right padding, packed documents: each row or document gets what it gets alone;",
        "- checkpointing: the same gradients with and without; saving: the loaded model gives the same logits;",
        "- half precision: in bfloat16 and float16, a softmax-only copy gives the teacher's logits in memory "
        "and from disk, difference 0, and each tensor keeps the teacher's dtype.",
        "",
        "| model type | notes |",
        "|---|---|",
        *(f"| {result['type']} | {'; '.join(result['notes'])} |" for result in done),
        "",
    ]
    if failing:
        lines += ["## Converted, but not every check passes", "", f"| model type | {' | '.join(columns)} |"]
        lines += ["|" + "---|" * (len(columns) + 1)]
        for result in failing:
            cells = " | ".join(result["checks"].get(name, "") for name in columns)
            lines.append(f"| {result['type']} | {cells} |")
        lines.append("")
    lines += ["## Refused", "", "| model type | why |", "|---|---|"]
    lines += [f"| {result['type']} | {result['refused'].replace('|', '/')} |" for result in refused]
    lines += ["", "## Without `self_attn` in their decoder layers", ""]
    lines += [", ".join(result["type"] for result in other) + ".", ""]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--json", type=Path, help="write every result there")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "supported_models.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    types = args.only.split(",") if args.only else causal_types()
    if args.worker:
        return work(types)
    console = Console()
    results = run_types(types, console)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if not args.only:
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(page(results))
    summary(results, console)


if __name__ == "__main__":
    main()
