"""Writes docs/selection.md and its plots from the committed results; called by `benchmarks/selection --report`."""

import itertools
import json
import math
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import analysis, ga_s2
from .data import BENCHMARK, FOLDER, TEACHERS, num_layers_of, read_lines
from .ga_s2 import table
from .plots import plot_costs, plot_steps, plot_teachers


DOCS = Path(__file__).parents[2] / "docs"
TEXT = Path(__file__).with_name("page.md")
SHOWN = ("ga-s2", "verified", "zero-shot-linearise", "zero-shot-removal", "ga-s1")


def write(results: Path) -> None:
    """docs/selection.md from `results`/selection*.json, the cache beside them, and the text in selection_page.md."""
    result = json.loads((results / "selection.json").read_text())
    held_out = json.loads((results / "selection_held_out.json").read_text())
    cache = results / "selection"
    grounds = [ground for name in BENCHMARK if (ground := analysis.read_ground(cache, name)) is not None]
    later = [ground for name in held_out["teachers"] if (ground := analysis.read_ground(cache, name)) is not None]
    found = {ground.name: analysis.choices(cache, ground) for ground in grounds}
    published = json.loads((results / "selection_published.json").read_text())
    embedded = next(ground for ground in grounds if ground.name == "embedded")
    plot_steps(embedded, DOCS / "selection_steps.png")
    plot_costs(result["methods"], result["recommended"], DOCS / "selection_costs.png")
    plot_teachers(result["methods"], DOCS / "selection_teachers.png")
    parts = {
        "RECOMMENDED": f"`{result['recommended']}`",
        "PAIRED": paired_table(result, ("verified, two proposals", "verified"), ("test", "dev")),
        "HELD_OUT": held_out_table(held_out),
        "HELD_OUT_COST": _number(next(row["cost"] for row in held_out["methods"] if row["method"] == "verified"), 2),
        "HELD_OUT_PAIRED": paired_table(held_out, ("verified", "zero-shot-linearise"), ("held-out",)),
        "HELD_OUT_TEACHERS": teachers_table(held_out, later),
        "LEFT_OUT": left_out_table(result["left_out"]),
        "FLOOR": _number(statistics.fmean(g.regret(g.best_on_average(k))[0] for g in grounds for k in (1, 2, 3))),
        "REGRET": regret_table(result),
        "PARTIAL": partial(result),
        "TEST": teacher_table(result, found, 2, "test"),
        "DEV": teacher_table(result, found, 2, "dev"),
        "TEACHERS": teachers_table(result, grounds),
        "TWINS": twins_table(results / "selection_twins.jsonl"),
        "STABILITY": ga_s2.stability(grounds),
        "VARIATION": ga_s2.variation(results / "selection_variation"),
        "LONGER": ga_s2.longer(
            grounds, results / "selection_long", SHOWN, [c for some in found.values() for c in some]
        ),
        "AGREEMENT": agreement(cache, grounds),
        "SEEDS": seed_table(grounds, found),
        "INTERACTIONS": interactions(grounds),
        "UNIFORM": uniform_table(grounds, found),
        "UNIFORM_ON_TEXT": uniform_table(grounds, found, "text"),
        "PUBLISHED": published_table(published),
        "COVERAGE": coverage(result),
    }
    page = TEXT.read_text()
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    (DOCS / "selection.md").write_text(page)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _mean(row: dict[str, Any], k: int, split: str | None = None) -> float | None:
    values = [v for name, v in row["by_k"][str(k)].items() if split is None or TEACHERS[name].split == split]
    return statistics.fmean(values) if values else None


def _split(row: dict[str, Any], split: str) -> str:
    found = row[split]
    return "" if found is None else f"{found['regret']:.3f} ± {found['sd']:.3f} ({found['teachers']})"


def paired_table(result: dict[str, Any], methods: tuple[str, ...], splits: tuple[str, ...]) -> str:
    """Regret minus GA-S2's on the same teacher: mean over teachers, standard error with a lineage as one cluster."""
    rows = {row["method"]: row["by_k"] for row in result["methods"]}
    lines = []
    for method in methods:
        for split in splits:
            names = [name for name in result["teachers"] if TEACHERS[name].split == split]
            cells = []
            for ks in ("1", "2", "3", "123"):
                gaps = {n: statistics.fmean(rows[method][k][n] - rows["ga-s2"][k][n] for k in ks) for n in names}
                cells.append("{:+.3f} ± {:.3f}".format(*mean_of_lineages(gaps)))
            lines.append([method, split, *cells])
    return table(["selector", "teachers", "K=1", "K=2", "K=3", "all"], lines)


