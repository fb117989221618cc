"""
Writes docs/results.md and its plots from the figures that all.py kept.

    python benchmarks/smollm2/report.py --results benchmarks/results/smollm2 --output docs/results.md

Every number comes from a JSON file in the folder, a folder for each seed. With two seeds or more, tables have the mean
over seeds and its standard error; with one, the standard error over rows and cases. What was left undone is listed.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from hf_hybrid.exporting.native import NATIVE_OPTIONS  # noqa: E402


Record = dict[str, Any]
# In the order of the tables; what is not among them comes last.
SELECTORS = ("search", "verified", "ga-s2", "zero-shot-linearise", "zero-shot", "ga-s1")
SELECTORS += ("window-sinks", "uniform", "random-0", "random-1")
NAMES = {"ga-s1": "alignment loss (ga-s1)", "random-0": "random, first draw", "random-1": "random, second draw"}
NAMES |= {"search": "swaps around the best set", "window-sinks": "verified, for windows"}
# The runs of the recipe, and what stands beside their seed.
RUNS = {
    "run-report": "",
    "run-again-report": ", once more",
    "run-again-2-report": ", a third time",
    "run-again-3-report": ", a fourth time",
    "run-again-4-report": ", a fifth time",
}


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
        self.about = _read(folder / "about.json")
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

    def chosen(self, k: int) -> dict[str, list[Record]]:
        """The hybrids with `k` softmax layers by their selectors; those that always agree share a name."""
        found: dict[str, list[Record]] = {}
        for selector in SELECTORS:
            records, shown = self.of_selector(k, selector), NAMES.get(selector, selector)
            if not records:
                continue
            same = next((name for name, others in found.items() if others == records), None)
            found[shown if same is None else f"{same}, {shown}"] = records if same is None else found.pop(same)
        return found

    def kept(self) -> list[int]:
        """How many layers keep softmax, in all there is."""
        found = {name[1 : name.index("-")] for jobs in self.seeds.values() for name in jobs if name.startswith("k")}
        return sorted((int(k) for k in found), reverse=True)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def page(results: Results, plots: Path, earlier: Results | None = None) -> str:
    """The whole page as Markdown, that of `earlier` runs at its end; plots are written to `plots`."""
    parts = ["# A real model: SmolLM2-135M-Instruct", setting(results)]
    if (runs := finished(results)) is not None:
        parts += ["## The finished hybrid", runs]
    if (reached := aims(results)) is not None:
        parts += ["## What was aimed at", reached]
    for k in results.kept():
        parts += [f"## Softmax in {k} layers", hybrids(results, k), by_length(results, k)]
    parts += ["## What choosing the layers costs", costs(results)]
    if (agreed := agreements(results)) is not None:
        parts += ["## Whether the methods agree", agreed]
    if (others := other_mixers(results)) is not None:
        parts += ["## Other mixers in the same layers", others]
    if (found := searches(results)) is not None:
        parts += ["## How far from the best that can be found", found]
    if (tried := settings(results)) is not None:
        parts += ["## Other settings of the distillation", tried]
    if (timed := speeds(results)) is not None:
        parts += ["## Speed and cache", timed]
    if draw_curves(results, plots / "results_curves.png"):
        text = "KL and single needles over the tokens of distillation, along one schedule (a cosine) for each hybrid."
        parts += ["## Over tokens", f"{text}\n\n![curves]({plots.name}/results_curves.png)"]
        parts += filter(None, [longer(results)])
    if (evaluated := evaluations(results)) is not None:
        parts += ["## Tasks of lm-eval, and free generation", evaluated]
    if (answers := chats(results)) is not None:
        parts += ["## Chat", answers]
    parts += ["## Left undone", undone(results)]
    if earlier is not None:
        parts += ["## Earlier: with large steps", of_earlier(earlier)]
    parts += ["## Text", text_of(results)]
    return "\n\n".join(parts) + "\n"


def of_earlier(results: Results) -> str:
    """What earlier runs, of other settings, came to."""
    parts = ["\n".join(f"- {note}" for note in results.about["notes"])]
    parts += [text for text in (finished(results), aims(results)) if text is not None]
    for k in results.kept():
        parts += [f"Softmax in {k} layers, {compared_tokens(results):,} tokens of distillation:", hybrids(results, k)]
        parts.append(by_length(results, k))
    return "\n\n".join([*parts, costs(results)])


def setting(results: Results) -> str:
    """What was run, where, with what budgets."""
    records = [record for jobs in results.seeds.values() for record in jobs.values() if "device" in record]
    devices = sorted({record["device"] for record in records})
    size = records[0]["size"]
    rows = {name: len(domain["rows"]) for name, domain in results.named("teacher")[0]["kl"]["domains"].items()}
    lines = [
        "Written by `benchmarks/smollm2/report.py` from the JSON files in `benchmarks/results/smollm2`, which "
        "`make smollm2` made. No figure of a table or a plot is typed in; how it was run is told in `about.json`.",
        f"- Seeds: {', '.join(map(str, results.seeds))}. Device: {', '.join(devices)}.",
        f"- Each hybrid that is compared: {compared_tokens(results):,} tokens of distillation from one aligned "
        "student, on the same rows in the same order.",
        f"- KL in nats per token on held-out rows of {size['block_size']:,} tokens of each domain ("
        + ", ".join(f"{name} {count}" for name, count in rows.items())
        + "), the mean of the domains; tasks after RULER (docs/evaluation.md) by likelihood, "
        f"{size['cases']} cases of each at {', '.join(map(str, size['lengths']))} tokens.",
    ]
    if results.about is not None:
        lines.append(f"- On {results.about['machine']}:")
        lines += [f"    - `{line}`" for line in results.about["commands"]]
        lines += [f"- {note}" for note in results.about["notes"]]
    if any(record.get("trial") for record in records):
        lines.insert(1, "**A trial: the figures say that every step runs, and nothing else.**")
    return "\n".join([lines[0], "", *lines[1:]])


def compared_tokens(results: Results) -> int:
    """Tokens of distillation of each hybrid that is compared."""
    return next(
        int(record["tokens"])
        for jobs in results.seeds.values()
        for name, record in jobs.items()
        if name.startswith("k") and name[1].isdigit()
    )


def finished(results: Results) -> str | None:
    """What the recipe made, a row for each run: of each seed, and of the same once more."""
    table, windows = runs_of(results, RUNS), runs_of(results, {"windows-report": ""})
    if table is None:
        return None
    about = (
        "`hf-hybrid run` with `recipes/smollm2-135m.yaml`: alignment, choice of layers and distillation, in tokens in "
        "this order. KL and perplexity on held-out rows of the training mixture."
    )
    parts = [about, table]
    if windows is not None:
        parts += ["The same with windows, `recipes/smollm2-135m-windows.yaml`:", windows]
    return "\n\n".join(parts)


def runs_of(results: Results, runs: dict[str, str]) -> str | None:
    """The table of finished runs, by the names of their records, or None where there is none."""
    head = ["seed", "softmax in", "KL", "perplexity", "teacher's", "cache of 8,192 tokens", "tokens", "seconds"]
    rows = []
    for (seed, jobs), (job, told) in itertools.product(results.seeds.items(), runs.items()):
        if (report := jobs.get(job)) is None:
            continue
        found, tokens = report["evaluation"], report["tokens"]
        rows.append(
            [
                f"{seed}{told}",
                str(report["selected"]),
                f"{found['kl']:.4f} ± {found['kl_sem']:.4f}",
                f"{found['perplexity']:.3f}",
                f"{found['teacher_perplexity']:.3f}",
                f"{found['cache_bytes'] / found['teacher_cache_bytes']:.2f} of the teacher's",
                " + ".join(f"{tokens[name] / 1e6:.1f}M" for name in ("align", "score", "distill") if name in tokens),
                f"{sum(report['seconds'].values()):.0f}",
            ]
        )
    return markdown(head, rows) if rows else None


def aims(results: Results) -> str | None:
    """How far the hybrids with 8 softmax layers are from what was aimed at."""
    found = {name: results.of_selector(8, name) for name in SELECTORS}
    found = {name: records for name, records in found.items() if records}
    if len(found) < 2:
        return None

    def kl(name: str) -> float:
        return statistics.fmean(record["kl"]["mean"] for record in found[name])

    def retrieval(records: list[Record], length: int) -> float:
        return statistics.fmean(retrieval_at(record, length) for record in records)

    best = min((name for name in found if name != "uniform"), key=kl)
    told = f"`{best}` ({kl(best):.4f}"
    told = (
        f"{kl(best) / kl('uniform'):.2f} of it, with the layers of {told} against {kl('uniform'):.4f}, "
        f"{compared_tokens(results):,} tokens)"
        if "uniform" in found
        else f"not measured, the uniform hybrid was not run; lowest with the layers of {told})"
    )
    lines = [f"- A KL of at most half of uniform's at equal budget: {told}."]
    teacher = results.named("teacher")
    if 2048 in teacher[0]["size"]["lengths"]:
        kept = {name: retrieval(found[name], 2048) / retrieval(teacher, 2048) for name in found}
        most = max(kept, key=lambda name: kept[name])
        lines.append(
            f"- Nine tenths of the teacher's retrieval at 2,048 tokens: {kept[most]:.2f} of it with the layers of "
            f"`{most}`, {kept[best]:.2f} with those of `{best}`"
            + (f", {kept['uniform']:.2f} with uniform ones." if "uniform" in kept else ".")
        )
        for chosen in results.named("mixer-window-sinks-chosen"):
            uniform = results.seeds[chosen["seed"]].get("mixer-window-sinks-uniform")
            options = ", ".join(f"{name} {value}" for name, value in chosen["mixer_options"].items())
            told = f"- With a sliding window in the place of linear attention ({options}), in the layers that "
            told += f"`verified` chooses for it before any training, seed {chosen['seed']}: "
            if uniform is not None:
                told += f"{chosen['kl']['mean'] / uniform['kl']['mean']:.2f} of the KL that uniform layers have with "
                told += "windows, "
            share = retrieval([chosen], 2048) / retrieval(teacher, 2048)
            lines.append(f"{told}{share:.2f} of the teacher's retrieval at 2,048 tokens.")
    lines += of_recipes(results)
    if theirs := results.named("score-ga-s2"):
        costs = []
        for name, job in (("verified", "score-verified-8"), ("zero-shot-linearise", "score-zero-shot-linearise")):
            ours = results.named(job)
            seconds = statistics.fmean(r["seconds"] for r in ours) / statistics.fmean(r["seconds"] for r in theirs)
            trained = ours[0]["tokens_forward_backward"] / theirs[0]["tokens_forward_backward"]
            costs.append(f"`{name}` took {seconds:.2f} of its seconds and {trained:.2f} of its tokens of training")
        lines.append(f"- At most a tenth of GA-S2's cost: {', '.join(costs)}.")
    else:
        lines.append("- At most a tenth of GA-S2's cost: not measured, GA-S2 was not run to its end.")
    return "\n".join(lines)


def of_recipes(results: Results) -> list[str]:
    """The share of the teacher's retrieval that each recipe's hybrid keeps, in both forms of the tasks."""
    lines = []
    for job, recipe in (("evaluation-run", "smollm2-135m"), ("evaluation-windows", "smollm2-135m-windows")):
        by_form: dict[str, list[str]] = {}
        for (form, length), share in retrieval_kept(results, job).items():
            by_form.setdefault(form, []).append(f"{share:.2f} ({length:,})")
        if by_form:
            told = "; ".join(f"by {form} {', '.join(shares)}" for form, shares in by_form.items())
            lines.append(
                f"- The whole of `recipes/{recipe}.yaml`, share of the teacher's retrieval by tokens of the prompt: "
                f"{told}."
            )
    return lines


def retrieval_kept(results: Results, job: str) -> dict[tuple[str, int], float]:
    """Of the retrieval tasks of the comparison, the share of the teacher's right answers, by form and length."""
    found = [results.named(name)[:1] for name in (job, "evaluation-teacher")]
    if not all(found):
        return {}
    tasks = set(results.named("teacher")[0]["size"]["tasks"]) - {"copying"}
    right: list[dict[tuple[str, int], list[float]]] = []
    for (record,) in found:
        right.append({})
        for score in record["tasks"]:
            if score["task"] in tasks:
                right[-1].setdefault((score["form"], score["length"]), []).append(score["mean"])
    ours, teacher = right
    return {key: sum(means) / sum(teacher[key]) for key, means in ours.items() if key in teacher and sum(teacher[key])}


