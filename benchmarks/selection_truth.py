"""Ground truth of the selection benchmark: every set of softmax layers, distilled with one budget and measured.

    python benchmarks/selection_truth.py --teachers llama-8 --seeds 0 1 2 --k 1 2 --cache FOLDER
    python benchmarks/selection_truth.py --cache FOLDER --device cuda --slots 8 --seconds 150

For each teacher and student seed an all-linear student is made and aligned; from it every set of K layers is restored,
the hybrid distilled on the same batches, and held-out KL and recall are measured on rows to choose on and on others to
report on. Results are appended to `FOLDER/TEACHER.jsonl` one by one and never computed twice.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from selection_data import ALIGN_STEPS, DISTILL_STEPS, SELECT_ROWS, TEACHERS, append_line, load_teacher, read_lines
from selection_student import Data, Slot, align, fresh_values
from torch import Tensor

from hf_hybrid.modeling.modeling_hybrid import decoder_layers


CHECKPOINTS = (3, 6, 12)  # steps at which single layers are measured as well


def record(name: str, seed: int, layers: list[int], found: dict[int, Tensor], kinds: list[str]) -> dict[str, Any]:
    """What is kept of one distillation: KL in nats per token, by kind of row, and recall."""
    steps, select = max(found), {}
    found = {step: measured.cpu() for step, measured in found.items()}
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


def read(cache: Path, name: str) -> list[dict[str, Any]]:
    """All records of one teacher."""
    return read_lines(cache / f"{name}.jsonl")


def wanted_sets(
    name: str, num_layers: int, seed: int, ks: Iterable[int], cache: Path, best: int | None = None
) -> Iterator[list[int]]:
    """
    The sets still to be distilled, the promising ones first, `best` of each size at most.

    What a set promises is its own KL with another seed, or else that of its best subset with one layer less.
    """
    there = read(cache, name)
    done = {tuple(r["layers"]) for r in there if r["seed"] == seed}
    known: dict[tuple[int, ...], list[float]] = {}
    for r in there:
        known.setdefault(tuple(r["layers"]), []).append(r["select"][str(r["steps"])][0])

    def promise(layers: tuple[int, ...]) -> tuple[int, float]:
        if layers in known:
            return 0, sum(known[layers]) / len(known[layers])
        smaller = (known.get(s) for s in itertools.combinations(layers, len(layers) - 1))
        return 1, min((sum(kls) / len(kls) for kls in smaller if kls), default=math.inf)

    for k in ks:
        # A negative K counts from the top: all layers softmax but -K of them.
        sets = list(itertools.combinations(range(num_layers), k if k >= 0 else num_layers + k))
        if k > 1:
            sets = sorted(sets, key=promise)[:best]
        yield from (list(layers) for layers in sets if layers not in done)


class Runner:
    """Slots for all teachers of one shape, used for one teacher and seed at a time."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args, self.graph = args, args.device != "cpu" and not args.eager
        self.teacher = load_teacher(name).to(args.device).requires_grad_(False)
        self.data = self._data(name, 0)
        self.slots = [Slot(self.teacher, self.data, self.graph) for _ in range(args.slots)]
        self.aligned: dict[tuple[str, int], list[Tensor]] = {}
        if self.graph:
            self.slots[0].capture(["align_step"])

    def capture(self) -> None:
        for slot in self.slots if self.graph else ():
            slot.capture(["distill_step", "measure_step"])

    def _data(self, name: str, seed: int) -> Data:
        return Data(name, seed, self.teacher, self.args.rows, self.args.steps, self.args.align_steps)

    def load(self, name: str, seed: int) -> list[Tensor]:
        """Puts the teacher and its rows in place; the parameters of its aligned student, kept in a file as well."""
        self.teacher.load_state_dict(load_teacher(name).state_dict())
        data = self._data(name, seed)
        self.data.copy_(data)
        self.data.kinds = data.kinds
        if (name, seed) in self.aligned:
            return self.aligned[name, seed]
        path, slot = self.args.cache / "aligned" / f"{name}_{seed}.pt", self.slots[0]
        if self.graph:
            torch.cuda.synchronize()
        values = fresh_values(name, seed)
        mixers = {id(parameter) for parameter in slot.mixers}
        places = [i for i, parameter in enumerate(slot.parameters) if id(parameter) in mixers]
        if path.is_file():
            for i, value in zip(places, torch.load(path), strict=True):
                values[i] = value
            values = [value.to(self.args.device) for value in values]
        else:
            values = align(slot, values, self.args.align_steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save([values[i].cpu() for i in places], partial)
            partial.rename(path)
        self.aligned[name, seed] = values
        return values

    def distill_all(self, name: str, seed: int, ks: Iterable[int], deadline: float) -> int:
        """Distils what is missing of one teacher and seed until `deadline`; returns how many sets were done."""
        values = self.load(name, seed)
        if self.graph:
            torch.cuda.synchronize()  # the slots' streams do not wait for the default one
        pending: dict[int, tuple[list[int], dict[int, Tensor]]] = {}
        path, count = self.args.cache / f"{name}.jsonl", 0

        def finish(i: int) -> None:
            layers, found = pending.pop(i)
            event = self.slots[i].event
            if event is not None:
                event.synchronize()
            append_line(path, record(name, seed, layers, found, self.data.kinds))

        num_layers = len(decoder_layers(self.teacher))
        for layers in self.args.sets or wanted_sets(name, num_layers, seed, ks, self.args.cache, self.args.best):
            if time.time() > deadline:
                break
            i = count % len(self.slots)
            if i in pending:
                finish(i)
            checkpoints = [step for step in CHECKPOINTS if step < self.args.steps] if len(layers) == 1 else []
            pending[i] = layers, self.slots[i].distill(values, layers, self.args.steps, checkpoints)
            count += 1
        for i in list(pending):
            finish(i)
        return count


def shape_of(name: str) -> str:
    config = load_teacher(name).config.to_dict()
    keys = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim")
    return "/".join(str(config[key]) for key in keys)


def compute(args: argparse.Namespace) -> None:
    """Distils all that is asked for and missing: for every seed first what `--k` names, in its order."""
    args.cache.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, list[str]] = {}
    for name in args.teachers:
        shapes.setdefault(shape_of(name), []).append(name)
    groups, started = list(shapes.values()), time.time()
    runners = [Runner(names[0], args) for names in groups]
    for seed in args.seeds:
        for runner, names in zip(runners, groups, strict=True):
            for name in names:
                runner.load(name, seed)
    print(f"{time.time() - started:.0f} s: aligned", flush=True)
    shares = [sum(load_teacher(name).config.num_hidden_layers ** 2.5 for name in names) for names in groups]
    for i, (runner, names) in enumerate(zip(runners, groups, strict=True)):
        runner.capture()
        left = math.inf if args.seconds is None else args.seconds - (time.time() - started)
        deadline = time.time() + left * shares[i] / sum(shares[i:])
        for seed, ks in [*((seed, args.k) for seed in args.seeds), (args.seeds[0], args.later_k)]:
            for name in names if ks else ():
                since = time.time()
                count = runner.distill_all(name, seed, ks, deadline)
                each = (time.time() - since) / max(count, 1)
                now = time.time() - started
                print(f"{now:.0f} s: {name}, seed {seed}, K {ks}: {count} sets, {each:.3f} s each", flush=True)
        runner.slots.clear()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rows", type=Path, help="folder that keeps the rows once drawn")
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    parser.add_argument("--k", type=int, nargs="*", default=[0, 1, 2, -1], help="set sizes; -1: all layers but one")
    parser.add_argument("--later-k", type=int, nargs="*", default=[], help="set sizes afterwards, first seed only")
    parser.add_argument("--best", type=int, help="of sets of two layers and more, only the most promising")
    parser.add_argument("--sets", type=json.loads, help="JSON list of layer sets, in the place of all")
    parser.add_argument("--steps", type=int, default=DISTILL_STEPS)
    parser.add_argument("--align-steps", type=int, default=ALIGN_STEPS)
    parser.add_argument("--slots", type=int, default=1, help="students trained at once (GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seconds", type=float, help="stop starting new distillations after this long")
    return parser


if __name__ == "__main__":
    compute(parser().parse_args())
