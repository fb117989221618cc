"""Ground truth of the selection benchmark: every set of softmax layers, distilled with one budget and measured.

    python benchmarks/selection_truth.py --teachers llama-8 --seeds 0 1 2 --k 1 2 --cache FOLDER
    python benchmarks/selection_truth.py --cache FOLDER --device cuda --slots 8 --seconds 150

For each teacher and student seed an all-linear student is made and aligned; from it every set of K layers is restored,
the hybrid distilled on the same batches, and held-out KL and recall are measured on rows to choose on and on others to
report on. Results are appended to `FOLDER/TEACHER.jsonl` one by one and never computed twice.

On a GPU a step of such a small model is bound by kernel launches, so both branches of every layer are computed and a
mask chooses, which lets one CUDA graph serve every set, and several students train at once, each on its own stream.
The branch that is masked out has gradients of zero, so nothing else changes (tests/test_selection_benchmark.py holds
it against hh.DistillationTrainer).
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from selection_data import (
    ALIGN_LENGTH,
    ALIGN_STEPS,
    BATCH,
    DISTILL_STEPS,
    REPORT_ROWS,
    SELECT_ROWS,
    TEACHERS,
    Rows,
    load_teacher,
    rows,
)
from torch import Tensor, nn

import hf_hybrid as hh
from hf_hybrid.modeling.modeling_hybrid import decoder, decoder_layers
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters
from hf_hybrid.trainers.losses import alignment_loss, kl_per_token, logit_function


MIXER_LR, LR, ALIGN_LR = 1e-3, 1e-4, 3e-3
EVALUATION_BATCH = 24
CHECKPOINTS = (3, 6, 12)  # steps at which single layers are measured as well


class Student(nn.Module):
    """An all-linear student with the teacher's attention beside each mixer; a set of layers says which one runs."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.model = hh.convert(teacher, [])
        self.model.to(teacher.device)
        self.softmax = nn.ModuleList(copy.deepcopy(layer.self_attn) for layer in decoder_layers(teacher))
        self.requires_grad_(True)

    def hidden(self, input_ids: Tensor, keep: Tensor | list[bool]) -> Tensor:
        """Final hidden states `[B, T, H]` with softmax in the layers where `keep` is true (or 1)."""
        backbone = decoder(self.model)
        x = backbone.embed_tokens(input_ids)
        rope = backbone.rotary_emb(x, torch.arange(input_ids.shape[1], device=x.device)[None])
        for i, layer in enumerate(backbone.layers):
            given = layer.input_layernorm(x)
            x = x + self._mix(i, layer.self_attn, given, rope, keep)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return backbone.norm(x)

    def _mix(self, i: int, mixer: Any, given: Tensor, rope: Any, keep: Tensor | list[bool]) -> Tensor:
        if isinstance(keep, list):
            module = self.softmax[i] if keep[i] else mixer
            return module(given, position_embeddings=rope, attention_mask=None)[0]
        linear, softmax = (
            module(given, position_embeddings=rope, attention_mask=None)[0] for module in (mixer, self.softmax[i])
        )
        return keep[i] * softmax + (1 - keep[i]) * linear


@torch.no_grad()
def teacher_hidden(teacher: Any, input_ids: Tensor) -> Tensor:
    """The teacher's final hidden states for `[..., B, T]` tokens, batch by batch."""
    flat = input_ids.flatten(0, -3) if input_ids.dim() > 2 else input_ids[None]
    hidden = [teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state for ids in flat]
    return torch.stack(hidden).view(*input_ids.shape, -1)