def mean_of_lineages(values: dict[str, float]) -> tuple[float, float]:
    """Mean over teachers and its standard error, in which teachers that share weights are one cluster."""
    mean = statistics.fmean(values.values())
    clusters: dict[str, float] = defaultdict(float)
    for name, value in values.items():
        clusters[analysis.lineage(name)] += value - mean
    count = len(clusters)
    return mean, (sum(x * x for x in clusters.values()) * count / (count - 1)) ** 0.5 / len(values)


def held_out_table(result: dict[str, Any]) -> str:
    """One line a selector: its regret by K and on each teacher made after the recommended selector was fixed."""
    names, rows = list(result["teachers"]), []
    for row in sorted(result["methods"], key=lambda row: row["regret"]):
        of_teacher = [statistics.fmean(row["by_k"][k][name] for k in "123") for name in names]
        by_k = [_number(_mean(row, k)) for k in (1, 2, 3)]
        mean = f"{row['regret']:.3f} ± {row['sd']:.3f}"
        rows.append([row["method"], mean, *by_k, *(_number(value, 2) for value in of_teacher), _number(row["cost"])])
    short = (name.removeprefix("planted-") for name in names)
    return table(["selector", "mean", "K=1", "K=2", "K=3", *short, "cost"], rows)


def partial(result: dict[str, Any]) -> str:
    """What was not run on every teacher with every student seed."""
    most = max(row["runs"] for row in result["methods"])
    few = [
        f"`{row['method']}` ({row['runs']} on {row['teachers']})" for row in result["methods"] if row["runs"] < most
    ]
    return textwrap.fill(
        f"All were run {most} times, on every teacher with every student seed, but for {', '.join(few)}." if few
        else f"All were run {most} times, on every teacher with every student seed.",
        119, break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def left_out_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [", ".join(row["lineage"]), row["recommended"], _number(row["regret"]), _number(row["ga-s2"])] for row in rows
    ]
    means = [_number(statistics.fmean(row[key] for row in rows)) for key in ("regret", "ga-s2")]
    header = ["left out", "chosen by the others", "its regret", "ga-s2's"]
    return table(header, [*cells, ["mean over lineages", "", *means]])


def regret_table(result: dict[str, Any]) -> str:
    rows = []
    for row in sorted(result["methods"], key=lambda row: (row["test"] or row["dev"] or row)["regret"]):
        name = f"**{row['method']}**" if row["method"] == result["recommended"] else row["method"]
        by_k = [_number(_mean(row, k, "test")) for k in (1, 2, 3)]
        cost = f"{row['tokens']:,}", f"{row['tokens_forward']:,}", _number(row["seconds"], 1), _number(row["cost"], 3)
        rows.append([name, *by_k, _split(row, "test"), _split(row, "dev"), _number(row["seeds_sd"]), *cost])
    randoms = [_random(result, k) for k in (1, 2, 3)]
    rows.append(["random (expected)", *(_number(value) for value in randoms), "", "", "", "0", "0", "", "0.000"])
    header = ["selector", "K=1", "K=2", "K=3", "test", "dev", "seeds", "trained", "measured", "s", "cost"]
    return table(header, rows)


def _random(result: dict[str, Any], k: int) -> float | None:
    values = [t["random"][str(k)] for t in result["teachers"].values() if t["split"] == "test"]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def teacher_table(result: dict[str, Any], found: dict[str, list[analysis.Choice]], k: int, split: str) -> str:
    """One line a selector, one column a teacher of `split`: its regret at K."""
    names = [name for name in result["teachers"] if found[name] and TEACHERS[name].split == split]
    rows = []
    for row in sorted(
        result["methods"], key=lambda row: _mean(row, k, split) if _mean(row, k, split) is not None else 9.0
    ):
        if any(name in row["by_k"][str(k)] for name in names):
            rows.append([row["method"], *(_number(row["by_k"][str(k)].get(name)) for name in names)])
    best = ["best set", *(str(result["teachers"][name]["best"][str(k)]) for name in names)]
    return table(["selector", *names], [best, *rows])