def retrieval_at(record: Record, length: int) -> float:
    """The mean share of right answers of the retrieval tasks at one length."""
    return statistics.fmean(
        score["mean"] for score in record["ruler"] if score["task"] != "copying" and score["length"] == length
    )


def hybrids(results: Results, k: int) -> str:
    """The table of hybrids that keep `k` layers."""
    teacher, aligned = results.named("teacher"), results.named("aligned")
    domains = list(teacher[0]["kl"]["domains"])
    head = ["layers by", "which", "KL", *(f"KL, {name}" for name in domains), "perplexity", "retrieval", "copying"]
    rows = [["teacher", "all", "0", *("0" for _ in domains), *measures(teacher)]]
    for name, found in results.chosen(k).items():
        which = [str(record["layers"]) for record in found]
        shown = which[0] if len(set(which)) == 1 else " / ".join(which)
        rows.append([name, shown, *kls(found, domains), *measures(found)])
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


def by_length(results: Results, k: int) -> str:
    """Retrieval at each length, a row for each selector."""
    teacher = results.named("teacher")
    lengths = teacher[0]["size"]["lengths"]
    single = "single_prose"

    def row(name: str, found: list[Record]) -> list[str]:
        cells = [over_seeds(found, lambda r, n=n: (retrieval_at(r, n), None), ".3f") for n in lengths]
        cells += [over_seeds(found, lambda r, n=n: (_score(r, single, n), None), ".3f") for n in lengths]
        return [name, *cells]

    rows = [row("teacher", teacher), *(row(name, found) for name, found in results.chosen(k).items())]
    head = ["layers by", *(f"{n:,}" for n in lengths), *(f"needle, {n:,}" for n in lengths)]
    text = "By length: the mean of all retrieval tasks, then single needles in prose alone.\n\n" + markdown(head, rows)
    hybrids = [record for found in results.chosen(k).values() for record in found]
    far = lengths[min(2, len(lengths) - 1)]
    best = min(hybrids, key=lambda record: record["kl"]["mean"])
    most = max(hybrids, key=lambda record: retrieval_at(record, far))
    if best["layers"] != most["layers"]:
        both = (f"{one['kl']['mean']:.3f} nats and {retrieval_at(one, far):.3f}" for one in (most, best))
        text += (
            f"\n\nThe KL does not see all of retrieval: most of all at {far:,} tokens retrieves the hybrid with "
            f"softmax in {most['layers']}, seed {most['seed']}, with {' where that of the lowest KL has '.join(both)}."
        )
    return text


