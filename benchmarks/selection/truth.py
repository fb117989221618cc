"""Ground truth of the selection benchmark: every set of softmax layers, distilled with one budget and measured.

    python -m benchmarks.selection.truth --teachers llama-8 --seeds 0 1 2 --k 1 2 --cache FOLDER
    python -m benchmarks.selection.truth --cache FOLDER --k 0 1 2 3 -1 --zero-shot --device cuda --together 48

For each teacher and student seed an all-linear student is made and aligned; from it every set of K layers is restored,
the hybrid distilled on the same batches, and held-out KL and recall are measured on rows to choose on and on others to
report on. Results are appended to `FOLDER/TEACHER.jsonl` and never computed twice. `--zero-shot` adds the KL of every
subset of layers without distillation, in `FOLDER/zero_shot/TEACHER.jsonl`.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import (
    ALIGN_STEPS,
    DISTILL_STEPS,
    SELECT_ROWS,
    TEACHERS,
    aligned_path,
    append_line,
    load_teacher,
    num_layers_of,
    read_lines,
)
from .student import Data, Student, Students, fresh_values


CHECKPOINTS = (3, 6, 12, 24, 48)  # steps at which single layers are measured as well


def record(name: str, seed: int, layers: list[int], found: dict[int, Tensor], kinds: list[str]) -> dict[str, Any]:
    """What is kept of one distillation: KL in nats per token, by kind of row, and recall."""
    steps, select = max(found), {}
    for step, rows_found in found.items():
        kl = rows_found[:SELECT_ROWS, 0].double()
        select[step] = [round(kl.mean().item(), 5), round(kl.std().item() / len(kl) ** 0.5, 5)]
    report = found[steps][SELECT_ROWS:].double()
    kl = report[:, 0]
    by_kind = {}
    for kind in sorted(set(kinds)):
        of_kind = torch.tensor([other == kind for other in kinds])
        by_kind[kind] = round(kl[of_kind].mean().item(), 5)
    answered = torch.tensor([kind not in ("text", "copying") for kind in kinds])
    recall = report[answered, 1].sum() / report[answered, 2].sum().clamp(min=1)
    return {
        "teacher": name,
        "seed": seed,
        "layers": layers,
        "steps": steps,
        "kl": round(kl.mean().item(), 5),
        "sem": round(kl.std().item() / len(kl) ** 0.5, 5),
        "recall": round(recall.item(), 4),
        "kinds": by_kind,
        "select": select,
    }


def wanted_sets(
    name: str, num_layers: int, seed: int, ks: Iterable[int], cache: Path, best: int | None = None
) -> list[list[int]]:
    """
    The sets still to be distilled, the promising ones first, `best` of each size at most.

    What a set promises is its own KL with another seed, or else that of its best subset with one layer less.
    """
    there = read_lines(cache / f"{name}.jsonl")
    done = {tuple(r["layers"]) for r in there if r["seed"] == seed}
    known: dict[tuple[int, ...], list[float]] = {}
    for r in there:
        known.setdefault(tuple(r["layers"]), []).append(r["select"][str(r["steps"])][0])

    def promise(layers: tuple[int, ...]) -> tuple[int, float]:
        if layers in known:
            return 0, sum(known[layers]) / len(known[layers])
        smaller = (known.get(s) for s in itertools.combinations(layers, len(layers) - 1))
        return 1, min((sum(kls) / len(kls) for kls in smaller if kls), default=math.inf)

    found: list[list[int]] = []
    for k in ks:
        # A negative K counts from the top: all layers softmax but -K of them.
        sets = list(itertools.combinations(range(num_layers), k if k >= 0 else num_layers + k))
        if k > 1:
            sets = sorted(sets, key=promise)[:best]
        found += (list(layers) for layers in sets if layers not in done)
    return found


class Runner:
    """The students of one teacher, `args.together` at once, with one seed at a time."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args, self.graph = name, args, args.device != "cpu" and not args.eager
        self.teacher = load_teacher(name).to(args.device).requires_grad_(False)
        self.num_layers = num_layers_of(name)
        self.path = args.cache / f"{name}.jsonl"
        self.data = self._data(0)
        self.one: Students | None = None

    def _data(self, seed: int) -> Data:
        rows_seed = seed if self.args.data_seed is None else self.args.data_seed
        return Data(self.name, rows_seed, self.teacher, self.args.rows, self.args.steps, self.args.align_steps)

    def _students(self, n: int, steps: list[str]) -> Students:
        students = Students(self.teacher, self.data, n, self.graph)
        if self.graph:
            students.capture(steps)
        return students

    def aligned(self, seed: int) -> dict[str, Tensor]:
        """The parameters of this seed's aligned student; the mixers', which alone change, are kept in a file."""
        values = fresh_values(self.name, seed)
        path = aligned_path(self.args.cache, self.name, seed, self.args.data_seed)
        if path.is_file():
            names = Student(self.teacher).mixer_names()
            values |= dict(zip(names, torch.load(path), strict=True))
        else:
            self.one = self.one or self._students(1, ["align_step"])
            values = self.one.align(values, self.args.align_steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save([values[key] for key in self.one.mixer_names], partial)
            partial.rename(path)
        return {key: value.to(self.args.device) for key, value in values.items()}

    def run(self, seeds: Iterable[int], deadline: float) -> None:
        """Distils what is missing until `deadline`."""
        args, there = self.args, read_lines(self.path)
        other = sorted({line["steps"] for line in there} - {args.steps})
        if other:
            raise ValueError(
                f"{self.path} has distillations of {other} steps, this run has {args.steps}; choose another --cache."
            )
        students: Students | None = None
        for seed in seeds:
            if args.sets is None:
                sets = wanted_sets(self.name, self.num_layers, seed, args.k, args.cache, args.best)
            else:
                before = [line["layers"] for line in there if line["seed"] == seed]
                sets = [layers for layers in args.sets if layers not in before]
            if (not sets and not args.zero_shot) or time.time() > deadline:
                continue
            since = time.time()
            self.data.copy_(self._data(seed))
            if self.graph:
                torch.cuda.synchronize()  # the students' stream does not wait for the default one
            values = self.aligned(seed)
            aligned = time.time()
            if students is None:
                n = math.ceil(len(sets) / math.ceil(len(sets) / args.together)) if sets else args.together
                students = self._students(n, ["distill_step", "measure_step"])
            ready = time.time()
            if args.zero_shot:
                self._zero_shot(students, values, seed)
            done = self._distil(students, values, seed, sets, deadline)
            print(
                f"{self.name}, seed {seed}: {done} of {len(sets)} sets, {students.n} at once, in "
                f"{time.time() - ready:.1f} s ({aligned - since:.1f} s to align, {ready - aligned:.1f} s to set up)",
                flush=True,
            )

    def _distil(
        self, students: Students, values: dict[str, Tensor], seed: int, sets: list[list[int]], deadline: float
    ) -> int:
        done = 0
        for chosen, filled in _batches(sets, students.n):
            if time.time() > deadline:
                break
            single = any(len(layers) == 1 for layers in chosen)
            checkpoints = [step for step in CHECKPOINTS if single and step < self.args.steps]
            found = students.distill(values, filled, self.args.steps, checkpoints)
            for i, layers in enumerate(chosen):
                kept = found if len(layers) == 1 else {self.args.steps: found[self.args.steps]}
                own = {step: measured[i] for step, measured in kept.items()}
                line = record(self.name, seed, layers, own, students.data.kinds)
                if self.args.data_seed is not None:
                    line["data"] = self.args.data_seed
                append_line(self.path, line)
            done += len(chosen)
        return done

    def _zero_shot(self, students: Students, values: dict[str, Tensor], seed: int) -> None:
        path = self.args.cache / "zero_shot" / f"{self.name}.jsonl"
        if any(line["seed"] == seed for line in read_lines(path)):
            return
        sets = [s for k in range(self.num_layers + 1) for s in itertools.combinations(range(self.num_layers), k)]
        found: dict[str, float] = {}
        for chosen, filled in _batches(sets, students.n):
            kls = students.zero_shot(values, filled).tolist()
            found |= {",".join(map(str, s)): round(kl, 5) for s, kl in zip(chosen, kls, strict=False)}
        append_line(path, {"teacher": self.name, "seed": seed, "zero_shot": found})


def _batches(sets: Sequence[Any], n: int) -> Iterator[tuple[list[Any], list[Any]]]:
    """`n` sets at a time, and the same filled up to `n` with the last one."""
    for start in range(0, len(sets), n):
        chosen = list(sets[start : start + n])
        yield chosen, chosen + chosen[-1:] * (n - len(chosen))


def ensure_aligned(name: str, seed: int, args: argparse.Namespace) -> None:
    """Makes the file of an aligned student's mixers if it is not there."""
    if not aligned_path(args.cache, name, seed).is_file():
        runner = Runner(name, args)
        runner.data.copy_(runner._data(seed))
        runner.aligned(seed)


def compute(args: argparse.Namespace) -> None:
    """Distils all that is asked for and missing."""
    args.cache.mkdir(parents=True, exist_ok=True)
    started = time.time()
    deadline = math.inf if args.seconds is None else started + args.seconds
    for name in args.teachers:
        if time.time() < deadline:
            Runner(name, args).run(args.seeds, deadline)
            print(f"{time.time() - started:.0f} s: {name} done", flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rows", type=Path, help="folder that keeps the rows once drawn")
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    parser.add_argument("--k", type=int, nargs="*", default=[0, 1, 2, -1], help="set sizes; -1: all layers but one")
    parser.add_argument("--data-seed", type=int, help="of the rows; by default the students' seed")
    parser.add_argument("--zero-shot", action="store_true", help="also every subset's KL without distillation")
    parser.add_argument("--best", type=int, help="of sets of two layers and more, only the most promising")
    parser.add_argument("--sets", type=json.loads, help="JSON list of layer sets, in the place of all")
    parser.add_argument("--steps", type=int, default=DISTILL_STEPS)
    parser.add_argument("--align-steps", type=int, default=ALIGN_STEPS)
    parser.add_argument("--together", type=int, default=1, help="students trained at once (GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seconds", type=float, help="stop starting new distillations after this long")
    return parser


if __name__ == "__main__":
    compute(parser().parse_args())
