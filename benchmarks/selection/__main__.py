"""How good is each way to select layers? Regret against the best set of layers, and cost.

    python -m benchmarks.selection --quick --output selection.json        # three teachers, K <= 2, one seed: minutes
    python -m benchmarks.selection --cache FOLDER --output selection.json # goes on with the full one: hours
    python -m benchmarks.selection --report                               # docs/selection.md from the committed JSON

Every set of K softmax layers is distilled with one budget (selection_truth.py); a selector's regret is the held-out KL
of the set it chooses minus that of the best set, on rows that nothing was chosen on. Every selector runs through
`hh.score_layers` (selection_methods.py). All results go to the cache folder one by one, and what is there is not run
again. Teachers marked `dev` were used to choose the recommended default, those marked `test` to report on it, and
those marked `held-out` came after it; they have a JSON of their own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import analysis, methods, truth
from .data import BATCH, BENCHMARK, LENGTH, TEACHERS


RESULTS = Path(__file__).parents[1] / "results"
QUICK_TEACHERS = ["embedded", "qwen3-8-drop", "llama-9-either"]
QUICK_METHODS = [label for label, method in methods.METHODS.items() if not method.steps or label == "verified"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON with the regret of every selector")
    parser.add_argument("--quick", action="store_true", help="three teachers, sets of one and two layers, short runs")
    parser.add_argument("--cache", type=Path, help="folder of the results; by default beside --output")
    parser.add_argument("--teachers", nargs="+", default=BENCHMARK, choices=list(TEACHERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    parser.add_argument("--analyse-only", action="store_true", help="run nothing; only what the cache holds")
    parser.add_argument("--report", action="store_true", help="write docs/selection.md and its plots")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if not args.report and args.output is None:
        parser.error("--output is needed, unless with --report")
    return args


def run(args: argparse.Namespace, cache: Path) -> None:
    """Everything that the cache lacks: ground truth, selectors, and the sets that they chose."""
    common = ["--cache", str(cache), "--rows", str(cache / "rows"), "--device", args.device]
    common += ["--teachers", *args.teachers, "--seeds", *map(str, args.seeds)]
    command = [*common, "--k", *map(str, (0, 1, 2) if args.quick else (0, 1, 2, 3, -1))]
    command += ["--steps", "12", "--align-steps", "40"] if args.quick else []
    command += ["--together", "48"] if args.device != "cpu" else []
    settings = truth.parser().parse_args(command)
    truth.compute(settings)
    labels = QUICK_METHODS if args.quick else list(methods.METHODS)
    train_rows = str(settings.steps * BATCH)
    selectors = methods.parser().parse_args([*common, "--methods", *labels, "--train-rows", train_rows])
    for name, seed in dict.fromkeys((job.name, job.seed) for job in methods.missing_jobs(selectors)):
        truth.ensure_aligned(name, seed, settings)
    methods.compute(selectors)
    for name in args.teachers:
        ground = analysis.read_ground(cache, name)
        assert ground is not None
        found = analysis.choices(cache, ground)
        for seed in args.seeds:
            sets = [s for s in analysis.unmeasured(ground, found, seed) if len(s) < 3 or not args.quick]
            if sets:
                settings.teachers, settings.seeds = [name], [seed]
                settings.sets = [list(s) for s in sets]
                truth.compute(settings)


def analyse(cache: Path, names: list[str], ks: list[int]) -> dict[str, Any]:
    """The regret table and what it rests on."""
    grounds = [ground for name in names if (ground := analysis.read_ground(cache, name)) is not None]
    found = [choice for ground in grounds for choice in analysis.choices(cache, ground, ks)]
    table = analysis.summarise(grounds, found, ks)
    teachers = {}
    for ground in grounds:
        of_size = {k: {s: len(r) for s, r in _sizes(ground, k).items()} for k in (1, 2, 3)}
        teachers[ground.name] = {
            "split": TEACHERS[ground.name].split,
            "num_layers": ground.num_layers,
            "sets": of_size,
            "best": {k: list(ground.best_on_average(k)) for k in (1, 2, 3)},
            "random": {k: ground.expected_of_random(k) for k in (1, 2, 3)},
            "unmeasured": [list(s) for s in analysis.unmeasured(ground, found) if len(s) in ks],
        }
    steps = {record["steps"] for g in grounds for records in g.records.values() for record in records.values()}
    return {
        "recommended": analysis.recommend(table),
        "methods": table,
        "left_out": analysis.left_out(grounds, found, ks) if names == BENCHMARK else [],
        "teachers": teachers,
        "budget": {"steps": sorted(steps), "rows": BATCH, "tokens_per_row": LENGTH},
    }


def _sizes(ground: analysis.Ground, k: int) -> dict[int, list[Any]]:
    return {seed: [s for s in records if len(s) == k] for seed, records in ground.records.items()}


def show(result: dict[str, Any], ks: list[int]) -> None:
    names = list(result["teachers"])
    title = f"regret: KL above the best set's, nats per token (by these teachers: {result['recommended']})"
    table = Table(title=title)
    for column in ("selector", *(f"K={k}" for k in ks), "mean", "sd", "cost / GA-S2", "trained", "measured", "s"):
        table.add_column(column, justify="left" if column == "selector" else "right", no_wrap=True)
    for row in sorted(result["methods"], key=lambda row: row["regret"]):
        by_k = []
        for k in ks:
            values = [row["by_k"][k][name] for name in names if name in row["by_k"][k]]
            by_k.append(f"{sum(values) / len(values):.3f}" if values else "")
        cost = "" if row["cost"] is None else f"{row['cost']:.3f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        cells = (f"{row['regret']:.3f}", f"{row['sd']:.3f}", cost, f"{row['tokens']:,}", f"{row['tokens_forward']:,}")
        table.add_row(row["method"], *by_k, *cells, seconds)
    Console(width=120).print(table)


def main() -> None:
    args = parse_args()
    if args.report:
        from . import report as selection_report

        selection_report.write(RESULTS)
        return
    cache = args.cache or args.output.with_name(args.output.stem + ("_quick_cache" if args.quick else "_cache"))
    ks = [1, 2] if args.quick else [1, 2, 3]
    if args.quick:
        args.teachers, args.seeds = QUICK_TEACHERS, args.seeds[:1]
    if not args.analyse_only:
        run(args, cache)
    result = analyse(cache, args.teachers, ks)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result, ks)


if __name__ == "__main__":
    main()