def teachers_table(result: dict[str, Any], grounds: list[analysis.Ground]) -> str:
    rows = []
    for ground in grounds:
        path = FOLDER / ground.name / "metrics.json"
        metrics = json.loads(path.read_text()) if path.is_file() else {}
        recipe = metrics.get("recipe", {"family": "qwen3", "heads": 4, "kv_heads": 2, "hidden": 96})
        heads = f"{recipe['heads']}/{recipe['kv_heads']} heads"
        shape = f"{recipe['family']}, {ground.num_layers} layers of {recipe['hidden']}, {heads}"
        best = [str(result["teachers"][ground.name]["best"][str(k)]) for k in (1, 2, 3)]
        accuracy = [_number(metrics.get(key), 2) for key in ("recall_256", "chained_256", "hops3_256")]
        rows.append([ground.name, TEACHERS[ground.name].split, shape, *accuracy, *best])
    header = ["teacher", "", "shape", "recall", "two hops", "three", "best K=1", "K=2", "K=3"]
    return table(header, rows)


def twins_table(path: Path) -> str:
    """What it costs to make either of two redundant layers linear, and both, all others softmax and distilled."""
    found: dict[tuple[str, frozenset[int]], dict[int, float]] = {}
    for line in read_lines(path):
        linear = frozenset(range(num_layers_of(line["teacher"]))) - frozenset(line["layers"])
        found.setdefault((line["teacher"], linear), {})[line["seed"]] = line["kl"]
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        twins = json.loads((FOLDER / name / "metrics.json").read_text())["recipe"]["twins"]
        for a, b in zip(twins[::2], twins[1::2], strict=True):
            kls = [found[name, frozenset(linear)] for linear in ((a,), (b,), (a, b))]
            means = [_number(statistics.fmean(of_seeds.values())) for of_seeds in kls]
            rows.append([name, TEACHERS[name].split, f"{a}, {b}", *means, str(min(map(len, kls)))])
    return table(["teacher", "", "layers", "the first", "the second", "both", "student seeds"], rows)


def seed_table(grounds: list[analysis.Ground], found: dict[str, list[analysis.Choice]]) -> str:
    """What one selector chooses at K=2 with each student seed: other mixers, alignment rows, training rows."""
    rows = []
    for ground in grounds:
        cells = [ground.name]
        for method in SHOWN:
            sets = {c.seed: list(c.sets[2]) for c in found[ground.name] if c.method == method}
            chosen = [str(sets.get(seed, "-")) for seed in sorted(ground.records)]
            cells.append(chosen[0] if len(set(chosen)) == 1 else "; ".join(chosen))
        rows.append(cells)
    return table(["teacher", *SHOWN], rows)


def interactions(grounds: list[analysis.Ground]) -> str:
    """The best pair against the two best single layers, by the mean over student seeds; how many seeds differ."""
    rows = []
    for ground in grounds:
        seeds, layers = list(ground.records.values()), range(ground.num_layers)

        def mean(s: analysis.Set, seeds: list[Any] = seeds) -> float:
            return statistics.fmean(records[s]["kl"] for records in seeds)

        def two_best(kl: Any, layers: range = layers) -> tuple[analysis.Set, analysis.Set]:
            singles = sorted(layers, key=lambda layer: kl((layer,)))
            return tuple(sorted(singles[:2])), min(itertools.combinations(layers, 2), key=kl)

        two, best = two_best(mean)
        differ = [a != b for a, b in (two_best(lambda s, r=r: r[s]["kl"]) for r in seeds)]
        cells = [
            str(list(two)),
            _number(mean(two)),
            str(list(best)),
            _number(mean(best)),
            _number(mean(two) - mean(best)),
        ]
        rows.append([ground.name, *cells, f"{sum(differ)} of {len(differ)}"])
    return table(["teacher", "two best singles", "KL", "best pair", "KL", "difference", "seeds that differ"], rows)