def _score(record: Record, task: str, length: int) -> float:
    found = [s["mean"] for s in record["ruler"] if (s["task"], s["length"]) == (task, length)]
    return float(found[0]) if found else float("nan")


def costs(results: Results) -> str:
    """Tokens and seconds of each method, and whether seeds agree."""
    rows = []
    jobs = sorted({name for found in results.seeds.values() for name in found if name.startswith("score-")})
    for job in jobs:
        found = results.named(job)
        k = found[0]["k"] or 8
        chosen = [set(record["ranking"][:k]) for record in found]
        shared = f"{len(set.intersection(*chosen))} of {k}" if len(chosen) > 1 else ""
        trained, measured, seconds = (
            statistics.fmean(record[name] for record in found)
            for name in ("tokens_forward_backward", "tokens_forward", "seconds")
        )
        cells = [str(sorted(chosen[0])), f"{trained / 1e6:.2f}M", f"{measured / 1e6:.2f}M", f"{seconds:.0f}", shared]
        share = job.removeprefix("score-ga-s2-") if job.startswith("score-ga-s2-") else ""
        rows.append([found[0]["method"] + (f", {share} times the tokens" if share else ""), str(k), *cells])
    head = [
        "method",
        "k",
        "layers (first seed)",
        "tokens trained on",
        "measured on",
        "seconds",
        "same with every seed",
    ]
    return markdown(head, rows)


