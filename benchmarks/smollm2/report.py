"""
Writes docs/results.md and its plots from the figures that all.py kept.

    python benchmarks/smollm2/report.py --results benchmarks/results/smollm2 --output docs/results.md

Every number comes from a JSON file in the folder, a folder for each seed. With two seeds or more, tables have the mean
over seeds and its standard error; with one, the standard error over rows and cases. What was left undone is listed.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


Record = dict[str, Any]
# In the order of the tables; what is not among them comes last.
SELECTORS = ("search", "verified", "ga-s2", "zero-shot-linearise", "zero-shot", "ga-s1")
SELECTORS += ("uniform", "random-0", "random-1")
NAMES = {"ga-s1": "alignment loss (ga-s1)", "random-0": "random, first draw", "random-1": "random, second draw"}
NAMES["search"] = "swaps around the best set"


class Results:
    """The records of all seeds by the names of their jobs."""

    def __init__(self, folder: Path) -> None:
        self.seeds: dict[int, dict[str, Record]] = {}
        for path in sorted(folder.glob("seed-*")):
            self.seeds[int(path.name.removeprefix("seed-"))] = {
                file.stem: json.loads(file.read_text("utf-8"))
                for file in sorted(path.glob("*.json"))
                if not file.name.endswith(".scores.json")
            }
        if not any(self.seeds.values()):
            raise ValueError(f"{folder} has no folder seed-N with figures; run benchmarks/smollm2/all.py first.")
        self.sources = _read(folder / "sources.json")
        self.written = _read(folder / "written.json")

    def named(self, job: str) -> list[Record]:
        """The records of one job, of all seeds that did it."""
        return [jobs[job] for jobs in self.seeds.values() if job in jobs]

    def of_selector(self, k: int, selector: str) -> list[Record]:
        """The hybrids with the `k` layers that a selector named, of all seeds: which layers may differ."""
        return [
            record
            for jobs in self.seeds.values()
            for name, record in jobs.items()
            if name.startswith(f"k{k}-") and selector in record["selectors"]
        ]

    def kept(self) -> list[int]:
        """How many layers keep softmax, in all there is."""
        found = {name[1 : name.index("-")] for jobs in self.seeds.values() for name in jobs if name.startswith("k")}
        return sorted((int(k) for k in found), reverse=True)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def page(results: Results, plots: Path) -> str:
    """The whole page as Markdown; plots are written to `plots`."""
    parts = ["# A real model: SmolLM2-135M-Instruct", setting(results)]
    for k in results.kept():
        parts += [f"## Softmax in {k} layers", hybrids(results, k)]
    parts += ["## What choosing the layers costs", costs(results)]
    if (others := other_mixers(results)) is not None:
        parts += ["## Other mixers in the same layers", others]
    if (found := searches(results)) is not None:
        parts += ["## How far from the best that can be found", found]
    if (timed := speeds(results)) is not None:
        parts += ["## Speed and cache", timed]
    if draw_curves(results, plots / "results_curves.png"):
        text = "KL and single needles over the tokens of distillation, along one schedule (a cosine) for each hybrid."
        parts += ["## Over tokens", f"{text}\n\n![curves]({plots.name}/results_curves.png)"]
    parts += ["## Text", text_of(results)]
    return "\n\n".join(parts) + "\n"


def setting(results: Results) -> str:
    """What was run, where, with what budgets."""
    records = [record for jobs in results.seeds.values() for record in jobs.values() if "device" in record]
    devices = sorted({record["device"] for record in records})
    size = records[0]["size"]
    lines = [
        "Written by `benchmarks/smollm2/report.py` from the JSON files in `benchmarks/results/smollm2`, which "
        "`make smollm2` made: nothing here is typed in.",
        f"- Seeds: {', '.join(map(str, results.seeds))}. Device: {', '.join(devices)}.",
        f"- Each hybrid that is compared: {size['tokens']:,} tokens of distillation from one aligned student, on the "
        "same rows in the same order.",
        f"- KL in nats per token on {size['held_out_rows']} held-out rows of {size['block_size']:,} tokens of each "
        "domain, the mean of the domains; tasks after RULER (docs/evaluation.md) by likelihood, "
        f"{size['cases']} cases of each at {', '.join(map(str, size['lengths']))} tokens.",
    ]
    if any(record.get("trial") for record in records):
        lines.insert(1, "**A trial: the figures say that every step runs, and nothing else.**")
    return "\n".join([lines[0], "", *lines[1:]])


def hybrids(results: Results, k: int) -> str:
    """The table of hybrids that keep `k` layers."""
    teacher, aligned = results.named("teacher"), results.named("aligned")
    domains = list(teacher[0]["kl"]["domains"])
    head = ["layers by", "which", "KL", *(f"KL, {name}" for name in domains), "perplexity", "retrieval", "copying"]
    rows = [["teacher", "all", "0", *("0" for _ in domains), *measures(teacher)]]
    listed = [name for name in SELECTORS if results.of_selector(k, name)]
    for selector in listed:
        found = results.of_selector(k, selector)
        which = " / ".join(str(record["layers"]) for record in found) if len(found) > 1 else str(found[0]["layers"])
        if len({str(record["layers"]) for record in found}) == 1:
            which = str(found[0]["layers"])
        rows.append([NAMES.get(selector, selector), which, *kls(found, domains), *measures(found)])
    if aligned:
        rows.append(["none, aligned only", "[]", *kls(aligned, domains), *measures(aligned)])
    table = markdown(head, rows)
    best = results.of_selector(k, "verified"), results.of_selector(k, "uniform")
    if all(best):
        ours, theirs = (statistics.fmean(record["kl"]["mean"] for record in found) for found in best)
        table += f"\n\nThe KL with `verified`'s layers is {ours / theirs:.2f} of that with uniform ones."
    return table


def kls(found: list[Record], domains: Iterable[str]) -> list[str]:
    """The mean KL, then that of each domain."""
    mean = over_seeds(found, lambda record: (record["kl"]["mean"], record["kl"]["sem"]))
    each = [
        over_seeds(found, lambda r, d=name: (r["kl"]["domains"][d]["mean"], r["kl"]["domains"][d]["sem"]))
        for name in domains
    ]
    return [mean, *each]


def measures(found: list[Record]) -> list[str]:
    """Perplexity (the geometric mean over domains), the share of right answers in all retrieval tasks, and copying."""

    def perplexity(record: Record) -> tuple[float, float | None]:
        return statistics.geometric_mean(record["perplexity"].values()), None

    def share(record: Record, *, copying: bool) -> tuple[float, float | None]:
        scores = [score for score in record["ruler"] if (score["task"] == "copying") == copying]
        if not scores:
            return float("nan"), None
        error = sum((score["sem"] or 0.0) ** 2 for score in scores) ** 0.5 / len(scores)
        return statistics.fmean(score["mean"] for score in scores), error

    return [
        over_seeds(found, perplexity, ".2f"),
        over_seeds(found, lambda record: share(record, copying=False), ".3f"),
        over_seeds(found, lambda record: share(record, copying=True), ".3f"),
    ]


def over_seeds(found: list[Record], of: Callable[[Record], tuple[float, float | None]], form: str = ".4f") -> str:
    """Mean and standard error over seeds, or of the one seed there is."""
    values = [of(record) for record in found]
    mean = statistics.fmean(value for value, _ in values)
    if mean != mean:
        return ""
    if len(values) > 1:
        error: float | None = statistics.stdev([value for value, _ in values]) / len(values) ** 0.5
    else:
        error = values[0][1]
    return format(mean, form) + ("" if error is None else f" ± {error:{form}}")


def costs(results: Results) -> str:
    """Tokens and seconds of each method, and whether seeds agree."""
    rows = []
    jobs = sorted({name for found in results.seeds.values() for name in found if name.startswith("score-")})
    for job in jobs:
        found = results.named(job)
        k = found[0]["k"] or 8
        chosen = [set(record["ranking"][:k]) for record in found]
        shared = f"{len(set.intersection(*chosen))} of {k}" if len(chosen) > 1 else ""
        tokens, seconds = (statistics.fmean(record[name] for record in found) for name in ("tokens", "seconds"))
        rows.append([found[0]["method"], str(k), f"{tokens / 1e6:.2f}M", f"{seconds:.0f}", shared])
    return markdown(["method", "layers", "tokens", "seconds", "chosen with every seed"], rows)


def other_mixers(results: Results) -> str | None:
    """The table of the other mixers, or None where none was tried."""
    jobs = sorted({name for found in results.seeds.values() for name in found if name.startswith("mixer-")})
    if not jobs:
        return None
    domains = list(results.named(jobs[0])[0]["kl"]["domains"])
    rows = [
        [job.removeprefix("mixer-"), *kls(results.named(job), domains), *measures(results.named(job))] for job in jobs
    ]
    head = ["mixer", "KL", *(f"KL, {name}" for name in domains), "perplexity", "retrieval", "copying"]
    return markdown(head, rows)


def searches(results: Results) -> str | None:
    """What the search by swaps found, and where the sets of the methods lie in what it tried."""
    found = results.named("search")
    if not found:
        return None
    lines = []
    for record in found:
        tried = sorted(record["evaluations"], key=lambda one: one["kl"])
        first = record["evaluations"][0]
        lines.append(
            f"- {len(tried)} sets of {record['k']} layers, each after a short distillation ({record['tokens']:,} "
            f"tokens in all): from {first['layers']} ({first['kl']:.4f} on the rows that scores are made on) to "
            f"{record['layers']} ({tried[0]['kl']:.4f}). It swaps one layer at a time and keeps what is better: a "
            "stronger search than any of the methods, and no proof of an optimum."
        )
    return "\n".join(lines)


def speeds(results: Results) -> str | None:
    """Prefill, decoding and cache of teacher and hybrid side by side, of the first seed that has them."""
    found = results.named("speed")
    if not found:
        return None
    record, rows = found[0], []
    of = {name: [row for row in record["rows"] if row["model"] == name] for name in ("teacher", "hybrid")}
    for teacher, ours in zip(of["teacher"], of["hybrid"], strict=True):
        row = [f"{ours['context']:,}", str(ours["batch"])]
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            row += [f"{teacher[name]:,.0f}", f"{ours[name]:,.0f}", f"{ours[name] / teacher[name]:.2f}"]
        rows.append([*row, f"{teacher['cache_bytes'] / 2**20:.1f}", f"{ours['cache_bytes'] / 2**20:.1f}"])
    head = ["context", "rows", "prefill, teacher", "hybrid", "ratio", "decoding, teacher", "hybrid", "ratio"]
    head += ["cache, teacher (MiB)", "hybrid"]
    about = (
        f"Tokens per second in {record['dtype']}, eager, with the library's dynamic cache, on {record['device']}; "
        f"softmax in layers {record['layers']}."
    )
    return f"{about}\n\n{markdown(head, rows)}"


def draw_curves(results: Results, path: Path) -> bool:
    """Draws KL and single needles over tokens; returns whether there was anything to draw."""
    most = max(results.kept(), default=0)
    curves = [
        (selector, record)
        for selector in SELECTORS
        for record in results.of_selector(8 if 8 in results.kept() else most, selector)[:1]
    ] + [("longer", record) for record in results.named("long")[:1]]
    if not curves:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for selector, record in curves:
        tokens = [point["tokens"] for point in record["curve"]] + [record["tokens"]]
        axes[0].plot(tokens, [p["kl"] for p in record["curve"]] + [record["kl"]["mean"]], marker="o", label=selector)
        needles = [point["ruler"][0] for point in record["curve"]]
        if not needles:
            continue
        last = next(
            score
            for score in record["ruler"]
            if (score["task"], score["length"]) == (needles[0]["task"], needles[0]["length"])
        )
        axes[1].plot(tokens, [needle["mean"] for needle in (*needles, last)], marker="o", label=selector)
    axes[0].set(xlabel="tokens of distillation", ylabel="held-out KL (nats per token)", yscale="log")
    axes[1].set(xlabel="tokens of distillation", ylabel="single needles in prose, found", ylim=(-0.05, 1.05))
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def text_of(results: Results) -> str:
    """Where the text comes from."""
    lines = [
        "Training rows mix sources as `recipes/smollm2-135m.yaml` says; held-out documents come from packages and "
    ]
    lines[0] += "topics that training never saw."
    if results.sources:
        lines.append("Sources with versions and licences: `benchmarks/results/smollm2/sources.json`.")
    if results.written:
        lines.append("What the teacher wrote, and what of it was dropped: `benchmarks/results/smollm2/written.json`.")
    return " ".join(lines)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; columns after the first two are numbers."""
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder with a folder for each seed")
    parser.add_argument("--output", type=Path, required=True, help="the page; plots go to images/ beside it")
    args = parser.parse_args()
    text = page(Results(args.results), args.output.parent / "images")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
