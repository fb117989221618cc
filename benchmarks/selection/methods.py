"""Runs the selectors of the benchmark, each through `hh.score_layers`, on the aligned students of the ground truth.

    python -m benchmarks.selection.methods --teachers llama-8 --seeds 0 --cache FOLDER
    python -m benchmarks.selection.methods --cache FOLDER --rows FOLDER/rows --processes 16 --seconds 500

Results are appended to `FOLDER/methods/TEACHER_SEED.jsonl`, one line a method: the layers it chooses for each K, its
value for every layer, and what it cost. What is there is not run again. GA-S2, GR-S2 and AVG-S2 are read from the
ground truth (`selection_truth.py`): they are distillations of the same kind, on the same rows, of sets of one layer
and of all but one. The two that say "(score_layers)" are the same once more, for their seconds and to compare both.
"""

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import statistics
import tempfile
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import hf_hybrid as hh
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.synthetic import associative_recall, ordinary_token_ids
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters
from hf_hybrid.trainers.scoring.methods import METHODS as OURS

from .compared import COMPARED
from .data import (
    BATCH,
    DISTILL_STEPS,
    LENGTH,
    SELECT_ROWS,
    TEACHERS,
    aligned_path,
    append_line,
    load_teacher,
    num_layers_of,
    read_lines,
    rows,
)
from .student import LR, MIXER_LR


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
    repeats: str | None = None  # what it is called where it is read from the ground truth


# The first form of `verified`, developed on the teachers of `dev` with 12 steps and 24 rows; the alignment's proposal,
# 6 steps and 16 rows came after the test.
TWO_PROPOSALS = {"proposals": ["zero-shot-linearise", "lazy-removal"]}
# In the order of the work: what costs little first, and last what can be spared.
METHODS = {
    method.label: method
    for method in (
        *(Method(rule, rule, needs_k=True, nested=False) for rule in POSITIONAL),
        Method("block-influence", "block-influence"),
        Method("ga-s1", "ga-s1"),
        Method("zero-shot-linearise", "zero-shot-linearise"),
        Method("zero-shot", "zero-shot"),
        Method("attention-mse", "attention-mse"),
        Method("ablation-ppl", "ablation-ppl"),
        Method("ablation-kl", "ablation-kl"),
        Method("ablation-recall", "ablation-recall"),
        Method("zero-shot-greedy", "zero-shot-greedy", needs_k=True),
        Method("path-gradient", "path-gradient"),
        Method("smart", "smart", needs_k=True, nested=False),
        Method("zero-shot-removal", "zero-shot-removal"),
        Method("verified", "verified", steps=6, rows=16, needs_k=True, nested=False),
        Method("verified, 24 rows", "verified", steps=6, needs_k=True, nested=False),
        Method("verified, 12 steps", "verified", steps=12, needs_k=True, nested=False),
        Method("verified, two proposals", "verified", steps=12, needs_k=True, nested=False, options=TWO_PROPOSALS),
        Method("gates", "gates", steps=24, needs_k=True, nested=False),
        Method("shared", "shared", steps=24, needs_k=True),
        Method("distilled-greedy", "distilled-greedy", steps=16, needs_k=True),
        Method("ga-s2 (score_layers)", "ga-s2", steps=24, repeats="ga-s2"),
        Method("ga-s2, halving", "ga-s2", steps=24, needs_k=True, options={"rounds": 4, "halving": True}),
        Method("ga-s2, stable", "ga-s2", steps=24, needs_k=True, options={"rounds": 8, "stability_window": 2}),
        Method("gr-s2 (score_layers)", "gr-s2", steps=24, repeats="gr-s2"),
    )
}


def aligned_student(name: str, seed: int, teacher: Any, path: Path) -> Any:
    """The all-linear student of this teacher and seed as the ground truth aligned it."""
    torch.manual_seed(seed)
    student = hh.convert(teacher, [])
    with torch.no_grad():
        for parameter, value in zip(mixer_parameters(student), torch.load(path, weights_only=True), strict=True):
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
            record = (OURS | COMPARED)[method.method]
            scores = hh.score_layers(student, teacher, train, held_out, args=args, method=record, k=k, options=options)
            scored.append(scores)
            for size in KS if method.nested else (k,):
                sets[size] = scores.top(size)
    last = scored[-1]
    return {
        "method": method.label,
        "sets": sets,
        "order": list(last.ranking)[: KS[-1]],
        "values": {score.layer: round(score.value, 6) for score in last.scores},
        # Of one selection: the mean where each K is one of its own.
        "tokens": round(statistics.fmean(scores.tokens for scores in scored)),
        "tokens_forward": round(statistics.fmean(scores.tokens_forward for scores in scored)),
        "most_tokens": max(scores.tokens for scores in scored),
        "seconds": round(statistics.fmean(scores.seconds for scores in scored), 3),
        "num_layers": num_layers,
        "settings": dataclasses.asdict(method),
    }


