"""Time and memory of the chunked gated delta rule on the CPU, against other torch forms and softmax attention.

    python benchmarks/delta_rule.py --tokens 512 2048 8192 --repeats 7 --threads 1 --output delta_rule.json

Times are medians over repeats, the implementations taking turns in one process so that a noisy machine slows all of
them. Peak memory is the rise of the resident set's high-water mark (VmHWM, reset through /proc/self/clear_refs) over
the resident set with the inputs in place, each number from a fresh process; gradients and outputs count. Only Linux
has it; elsewhere memory is not measured.
"""

import argparse
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from hf_hybrid.modeling.ops_delta_rule import chunk_gated_delta_rule


BATCH, HEADS, DIM = 1, 8, 64
MODES = ("forward", "forward_backward")
NAMES = ("ours", "transformers", "fla_naive", "sdpa")
Operator = Callable[..., torch.Tensor]


class Row(TypedDict):
    impl: str
    tokens: int
    mode: str
    ms: float
    peak_mb: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="sequence lengths")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs per cell")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the numbers")
    parser.add_argument("--cell", nargs=2, metavar=("IMPL", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cell:
        name, mode = args.cell
        sys.stdout.write(json.dumps(measure_peak(name, mode, args.tokens[0])))
        return

    operators = {name: load(name) for name in NAMES}
    missing = [name for name, operator in operators.items() if operator is None]
    for name in missing:
        sys.stderr.write(f"{name} is left out: fla and triton are not installed here; `make benchmarks` has them\n")
    available = {name: operator for name, operator in operators.items() if operator is not None}
    check_agreement(available)
    rows: list[Row] = []
    for tokens in args.tokens:
        for mode in MODES:
            times = measure_times(available, mode, tokens, args.repeats)
            for name in available:
                peak = peak_in_fresh_process(name, mode, tokens, args.threads)
                rows.append({"impl": name, "tokens": tokens, "mode": mode, "ms": times[name], "peak_mb": peak})
    show(rows, missing, args.threads)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


def load(name: str) -> Operator | None:
    """The implementation as a function of (q, k, v, g, beta) that returns the output, or None if not importable."""
    if name == "ours":
        return lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]
    if name == "sdpa":
        return lambda q, k, v, g, beta: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if name == "transformers":
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as chunked

        # The decorated function prefers fla's kernel wherever fla is importable, on CPU tensors too.
        chunked = getattr(chunked, "__wrapped__", chunked)
        return lambda q, k, v, g, beta: chunked(q, k, v, g=g, beta=beta)[0]
    try:
        naive = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_chunk_gated_delta_rule
    except ImportError:
        return None
    return lambda q, k, v, g, beta: naive(q, k, v, g=g, beta=beta)[0]


@torch.no_grad()
def check_agreement(operators: dict[str, Operator]) -> None:
    """Raises an error where the forms of the delta rule do not give the same outputs."""
    inputs, _ = make_inputs("ours", "forward", 200)
    outputs = {name: operator(*inputs) for name, operator in operators.items() if name != "sdpa"}
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["ours"], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def make_inputs(name: str, mode: str, tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, g, beta, and the gradient of the output; attention gets [B, H, T, D], the layout it likes best."""
    torch.manual_seed(0)
    q, k, v, d_out = torch.randn(4, BATCH, tokens, HEADS, DIM).unbind()
    inputs = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v.clone()]
    d_out = d_out.clone()
    if name == "sdpa":
        inputs = [x.transpose(1, 2).contiguous() for x in inputs]
        d_out = d_out.transpose(1, 2).contiguous()
    inputs += [-torch.rand(BATCH, tokens, HEADS), torch.rand(BATCH, tokens, HEADS)]
    return [x.requires_grad_(mode == "forward_backward") for x in inputs], d_out


def run(operator: Operator, inputs: list[torch.Tensor], d_out: torch.Tensor) -> None:
    if inputs[0].requires_grad:
        torch.autograd.grad(operator(*inputs), inputs, d_out, allow_unused=True)
    else:
        with torch.no_grad():
            operator(*inputs)


def measure_times(operators: dict[str, Operator], mode: str, tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds per implementation."""
    inputs = {name: make_inputs(name, mode, tokens) for name in operators}
    times: dict[str, list[float]] = {name: [] for name in operators}
    for repeat in range(repeats + 1):
        for name, operator in operators.items():
            start = time.perf_counter()
            run(operator, *inputs[name])
            if repeat:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_in_fresh_process(name: str, mode: str, tokens: int, threads: int) -> float | None:
    if not pathlib.Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--tokens", str(tokens), "--threads", str(threads), "--cell", name, mode]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, mode: str, tokens: int) -> float:
    """Megabytes (10^6) that one run adds to this process."""
    operator = load(name)
    if operator is None:
        raise ValueError(f"{name} cannot be imported here.")
    run(operator, *make_inputs(name, mode, 64))  # libraries load and set up their buffers
    inputs, d_out = make_inputs(name, mode, tokens)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(operator, inputs, d_out)
    return (resident("VmHWM") - before) * 1024 / 1e6


def resident(field: str) -> int:
    """A memory figure of this process in KiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def show(rows: list[Row], missing: list[str], threads: int) -> None:
    """Print the table, with ratios against transformers' form."""
    caption = f"float32, B={BATCH} H={HEADS} D={DIM}, {threads} thread(s), torch {torch.__version__}"
    caption += "".join(f"\n{name}: not measured, it cannot be imported here" for name in missing)
    table = Table(title="Gated delta rule on the CPU (ratios: against transformers)", caption=caption)
    for column in ("tokens", "mode", "impl", "ms", "speed", "peak MB", "memory"):
        table.add_column(column, justify="left" if column in ("mode", "impl") else "right", no_wrap=True)
    reference = {(row["tokens"], row["mode"]): row for row in rows if row["impl"] == "transformers"}
    for row in rows:
        other = reference[row["tokens"], row["mode"]]
        cells = []
        for value, base, least in ((row["ms"], other["ms"], 0.0), (row["peak_mb"], other["peak_mb"], 1.0)):
            # Below a megabyte the resident set says too little for a ratio.
            ratio = "-" if value is None or base is None or min(value, base) < least else f"{base / value:.2f}x"
            cells += ["-" if value is None else f"{value:.1f}", ratio]
        table.add_row(
            str(row["tokens"]), "forward" if row["mode"] == "forward" else "fwd + bwd", str(row["impl"]), *cells
        )
    Console().print(table)


if __name__ == "__main__":
    main()