class Data:
    """One teacher's rows of one seed and what the teacher makes of them, in buffers that graphs can read."""

    def __init__(self, name: str, seed: int, teacher: Any, cache: Path | None, steps: int, align_steps: int) -> None:
        mix, device = TEACHERS[name].mix, teacher.device
        self.train = rows(mix, "train", seed, steps * BATCH, cache).input_ids.view(steps, BATCH, -1).to(device)
        self.align = rows(mix, "align", seed, align_steps * BATCH, cache, ALIGN_LENGTH).input_ids
        self.align = self.align.view(align_steps, BATCH, -1).to(device)
        select, report = rows(mix, "score", seed, SELECT_ROWS, cache), rows(mix, "report", 0, REPORT_ROWS, cache)
        self.kinds = report.kinds
        held_out = Rows(
            torch.cat((select.input_ids, report.input_ids)), torch.cat((select.answers, report.answers)), []
        )
        self.held_out = held_out.input_ids.view(-1, EVALUATION_BATCH, held_out.input_ids.shape[-1]).to(device)
        self.answers = held_out.answers.view_as(self.held_out).to(device)
        self.train_reference = teacher_hidden(teacher, self.train)
        self.held_out_reference = teacher_hidden(teacher, self.held_out)

    def copy_(self, other: "Data") -> None:
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)


