"""The plots of docs/selection.md."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import analysis
from .data import BATCH, LENGTH, TEACHERS


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_steps(ground: analysis.Ground, path: Path) -> None:
    """GA-S2's score of every layer over its steps: mean over student seeds, band of one standard error of the rows."""
    figure, axes = _figure(7.0, 4.0)
    colours = colormaps["viridis"].resampled(ground.num_layers)
    for layer in range(ground.num_layers):
        runs = [records[layer,]["select"] for records in ground.records.values() if (layer,) in records]
        steps = sorted(int(step) for step in runs[0])
        tokens = [step * BATCH * LENGTH for step in steps]
        kl = [statistics.fmean(run[str(step)][0] for run in runs) for step in steps]
        errors = [statistics.fmean(run[str(step)][1] for run in runs) / len(runs) ** 0.5 for step in steps]
        seeds = [statistics.stdev([run[str(s)][0] for run in runs]) if len(runs) > 1 else 0.0 for s in steps]
        low, high = ([m + sign * max(e, s) for m, e, s in zip(kl, errors, seeds, strict=True)] for sign in (-1, 1))
        axes.fill_between(tokens, low, high, color=colours(layer), alpha=0.15, linewidth=0)
        axes.plot(tokens, kl, color=colours(layer), marker="o", markersize=3, label=str(layer))
    seeds_text = f"{len(ground.records)} student seeds"
    axes.set_xlabel("tokens of distillation, each layer")
    axes.set_ylabel("held-out KL (nats per token)")
    title = f"embedded teacher, one layer restored: mean of {seeds_text}\nband: spread over seeds or s.e. over rows"
    axes.set_title(title, fontsize="medium", loc="left")
    axes.legend(title="layer", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)


def plot_costs(table: list[dict[str, Any]], recommended: str, path: Path) -> None:
    """Regret on the test teachers over cost relative to GA-S2."""
    figure, axes = _figure(7.0, 5.4)
    most = max((row["test"]["teachers"] for row in table if row["test"]), default=0)
    shown = [row for row in table if row["test"] and row["cost"] is not None and row["test"]["teachers"] == most]
    for place, row in enumerate(sorted(shown, key=lambda row: row["test"]["regret"])):
        at = max(row["cost"], 1e-3), max(row["test"]["regret"], 1e-3)
        colour = "#d95f02" if row["method"] == recommended else "#1b9e77" if "ga-s2" in row["method"] else "#8da0cb"
        axes.plot(*at, "o", color=colour)
        # Neighbours in regret have their names on different sides.
        left = place % 2 == 1 and at[0] > 1e-3
        where: dict[str, Any] = {"xytext": (-5, -3) if left else (5, -3), "ha": "right" if left else "left"}
        axes.annotate(row["method"], at, fontsize=7, textcoords="offset points", **where)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.axvline(0.1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("cost relative to GA-S2 (0.001: nothing is measured)")
    axes.set_ylabel("regret on the test teachers (nats per token)")
    axes.set_title("mean over teachers, seeds and K = 1, 2, 3", fontsize="medium", loc="left")
    figure.savefig(path)


def plot_teachers(rows: list[dict[str, Any]], path: Path) -> None:
    """Every selector's regret on every teacher, mean over K and student seeds; a bar at the test teachers' mean."""
    shown = [row for row in rows if row["test"] is not None]
    shown.sort(key=lambda row: row["test"]["regret"], reverse=True)
    figure, axes = _figure(7.0, 0.24 * len(shown) + 1.0)
    for place, row in enumerate(shown):
        for split, colour, shift in (("dev", "#8da0cb", 0.18), ("test", "#d95f02", -0.18)):
            names = [name for name in TEACHERS if TEACHERS[name].split == split]
            values = [[row["by_k"][k][name] for k in row["by_k"] if name in row["by_k"][k]] for name in names]
            means = [statistics.fmean(value) for value in values if value]
            label = split if place == 0 else None
            axes.plot(means, [place + shift] * len(means), "o", color=colour, markersize=3, alpha=0.7, label=label)
        axes.plot([row["test"]["regret"]] * 2, [place - 0.4, place + 0.1], color="#d95f02", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown], fontsize=7)
    axes.set_xlabel("regret, mean over K = 1, 2, 3 and student seeds (nats per token)")
    axes.legend(title="teachers", frameon=False, loc="upper right")
    figure.savefig(path)
