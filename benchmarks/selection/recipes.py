"""Recipes of the teachers that the selection benchmark is run on; `selection_teachers.py` trains them."""

import dataclasses
from dataclasses import dataclass


TASKS = ("text", "recall", "copying", "chained", "hops3")


@dataclass(frozen=True)
class Recipe:
    """
    One teacher: its shape, its seed, rows of each task per step (see TASKS), and what is done to its attention.

    `start` continues another teacher; with `order` its layers are laid out anew: index of the layer to copy, or -1 for
    a new layer that adds nothing at first. MLPs are cut to `intermediate` by the size of their neurons. `twins` are
    layers two by two, (3, 4, 9, 10) are two pairs; from the share `impaired_from` of training on, either of a pair has
    to do without the other (`selection_teachers.draw_gates`), and all layers without those that `drop` takes away.
    `planted` are circuits that the initialisation holds (`selection_planting.plant`): for each the layer that looks at
    the token before and the layers that match.
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
    impaired_from: float = 0.4
    late: tuple[int, ...] = ()
    start: str | None = None
    order: tuple[int, ...] = ()
    rate: float = 2e-3
    planted: tuple[tuple[int, ...], ...] = ()


CHAINS, HALF, FEW = (16, 16, 8, 24, 0), (12, 5, 4, 11, 0), (9, 11, 4, 8, 0)
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
# The embedded teacher with new layers between its own, or some of its own twice, and trained on. When these were
# trained, both of two copies kept the MLP, and twins lost their whole output in two rows of five: no logits shrank.
MOVED = tuple(
    Recipe(name, "qwen3", len(order), 96, width, 4, 2, 32, seed, HALF, drop, twins, 0.4, (), "embedded", order, 1e-3)
    for name, width, seed, drop, twins, order in (
        ("qwen3-8-moved", 160, 26, 0.0, (), (0, -1, 1, 2, -1, 3, 4, 5)),
        ("qwen3-10-twins", 96, 27, 0.0, (3, 4), (-1, 0, 1, 2, 2, -1, 3, 4, -1, 5)),
        ("qwen3-12-spread", 64, 29, 0.05, (), (-1, 0, -1, 1, -1, 2, -1, 3, 4, -1, 5, -1)),
    )
)
# Layers in which others retrieve, twice, so that either of the two will do.
REDUNDANT = tuple(
    Recipe(name, *shape, seed, rows, twins=twins, impaired_from=0.0, start=start, order=order, rate=1e-3)
    for name, shape, seed, rows, twins, start, order in (
        ("qwen3-10-either", ("qwen3", 10, 96, 160, 4, 2, 32), 61, HALF, (3, 4, 6, 7), "qwen3-8-moved",
         (0, 1, 2, 3, 3, 4, 5, 5, 6, 7)),
        ("llama-9-either", ("llama", 9, 96, 168, 4, 4, 24), 62, HALF, (3, 4), "llama-8", (0, 1, 2, 3, 3, 4, 5, 6, 7)),
        ("llama-10-either", ("llama", 10, 88, 160, 4, 2, 32), 63, (12, 10, 6, 4, 0), (5, 6), "llama-9",
         (0, 1, 2, 3, 4, 5, 5, 6, 7, 8)),
        ("qwen3-11-either", ("qwen3", 11, 80, 160, 4, 2, 32), 64, HALF, (3, 4), "qwen3-10",
         (0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9)),
        ("qwen3-12-either", ("qwen3", 12, 80, 160, 4, 2, 32), 65, HALF, (3, 4, 9, 10), "qwen3-10",
         (0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9)),
    )
)  # fmt: skip
# Shape, then seed and late layers of fresh starts. The late layers leave those on that no rule of thumb takes.
SHAPES: dict[str, tuple[str, int, int, int, int, int]] = {
    "qwen3": ("qwen3", 96, 160, 4, 2, 32),
    "qwen3-mha": ("qwen3", 96, 168, 4, 4, 24),
    "llama": ("llama", 88, 160, 4, 2, 32),
    "llama-mha": ("llama", 96, 168, 4, 4, 24),
    "qwen2": ("qwen2", 96, 160, 4, 2, 32),
}
EIGHT, NINE, TEN = (0, 3, 5, 7), (0, 2, 4, 6, 8), (0, 2, 4, 5, 7, 9)
BEGINNINGS: tuple[tuple[str, int, int, tuple[int, ...]], ...] = (
    ("qwen3", 8, 41, EIGHT), ("qwen3", 9, 42, NINE), ("qwen3", 8, 43, ()),
    ("qwen3-mha", 8, 44, EIGHT), ("qwen3-mha", 9, 45, ()),
    ("llama", 8, 46, EIGHT), ("llama", 10, 47, TEN), ("llama", 9, 48, ()),
    ("llama-mha", 8, 49, EIGHT), ("llama-mha", 9, 50, NINE), ("llama-mha", 8, 51, ()),
    ("qwen2", 8, 52, EIGHT), ("qwen2", 9, 53, ()),
)  # fmt: skip


def fresh(kind: str, layers: int, seed: int, late: tuple[int, ...]) -> tuple[Recipe, Recipe]:
    """A start of its own and what continues it."""
    family, hidden, intermediate, heads, kv_heads, head_dim = SHAPES[kind]
    name = f"{kind}-{layers}-{seed}"
    start = Recipe(
        f"{name}-start", family, layers, hidden, intermediate, heads, kv_heads, head_dim, seed, FEW, late=late
    )
    return start, dataclasses.replace(start, name=name, seed=seed + 100, rows=HALF, late=(), start=start.name)


FRESH = tuple(recipe for beginning in BEGINNINGS for recipe in fresh(*beginning))

# Made to check a selector on teachers that it was not developed on: from initialisations of their own that hold the
# heads of recall, in layers drawn here by hand, so that a CPU can train them (500 steps, `--ramp 0.3`). The list was
# fixed, and `verified` with it, before any of them was trained.
SIMPLE, TWO_HOPS = (5, 6, 2, 3, 0), (4, 4, 2, 6, 0)
PLANTED = tuple(
    Recipe(
        f"planted-{name}", family, layers, hidden, 128, 4, kv_heads, dim, seed, rows,
        drop=drop, impaired_from=0.5, rate=3e-3, planted=circuits,
    )
    for name, family, layers, hidden, kv_heads, dim, seed, rows, drop, circuits in (
        ("qwen3-8-71", "qwen3", 8, 64, 2, 32, 71, SIMPLE, 0.0, ((1, 4),)),
        ("llama-8-72", "llama", 8, 64, 2, 32, 72, SIMPLE, 0.0, ((0, 3),)),
        ("qwen3-8-73", "qwen3", 8, 64, 2, 32, 73, TWO_HOPS, 0.0, ((0, 2, 6),)),
        ("qwen2-8-74", "qwen2", 8, 64, 2, 32, 74, SIMPLE, 0.0, ((2, 5),)),
        ("qwen3-8-75", "qwen3", 8, 64, 2, 32, 75, SIMPLE, 0.0, ((0, 3), (2, 6))),
        ("llama-mha-8-76", "llama", 8, 72, 4, 24, 76, SIMPLE, 0.0, ((1, 6),)),
        ("qwen3-9-77", "qwen3", 9, 64, 2, 32, 77, SIMPLE, 0.1, ((3, 7),)),
        ("llama-8-78", "llama", 8, 64, 2, 32, 78, TWO_HOPS, 0.0, ((1, 4, 6),)),
        ("qwen3-mha-8-79", "qwen3", 8, 72, 4, 24, 79, SIMPLE, 0.0, ((2, 3),)),
        ("qwen2-8-80", "qwen2", 8, 64, 2, 32, 80, TWO_HOPS, 0.0, ((0, 4, 7),)),
        ("llama-8-81", "llama", 8, 64, 2, 32, 81, SIMPLE, 0.1, ((0, 2), (4, 5))),
        ("qwen3-10-82", "qwen3", 10, 64, 2, 32, 82, SIMPLE, 0.0, ((4, 8),)),
    )
)  # fmt: skip
RECIPES = STARTS + CONTINUED + MOVED + REDUNDANT + FRESH + PLANTED
