"""Regret and cost of every selector, from the ground truth and the selectors' choices in a cache folder."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import methods
from .data import BATCH, LENGTH, SELECT_ROWS, TEACHERS, num_layers_of, read_lines
from .recipes import RECIPES


Set = tuple[int, ...]
REPEATS = {label: method.repeats for label, method in methods.METHODS.items() if method.repeats}


@dataclass
class Ground:
    """What is known of one teacher: for each student seed, the record of every set that was distilled."""

    name: str
    num_layers: int
    records: dict[int, dict[Set, dict[str, Any]]]

    def best(self, seed: int, k: int) -> tuple[Set, float]:
        """The best known set of k layers and its KL."""
        sets = {s: r["kl"] for s, r in self.records[seed].items() if len(s) == k}
        chosen = min(sets, key=lambda s: sets[s])
        return chosen, sets[chosen]

    def best_on_average(self, k: int) -> Set:
        """The set of k layers with the lowest regret, among those distilled with the most seeds."""
        counts = {s: sum(s in r for r in self.records.values()) for r in self.records.values() for s in r}
        most = max((count for s, count in counts.items() if len(s) == k), default=0)
        candidates = [s for s, count in counts.items() if len(s) == k and count == most]
        return min(candidates, key=lambda s: self.regret(s)[0]) if candidates else ()

    def regret(self, layers: Iterable[int]) -> tuple[float, int]:
        """
        KL of a set above that of the best known set of its size, mean over the student seeds that it was distilled
        with, and the number of those; a set is judged with every seed, whichever seed chose it.
        """
        chosen = tuple(sorted(layers))
        found = [r[chosen]["kl"] - self.best(s, len(chosen))[1] for s, r in self.records.items() if chosen in r]
        return (statistics.fmean(found) if found else float("nan")), len(found)

    def expected_of_random(self, k: int) -> float | None:
        """Mean regret of all sets of k layers, where all were distilled."""
        total = sum(1 for _ in itertools.combinations(range(self.num_layers), k))
        means = []
        for seed, records in self.records.items():
            kls = [r["kl"] for s, r in records.items() if len(s) == k]
            if len(kls) == total:
                means.append(statistics.fmean(kls) - self.best(seed, k)[1])
        return statistics.fmean(means) if means else None


def read_ground(cache: Path, name: str) -> Ground | None:
    """The ground truth of one teacher, or None where there is none."""
    records: dict[int, dict[Set, dict[str, Any]]] = defaultdict(dict)
    for record in read_lines(cache / f"{name}.jsonl"):
        records[record["seed"]][tuple(record["layers"])] = record
    if not records:
        return None
    return Ground(name, num_layers_of(name), dict(records))


@dataclass
class Choice:
    """The layers that a selector chose on one teacher with one student seed, and what that cost."""

    method: str
    teacher: str
    seed: int
    sets: dict[int, Set]
    tokens: int = 0
    tokens_forward: int = 0
    seconds: float | None = None
    values: dict[int, float] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Cost in forward passes of one token: 3 forward and backward, 1 for the teacher beside it, 1 to measure."""
        return 4 * self.tokens + self.tokens_forward


def choices(cache: Path, ground: Ground, ks: Iterable[int] = methods.KS) -> list[Choice]:
    """All selectors' choices on one teacher: what was run, and GA-S2, GR-S2 and AVG-S2 from the ground truth."""
    found = []
    for seed in sorted(ground.records):
        derived = {choice.method: choice for choice in distilled(ground, seed, list(ks))}
        for choice in recorded(cache, ground.name, seed):
            again = REPEATS.get(choice.method)
            if again is None:
                found.append(choice)
            elif again in derived:
                derived[again].seconds = choice.seconds
        found += derived.values()
    return found + _every_set(cache, ground, list(ks))


def _every_set(cache: Path, ground: Ground, ks: list[int]) -> list[Choice]:
    """What an exhaustive search without distillation would choose, where every subset was measured."""
    found = []
    for line in read_lines(cache / "zero_shot" / f"{ground.name}.jsonl"):
        kls = {tuple(int(i) for i in key.split(",") if i): kl for key, kl in line["zero_shot"].items()}
        some = {k: {s: kl for s, kl in kls.items() if len(s) == k} for k in ks}
        sets = {k: min(of_size, key=of_size.__getitem__) for k, of_size in some.items()}
        measured = round(sum(map(len, some.values())) / len(ks)) * SELECT_ROWS * LENGTH
        found.append(Choice("zero-shot, every set", ground.name, line["seed"], sets, 0, measured))
    return found