def results_path(cache: Path, name: str, seed: int) -> Path:
    """Where the selectors' results on one teacher and student are."""
    return cache / "methods" / f"{name}_{seed}.jsonl"


@dataclass(frozen=True)
class Job:
    """One selector on one teacher and student."""

    name: str
    seed: int
    label: str
    cache: Path
    rows: Path | None
    train_rows: int
    device: str


@functools.lru_cache(maxsize=64)
def _models_and_rows(job: Job) -> tuple[Any, Any, Any, Any]:
    """Student, teacher, and the rows to train and to measure on; `job` without its label."""
    mix = TEACHERS[job.name].mix
    teacher = load_teacher(job.name).to(job.device).requires_grad_(False)
    path = aligned_path(job.cache, job.name, job.seed)
    student = aligned_student(job.name, job.seed, load_teacher(job.name), path).to(job.device)
    train = rows(mix, "train", job.seed, job.train_rows, job.rows)
    steps = max(method.steps for method in METHODS.values())
    train = dataclasses.replace(train, input_ids=train.input_ids[: steps * BATCH])
    return student, teacher, train.dataset(), rows(mix, "score", job.seed, SELECT_ROWS, job.rows).dataset()


def run_job(job: Job) -> dict[str, Any]:
    """The record of one selector, made in a process of its own."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    method = METHODS[job.label]
    student, teacher, train, held_out = _models_and_rows(dataclasses.replace(job, label=""))
    try:
        found = run_method(method, student, teacher, train, held_out.select(range(method.rows)), job.seed, job.device)
    except Exception:
        _models_and_rows.cache_clear()  # the student may be left as it was in the middle of the work
        raise
    return {"teacher": job.name, "seed": job.seed, **found}


def _settings(label: str) -> dict[str, Any] | None:
    """How the selector of this label is called now; a record of other settings is made anew."""
    return dataclasses.asdict(METHODS[label]) if label in METHODS else None


def missing_jobs(args: argparse.Namespace) -> list[Job]:
    """What is not in the cache, in the order of METHODS, the teachers with the fewest layers first."""
    names = sorted(args.teachers, key=num_layers_of)
    pairs = [(name, seed) for seed in args.seeds for name in names]
    done = {
        (name, seed, record["method"])
        for name, seed in pairs
        for record in read_lines(results_path(args.cache, name, seed))
        if record["settings"] == _settings(record["method"])
    }
    return [
        Job(name, seed, label, args.cache, args.rows, args.train_rows, args.device)
        for label in METHODS
        for name, seed in pairs
        if label in args.methods and (name, seed, label) not in done
    ]


def compute(args: argparse.Namespace) -> None:
    """Runs what is missing, `args.processes` at a time, and keeps each result as soon as it is there."""
    jobs, failed = missing_jobs(args), 0
    started = time.time()
    running: dict[Future, Job] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        while jobs or running:
            late = args.seconds is not None and time.time() - started > args.seconds
            for job in () if late else _ready(jobs, args.processes - len(running)):
                jobs.remove(job)
                running[pool.submit(run_job, job)] = job
            if not running:
                if late or not args.wait:
                    break
                time.sleep(1)
                continue
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                failed += not _keep(running.pop(future), future, time.time() - started)
    for name, seed in dict.fromkeys((job.name, job.seed) for job in jobs):
        left = sum((job.name, job.seed) == (name, seed) for job in jobs)
        path = aligned_path(args.cache, name, seed)
        why = "no time left" if path.is_file() else f"there is no {path}"
        print(f"{name}, seed {seed}: {left} selectors not run, {why}", flush=True)
    if failed:
        raise SystemExit(f"{failed} selectors failed; see above")


def _ready(jobs: list[Job], count: int) -> list[Job]:
    """The first `count` jobs whose student has been aligned."""
    return list(itertools.islice((j for j in jobs if aligned_path(j.cache, j.name, j.seed).is_file()), count))


def _keep(job: Job, future: Future, seconds: float) -> bool:
    """Appends what a job found to its file; False where it failed, which is printed."""
    error = future.exception()
    if error is not None:
        print(f"{job.name}, seed {job.seed}: {job.label} failed", flush=True)
        traceback.print_exception(error)
        return False
    found = future.result()
    append_line(results_path(job.cache, job.name, job.seed), found)
    took = f"in {found['seconds']:.1f} s"
    print(f"{seconds:.0f} s: {job.name}, seed {job.seed}: {job.label} {found['sets']} {took}", flush=True)
    return True


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the results and of the aligned students")
    parser.add_argument("--rows", type=Path, help="folder that keeps the rows once drawn")
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--train-rows", type=int, default=DISTILL_STEPS * BATCH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="selectors at a time, with a thread each")
    parser.add_argument("--seconds", type=float, help="start no selector after this long")
    parser.add_argument("--wait", action="store_true", help="wait for students that another process aligns")
    return parser


if __name__ == "__main__":
    compute(parser().parse_args())