def agreement(cache: Path, grounds: list[analysis.Ground]) -> str:
    """GA-S2 and GR-S2 through `hh.score_layers` against the ground truth's loop."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for ground in grounds:
        for line in analysis.agreement(cache, ground):
            rows.setdefault((line["method"], ground.name), []).append(line)
    cells = [
        [name, method, str(len(lines)), _number(max(line["largest"] for line in lines), 4),
         f"{sum(line['same_sets'] for line in lines)} of {len(lines)}"]
        for (method, name), lines in rows.items()
    ]  # fmt: skip
    return table(["teacher", "selector", "runs", "largest difference of a KL", "same sets"], cells)


def uniform_table(grounds: list[analysis.Ground], found: dict[str, list[analysis.Choice]], kind: str = "") -> str:
    """Regret of the rules of thumb at K=2, on all rows or on those of one kind."""
    rows = []
    for ground in grounds:
        cells = [ground.name]
        for rule in ("uniform", "uniform-last", "uniform-centre", "first", "last"):
            choice = next((c for c in found[ground.name] if c.method == rule), None)
            if choice is None:
                cells.append("")
            elif kind:
                cells.append(_number(_of_kind(ground, choice.sets[2], kind)))
            else:
                cells.append(_number(ground.regret(choice.sets[2])[0]))
        rows.append(cells if kind else [*cells, _number(ground.expected_of_random(2))])
    header = ["teacher, K=2", "uniform", "-last", "-centre", "first", "last"]
    return table(header if kind else [*header, "random"], rows)


def _of_kind(ground: analysis.Ground, layers: analysis.Set, kind: str) -> float | None:
    """KL on rows of one kind above that of the set that is best on all rows, mean over student seeds."""
    gaps = []
    for seed, records in ground.records.items():
        if layers in records:
            best = records[ground.best(seed, len(layers))[0]]
            gaps.append(records[layers]["kinds"][kind] - best["kinds"][kind])
    return statistics.fmean(gaps) if gaps else None


def published_table(published: dict[str, Any]) -> str:
    """Jaccard overlap of each published selector's list with GA-S2's, and what chance would give."""
    selectors = ["smart", "uniform", "ar", "ar-multihop", "mse", "ppl"]
    rows = []
    for model, about in published["models"].items():
        layers, sets = about["num_layers"], {name: set(s) for name, s in about["selected"].items()}
        reference = sets["ga-s2"]
        cells = [f"{len(reference & sets[n]) / len(reference | sets[n]):.2f}" if n in sets else "" for n in selectors]
        others = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in itertools.combinations(sorted(sets), 2)]
        chance = expected_jaccard(layers, len(reference), len(reference))
        rows.append(
            [f"{model}, {len(reference)} of {layers}", *cells, f"{statistics.fmean(others):.2f}", f"{chance:.2f}"]
        )
    return table(["model", *(f"ga-s2 and {n}" for n in selectors), "all pairs", "by chance"], rows)


def expected_jaccard(layers: int, a: int, b: int) -> float:
    """Mean Jaccard overlap of a fixed set of `a` layers and a random one of `b`."""
    shared = range(max(0, a + b - layers), min(a, b) + 1)
    return sum(math.comb(a, m) * math.comb(layers - a, b - m) / math.comb(layers, b) * m / (a + b - m) for m in shared)


def coverage(result: dict[str, Any]) -> str:
    """How many sets were distilled, and whether any is missing."""
    counts = {k: 0 for k in ("1", "2", "3")}
    short = []
    for name, about in result["teachers"].items():
        for k, by_seed in about["sets"].items():
            counts[k] += sum(by_seed.values())
            every = math.comb(about["num_layers"], int(k))
            short += [f"{name} (K={k}, seed {seed})" for seed, count in by_seed.items() if count < every]
        short += [f"{name}: {layers}" for layers in about["unmeasured"]]
    text = (
        f"Distilled were {counts['1']:,} single layers, {counts['2']:,} pairs and {counts['3']:,} triples on "
        f"{len(result['teachers'])} teachers. "
    )
    missing = (
        f"Missing: {', '.join(short)}."
        if short
        else (
            'With every student seed that is every set of one to three layers of every teacher, and "best" is the '
            "optimum under this budget, not the best of a search."
        )
    )
    return textwrap.fill(text + missing, 119)