def agreements(results: Results) -> str | None:
    """How many layers the sets of two methods share, and what GA-S2 names with fewer tokens and with more."""
    most = results.named("teacher")[0]["size"]["kept"][0]
    methods = {"verified": f"score-verified-{most}"}
    methods |= {name: f"score-{name}" for name in ("ga-s2", "zero-shot-linearise", "zero-shot", "ga-s1")}
    methods = {name: job for name, job in methods.items() if results.named(job)}

    def shared(one: str, other: str) -> str:
        pairs = [(jobs[one], jobs[other]) for jobs in results.seeds.values() if {one, other} <= set(jobs)]
        counts = [len(set(a["ranking"][:most]) & set(b["ranking"][:most])) for a, b in pairs]
        return f"{statistics.fmean(counts):.1f}" if counts else ""

    parts = []
    if len(methods) > 1:
        rows = [[name, *(shared(job, other) for other in methods.values())] for name, job in methods.items()]
        by_chance = most**2 / results.named("teacher")[0]["num_layers"]
        text = f"Of {most} layers, those that two methods both name, mean over seeds; by chance {by_chance:.1f}."
        parts.append(f"{text}\n\n{markdown(['', *methods], rows)}")
    if (stable := stability(results, most)) is not None:
        parts.append(stable)
    return "\n\n".join(parts) or None


