"""How sure GA-S2 is of itself: over its steps, over initialisation and data, and with four times the tokens."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import analysis
from .data import BATCH, BENCHMARK, LENGTH


Set = analysis.Set


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def stability(grounds: list[analysis.Ground]) -> str:
    """GA-S2 after a part of its steps: how often its set is already the final one, and its regret."""
    steps: dict[int, dict[int, list[tuple[bool, float]]]] = {}
    for ground in grounds:
        for seed in ground.records:
            chosen = {c.method: c.sets for c in analysis.distilled(ground, seed, [1, 2, 3])}
            for method, sets in chosen.items():
                if method.startswith("ga-s2"):
                    step = int(method.split()[1]) if "," in method else 24
                    for k, s in sets.items():
                        entry = (s == chosen["ga-s2"][k], ground.regret(s)[0])
                        steps.setdefault(step, {}).setdefault(k, []).append(entry)
    rows = []
    for step in sorted(steps):
        cells = [f"{step}", f"{step * BATCH * LENGTH:,}"]
        for k in (1, 2, 3):
            entries = steps[step][k]
            known = [regret for _, regret in entries if regret == regret]
            share = f"{sum(same for same, _ in entries)} of {len(entries)}"
            cells += [share, f"{statistics.fmean(known):.3f}" if known else ""]
        rows.append(cells)
    header = ["steps", "tokens a layer"]
    for k in (1, 2, 3):
        header += [f"K={k}: set is final", "regret"]
    return table(header, rows)


def variation(folder: Path) -> str:
    """
    Single layers distilled with every initialisation and every draw of rows (`folder`/DATA/TEACHER.jsonl): standard
    deviation of a layer's KL on the same held-out rows that either causes, and what is left.
    """
    rows = []
    by_data = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    for name in BENCHMARK:
        found = {data: ground for data, path in by_data.items() if (ground := analysis.read_ground(path, name))}
        if len(found) < 2:
            continue
        seeds = sorted(set.intersection(*(set(ground.records) for ground in found.values())))
        layers = [(layer,) for layer in range(next(iter(found.values())).num_layers)]
        kl = {
            (seed, data): [found[data].records[seed][layer]["kl"] for layer in layers]
            for seed, data in itertools.product(seeds, found)
        }
        by_seed, by_draw, rest = _effects(kl, seeds, list(found))
        orders = [sorted(range(len(layers)), key=lambda i: values[i]) for values in kl.values()]  # noqa: B023
        mean = sorted(statistics.fmean(values[i] for values in kl.values()) for i in range(len(layers)))
        same = [len([o for o in orders if set(o[:k]) == _commonest(orders, k)]) for k in (1, 2)]
        cells = [f"{value:.3f}" for value in (by_seed, by_draw, rest, mean[1] - mean[0], mean[2] - mean[1])]
        rows.append([name, *cells, *(f"{count} of {len(orders)}" for count in same)])
    header = ["teacher", "sd initialisation", "sd data", "sd left", "1st to 2nd", "2nd to 3rd"]
    return table([*header, "same layer", "same two"], rows)


def _effects(kl: dict[tuple[int, str], list[float]], seeds: list[int], draws: list[str]) -> tuple[float, float, float]:
    """Of a two-way layout, root mean square over layers: the sd of the row means, of the column means, of the rest."""
    squares: tuple[list[float], ...] = ([], [], [])
    for i in range(len(next(iter(kl.values())))):
        rows = [statistics.fmean(kl[seed, draw][i] for draw in draws) for seed in seeds]
        columns = [statistics.fmean(kl[seed, draw][i] for seed in seeds) for draw in draws]
        mean = statistics.fmean(rows)
        left = [
            (kl[seed, draw][i] - rows[a] - columns[b] + mean) ** 2
            for (a, seed), (b, draw) in itertools.product(enumerate(seeds), enumerate(draws))
        ]
        squares[0].append(statistics.variance(rows))
        squares[1].append(statistics.variance(columns))
        squares[2].append(sum(left) / ((len(rows) - 1) * (len(columns) - 1)))
    by_seed, by_draw, rest = (statistics.fmean(found) ** 0.5 for found in squares)
    return by_seed, by_draw, rest


def _commonest(orders: list[list[int]], k: int) -> set[int]:
    sets = [frozenset(order[:k]) for order in orders]
    return set(max(sets, key=sets.count))


def longer(
    grounds: list[analysis.Ground], folder: Path, shown: Sequence[str], choices: Sequence[analysis.Choice]
) -> str:
    """The short truth against one of four times the tokens: its best sets, and regret there of what was chosen."""
    rows = []
    for ground in grounds:
        long = analysis.read_ground(folder, ground.name)
        if long is None:
            continue
        (seed,) = long.records
        cells = [ground.name]
        for k in (1, 2):
            short, other = ground.best(seed, k)[0], long.best(seed, k)[0]
            cells.append(f"{list(short)}" if short == other else f"{list(short)}, then {list(other)}")
            cells.append(f"{long.regret(short)[0]:.3f}")
        for method in shown:
            chosen = next(
                (c.sets for c in choices if (c.method, c.teacher, c.seed) == (method, ground.name, seed)), None
            )
            cells.append("" if chosen is None else f"{long.regret(chosen[2])[0]:.3f}")
        own = {c.method: c.sets for c in analysis.distilled(long, seed, [1, 2])}
        cells.append(f"{long.regret(own['ga-s2'][2])[0]:.3f}")
        rows.append([*cells, _final_from(own)])
    header = ["teacher", "best layer", "regret", "best pair", "regret"]
    return table(
        [*header, *(f"{method}, K=2" for method in shown), "ga-s2, 96 steps, K=2", "its two are final from"], rows
    )


def _final_from(sets: dict[str, dict[int, Set]]) -> str:
    """The first step from which on GA-S2's two layers do not change."""
    last = sets["ga-s2"][2]
    steps = sorted((int(method.split()[1]), s[2]) for method, s in sets.items() if method.startswith("ga-s2,"))
    since = 96
    for step, chosen in reversed(steps):
        if chosen != last:
            break
        since = step
    return f"step {since}"