def recorded(cache: Path, name: str, seed: int) -> list[Choice]:
    """What the selectors that were run chose on one teacher with one student seed."""
    found = []
    for line in read_lines(methods.results_path(cache, name, seed)):
        sets = {int(k): tuple(layers) for k, layers in line["sets"].items()}
        cost = {key: line[key] for key in ("tokens", "tokens_forward", "seconds")}
        values = {int(layer): value for layer, value in line["values"].items()}
        found.append(Choice(line["method"], name, seed, sets, values=values, **cost))
    return found


def agreement(cache: Path, ground: Ground) -> list[dict[str, Any]]:
    """
    `hh.score_layers` against the ground truth's own loop, wherever both distilled the same: the largest difference of
    a layer's held-out KL, and whether both choose the same sets.
    """
    found = []
    for seed in sorted(ground.records):
        derived = {choice.method: choice for choice in distilled(ground, seed, list(methods.KS))}
        for choice in recorded(cache, ground.name, seed):
            other = derived.get(REPEATS.get(choice.method, ""))
            if other is not None:
                # What is removed is ranked by minus its KL there.
                largest = max(abs(abs(other.values[i]) - value) for i, value in choice.values.items())
                row = {"method": other.method, "teacher": ground.name, "seed": seed, "largest": round(largest, 5)}
                found.append(row | {"same_sets": other.sets == choice.sets})
    return found


def distilled(ground: Ground, seed: int, ks: list[int]) -> list[Choice]:
    """GA-S2 after every checkpoint, GR-S2 and AVG-S2: distillations that the ground truth has made."""
    records, layers = ground.records[seed], range(ground.num_layers)
    if any((layer,) not in records for layer in layers):
        return []
    final = str(records[0,]["steps"])
    found, measured = [], ground.num_layers * SELECT_ROWS * LENGTH
    added = {}
    for step in records[0,]["select"]:
        added = {layer: records[layer,]["select"][step][0] for layer in layers}
        tokens = ground.num_layers * int(step) * BATCH * LENGTH
        label = "ga-s2" if step == final else f"ga-s2, {step} steps"
        found.append(_ranked(label, ground.name, seed, added, ks, tokens, measured))
    removed = {layer: records.get(tuple(i for i in layers if i != layer)) for layer in layers}
    if all(removed.values()):
        tokens = ground.num_layers * int(final) * BATCH * LENGTH
        left = {layer: -record["select"][final][0] for layer, record in removed.items() if record}
        found.append(_ranked("gr-s2", ground.name, seed, left, ks, tokens, measured))
        ranks = [{layer: r for r, layer in enumerate(sorted(x, key=lambda i: x[i]))} for x in (added, left)]  # noqa: B023
        mean = {layer: (ranks[0][layer] + ranks[1][layer]) / 2 for layer in layers}
        found.append(_ranked("avg-s2", ground.name, seed, mean, ks, 2 * tokens, 2 * measured))
    return found


def _ranked(
    label: str, name: str, seed: int, values: dict[int, float], ks: list[int], tokens: int, forward: int
) -> Choice:
    order = sorted(values, key=lambda layer: (values[layer], layer))
    sets = {k: tuple(sorted(order[:k])) for k in ks}
    return Choice(label, name, seed, sets, tokens, forward, None, values)


def unmeasured(ground: Ground, found: list[Choice], seed: int | None = None) -> list[Set]:
    """Sets that a selector chose and that were not distilled with `seed` (or with any, for None)."""
    known = set().union(*ground.records.values()) if seed is None else set(ground.records.get(seed, {}))
    own = (choice for choice in found if choice.teacher == ground.name)
    return sorted({s for choice in own for s in choice.sets.values() if s not in known}, key=lambda s: (len(s), s))