def stability(results: Results, most: int) -> str | None:
    """The sets that GA-S2 names by its tokens for each layer, beside that with the most."""
    rows = []
    for seed, jobs in results.seeds.items():
        found = [record for name, record in jobs.items() if name.startswith("score-ga-s2")]
        found.sort(key=lambda record: record["tokens_forward_backward"])
        for record in found if len(found) > 1 else ():
            chosen, last = set(record["ranking"][:most]), set(found[-1]["ranking"][:most])
            tokens = record["tokens_forward_backward"] / len(record["ranking"])
            rows.append(
                [
                    str(seed),
                    f"{tokens:,.0f}",
                    str(sorted(chosen)),
                    f"{len(chosen & last)} of {most}",
                    f"{record['seconds']:.0f}",
                ]
            )
    if not rows:
        return None
    head = ["seed", "tokens for each layer", f"best {most}", "shared with the most tokens", "seconds"]
    return f"GA-S2 by its tokens for each layer:\n\n{markdown(head, rows)}"


def settings(results: Results) -> str | None:
    """The uniform hybrid with other learning rates and rows of a step, beside the recipe's."""
    jobs = sorted({name for found in results.seeds.values() for name in found if name.startswith("setting-")})
    if not jobs:
        return None
    most = results.named("teacher")[0]["size"]["kept"][0]
    domains = list(results.named("teacher")[0]["kl"]["domains"])
    kinds = [
        ("the recipe's", results.of_selector(most, "uniform")),
        *((job.removeprefix("setting-"), results.named(job)) for job in jobs),
    ]
    rows = []
    for name, found in kinds:
        record = found[0]
        steps = record["tokens"] // (record["rows"] * record["size"]["block_size"])
        rates = " and ".join(f"{rate:g}" for rate in record["learning_rates"])
        rows.append(
            [name, rates, str(record["rows"]), str(steps), *kls(found, domains), f"{record['train_seconds']:.0f}"]
        )
    head = [
        "settings",
        "learning rates (all else, mixers)",
        "rows",
        "steps",
        "KL",
        *(f"KL, {name}" for name in domains),
        "seconds",
    ]
    return f"Of the hybrid with {most} uniform layers, at the same tokens.\n\n{markdown(head, rows)}"


def hybrid_name(layers: list[int]) -> str:
    """The record of the comparison's hybrid with softmax in `layers`."""
    return f"k{len(layers)}-{'-'.join(map(str, layers))}"


