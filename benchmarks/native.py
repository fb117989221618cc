"""What the mixer options cost with which a hybrid can be exported: KL and recall at one budget, option by option.

    python -m benchmarks.native
    python -m benchmarks.native --teacher Qwen/Qwen3-0.6B --text 'texts/*.txt' --keep 6 13 20 27 --block 1024 \\
        --batch 16 --budgets 600 --distill-steps 2400 --align-lr 1e-3 --mixer-lr 1e-3 --lr 3e-5
    python -m benchmarks.native --trial
    python -m benchmarks.native --write-docs

For each seed, every set of options starts from the same weights of the teacher and sees the same rows in the same
order: calibration, alignment, then distillation with softmax in the layers `--keep`. Held-out rows are the same for
all seeds, and no run trained on them. Runs on a GPU, under bf16 autocast, where there is one. Prints a table, with the
paired differences from the default, and adds its records to a JSON file after each run; runs that are there already
are not made again.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hf_hybrid as hh
from benchmarks.starts import Study
from hf_hybrid.exporting.native import NATIVE_OPTIONS
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.trainers.held_out import standard_error


PAGE = Path(__file__).parents[1] / "docs" / "native.md"
_TABLES = "## The tables"
# Records are of one study where these are equal.
_SAME = ("teacher", "keep", "tokens", "rates", "precision")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "native": NATIVE_OPTIONS,
    "no RoPE": {"rope": False},
    "no q/k norm": {"qk_norm": False},
    "no biases": {"projection_bias": False},
    "SiLU on q and k": {"silu_qk": True},
    "SiLU on q, k and v": {"silu_qk": True, "silu_v": True},
    "convolution of 4": {"short_convolution": 4},
    "no RoPE, convolution of 4": {"rope": False, "short_convolution": 4},
    "native, from the identity": NATIVE_OPTIONS,
    "native, but RoPE": NATIVE_OPTIONS | {"rope": True},
    "native, but RoPE, from the identity": NATIVE_OPTIONS | {"rope": True},
    "native, but q/k norm": NATIVE_OPTIONS | {"qk_norm": True},
    "native, but no SiLU": NATIVE_OPTIONS | {"silu_qk": False, "silu_v": False},
}


def parse_args(parser: argparse.ArgumentParser, output: str, variants: Sequence[str]) -> argparse.Namespace:
    """The options of a benchmark of hybrids with several mixer options, of which `variants` are the default ones."""
    parser.add_argument("--teacher", default="embedded", help="a folder, Hub id or GGUF file")
    parser.add_argument("--mixer", default="gated_deltanet", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", nargs="+", help="text files for rows; by default Python source, recall and copying")
    parser.add_argument("--block", type=int, help="tokens of a row; by default 256 of alignment, 128 of all else")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--budgets", type=int, nargs=1, default=[64], metavar="STEPS", help="steps of alignment")
    parser.add_argument("--distill-steps", type=int, default=160)
    parser.add_argument("--calibration-rows", type=int, default=32)
    parser.add_argument("--held-out-rows", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", type=int, nargs="*", default=[2, 3], help="layers that keep softmax")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(variants))
    parser.add_argument("--align-lr", type=float, default=3e-3)
    parser.add_argument("--mixer-lr", type=float, default=3e-3, help="of the mixers in the distillation")
    parser.add_argument("--lr", type=float, default=3e-4, help="of all else in the distillation")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    parser.add_argument("--trial", action="store_true", help="sizes that say nothing")
    parser.add_argument("--write-docs", action="store_true", help="only put the tables of --output into the page")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "native" / output)
    args = parser.parse_args()
    if args.text and args.block is None:
        args.block = 256
    if args.trial:
        args.budgets, args.distill_steps, args.seeds = [1], 1, min(args.seeds, 2)
        args.calibration_rows, args.held_out_rows, args.batch = 4, 4, 2
        args.variants = args.variants[:2]
    return args


def converted(teacher: Any, name: str) -> Any:
    """A hybrid with every layer linear and the options `name`."""
    student = hh.convert(teacher, [], mixer_options=VARIANTS[name])
    if name.endswith("from the identity"):  # not from a tenth of it, as before SiLU
        with torch.no_grad():
            for layer in decoder_layers(student):
                layer.self_attn.conv.weight[..., -1] = 1.0
    return student.requires_grad_(True)


def one(study: Study, name: str, seed: int) -> dict[str, Any]:
    """What one set of options is worth with one seed."""
    args, began = study.args, time.perf_counter()
    torch.manual_seed(seed)
    student = converted(study.teacher, name)
    rows = study.rows.train(seed, "align", args.calibration_rows)
    hh.calibrate(student, study.teacher, rows, batch_size=args.batch, precision=study.precision)
    study.align(student, study.rows.train(seed, "align", max(args.budgets) * args.batch), seed, lambda step: None)
    aligned = statistics.fmean(study.held_out.kl(student))
    student.set_full_attention_layers(args.keep, study.teacher)
    study.distill(student, study.rows.train(seed, "train", args.distill_steps * args.batch), seed)
    found = {"aligned_kl": aligned, "kl": statistics.fmean(study.held_out.kl(student))}
    found |= {"recall": study.recall_of(student), "seconds": round(time.perf_counter() - began, 1)}
    return {"variant": name, "seed": seed} | found


def cell(values: list[float], sign: bool = False) -> str:
    """Mean and standard error over seeds."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {standard_error(values):.3f}"


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text: the options, means over seeds, and paired differences from the default."""
    base = {record["seed"]: record for record in records if record["variant"] == "default"}
    rows = [["options", "KL, aligned", "KL", "recall", "KL - default's", "recall - default's"]]
    for name in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == name]
        row = [name]
        for key in ("aligned_kl", "kl", "recall"):
            row.append(cell([record[key] for record in own if record[key] is not None]))
        for key in ("kl", "recall"):
            pairs = [(record[key], base[record["seed"]][key]) for record in own if record["seed"] in base]
            differences = [mine - its for mine, its in pairs if mine is not None and its is not None]
            row.append("" if name == "default" else cell(differences, sign=True))
        rows.append(row)
    return rows


def page(studies: list[dict[str, Any]]) -> str:
    """The tables of the documentation."""
    parts = []
    for study in studies:
        tokens, rows = study["tokens"], table(study["records"])
        recall = "" if study["teacher_recall"] is None else f" The teacher's recall is {study['teacher_recall']:.3f}."
        seeds = len({record["seed"] for record in study["records"]})
        rows.insert(1, ["---", *("---:" for _ in rows[0][1:])])
        parts.append(
            f"### {study['teacher']}\n\n"
            f"{study['device']}, torch {study['torch']}, precision: {study['precision']}; seeds: {seeds}. Softmax in "
            f"{study['keep']}. Tokens: {tokens['calibration']:,} of calibration, {tokens['alignment']:,} of "
            f"alignment, {tokens['distillation']:,} of distillation, {tokens['held out']:,} held out.{recall}\n\n"
            f"    {study['command']}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
        )
    return "\n".join(parts)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def about_run(args: argparse.Namespace, study: Study, script: str) -> dict[str, Any]:
    """What was run, on what."""
    length = args.block or 256
    return {
        "teacher": Path(args.teacher).name,
        "keep": args.keep,
        "tokens": {
            "calibration": args.calibration_rows * length,
            "alignment": max(args.budgets) * args.batch * length,
            "distillation": args.distill_steps * args.batch * (args.block or 128),
            "held out": study.held_out.tokens,
        },
        "rates": {"alignment": args.align_lr, "mixers": args.mixer_lr, "all else": args.lr},
        "precision": str(study.precision),
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *map(_public, sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "teacher_recall": study.recall_of(study.teacher),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args, began = (
        parse_args(parser, "native.json", [name for name in VARIANTS if "biases" not in name]),
        time.perf_counter(),
    )
    if args.write_docs:
        before, mark, _ = PAGE.read_text("utf-8").partition(_TABLES)
        PAGE.write_text(before + mark + "\n\n" + page(read(args.output)), "utf-8")
        return
    study = Study(args)
    about = {name: value for name, value in about_run(args, study, "native").items() if name in _SAME}
    others = [found for found in read(args.output) if any(found[key] != about[key] for key in about)]
    same = [found for found in read(args.output) if found not in others]
    records = same[0]["records"] if same else []
    about = about_run(args, study, "native")
    made = {(record["variant"], record["seed"]) for record in records}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.variants:
            if (name, seed) in made:
                continue
            if time.perf_counter() - began > args.seconds:
                print(f"out of time before {name!r} of seed {seed}", flush=True)
                break
            records.append(one(study, name, seed))
            print(json.dumps(records[-1]), flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps([*others, about | {"records": records}], indent=1) + "\n")
    shown = Table(*table(records)[0], title=f"{about['teacher']}, softmax in {args.keep}: mean ± s.e. over seeds")
    for row in table(records)[1:]:
        shown.add_row(*row)
    Console(width=140).print(shown)


def _public(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


if __name__ == "__main__":
    main()
