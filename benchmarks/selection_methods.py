"""Runs the selectors of the benchmark, each through `hh.score_layers`, on the aligned students of the ground truth.

    python benchmarks/selection_methods.py --teachers llama-8 --seeds 0 --cache FOLDER

Results are appended to `FOLDER/methods/TEACHER_SEED.jsonl`, one line a method: the layers it chooses for each K, its
value for every layer, and what it cost. What is there is not run again. GA-S2, GR-S2 and AVG-S2 are not run here: they
are distillations of the same kind, on the same rows, as the ground truth (`selection_truth.py`, sets of one layer and
of all but one), and `selection.py` reads them from there; a test compares both ways.
"""

import argparse
import dataclasses
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from selection_data import (
    BATCH,
    DISTILL_STEPS,
    LENGTH,
    SELECT_ROWS,
    TEACHERS,
    append_line,
    load_teacher,
    read_lines,
    rows,
)
from selection_student import LR, MIXER_LR
from transformers.utils import logging

import hf_hybrid as hh
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.synthetic import associative_recall, ordinary_token_ids
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters


KS = (1, 2, 3)
POSITIONAL = ("uniform", "uniform-last", "uniform-centre", "first", "last")


@dataclass(frozen=True)
class Method:
    """One selector: how `hh.score_layers` is called."""

    label: str
    method: str
    steps: int = 0
    rows: int = SELECT_ROWS
    nested: bool = True  # one call serves every K
    needs_k: bool = False
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    method.label: method
    for method in (
        Method("zero-shot-removal", "zero-shot-removal"),
        Method("zero-shot-linearise", "zero-shot-linearise"),
        Method("zero-shot", "zero-shot"),
        Method("zero-shot-greedy", "zero-shot-greedy", needs_k=True),
        Method("distilled-greedy", "distilled-greedy", steps=16, needs_k=True),
        Method("path-gradient", "path-gradient"),
        Method("ga-s1", "ga-s1"),
        Method("block-influence", "block-influence"),
        Method("ablation-kl", "ablation-kl"),
        Method("ablation-recall", "ablation-recall"),
        Method("ablation-ppl", "ablation-ppl"),
        Method("attention-mse", "attention-mse"),
        Method("smart", "smart", needs_k=True, nested=False),
        Method("shared", "shared", steps=24, needs_k=True),
        Method("gates", "gates", steps=24, needs_k=True, nested=False),
        *(Method(rule, rule, needs_k=True, nested=False) for rule in POSITIONAL),
    )
}


def aligned_student(name: str, seed: int, teacher: Any, path: Path) -> Any:
    """The all-linear student of this teacher and seed as the ground truth aligned it."""
    torch.manual_seed(seed)
    student = hh.convert(teacher, [])
    with torch.no_grad():
        for parameter, value in zip(mixer_parameters(student), torch.load(path), strict=True):
            parameter.copy_(value)
    return student


def run_method(
    method: Method, student: Any, teacher: Any, train: Any, held_out: Any, seed: int, device: str
) -> dict[str, Any]:
    """The sets that one selector chooses for every K of KS, with its cost."""
    num_layers = len(decoder_layers(teacher))
    options = dict(method.options)
    if method.method == "ablation-recall":
        generator = torch.Generator().manual_seed(2 * 10**6 + seed)
        ids = ordinary_token_ids(hh.embedded_tokenizer())
        options["task"] = associative_recall(len(held_out), LENGTH, ids, generator)
    with tempfile.TemporaryDirectory() as scratch:
        args = hh.DistillationConfig(
            output_dir=scratch,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=24,
            learning_rate=LR,
            mixer_learning_rate=MIXER_LR,
            train_sampling_strategy="sequential",
            use_cpu=device == "cpu",
            seed=seed,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            max_steps=max(1, method.steps),
        )
        scored, sets = [], {}
        for k in (KS[-1:] if method.nested else KS) if method.needs_k else (None,):
            scores = hh.score_layers(
                student, teacher, train, held_out, args=args, method=method.method, k=k, options=options
            )
            scored.append(scores)
            for size in KS if method.nested else (k,):
                sets[size] = scores.top(size)
    last = scored[-1]
    return {
        "method": method.label,
        "sets": sets,
        "order": list(last.ranking)[: KS[-1]],
        "values": {score.layer: round(score.value, 6) for score in last.scores},
        "tokens": max(scores.tokens for scores in scored),
        "tokens_forward": max(scores.tokens_forward for scores in scored),
        "seconds": round(sum(scores.seconds for scores in scored) / len(scored), 3),
        "num_layers": num_layers,
        "settings": dataclasses.asdict(method),
    }


def compute(name: str, seed: int, labels: list[str], args: argparse.Namespace) -> None:
    """Runs what is missing of the selectors `labels` on one teacher and student."""
    path = args.cache / "methods" / f"{name}_{seed}.jsonl"
    done = {found["method"] for found in read_lines(path)}
    missing = [label for label in labels if label not in done]
    if not missing:
        return
    mix, aligned = TEACHERS[name].mix, args.cache / "aligned" / f"{name}_{seed}.pt"
    while not aligned.is_file() and args.wait:
        time.sleep(0.5)
    teacher = load_teacher(name).to(args.device).requires_grad_(False)
    student = aligned_student(name, seed, load_teacher(name), aligned).to(args.device)
    steps = max(method.steps for method in METHODS.values())
    train = rows(mix, "train", seed, args.train_rows, args.rows)
    train = dataclasses.replace(train, input_ids=train.input_ids[: steps * BATCH]).dataset()
    held_out = rows(mix, "score", seed, SELECT_ROWS, args.rows).dataset()
    for label in missing:
        method = METHODS[label]
        some = held_out.select(range(method.rows))
        found = run_method(method, student, teacher, train, some, seed, args.device)
        append_line(path, {"teacher": name, "seed": seed, **found})
        print(f"{name}, seed {seed}: {label} {found['sets']} in {found['seconds']:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--train-rows", type=int, default=DISTILL_STEPS * BATCH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wait", action="store_true", help="wait for students that another process aligns")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th job from I")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    jobs = [(name, seed) for seed in args.seeds for name in args.teachers]
    for name, seed in jobs[args.part[0] :: args.part[1]]:
        compute(name, seed, args.methods, args)


if __name__ == "__main__":
    main()