def other_mixers(results: Results) -> str | None:
    """The table of the other mixers beside the recipe's in the same layers, or None where none was tried."""
    jobs = sorted({name for found in results.seeds.values() for name in found if name.startswith("mixer-")})
    if not jobs:
        return None
    of_mixers = [record for job in jobs for record in results.named(job)]
    domains, lengths = list(of_mixers[0]["kl"]["domains"]), of_mixers[0]["size"]["lengths"]
    # By the layers that keep softmax: those that are chosen for a mixer differ from seed to seed.
    in_layers: dict[str, dict[str, list[Record]]] = {}
    for job in sorted(jobs, key=lambda job: (job.endswith("-chosen"), job.endswith("-uniform"))):
        for record in results.named(job):
            in_layers.setdefault(hybrid_name(record["layers"]), {}).setdefault(job, []).append(record)
    rows, kl = [], dict[tuple[str, str], dict[int, float]]()  # of each mixer in each layers, by seed
    for hybrid, others in in_layers.items():
        seeds = {record["seed"] for records in others.values() for record in records}
        linear = [record for record in results.named(hybrid) if record["seed"] in seeds]
        for job, found in (({hybrid: linear} if linear else {}) | others).items():
            given = found[0].get("mixer_options", {})
            options = ["native"] if given == NATIVE_OPTIONS else [f"{name} {value}" for name, value in given.items()]
            told = ["untrained"] * (not found[0]["tokens"]) + ["layers chosen for it"] * job.endswith("-chosen")
            name = ", ".join([found[0]["mixer"], *options, *told])
            by = [over_seeds(found, lambda r, n=n: (retrieval_at(r, n), None), ".3f") for n in lengths]
            kl[hybrid, name] = {record["seed"]: record["kl"]["mean"] for record in found}
            about = [name, str(found[0]["layers"]), ", ".join(map(str, kl[hybrid, name]))]
            rows.append([*about, *kls(found, domains), *measures(found)[:1], *by])
    head = ["mixer", "softmax in", "seeds", "KL", *(f"KL, {name}" for name in domains), "perplexity"]
    text = (
        "Each mixer aligned and distilled on the same tokens. The last columns are retrieval by "
        f"length.\n\n{markdown([*head, *(f'{n:,}' for n in lengths)], rows)}"
    )

    def share(one: tuple[str, str], other: tuple[str, str]) -> float | None:
        """The KL of `one` over that of `other`, of the seeds that have both; None where that is 0, as in a trial."""
        both = kl.get(one, {}).keys() & kl.get(other, {}).keys()
        ours, theirs = (sum(kl.get(of, {}).get(seed, 0.0) for seed in both) for of in (one, other))
        return ours / theirs if theirs else None

    best_layers = next(iter(in_layers))
    uniform = [layers for layers, found in in_layers.items() if any(job.endswith("-uniform") for job in found)]
    linear_there = (best_layers, "gated_deltanet")
    windows = {
        key: of
        for key in kl
        if key[0] == best_layers and "window" in key[1] and (of := share(key, linear_there)) is not None
    }
    best = min(windows, key=windows.__getitem__, default=None)
    if best is None or windows[best] >= 1:
        return text
    text += (
        "\n\n**Layers that attend to a window lose less than linear ones here**: a KL of "
        f"{windows[best]:.2f} of gated_deltanet's. A window is the teacher's own softmax over the last tokens from "
        "the start; most of what a KL measures is local, and the layers that keep softmax see the rest. A recurrent "
        "state has to be learned, and these budgets are a few million tokens."
    )
    far = f"at {' and '.join(f'{n:,}' for n in lengths[-2:])} tokens"

    def found_far(records: list[Record]) -> str:
        means = (statistics.fmean(retrieval_at(record, n) for record in records) for n in lengths[-2:])
        return " and ".join(f"{mean:.3f}" for mean in means)

    both = [results.named(f"mixer-window-sinks{which}") for which in ("-untrained", "")]
    if all(both):
        before, after = (found_far(found) for found in both)
        text += f" Training is not idle for windows either: without any, retrieval {far} is {before}, with it {after}."
    for layers in uniform:
        shares = [share((best_layers, name), (layers, name)) for name in (best[1], "gated_deltanet")]
        if None not in shares:
            text += (
                f" With windows, the KL with the chosen layers is {shares[0]:.2f} of that with uniform ones; with "
                f"gated_deltanet, {shares[1]:.2f}."
            )
    for record in results.named("mixer-window-sinks-chosen"):
        text += (
            f" For windows that are not trained yet, `verified` chooses {record['layers']} with seed "
            f"{record['seed']}: KL {record['kl']['mean']:.3f}, retrieval {far} {found_far([record])}"
        )
        there = results.seeds[record["seed"]].get(hybrid_name(record["layers"]))
        if there is not None:
            text += f"; gated_deltanet in the same layers {there['kl']['mean']:.3f} and {found_far([there])}"
        text += "."
    return text