class Slot:
    """One student being trained: parameters, optimizer and, on a GPU, its stream and graphs."""

    def __init__(self, teacher: Any, data: Data, graph: bool) -> None:
        self.teacher, self.data, self.device = teacher, data, teacher.device
        self.student = Student(teacher)
        self.num_layers = len(self.student.softmax)
        self.parameters = list(self.student.parameters())
        mixers = mixer_parameters(self.student.model)
        ids = {id(parameter) for parameter in mixers}
        rest = [parameter for parameter in self.parameters if id(parameter) not in ids]
        kind: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
        if graph:
            kind |= {"capturable": True, "fused": True}
        self.rate = torch.zeros((), device=self.device)
        self.aligner = torch.optim.AdamW(mixers, lr=self.rate if graph else ALIGN_LR, **kind)
        groups = [{"params": mixers, "lr": MIXER_LR}, {"params": rest, "lr": LR}]
        self.optimizer = torch.optim.AdamW(groups, **kind)
        self.mixers, self.step_index, self.out_index = (
            mixers,
            *(torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(2)),
        )
        self.out = torch.zeros(*data.held_out.shape[:2], 3, device=self.device)  # KL, right answers, answers
        self.keep: Tensor | list[bool] = torch.zeros(self.num_layers, device=self.device)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.stream = torch.cuda.Stream() if graph else None
        self.event = torch.cuda.Event() if graph else None

    def distill_step(self) -> None:
        ids = self.data.train.index_select(0, self.step_index)[0]
        reference = self.data.train_reference.index_select(0, self.step_index)[0]
        with torch.no_grad():
            teacher_logits = logit_function(self.teacher)(reference)
        hidden = self.student.hidden(ids, self.keep)
        loss = kl_per_token(teacher_logits, logit_function(self.student.model)(hidden)).mean()
        self._update(loss, self.optimizer, self.parameters)
        self.step_index += 1

    def align_step(self) -> None:
        """As hh.AlignmentTrainer: every mixer sees its layer's input in the teacher and learns its output."""
        ids = self.data.align.index_select(0, self.step_index)[0]
        backbone, losses = decoder(self.teacher), []
        with torch.no_grad():
            x = backbone.embed_tokens(ids)
            rope = backbone.rotary_emb(x, torch.arange(ids.shape[1], device=x.device)[None])
        for layer, own in zip(backbone.layers, decoder_layers(self.student.model), strict=True):
            with torch.no_grad():
                given = layer.input_layernorm(x)
                wanted = layer.self_attn(given, position_embeddings=rope, attention_mask=None)[0]
                x = x + wanted
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            losses.append(alignment_loss(wanted, own.self_attn(given, position_embeddings=rope)[0]))
        self._update(torch.stack(losses).mean(), self.aligner, self.mixers)
        self.step_index += 1

    @torch.no_grad()
    def measure_step(self) -> None:
        ids, answers, reference = (
            x.index_select(0, self.out_index)[0]
            for x in (self.data.held_out, self.data.answers, self.data.held_out_reference)
        )
        logits = logit_function(self.student.model)(self.student.hidden(ids, self.keep))
        kl = kl_per_token(logit_function(self.teacher)(reference), logits).mean(-1)
        marked = answers[:, 1:]
        right = ((logits[:, :-1].argmax(-1) == ids[:, 1:]) & marked).sum(-1)
        self.out.index_copy_(0, self.out_index, torch.stack((kl, right.float(), marked.sum(-1).float()), -1)[None])
        self.out_index += 1

    def _update(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[Any]) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def forget_gradients(self) -> None:
        for optimizer in (self.aligner, self.optimizer):
            optimizer.zero_grad(set_to_none=True)

    def capture(self, names: Iterable[str]) -> None:
        """Records the named steps as graphs; what the warm-up changes is reset before every use."""
        assert self.stream is not None
        for name in names:
            step: Callable[[], None] = getattr(self, name)
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    self.reset_counters()
                    self.forget_gradients()
                    step()
            torch.cuda.synchronize()
            self.forget_gradients()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                step()
            self.graphs[name] = graph
            self.forget_gradients()

    def reset_counters(self) -> None:
        self.step_index.zero_()
        self.out_index.zero_()

    @torch.no_grad()
    def reset(self, values: list[Tensor]) -> None:
        """Parameters as in `values`, optimizers and counters as new."""
        torch._foreach_copy_(self.parameters, values)
        for optimizer in (self.aligner, self.optimizer):
            if self.stream is None:
                optimizer.state.clear()
            states = [x for state in optimizer.state.values() for x in state.values()]
            if states:
                torch._foreach_zero_(states)
        self.reset_counters()

    def run(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            if name in self.graphs:
                self.graphs[name].replay()
            else:
                getattr(self, name)()
                self.forget_gradients()

    def set_keep(self, layers: Iterable[int]) -> None:
        chosen = [i in set(layers) for i in range(self.num_layers)]
        if self.graphs:
            assert isinstance(self.keep, Tensor)
            self.keep.copy_(torch.tensor(chosen, dtype=torch.float32))
        else:
            self.keep = chosen

    def measure(self, batches: int) -> Tensor:
        self.out_index.zero_()
        self.run("measure_step", batches)
        return self.out[:batches].flatten(0, 1).clone()

    def distill(self, values: list[Tensor], layers: Iterable[int], steps: int, checkpoints: Iterable[int]) -> Any:
        """Distils with softmax in `layers`; the rows to choose on at `checkpoints`, and all rows at the end."""
        with torch.cuda.stream(self.stream):
            self.reset(values)
            self.set_keep(layers)
            found, done = {}, 0
            for step in sorted({*checkpoints, steps}):
                self.run("distill_step", step - done)
                done = step
                last = step == steps
                found[step] = self.measure(len(self.data.held_out) if last else SELECT_ROWS // EVALUATION_BATCH)
            if self.event is not None:
                self.event.record()
        return found


def fresh_values(name: str, seed: int) -> list[Tensor]:
    """Parameters of a new student, in the order of `Slot.parameters`; drawn on the CPU, so alike on every device."""
    torch.manual_seed(seed)
    return [parameter.detach() for parameter in Student(load_teacher(name)).parameters()]


def align(slot: Slot, values: list[Tensor], steps: int) -> list[Tensor]:
    """The parameters after alignment, from `values` of a new student."""
    with torch.cuda.stream(slot.stream):
        slot.reset([value.to(slot.device) for value in values])
        for step in range(steps):
            rate = ALIGN_LR * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            slot.rate.fill_(rate)
            if slot.stream is None:
                slot.aligner.param_groups[0]["lr"] = rate
            slot.run("align_step")
        aligned = [parameter.detach().clone() for parameter in slot.parameters]
    if slot.stream is not None:
        torch.cuda.synchronize()
    return aligned


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
    """All records of one teacher; a line that a kill cut short is left out."""
    path, found = cache / f"{name}.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


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
            with path.open("a") as stream:
                stream.write(json.dumps(record(name, seed, layers, found, self.data.kinds)) + "\n")

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
