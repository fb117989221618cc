"""Recipes of the teachers that the selection benchmark is run on; `selection_teachers.py` trains them."""

from dataclasses import dataclass


TASKS = ("text", "recall", "copying", "chained", "hops3")


@dataclass(frozen=True)
class Recipe:
    """
    One teacher: its shape, its seed, rows of each task per step (see TASKS), and what is done to its attention.

    `start` continues another teacher; with `order` its layers are laid out anew: index of the layer to copy, or -1 for
    a new layer that adds nothing at first. MLPs are cut to `intermediate` by the size of their neurons.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    seed: int
    rows: tuple[int, ...] = (24, 12, 12, 16, 0)
    drop: float = 0.0
    twins: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    start: str | None = None
    order: tuple[int, ...] = ()
    rate: float = 2e-3


CHAINS, HALF = (16, 16, 8, 24, 0), (12, 5, 4, 11, 0)
# From a plain initialisation; all but qwen3-8-text are continued below.
STARTS = (
    Recipe("qwen3-10-start", "qwen3", 10, 80, 160, 4, 2, 32, 5),
    Recipe("qwen3-8-drop-start", "qwen3", 8, 96, 160, 4, 2, 32, 2),
    Recipe("qwen3-8-hops3-start", "qwen3", 8, 96, 160, 4, 2, 32, 13, (20, 8, 8, 12, 16)),
    Recipe("llama-8-start", "llama", 8, 96, 168, 4, 4, 24, 3),
    Recipe("llama-9-start", "llama", 9, 88, 160, 4, 2, 32, 11, late=(0, 3, 4, 7, 8)),
    Recipe("qwen3-9-twins-start", "qwen3", 9, 88, 160, 4, 2, 32, 9, twins=(4, 6), late=(0, 2, 8)),
    Recipe("qwen3-8-text", "qwen3", 8, 96, 160, 4, 2, 32, 15, (44, 6, 6, 8, 0)),
)
CONTINUED = (
    Recipe("qwen3-10", "qwen3", 10, 80, 160, 4, 2, 32, 21, CHAINS, start="qwen3-10-start"),
    Recipe("qwen3-8-drop", "qwen3", 8, 96, 160, 4, 2, 32, 22, CHAINS, start="qwen3-8-drop-start", drop=0.15),
    Recipe("qwen3-8-hops3", "qwen3", 8, 96, 160, 4, 2, 32, 23, (16, 12, 6, 18, 12), start="qwen3-8-hops3-start"),
    Recipe("llama-8", "llama", 8, 96, 168, 4, 4, 24, 24, CHAINS, start="llama-8-start"),
    Recipe("llama-9", "llama", 9, 88, 160, 4, 2, 32, 25, CHAINS, start="llama-9-start"),
    Recipe("qwen3-9-twins", "qwen3", 9, 88, 160, 4, 2, 32, 20, CHAINS, start="qwen3-9-twins-start", twins=(4, 6)),
)
# The embedded teacher with new layers between its own, or some of its own twice, and trained on.
MOVED = tuple(
    Recipe(name, "qwen3", len(order), 96, width, 4, 2, 32, seed, HALF, drop, twins, (), "embedded", order, 1e-3)
    for name, width, seed, drop, twins, order in (
        ("qwen3-8-moved", 160, 26, 0.0, (), (0, -1, 1, 2, -1, 3, 4, 5)),
        ("qwen3-10-twins", 96, 27, 0.0, (3, 4), (-1, 0, 1, 2, 2, -1, 3, 4, -1, 5)),
        ("qwen3-12-spread", 64, 29, 0.05, (), (-1, 0, -1, 1, -1, 2, -1, 3, 4, -1, 5, -1)),
    )
)
RECIPES = STARTS + CONTINUED + MOVED