def longer(results: Results) -> str | None:
    """The hybrid that was distilled for longer, beside the same layers at the budget of the comparison."""
    rows, lengths = [], results.named("teacher")[0]["size"]["lengths"]
    for record in results.named("long"):
        for one in (results.seeds[record["seed"]].get(hybrid_name(record["layers"])), record):
            if one is not None:
                kl = f"{one['kl']['mean']:.4f} ± {one['kl']['sem']:.4f}"
                by = [f"{retrieval_at(one, n):.3f}" for n in lengths]
                rows.append([str(record["seed"]), f"{one['tokens']:,}", kl, *by])
    if not rows:
        return None
    head = ["seed", "tokens", "KL", *(f"retrieval, {n:,}" for n in lengths)]
    text = f"Softmax in {results.named('long')[0]['layers']}, with the budget of the comparison and with more:"
    return f"{text}\n\n{markdown(head, rows)}"


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
    parts = [about, markdown(head, rows)]
    for compiled in results.named("speed-compiled")[:1]:
        of = {name: [row for row in compiled["rows"] if row["model"] == name] for name in ("teacher", "hybrid")}
        rows = [
            [
                f"{ours['context']:,}",
                str(ours["batch"]),
                *(f"{row['decode_tokens_per_second']:,.0f}" for row in (teacher, ours)),
                f"{ours['decode_tokens_per_second'] / teacher['decode_tokens_per_second']:.2f}",
                *(f"{row['first_call_seconds']:.0f}" for row in (teacher, ours)),
            ]
            for teacher, ours in zip(of["teacher"], of["hybrid"], strict=True)
        ]
        head = ["context", "rows", "decoding, teacher", "hybrid", "ratio", "first call, teacher (s)", "hybrid (s)"]
        parts += [
            "Eager decoding waits for Python, which launches more for a linear layer than for one of softmax. "
            'Decoding by `generate(cache_implementation="static")`, which compiles the step in its first call:',
            markdown(head, rows),
        ]
    return "\n\n".join(parts)


def draw_curves(results: Results, path: Path) -> bool:
    """Draws KL and single needles over tokens; returns whether there was anything to draw."""
    most = max(results.kept(), default=0)
    shown = results.chosen(8 if 8 in results.kept() else most)
    curves = [(name, records[0]) for name, records in shown.items()]
    curves += [("longer", record) for record in results.named("long")[:1]]
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


def evaluations(results: Results) -> str | None:
    """What `hf-hybrid evaluate` found of the finished models and their teacher, of the first seed that has it."""
    models = {"teacher": "evaluation-teacher", "hybrid": "evaluation-run"}
    models |= {"hybrid, fine-tuned on instructions": "evaluation-chat", "hybrid with windows": "evaluation-windows"}
    found = {name: results.named(job)[0]["tasks"] for name, job in models.items() if results.named(job)}
    parts: list[str] = []
    if found:
        lengths = list(dict.fromkeys(score["length"] for tasks in found.values() for score in tasks))
        head = [f"{length:,}" if length else "" for length in lengths]
        rows, details = [], []
        for form in dict.fromkeys(score["form"] for tasks in found.values() for score in tasks):
            for name, tasks in found.items():
                of = [[s for s in tasks if (s["form"], s["length"]) == (form, length)] for length in lengths]
                if any(of):
                    rows.append([form, name, *(_share(scores) for scores in of)])
        pairs = dict.fromkeys((score["task"], score["form"]) for tasks in found.values() for score in tasks)
        for task, form in pairs:
            for name, tasks in found.items():
                scores = {s["length"]: s for s in tasks if (s["task"], s["form"]) == (task, form)}
                if scores:
                    cells = [_share([scores[length]] if length in scores else []) for length in lengths]
                    details.append([task, form, name, *cells])
        parts += [
            "Share of right answers by tokens of the prompt, first of all tasks together, each counted alike:",
            markdown(["form", "model", *head], rows),
            "Of each task:",
            markdown(["task", "form", "model", *head], details),
        ]
    texts = {"evaluation-text": "Free generation", "evaluation-windows-text": "With windows"}
    for told, record in ((told, record) for job, told in texts.items() for record in results.named(job)[:1]):
        written = record["generation"]
        share = {name: _share([one]) for name, one in written.items() if isinstance(one, dict)}
        parts.append(
            f"{told}, greedy, {written['prompts']} prompts of {written['new_tokens']} tokens: "
            f"{share['agreement']} of the tokens are the teacher's, {share['common_prefix']} tokens until the first "
            f"that is not; repetition {share['repetition']} (teacher {share['teacher_repetition']}), texts that end "
            f"in a loop {share['looping']} (teacher {share['teacher_looping']}). The first two, the hybrid's beside "
            "the teacher's:"
        )
        for sample in written["samples"][:2]:
            texts = [" ".join(sample[name].split()) for name in ("text", "teacher_text")]
            hybrid, teacher = (text if len(text) <= 300 else f"{text[:300]} ..." for text in texts)
            parts.append(f"> **{sample['prompt']}**\n>\n> *Hybrid*: {hybrid}\n>\n> *Teacher*: {teacher}")
    return "\n\n".join(parts) or None


