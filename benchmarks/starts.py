"""Where the mixers start: what each way is worth before training, after alignment, and after a short distillation.

    python -m benchmarks.starts --teacher embedded
    python -m benchmarks.starts --teacher qwen3-8-drop --seeds 3
    python -m benchmarks.starts --teacher model.gguf --block 512 --batch 16 --text 'texts/*.txt' --seconds 120 \\
        --align-lr 1e-3 --mixer-lr 3e-4 --lr 3e-5 --trained drawn 'the same, writes 0.2' --starts drawn
    python -m benchmarks.starts --trial
    python -m benchmarks.starts --write-docs

For each seed one student is converted and its rows are drawn; every start begins with the same weights, rows and
order. Alignment is one cosine over all its steps, measured on the way. Distillation then keeps softmax in the layers
`--keep`, by default the two that alone lower the held-out KL most in the student that the drawn start aligned, for all
starts the same. Held-out rows are the same for all seeds. Prints a table and adds its records to a JSON file.
"""

import argparse
import functools
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback

import hf_hybrid as hh
from benchmarks.selection.data import TEACHERS, load_teacher
from benchmarks.selection.data import rows as task_rows
from hf_hybrid.data.config import DataConfig
from hf_hybrid.data.rows import build_rows
from hf_hybrid.demo_data import demo_rows
from hf_hybrid.evaluation import recall_of, recall_task
from hf_hybrid.modeling.linear_attention import widen
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.teacher.loading import load_pair
from hf_hybrid.trainers.alignment import mixer_outputs
from hf_hybrid.trainers.calibration import Calibration
from hf_hybrid.trainers.held_out import HeldOut, batches, standard_error
from hf_hybrid.trainers.losses import alignment_loss
from hf_hybrid.trainers.modes import evaluating
from hf_hybrid.trainers.precision import Precision
from hf_hybrid.trainers.scoring.both_attentions import BothAttentions


PAGE = Path(__file__).parents[1] / "docs" / "starts.md"
# What the page has above its tables.
_TABLES = "## The tables"
NOTHING = {"gate": False, "half_life": None, "write_strength": None, "scale": None}
# What each start sets, as options of hh.calibrate; None leaves all as it was drawn.
STARTS: dict[str, dict[str, Any] | None] = {
    "drawn": None,
    "gate 0": {},
    "gate 1": NOTHING | {"gate": True},
    "gate 1, decay": NOTHING | {"gate": True, "half_life": 0.69},
    "gate 1, scale": NOTHING | {"gate": True, "scale": "norm"},
    "decay": NOTHING | {"half_life": 0.69},
    "gate 1, decay, scale": {"write_strength": None},
    "the same, half-life = distance": {"write_strength": None, "half_life": 1.0},
    "the same, first token counted": {"write_strength": None, "skip_first": False},
    "the same, writes by entropy": {"write_strength": "entropy"},
    "the same, writes 0.1": {"write_strength": 0.1},
    "the same, writes 0.2": {"write_strength": 0.2},
    "the same, writes 0.4": {"write_strength": 0.4},
    "writes 0.2, scale by gate": {"write_strength": 0.2, "scale": "gate"},
    "writes 0.2, output projection": {"write_strength": 0.2},
}
TRAINED = (
    "drawn",
    "gate 0",
    "gate 1",
    "gate 1, scale",
    "gate 1, decay, scale",
    "the same, writes 0.2",
    "writes 0.2, scale by gate",
    "writes 0.2, output projection",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", default="embedded", help="one of the selection benchmark's, a folder, Hub id, GGUF"
    )
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", nargs="+", help="text files for rows; by default Python source, recall and copying")
    parser.add_argument("--block", type=int, help="tokens of a row; by default 256 of alignment, 128 of all else")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64], help="steps of alignment to measure at")
    parser.add_argument("--distill-steps", type=int, default=24)
    parser.add_argument("--calibration-rows", type=int, default=32)
    parser.add_argument("--held-out-rows", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", type=int, nargs="*", help="layers that keep softmax in the distillation")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="measured untrained")
    parser.add_argument("--trained", nargs="*", choices=STARTS, default=list(TRAINED), help="those that are trained")
    parser.add_argument("--align-lr", type=float, default=3e-3)
    parser.add_argument("--mixer-lr", type=float, default=1e-3, help="of the mixers in the distillation")
    parser.add_argument("--lr", type=float, default=1e-4, help="of all else in the distillation")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further start after this time")
    parser.add_argument("--trial", action="store_true", help="sizes that say nothing")
    parser.add_argument("--write-docs", action="store_true", help="only put the tables of --output into the page")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "starts.json")
    args = parser.parse_args()
    if args.text and args.block is None:
        args.block = 256
    if args.trial:
        args.budgets, args.distill_steps, args.seeds = [1, 2], 1, min(args.seeds, 2)
        args.calibration_rows, args.held_out_rows, args.batch = 4, 4, 2
        args.trained = args.trained[:3]
    return args


