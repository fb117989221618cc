"""Writes docs/selection.md and its plots from the committed results; called by `benchmarks/selection.py --report`."""

import itertools
import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

import selection_analysis as analysis
from selection_data import BATCH, FOLDER, LENGTH, TEACHERS, num_layers_of, read_lines
from selection_plots import plot_costs, plot_steps


DOCS = Path(__file__).parents[1] / "docs"
TEXT = Path(__file__).with_name("selection_page.md")
SHOWN = ("ga-s2", "ga-s2, 6 steps", "gr-s2", "avg-s2", "zero-shot-removal", "zero-shot-linearise", "zero-shot-greedy")


def write(results: Path) -> None:
    """docs/selection.md from `results`/selection.json, the cache beside it, and the text in selection_page.md."""
    result = json.loads((results / "selection.json").read_text())
    cache = results / "selection"
    grounds = [ground for name in TEACHERS if (ground := analysis.read_ground(cache, name)) is not None]
    found = {ground.name: analysis.choices(cache, ground) for ground in grounds}
    published = json.loads((results / "selection_published.json").read_text())
    embedded = next(ground for ground in grounds if ground.name == "embedded")
    plot_steps(embedded, DOCS / "selection_steps.png")
    plot_costs(result["methods"], result["recommended"], DOCS / "selection_costs.png")
    parts = {
        "RECOMMENDED": f"`{result['recommended']}`",
        "REGRET": regret_table(result),
        "BY_TEACHER": teacher_table(result, found, 2),
        "TEACHERS": teachers_table(result, grounds),
        "TWINS": twins_table(results / "selection_twins.jsonl"),
        "STABILITY": stability_table(grounds),
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


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _mean(row: dict[str, Any], k: int, split: str | None = None) -> float | None:
    values = [v for name, v in row["by_k"][str(k)].items() if split is None or TEACHERS[name].split == split]
    return statistics.fmean(values) if values else None


def _split(row: dict[str, Any], split: str) -> str:
    found = row[split]
    return "" if found is None else f"{found['regret']:.3f} ± {found['sd']:.3f} ({found['teachers']})"


def regret_table(result: dict[str, Any]) -> str:
    rows = []
    for row in sorted(result["methods"], key=lambda row: (row["test"] or row["dev"] or row)["regret"]):
        name = f"**{row['method']}**" if row["method"] == result["recommended"] else row["method"]
        by_k = [_number(_mean(row, k, "test")) for k in (1, 2, 3)]
        cost = f"{row['tokens']:,}", f"{row['tokens_forward']:,}", _number(row["seconds"], 1), _number(row["cost"], 3)
        rows.append([name, *by_k, _split(row, "test"), _split(row, "dev"), *cost])
    randoms = [_random(result, k) for k in (1, 2, 3)]
    rows.append(["random (expected)", *(_number(value) for value in randoms), "", "", "0", "0", "", "0.000"])
    header = ["selector", "K=1", "K=2", "K=3", "test", "dev", "trained", "measured", "s", "cost"]
    return _table(header, rows)


def _random(result: dict[str, Any], k: int) -> float | None:
    values = [t["random"][str(k)] for t in result["teachers"].values() if t["split"] == "test"]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def teacher_table(result: dict[str, Any], found: dict[str, list[analysis.Choice]], k: int) -> str:
    """One line a selector, one column a teacher: its regret at K."""
    names = [name for name in result["teachers"] if found[name]]
    rows = []
    for row in sorted(result["methods"], key=lambda row: _mean(row, k) if _mean(row, k) is not None else 9.0):
        if any(name in row["by_k"][str(k)] for name in names):
            rows.append([row["method"], *(_number(row["by_k"][str(k)].get(name)) for name in names)])
    best = ["best set", *(str(result["teachers"][name]["best"][str(k)]) for name in names)]
    return _table(["selector", *names], [best, *rows])


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
    return _table(header, rows)


def twins_table(path: Path) -> str:
    """What it costs to make either of two redundant layers linear, and both, all others softmax and distilled."""
    found: dict[tuple[str, frozenset[int]], list[float]] = {}
    for line in read_lines(path):
        linear = frozenset(range(num_layers_of(line["teacher"]))) - frozenset(line["layers"])
        found.setdefault((line["teacher"], linear), []).append(line["kl"])
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        twins = json.loads((FOLDER / name / "metrics.json").read_text())["recipe"]["twins"]
        for a, b in zip(twins[::2], twins[1::2], strict=True):
            kls = [found[name, frozenset(linear)] for linear in ((a,), (b,), (a, b))]
            means = [_number(statistics.fmean(of_seeds)) for of_seeds in kls]
            rows.append([name, TEACHERS[name].split, f"{a}, {b}", *means, str(min(map(len, kls)))])
    return _table(["teacher", "", "layers", "the first", "the second", "both", "student seeds"], rows)


def stability_table(grounds: list[analysis.Ground]) -> str:
    """GA-S2 after a part of its steps: how often its set is already the final one, and its regret."""
    steps: dict[int, dict[int, list[tuple[bool, float]]]] = {}
    for ground in grounds:
        for seed in ground.records:
            chosen = {c.method: c.sets for c in analysis.choices(Path(), ground) if c.seed == seed}
            if "ga-s2" not in chosen:
                continue
            final = chosen["ga-s2"]
            for method, sets in chosen.items():
                if method.startswith("ga-s2"):
                    step = int(method.split()[1]) if "," in method else 24
                    for k, s in sets.items():
                        entry = (s == final[k], ground.regret(s)[0])
                        steps.setdefault(step, {}).setdefault(k, []).append(entry)
    rows = []
    for step in sorted(steps):
        cells = [f"{step}", f"{step * BATCH * LENGTH:,}"]
        for k in (1, 2, 3):
            entries = steps[step][k]
            known = [regret for _, regret in entries if regret == regret]
            share = f"{sum(same for same, _ in entries)} of {len(entries)}"
            cells += [share, _number(statistics.fmean(known)) if known else ""]
        rows.append(cells)
    header = ["steps", "tokens a layer"]
    for k in (1, 2, 3):
        header += [f"K={k}: set is final", "regret"]
    return _table(header, rows)


def seed_table(grounds: list[analysis.Ground], found: dict[str, list[analysis.Choice]]) -> str:
    """What one selector chooses at K=2 with other student seeds: other mixers, alignment rows, training rows."""
    rows = []
    for ground in grounds:
        seeds = sorted(ground.records)
        if len(seeds) < 2:
            continue
        cells = [ground.name]
        for method in ("ga-s2", "zero-shot-removal", "zero-shot-linearise"):
            sets = [
                next((c.sets[2] for c in found[ground.name] if (c.method, c.seed) == (method, s)), None) for s in seeds
            ]
            cells.append("; ".join(str(list(s)) if s else "-" for s in sets))
        rows.append(cells)
    return _table(["teacher", "ga-s2", "zero-shot-removal", "zero-shot-linearise"], rows)


def interactions(grounds: list[analysis.Ground]) -> str:
    """Where the best pair is not the two best singles, and what that costs."""
    rows = []
    for ground in grounds:
        for seed in ground.records:
            singles = sorted(
                (s for s in ground.records[seed] if len(s) == 1), key=lambda s: ground.records[seed][s]["kl"]
            )
            if len(singles) < ground.num_layers or not any(len(s) == 2 for s in ground.records[seed]):
                continue
            two = tuple(sorted(singles[0] + singles[1]))
            best, kl = ground.best(seed, 2)
            other = ground.records[seed].get(two)
            gap = "" if other is None else f"{other['kl'] - kl:.3f}"
            exhaustive = "all" if ground.expected_of_random(2) is not None else "search"
            cells = [str(list(two)), "" if other is None else f"{other['kl']:.3f}", str(list(best)), f"{kl:.3f}", gap]
            rows.append([ground.name, str(seed), *cells, exhaustive])
    return _table(["teacher", "seed", "two best singles", "KL", "best pair", "KL", "difference", "pairs"], rows)


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
    return _table(header if kind else [*header, "random"], rows)


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
    return _table(["model", *(f"ga-s2 and {n}" for n in selectors), "all pairs", "by chance"], rows)


def expected_jaccard(layers: int, a: int, b: int) -> float:
    """Mean Jaccard overlap of a fixed set of `a` layers and a random one of `b`."""
    from math import comb

    shared = range(max(0, a + b - layers), min(a, b) + 1)
    return sum(comb(a, m) * comb(layers - a, b - m) / comb(layers, b) * m / (a + b - m) for m in shared)


def coverage(result: dict[str, Any]) -> str:
    rows = []
    for name, about in result["teachers"].items():
        cells = []
        for k in ("1", "2", "3"):
            counts = about["sets"][k]
            cells.append(", ".join(str(counts[seed]) for seed in sorted(counts)))
        rows.append([name, *cells, str(len(about["unmeasured"]))])
    text = "Sets distilled, by student seed; the last column counts chosen sets that were not distilled."
    header = ["teacher", "K=1", "K=2", "K=3", "missing"]
    return textwrap.fill(text, 119) + "\n\n" + _table(header, rows)