def _share(scores: list[dict[str, Any]]) -> str:
    """The mean of the scores of tasks, with its standard error."""
    if not scores:
        return ""
    sem = sum((score["sem"] or 0.0) ** 2 for score in scores) ** 0.5 / len(scores)
    return f"{statistics.fmean(score['mean'] for score in scores):.3f} ± {sem:.3f}"


def chats(results: Results) -> str | None:
    """The losses of fine-tuning on instructions, and what the model answers."""
    if not (found := results.named("chat")):
        return None
    record = found[0]
    lines = [
        f"`chat.py` fine-tunes the finished hybrid with TRL's `SFTTrainer` on {record['rows']:,} rows in "
        f"{record['steps']} steps: loss on held-out instructions {record['loss_before']:.3f} before, "
        f"{record['loss_after']:.3f} after. Greedy answers of the saved model, loaded with `trust_remote_code=True`:"
    ]
    for prompt, answer in record["answers"].items():
        shown = answer if len(answer) <= 400 else answer[:400] + " ..."
        lines.append(f"> **{prompt}**\n>\n" + "\n".join(f"> {line}".rstrip() for line in shown.splitlines()))
    return "\n\n".join(lines)


def undone(results: Results) -> str:
    """The jobs of compare.py and all.py of which there is no record, or not of every seed."""
    size = results.named("teacher")[0]["size"]
    most, *others = size["kept"]
    wanted = [f"score-{name}-{most}" if name == "verified" else f"score-{name}" for name in size["selectors"]]
    wanted += [f"score-verified-{k}" for k in others]
    wanted += ["long", "search", "speed", "speed-compiled"]
    mixers = ["native", "convolution", "kda", "window-state", "window-sinks"]
    mixers += [f"window-sinks-{which}" for which in ("uniform", "chosen", "untrained")]
    wanted += [f"mixer-{name}" for name in mixers]
    wanted += [
        f"setting-{name}" for name in ("rates-low", "rates-high", "mixer-rate-high", "batch-half", "batch-double")
    ]
    if "ga-s2" in size["selectors"]:
        wanted += [f"score-ga-s2-{share}" for share in (0.1, 0.3, 2.0)]
    evaluated = ("text", "windows-text", "run", "windows", "teacher", "chat")
    wanted += ["run-report", "windows-report", "chat", *(f"evaluation-{name}" for name in evaluated)]
    missing = [name for name in wanted if not results.named(name)]
    partly = [name for name in wanted if 0 < len(results.named(name)) < len(results.seeds)]
    missing += [f"hybrids with {k} softmax layers" for k in size["kept"] if k not in results.kept()]
    for job in (f"evaluation-{name}" for name in evaluated):
        forms = {score["form"] for record in results.named(job) for score in record["tasks"]}
        missing += [f"{job} but by {form}" for form in forms if len(forms) == 1]
    lines = [f"Not run: {', '.join(missing)}."] if missing else ["Every job was run."]
    if partly:
        lines.append(f"Not with every seed: {', '.join(partly)}.")
    return " ".join(lines)


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
    parser.add_argument("--earlier", type=Path, help="such a folder of earlier runs, for the end of the page")
    args = parser.parse_args()
    earlier = None if args.earlier is None else Results(args.earlier)
    text = page(Results(args.results), args.output.parent / "images", earlier)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
