"""Pictures of a run."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_hybrid.trainers import LayerScores

_CHOSEN, _OTHER = "#d95f02", "#8da0cb"


def plot_scores(scores: "LayerScores", selected: Iterable[int], path: str | os.PathLike) -> None:
    """Writes a bar chart of the scores to `path` (PNG, PDF or SVG by its ending), the `selected` layers marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    chosen = set(selected)
    rows = sorted(scores.scores, key=lambda score: score.layer)
    # A figure of its own, not pyplot's: that one would keep it and might look for a display.
    figure = Figure(figsize=(max(5.6, 2.2 + 0.3 * len(rows)), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(
        [score.layer for score in rows],
        [0.0 if score.diverged else score.value for score in rows],
        yerr=[score.sem for score in rows],
        color=[_CHOSEN if score.layer in chosen else _OTHER for score in rows],
        ecolor="#444444",
        capsize=3,
    )
    for layer in scores.diverged:
        # Beside the axis, at whichever height the others are.
        axes.text(layer, 0.03, "diverged", rotation=90, ha="center", transform=axes.get_xaxis_transform())
    axes.set_xticks([score.layer for score in rows])
    better = "higher" if scores.higher_is_better else "lower"
    axes.set_xlabel("layer (index)")
    axes.set_ylabel(scores.unit)
    title = f"{scores.method}: {scores.measure}\n± 1 s.e., {better}: matters more"
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=_CHOSEN, label="keeps softmax"), Patch(color=_OTHER, label="linear")]
    axes.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def plot_curves(scores: "LayerScores", path: str | os.PathLike) -> None:
    """Writes each layer's value over the tokens it was trained on to `path`, with a band of ± 1 standard error."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [score for score in sorted(scores.scores, key=lambda score: score.layer) if score.curve]
    if not measured:
        raise ValueError("no score was measured on the way; score with options={'rounds': 8}.")
    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"].resampled(max(2, len(measured)))
    for i, score in enumerate(measured):
        tokens, values, errors = zip(*score.curve, strict=True)
        lower, upper = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(tokens, lower, upper, color=colours(i), alpha=0.15, linewidth=0)
        axes.plot(tokens, values, color=colours(i), marker="o", markersize=3, label=str(score.layer))
    axes.set_xlabel("tokens of distillation")
    axes.set_ylabel(f"held-out KL ({scores.unit})")
    axes.set_title(f"{scores.method}: one layer restored, ± 1 s.e. over rows", fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="layer", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike) -> None:
    path = Path(path)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial)
    os.replace(partial, path)