def summarise(
    grounds: list[Ground], found: list[Choice], ks: Iterable[int], split_of: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """One row a selector: regret by split and K (mean over teachers and seeds, spread over teachers), and cost."""
    by_name = {ground.name: ground for ground in grounds}
    split_of = split_of or {name: teacher.split for name, teacher in TEACHERS.items()}
    reference = defaultdict(list)
    for choice in found:
        if choice.method == "ga-s2":
            reference[choice.teacher].append(choice.units)
    table = []
    for label in dict.fromkeys(choice.method for choice in found):
        own = [choice for choice in found if choice.method == label]
        row: dict[str, Any] = {"method": label, "by_k": {}}
        everything = defaultdict(list)
        for k in ks:
            per_teacher = defaultdict(list)
            for choice in own:
                if k in choice.sets:
                    value, count = by_name[choice.teacher].regret(choice.sets[k])
                    if count:
                        per_teacher[choice.teacher].append(value)
            row["by_k"][k] = {name: round(statistics.fmean(values), 4) for name, values in per_teacher.items()}
            for name, values in per_teacher.items():
                everything[name] += values
        means = {name: statistics.fmean(values) for name, values in everything.items()}
        if not means:
            continue
        row |= _mean_and_spread(list(means.values()))
        for split in ("dev", "test"):
            some = [value for name, value in means.items() if split_of[name] == split]
            own_cost = _cost([choice for choice in own if split_of[choice.teacher] == split], reference)
            row[split] = _mean_and_spread(some) | {"cost": own_cost} if some else None
        row["seeds_sd"] = _seed_spread(own, by_name, ks)
        row["tokens"] = round(statistics.fmean(choice.tokens for choice in own))
        row["tokens_forward"] = round(statistics.fmean(choice.tokens_forward for choice in own))
        seconds = [choice.seconds for choice in own if choice.seconds is not None]
        row["seconds"] = round(statistics.median(seconds), 2) if seconds else None
        row["cost"] = _cost(own, reference)
        row["runs"] = len(own)
        table.append(row)
    return table


def _cost(own: list[Choice], reference: dict[str, list[int]]) -> float | None:
    """Cost relative to GA-S2's on the same teacher, mean over runs."""
    shares = [c.units / statistics.fmean(reference[c.teacher]) for c in own if reference[c.teacher]]
    return round(statistics.fmean(shares), 4) if shares else None


def _mean_and_spread(values: list[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"regret": round(statistics.fmean(values), 4), "sd": round(sd, 4), "teachers": len(values)}


def _seed_spread(own: list[Choice], by_name: dict[str, Ground], ks: Iterable[int]) -> float | None:
    """Standard deviation of the regret over student seeds of one teacher, mean over teachers and K."""
    spreads = []
    for name, k in itertools.product({choice.teacher for choice in own}, ks):
        values = [by_name[name].regret(c.sets[k]) for c in own if c.teacher == name and k in c.sets]
        known = [value for value, count in values if count]
        if len(known) > 1:
            spreads.append(statistics.stdev(known))
    return round(statistics.fmean(spreads), 4) if spreads else None


def recommend(table: list[dict[str, Any]], split: str | None = None, limit: float = 0.1, noise: float = 0.02) -> str:
    """
    Of the selectors within `limit` of GA-S2's cost, the cheapest of those whose regret is within `noise` of the
    lowest, on the teachers of `split` or on all: the standard error of one set's KL over the held-out rows is 0.02 to
    0.05.
    """
    found = {row["method"]: row if split is None else row[split] for row in table}
    most = max((about["teachers"] for about in found.values() if about), default=0)
    judged = {m: about for m, about in found.items() if about and about["teachers"] == most}
    cheap = {m: about for m, about in judged.items() if about["cost"] is not None and about["cost"] <= limit}
    if not cheap:
        raise ValueError(f"no selector cost {limit} of GA-S2's or less; run more of them.")
    lowest = min(about["regret"] for about in cheap.values())
    good = {m: about for m, about in cheap.items() if about["regret"] <= lowest + noise}
    return min(good, key=lambda m: (good[m]["cost"], good[m]["regret"]))


def left_out(grounds: list[Ground], found: list[Choice], ks: Iterable[int]) -> list[dict[str, Any]]:
    """
    The rule of [`recommend`] with one lineage after the other left out: what it recommends by the other teachers, and
    the regret of that, and of GA-S2, on those left out (mean over K, student seeds and teachers).
    """
    by_name, kept = {ground.name: ground for ground in grounds}, list(ks)
    rows = []
    for origin in dict.fromkeys(lineage(name) for name in by_name):
        inside = {name for name in by_name if lineage(name) == origin}
        split = {name: "test" if name in inside else "dev" for name in by_name}
        table = {row["method"]: row for row in summarise(grounds, found, kept, split)}
        chosen = recommend(list(table.values()), "dev")
        of = {method: table[method]["test"]["regret"] for method in (chosen, "ga-s2")}
        rows.append({"lineage": sorted(inside), "recommended": chosen, "regret": of[chosen], "ga-s2": of["ga-s2"]})
    return rows


def lineage(name: str) -> str:
    """The teacher from a plain initialisation that `name` goes back to."""
    starts = {recipe.name: recipe.start for recipe in RECIPES}
    while starts.get(name) is not None:
        name = str(starts[name])
    return name