class Rows:
    """A teacher's rows: of each seed for training, and the same for all seeds to measure on."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, vocab_size: int) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.of_alignment = max(max(args.budgets) * args.batch, args.calibration_rows)
        self.of_seed = self.of_alignment + args.distill_steps * args.batch
        if args.text:
            held_out = {"held_out_rows": 1, "report_rows": args.held_out_rows}
            config = DataConfig(text_files=args.text, block_size=args.block, **held_out)
            folder, needed = Path(tempfile.mkdtemp()) / "rows", (args.first_seed + args.seeds) * self.of_seed
            # In one order whatever the seeds are, so that seeds of different calls are measured on the same rows.
            self._text = build_rows(config, tokenizer, needed, 0, folder, vocab_size)
            if len(self._text["train"]) < needed:
                raise ValueError(
                    f"the text has {len(self._text['train'])} rows of {needed}; give more, or fewer seeds."
                )
        self.held_out = self._of("report", 0, args.held_out_rows, args.block or 128)

    def train(self, seed: int, stage: str, count: int) -> Any:
        return self._of(stage, seed, count, self.args.block or (128 if stage == "train" else 256))

    @functools.cache  # noqa: B019  as long as the study
    def _of(self, split: str, seed: int, count: int, length: int) -> Any:
        args = self.args
        if args.text:
            if split == "report":
                return self._text["report"]
            # One packing for all seeds, or the held-out documents of one would be trained on by another: a seed has
            # its own part of the rows, first those of the alignment.
            place = seed * self.of_seed + (0 if split == "align" else self.of_alignment)
            return self._text["train"].select(range(place, place + count))
        if args.teacher in TEACHERS:
            return task_rows(TEACHERS[args.teacher].mix, split, seed, count, None, length).dataset()
        return demo_rows(self.tokenizer, length, count, 2 * seed + (split == "align"), split.replace("align", "train"))


class Study:
    """One teacher, what is measured, and what training needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        device = torch.device(args.device)
        if args.teacher in TEACHERS:
            teacher, self.tokenizer = load_teacher(args.teacher), hh.embedded_tokenizer()
        else:
            teacher, self.tokenizer = load_pair(args.teacher, dtype="float32")
        self.teacher = teacher.to(device).requires_grad_(False)
        self.rows = Rows(args, self.tokenizer, teacher.config.vocab_size)
        self.scratch = tempfile.mkdtemp()
        self.precision = Precision.of(self.training(hh.AlignmentConfig, 0))
        self.held_out = HeldOut(self.rows.held_out, self.teacher, args.batch, self.precision)
        length = args.block or 128
        self.recall = recall_task(teacher.config, self.tokenizer, 4 if args.trial else 64, length)
        self.keep = args.keep

    def training(self, kind: Any, seed: int, **more: Any) -> Any:
        """Arguments of a trainer, of all stages alike."""
        fixed = {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": seed}
        fixed |= {"per_device_train_batch_size": self.args.batch, "dataloader_drop_last": True}
        on_cuda = self.args.device.startswith("cuda")
        return kind(self.scratch, use_cpu=not on_cuda, bf16=on_cuda, **fixed, **more)

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, Any]:
        """Alignment loss (the mean over linear layers) and KL of each held-out row."""
        found: dict[str, Any] = {"kl": self.held_out.kl(student)}
        losses = []
        with evaluating(student, self.teacher):
            for batch in batches(self.rows.held_out, self.args.batch, self.teacher.device):
                outputs = mixer_outputs(student, self.teacher, batch, self.precision)
                losses.append([alignment_loss(wanted, given, mask).item() for _, wanted, given, mask in outputs])
        if losses[0]:
            found["alignment_loss"] = statistics.fmean(statistics.fmean(layers) for layers in losses)
        found["kl"] = statistics.fmean(found["kl"])
        return found

    def recall_of(self, model: Any) -> float | None:
        return recall_of(model, self.recall, self.args.batch, self.precision)

    def start(self, name: str, student: Any, rows: Any) -> Calibration | None:
        """Puts `student`, as it was drawn, to the start `name`."""
        options = STARTS[name]
        if options is None:
            return None
        if name == "gate 0":
            with torch.no_grad():
                for layer in decoder_layers(student):
                    layer.self_attn.g_proj.weight.zero_()
            return None
        found = hh.calibrate(
            student, self.teacher, rows, batch_size=self.args.batch, precision=self.precision, **options
        )
        if "output projection" in name:
            fit_output_projections(student, self.teacher, rows, self.args.batch, self.precision)
        return found

    def align(self, student: Any, rows: Any, seed: int, measured: Callable[[int], None]) -> None:
        budgets = self.args.budgets
        more = {"max_steps": max(budgets), "learning_rate": self.args.align_lr}
        args = self.training(hh.AlignmentConfig, seed, **more)
        trainer = hh.AlignmentTrainer(model=student, teacher=self.teacher, args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_At(budgets, measured))
        trainer.train()

    def distill(self, student: Any, rows: Any, seed: int) -> None:
        rates = {"learning_rate": self.args.lr, "mixer_learning_rate": self.args.mixer_lr}
        args = self.training(hh.DistillationConfig, seed, max_steps=self.args.distill_steps, **rates)
        trainer = hh.DistillationTrainer(model=student, teacher=self.teacher, args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def best_two(self, student: Any) -> list[int]:
        """The two layers that alone, with softmax, lower the held-out KL of an aligned student most."""
        found = {}
        with BothAttentions(student, self.teacher) as both:
            for i in range(len(both.layers)):
                both.keep([i])
                found[i] = statistics.fmean(self.held_out.kl(student))
            both.keep([])
        return sorted(sorted(found, key=lambda i: found[i])[:2])

    def one(self, name: str, seed: int, drawn: dict[str, torch.Tensor], student: Any, trained: bool) -> dict[str, Any]:
        """What one start of one seed is worth."""
        args, began = self.args, time.perf_counter()
        aligned_on = self.rows.train(seed, "align", max(args.budgets) * args.batch)
        rows = self.rows.train(seed, "align", args.calibration_rows)
        student.load_state_dict(drawn)
        calibration = self.start(name, student, rows)
        record: dict[str, Any] = {"start": name, "seed": seed, "steps": {"0": self.measure(student)}}
        record["start_seconds"] = round(time.perf_counter() - began, 2)
        if calibration is not None:
            record["calibration"] = calibration.lines()
        if not trained:
            return record
        self.align(student, aligned_on, seed, lambda step: record["steps"].update({str(step): self.measure(student)}))
        if self.keep is None:
            self.keep = self.best_two(student)
        student.set_full_attention_layers(self.keep, self.teacher)
        self.distill(student, self.rows.train(seed, "train", args.distill_steps * args.batch), seed)
        record["distilled"] = {"kl": statistics.fmean(self.held_out.kl(student)), "recall": self.recall_of(student)}
        student.set_full_attention_layers([])
        record["seconds"] = round(time.perf_counter() - began, 1)
        return record


class _At(TrainerCallback):
    """Calls `measured` after the steps `budgets`."""

    def __init__(self, budgets: list[int], measured: Callable[[int], None]) -> None:
        self.budgets, self.measured = set(budgets), measured

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.budgets:
            self.measured(state.global_step)


@torch.no_grad()
def fit_output_projections(student: Any, teacher: Any, rows: Any, batch: int, precision: Precision) -> None:
    """
    Each `o_proj` by least squares on the teacher's attention output, given the mixer's heads `[B, T, H V]`, with a
    ridge of 1% of their mean square towards the projection that there is.
    """
    layers, seen, sums = decoder_layers(student), {}, {}
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, i=i: seen.__setitem__(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    with evaluating(student, teacher):
        for inputs in batches(rows, batch, teacher.device):
            for i, wanted, _, mask in mixer_outputs(student, teacher, inputs, precision):
                counted = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
                heads, missing = widen(seen.pop(i)[counted]), widen(wanted[counted])
                missing = missing - torch.nn.functional.linear(heads, *_weights(layers[i].self_attn.o_proj))
                moment, cross = sums.get(i, (0.0, 0.0))
                sums[i] = moment + (heads.mT @ heads).double(), cross + (heads.mT @ missing).double()
    for handle in handles:
        handle.remove()
    for i, (moment, cross) in sums.items():
        ridge = 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        layers[i].self_attn.o_proj.weight.add_(torch.linalg.solve(moment + ridge, cross).mT)


def _weights(projection: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return widen(projection.weight), None if projection.bias is None else widen(projection.bias)


def summary(records: list[dict[str, Any]], of: Callable[[dict[str, Any]], float | None]) -> dict[str, tuple[str, str]]:
    """Mean and standard error over seeds, and of the paired differences from the drawn start, of each record."""
    drawn = {record["seed"]: of(record) for record in records if record["start"] == "drawn"}
    cells = {}
    for name in dict.fromkeys(record["start"] for record in records):
        values = {r["seed"]: of(r) for r in records if r["start"] == name}
        known = {seed: value for seed, value in values.items() if value is not None}
        paired = [value - base for seed, value in known.items() if (base := drawn.get(seed)) is not None]
        cells[name] = (_mean(list(known.values())), _mean(paired, sign=True))
    return cells


def _mean(values: list[float], sign: bool = False) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {standard_error(values):.3f}"


def columns(budgets: list[int]) -> dict[str, Callable[[dict[str, Any]], float | None]]:
    """What the table shows of a record, by its title."""

    def at(step: int, what: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda record: record["steps"].get(str(step), {}).get(what)

    shown: dict[str, Callable[[dict[str, Any]], float | None]] = {}
    for step in (0, *sorted(budgets)):
        shown[f"loss, {step} steps"] = at(step, "alignment_loss")
        shown[f"KL, {step} steps"] = at(step, "kl")
    shown["KL, distilled"] = lambda record: record.get("distilled", {}).get("kl")
    shown["recall, distilled"] = lambda record: record.get("distilled", {}).get("recall")
    return shown


def show(records: list[dict[str, Any]], about: dict[str, Any]) -> None:
    shown = {title: summary(records, of) for title, of in columns(about["budgets"]).items()}
    for place, title in enumerate(("mean ± s.e. over seeds", "paired difference from the drawn start")):
        table = Table(title=f"{about['teacher']}, {about['mixer']}, kept {about['keep']}: {title}")
        for name in ("start", *shown):
            table.add_column(name, justify="left" if name == "start" else "right")
        for name in dict.fromkeys(record["start"] for record in records):
            table.add_row(name, *(cells[name][place] for cells in shown.values()))
        Console(width=200).print(table)


def page(studies: list[dict[str, Any]]) -> str:
    """The tables of the documentation."""
    parts = []
    for study in studies:
        tokens, records = study["tokens"], study["records"]
        kinds = {title: summary(records, of) for title, of in columns(study["budgets"]).items()}
        shown = [title for title, cells in kinds.items() if any(mean for mean, _ in cells.values())]
        trained = ""
        if any("distilled" in record for record in records):
            budgets = " and ".join(f"{count:,}" for count in tokens["alignment"])
            trained = f"{budgets} of alignment, {tokens['distillation']:,} of distillation, "
            trained += f"which keeps softmax in {study['keep']}, "
        recall = "" if study["teacher_recall"] is None else f" The teacher's recall is {study['teacher_recall']:.3f}."
        seeds = len({record["seed"] for record in records})
        parts.append(
            f"### {study['teacher']}, {study['mixer']}\n\n"
            f"{study['device']}, torch {study['torch']}, precision: {study['precision']}; seeds: {seeds}. Tokens: "
            f"{tokens['calibration']:,} of calibration, {trained}"
            f"{tokens['held out']:,} held out.{recall}\n\n    {study['command']}\n"
        )
        for place, title in enumerate(("Mean ± s.e. over seeds.", "Paired difference from the drawn start ± s.e.")):
            rows = [["start", *shown], ["---", *("---:" for _ in shown)]]
            for name in dict.fromkeys(record["start"] for record in records):
                cells = [kinds[column][name][place] for column in shown]
                if place == 0 or name != "drawn":
                    rows.append([name, *cells])
            parts.append(title + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    return "\n".join(parts)


def write_docs(studies: list[dict[str, Any]], path: Path) -> None:
    """Puts the tables into the page, in the place of those that are there."""
    before, mark, _ = path.read_text().partition(_TABLES)
    path.write_text(before + mark + "\n\n" + page(studies))


def write(path: Path, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Puts the study of one teacher and mixer into the file, in the place of an earlier one of the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = json.loads(path.read_text()) if path.is_file() else []
    key = (about["teacher"], about["mixer"])
    there = [study for study in there if (study["teacher"], study["mixer"]) != key]
    path.write_text(json.dumps([*there, about | {"records": records}], indent=1) + "\n")


def main() -> None:
    args, began = parse_args(), time.perf_counter()
    if args.write_docs:
        write_docs(json.loads(args.output.read_text()), PAGE)
        return
    study, records = Study(args), []
    length = args.block or 256
    about = {
        "teacher": Path(args.teacher).name,
        "mixer": args.mixer,
        "command": shlex.join(["python", "-m", "benchmarks.starts", *map(_public, sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "budgets": args.budgets,
        "tokens": {
            "calibration": args.calibration_rows * length,
            "alignment": [steps * args.batch * length for steps in args.budgets],
            "distillation": args.distill_steps * args.batch * (args.block or 128),
            "held out": study.held_out.tokens,
        },
        "precision": str(study.precision),
        "teacher_recall": study.recall_of(study.teacher),
    }
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        if time.perf_counter() - began > args.seconds:
            break
        torch.manual_seed(seed)
        student = hh.convert(study.teacher, [], mixer=args.mixer)
        student.requires_grad_(True)
        drawn = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        for name in dict.fromkeys([*args.trained, *args.starts]):
            if time.perf_counter() - began > args.seconds:
                print(f"out of time before {name!r} of seed {seed}", flush=True)
                break
            records.append(study.one(name, seed, drawn, student, trained=name in args.trained))
            print(json.dumps({key: value for key, value in records[-1].items() if key != "calibration"}), flush=True)
            write(args.output, about | {"keep": study.keep, "seconds": round(time.perf_counter() - began)}, records)
    show(records, about | {"keep": study.keep})


def _public(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


if __name__ == "__main__":
    main()
