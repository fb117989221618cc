"""
Hybrids of one teacher at equal budgets: which layers keep softmax, how many, and what replaces it.

    python benchmarks/smollm2/compare.py --run RUN --held-out TEXT/held_out --output RESULTS [--minutes 20]

Starts from the aligned student and the rows of a run (`hf-hybrid run recipes/smollm2-135m.yaml`). Jobs are done in the
order of `jobs`, each leaves one JSON file in RESULTS, and one that is there is not done again: the same command goes
on after a kill, or on another day with more jobs. A job that would not end within `--minutes` is left for the next
call, which is said. Where a machine has several GPUs, the same command once for each (CUDA_VISIBLE_DEVICES) shares the
jobs among them.

Every hybrid sees the same rows in the same order and is measured on the same held-out rows and the same prompts, so
differences between two are paired.
"""

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import fnmatch
import functools
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

import hf_hybrid as hh
from hf_hybrid.data.config import DataConfig
from hf_hybrid.data.rows import CutRows, first_rows, load_rows
from hf_hybrid.environment import describe_kernels
from hf_hybrid.evaluation import cache_bytes, perplexity
from hf_hybrid.exporting.native import NATIVE_OPTIONS
from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.run.kernel_tuning import tune_kernels
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.selection import select_layers
from hf_hybrid.tasks import TaskScore, ruler, ruler_cases
from hf_hybrid.teacher.loading import load_model, load_pair
from hf_hybrid.trainers import AlignmentConfig, AlignmentTrainer, DistillationConfig, DistillationTrainer
from hf_hybrid.trainers.durable import read_json, write_json
from hf_hybrid.trainers.held_out import HeldOut, standard_error
from hf_hybrid.trainers.precision import AS_LOADED, Precision


DOMAINS = ("prose", "code", "textbook", "instructions")
SCORES = ("verified", "zero-shot-linearise", "zero-shot", "ga-s1", "ga-s2")  # the dearest last
# What is tried in the distillation of one hybrid in place of the recipe's learning rates and rows of a step.
SETTINGS: dict[str, dict[str, Any]] = {
    "rates-low": {"learning_rate": 1e-4},
    "rates-high": {"learning_rate": 1e-3},
    "mixer-rate-high": {"mixer_learning_rate": 3e-3},
    "batch-half": {"batch": 0.5},
    "batch-double": {"batch": 2.0},
}
# Of the tokens for each layer: what GA-S2 names with fewer, and with more.
GA_S2_SHARES = (0.1, 0.3, 2.0)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is spent on everything; `--trial` does each step once on a CPU."""

    score_tokens: int = 163_840  # of each short distillation that scores layers
    score_rows: int = 32
    tokens: int = 1_966_080  # of each hybrid that is compared
    long_tokens: int = 7_864_320
    batch_size: int = 8  # rows of a step
    micro_batch_size: int = 8
    held_out_rows: int = 32  # of each domain
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    cases: int = 32
    # Those after RULER of which the teacher gets any right.
    tasks: tuple[str, ...] = (
        *("single_noise", "single_prose", "multikey_prose", "multivalue", "multiquery"),
        *("variable_tracking", "frequent_words", "copying"),
    )
    block_size: int = 2048
    selectors: tuple[str, ...] = SCORES
    kept: tuple[int, ...] = (8, 4, 15)  # softmax layers; of the first, all selectors are compared
    searched: int = 4  # softmax layers of the set that swaps look for
    swaps: int = 40  # short distillations of that search at most
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)  # tokens before those that are timed
    batches: tuple[int, ...] = (1, 32)
    decoded: int = 32

    def scaled(self, share: float) -> "Size":
        """With this share of all budgets of tokens."""
        names = ("score_tokens", "tokens", "long_tokens")
        return dataclasses.replace(self, **{name: round(share * getattr(self, name)) for name in names})


TRIAL = Size(
    score_tokens=256,
    score_rows=2,
    tokens=512,
    long_tokens=1024,
    batch_size=2,
    micro_batch_size=2,
    held_out_rows=1,
    lengths=(512,),
    cases=1,
    tasks=("single_noise", "single_prose"),
    block_size=128,
    kept=(2,),
    selectors=("verified", "zero-shot"),
    searched=2,
    swaps=3,
    contexts=(64,),
    batches=(1, 2),
    decoded=2,
)


class Study:
    """The models, rows and measurements that all jobs share, and the folder of their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run: Path = args.run
        self.size = TRIAL if args.trial else Size().scaled(args.scale)
        self.trial = args.trial
        self.deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        self.recipe = Recipe.load(self.run / "recipe.yaml")
        self.seed = self.recipe.seed
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.device = torch.device(self.device)
        teacher, self.tokenizer = load_pair(self.recipe.teacher, dtype=self.recipe.dtype)
        self.teacher = teacher.to(self.device).requires_grad_(False)
        rows = load_rows(self.run / ARTEFACTS["data"])
        self.prefix = rows.packing.prefix
        self.train = CutRows(rows["train"], self.size.block_size, self.prefix)
        self.score = _first(CutRows(rows["score"], self.size.block_size, self.prefix), self.size.score_rows)
        self.precision = Precision.of(self.arguments("precision", 1))
        self.held_out = {
            name: first_rows(
                DataConfig(text_files=[str(args.held_out / f"{name}.jsonl")], block_size=self.size.block_size),
                self.tokenizer,
                self.size.held_out_rows,
            )
            for name in DOMAINS
            if (args.held_out / f"{name}.jsonl").is_file()
        }
        self.measured_on = {
            name: HeldOut(rows, self.teacher, self.size.micro_batch_size, self.precision)
            for name, rows in self.held_out.items()
        }
        # The same prompts whatever the run's seed is.
        self.cases = ruler_cases(
            self.tokenizer, tasks=self.size.tasks, lengths=self.size.lengths, cases=self.size.cases, seed=0
        )
        self.num_layers = self.teacher.config.num_hidden_layers

    def arguments(self, name: str, tokens: int, batch: float = 1.0, **changed: Any) -> DistillationConfig:
        """The settings of one distillation, the same for all that are compared; `batch` times the rows of a step."""
        size, stage = self.size, self.recipe.distill
        rows = max(1, round(batch * size.batch_size))
        micro = min(rows, size.micro_batch_size)
        steps = max(1, round(tokens / (rows * size.block_size)))
        values: dict[str, Any] = {
            "output_dir": str(self.run / "compared" / name),
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": rows // micro,
            "per_device_eval_batch_size": size.micro_batch_size,
            "seed": self.seed,
            "learning_rate": stage.learning_rate,
            "mixer_learning_rate": stage.mixer_learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(10, steps // 4),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": max(1, steps // 20),
            "bf16": self.recipe.training.get("bf16", False) and self.device.type == "cuda",
            "use_cpu": self.device.type == "cpu",
        }
        return DistillationConfig(**{**values, **changed})

    def aligned(self) -> Any:
        """The aligned student, as a run left it."""
        student = load_model(self.run / ARTEFACTS["align"], dtype=torch.float32, kernel=self.recipe.kernel)
        return student.to(self.device).requires_grad_(True)

    def hybrid(self, layers: Iterable[int]) -> Any:
        """The aligned student with softmax in `layers`."""
        student = self.aligned()
        student.set_full_attention_layers(list(layers), self.teacher)
        return student

    def converted(self, mixer: str, options: dict[str, Any], layers: Iterable[int] = ()) -> Any:
        """The teacher with another mixer, as conversion leaves it, and softmax in `layers`."""
        kernel = self.recipe.kernel
        student = hh.convert(self.teacher, list(layers), mixer=mixer, mixer_options=options, kernel=kernel)
        return student.to(device=self.device, dtype=torch.float32).requires_grad_(True)

    def as_used(self, layers: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """The teacher, then the hybrid of `layers`, each in the dtype that it is used in."""
        for name, source in (("teacher", self.teacher), ("hybrid", self.hybrid(layers))):
            yield name, copy.deepcopy(source).to(self.used_dtype).eval()

    @property
    def used_dtype(self) -> torch.dtype:
        """In which models are used here."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def distil(self, name: str, student: Any, tokens: int, at: Iterable[float] = (), **changed: Any) -> dict[str, Any]:
        """Trains `student` in place; measures it, beside the end, `at` these shares of the steps."""
        args = self.arguments(name, tokens, **changed)
        set_seed(self.seed)
        trainer = DistillationTrainer(model=student, teacher=self.teacher, args=args, train_dataset=self.train)
        trainer.remove_callback(PrinterCallback)
        steps = {max(1, round(share * args.max_steps)) for share in at}
        curve = _Curve(self, student, steps, args.train_batch_size * args.gradient_accumulation_steps)
        trainer.add_callback(curve)
        start = time.perf_counter()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "tokens": args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * self.size.block_size,
            "train_seconds": round(time.perf_counter() - start - curve.seconds, 2),
            "losses": losses,
            "curve": curve.points,
            "learning_rates": [args.learning_rate, args.mixer_learning_rate],
            "rows": args.train_batch_size * args.gradient_accumulation_steps,
        }

    def kl(self, student: Any) -> dict[str, Any]:
        """Held-out KL in nats per token: of each domain with its rows, and the mean of the domains."""
        rows = {name: held_out.kl(student) for name, held_out in self.measured_on.items()}
        means = {name: statistics.fmean(values) for name, values in rows.items()}
        sem = sum(standard_error(values) ** 2 for values in rows.values()) ** 0.5 / len(rows)
        domains = {name: {"mean": means[name], "sem": standard_error(rows[name]), "rows": rows[name]} for name in rows}
        return {"mean": statistics.fmean(means.values()), "sem": sem, "domains": domains}

    def tasks(self, model: Any, *, quick: bool = False) -> list[dict[str, Any]]:
        """Tasks after RULER by likelihood; `quick` is single needles of one length, for curves."""
        cases = self.cases
        if quick:
            length = self.size.lengths[min(2, len(self.size.lengths) - 1)]
            cases = [case for case in cases if case.length == length and case.task == "single_prose"]
        scores: list[TaskScore] = ruler(model, self.tokenizer, cases=cases, precision=self.precision)
        return [dataclasses.asdict(score) for score in scores]

    def measure(self, model: Any) -> dict[str, Any]:
        """Everything about a finished hybrid."""
        perplexities = {
            name: perplexity(model, rows, self.size.micro_batch_size, self.precision)
            for name, rows in self.held_out.items()
        }
        context = self.teacher.config.max_position_embeddings
        return {
            "num_layers": self.num_layers,
            "kl": self.kl(model),
            "perplexity": perplexities,
            "ruler": self.tasks(model),
            "cache_bytes": {"context": context, "bytes": cache_bytes(model, context)},
        }

    def sets(self, k: int) -> dict[tuple[int, ...], list[str]]:
        """The sets of `k` layers that the selectors name, with the names of those that agree."""
        found: dict[tuple[int, ...], list[str]] = {}
        named: dict[str, list[int]] = {}
        for method in SCORES:
            path = self.folder / (f"score-{method}-{k}.json" if method == "verified" else f"score-{method}.json")
            if path.is_file():
                named[method] = hh.LayerScores.load(path.with_suffix(".scores.json")).top(k)
        named["uniform"] = select_layers("uniform", k, self.num_layers)
        for seed in (0, 1):
            named[f"random-{seed}"] = select_layers("random", k, self.num_layers, seed=seed)
        for name, layers in named.items():
            found.setdefault(tuple(layers), []).append(name)
        return found

    def add_selectors(self, name: str, names: list[str]) -> None:
        """Says in the record of a hybrid, where it is there, who else chose its layers."""
        record = read_json(self.folder / f"{name}.json")
        if record is not None and not set(names) <= set(record["selectors"]):
            record["selectors"] = list(dict.fromkeys([*record["selectors"], *names]))
            write_json(self.folder / f"{name}.json", record)


class _Curve(TrainerCallback):
    """Measures the student between two steps of its training."""

    def __init__(self, study: Study, student: Any, steps: set[int], batch_size: int) -> None:
        self.study, self.student, self.steps, self.batch_size = study, student, steps, batch_size
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps and state.global_step < state.max_steps:
            start = time.perf_counter()
            tokens = state.global_step * self.batch_size * self.study.size.block_size
            kl = self.study.kl(self.student)
            needle = self.study.tasks(self.student, quick=True)
            self.points.append({"tokens": tokens, "kl": kl["mean"], "sem": kl["sem"], "ruler": needle})
            self.seconds += time.perf_counter() - start


def _first(rows: CutRows, count: int) -> Dataset:
    """The first rows as a dataset."""
    return Dataset.from_dict({name: column.tolist() for name, column in rows[: min(count, len(rows))].items()})


# The name of a job, its kind (jobs of a kind take alike long) and its work; None where what comes next looks at the
# results of all before it.
Job = tuple[str, str, Callable[[Study], dict[str, Any]]] | None


def jobs(study: Study) -> Iterable[Job]:
    """All jobs, the most telling first, made as they are asked for: which hybrids there are follows from scores."""
    size, most = study.size, study.size.kept[0]
    uniform = select_layers("uniform", most, study.num_layers)
    yield "teacher", "measure", lambda study: study.measure(study.teacher)
    yield "aligned", "measure", lambda study: study.measure(study.aligned())

    def score(method: str, k: int) -> Job:
        if method == "verified":  # each set is another search
            return f"score-{method}-{k}", method, lambda study: scored(study, method, k, size.score_tokens)
        return f"score-{method}", method, lambda study: scored(study, method, None, size.score_tokens)

    def hybrids(k: int, *selectors: str) -> Iterable[Job]:
        for layers, names in study.sets(k).items():
            if not selectors or not set(selectors).isdisjoint(names):
                yield of_layers(layers, names)

    def of_layers(layers: Iterable[int], names: list[str]) -> Job:
        name = f"k{len(list(layers))}-{_named(layers)}"
        study.add_selectors(name, names)
        return name, "hybrid", functools.partial(hybrid, layers=layers, names=names, tokens=size.tokens)

    for method in size.selectors[:-1]:
        yield score(method, most)
    yield None
    yield score(size.selectors[-1], most)  # the dearest: others go on meanwhile
    yield from hybrids(most)
    for k in size.kept[1:]:
        yield score("verified", k)
    yield None
    yield from hybrids(most)
    for k in size.kept[1:]:
        yield from hybrids(k, "uniform", "verified", "ga-s2")
    yield None
    best = best_of(study, most)
    yield "speed", "measure", lambda study: speed(study, best)
    yield "speed-compiled", "compiled", lambda study: compiled_speed(study, best)
    window, sinks = {"window": state_window(study)}, {"window": 128, "sinks": 4}
    for name, mixer, options, layers in (
        ("native", "gated_deltanet", NATIVE_OPTIONS, best),
        ("convolution", "gated_deltanet", {"short_convolution": 4}, best),
        ("kda", "kimi_delta_attention", {}, best),
        ("window-state", "sliding_window", window, best),
        ("window-sinks", "sliding_window", sinks, best),
        ("window-sinks-uniform", "sliding_window", sinks, uniform),  # does the choice of layers matter then?
    ):
        work = functools.partial(other_mixer, name=name, mixer=mixer, options=options, layers=layers)
        yield f"mixer-{name}", "mixer", work
    work = functools.partial(chosen_for, name="window-sinks-chosen", mixer="sliding_window", options=sinks, k=most)
    yield "mixer-window-sinks-chosen", "mixer", work
    work = functools.partial(untrained, mixer="sliding_window", options=sinks, layers=best)
    yield "mixer-window-sinks-untrained", "measure", work
    yield "long", "long", lambda study: hybrid(study, best, [f"best of {most}"], size.long_tokens)
    yield "search", "search", lambda study: search(study, size.searched)
    if "ga-s2" in size.selectors:
        for share in GA_S2_SHARES:
            work = functools.partial(scored, method="ga-s2", k=None, tokens=round(share * size.score_tokens))
            yield f"score-ga-s2-{share}", f"ga-s2-{share}", functools.partial(work, name=f"score-ga-s2-{share}")
    for name, changed in SETTINGS.items():
        work = functools.partial(setting, name=f"setting-{name}", layers=uniform, changed=changed)
        yield f"setting-{name}", "setting", work
    yield None
    # "window-sinks": the layers that windows want, with the run's mixer. Are they what retrieval needs whatever takes
    # the place of softmax?
    for job, selector in (("search", "search"), ("mixer-window-sinks-chosen", "window-sinks")):
        found = read_json(study.folder / f"{job}.json")
        if found is not None:
            yield of_layers(found["layers"], [selector])


def _named(layers: Iterable[int]) -> str:
    return "-".join(map(str, layers))


def best_of(study: Study, k: int) -> tuple[int, ...]:
    """The set of `k` layers whose hybrid has the lowest held-out KL so far; uniform where there is none."""
    found = [read_json(path) for path in sorted(study.folder.glob(f"k{k}-*.json"))]
    # Not one that comes after the jobs that are made in the best set: they would be in others on another day.
    found = [record for record in found if record["selectors"] != ["window-sinks"]]
    if not found:
        return tuple(select_layers("uniform", k, study.num_layers))
    return tuple(min(found, key=lambda job: job["kl"]["mean"])["layers"])


def search(study: Study, k: int) -> dict[str, Any]:
    """
    Swaps one layer for another around the best set of `k` layers so far, and keeps what a short distillation says is
    better on the rows that scores are made on: how far is the choice of a method from the best that can be found? Not
    the optimum, but a stronger search than any of the methods.
    """
    size = study.size
    held_out = HeldOut(study.score, study.teacher, size.micro_batch_size, study.precision)
    # Layers that some method wants first.
    sets = sorted(study.sets(k), key=lambda layers: -len(study.sets(k)[layers]))
    pool = list(dict.fromkeys([layer for layers in sets for layer in layers] + list(range(study.num_layers))))
    # What was tried stays beside the run: the same search goes on after a kill.
    partial = study.run / "compared" / f"search-{k}-{size.score_tokens}.partial.json"
    tried = {tuple(one["layers"]): one["kl"] for one in (read_json(partial) or [])}

    def seen() -> list[dict[str, Any]]:
        return [{"layers": list(layers), "kl": value} for layers, value in tried.items()]

    def kl(layers: tuple[int, ...]) -> float:
        if layers not in tried:
            student = study.hybrid(layers)
            study.distil(f"search-{_named(layers)}", student, size.score_tokens)
            tried[layers] = statistics.fmean(held_out.kl(student))
            write_json(partial, seen())
            say(f"search: {len(tried)} of {size.swaps}, {list(layers)}: KL {tried[layers]:.4f}")
        return tried[layers]

    best = next(iter(tried), best_of(study, k))  # where it began
    kl(best)
    better = True
    while better:
        better = False
        for new in (layer for layer in pool if layer not in best):
            around = [tuple(sorted({*best, new} - {old})) for old in best]
            for layers in around:
                if (layers in tried or len(tried) < size.swaps) and kl(layers) < kl(best):
                    best, better = layers, True
                    break
    return {"layers": list(best), "k": k, "evaluations": seen(), "tokens": len(tried) * size.score_tokens}


def speed(study: Study, layers: Iterable[int]) -> dict[str, Any]:
    """
    Of the teacher and of a hybrid, as they are loaded for use: prefill and decoding in tokens per second, eager and
    with the library's dynamic cache, and the bytes of that cache. Medians of three.
    """
    size, rows = study.size, []
    for name, model in study.as_used(layers):
        for context, batch in itertools.product(size.contexts, size.batches):
            prompt = min(context, model.config.max_position_embeddings - size.decoded)
            ids = torch.randint(model.config.vocab_size, (batch, prompt), device=study.device)
            timed = [_timed(study, model, ids) for _ in range(4)][1:]  # the first makes kernels ready
            prefill, decode = (statistics.median(times) for times in zip(*timed, strict=True))
            rows.append(
                {
                    "model": name,
                    "context": prompt,
                    "batch": batch,
                    "prefill_tokens_per_second": batch * prompt / prefill,
                    "decode_tokens_per_second": batch * size.decoded / decode,
                    "cache_bytes": cache_bytes(model, prompt) * batch,
                }
            )
            say(f"speed: {rows[-1]}")
    return {"layers": list(layers), "rows": rows, "dtype": str(study.used_dtype).removeprefix("torch.")}


def compiled_speed(study: Study, layers: Iterable[int]) -> dict[str, Any]:
    """
    Decoding of both as `generate(cache_implementation="static")` does it, which compiles the step on a GPU: tokens per
    second after the first, the median of three, and the seconds of the call that compiled.
    """
    size, rows = study.size, []
    for name, model in study.as_used(layers):
        # From the longest on: lengths after the first share what is compiled for them.
        for batch, context in itertools.product(
            size.batches, sorted({size.contexts[-1], size.contexts[0]}, reverse=True)
        ):
            prompt = min(context, model.config.max_position_embeddings) - size.decoded
            ids = torch.randint(model.config.vocab_size, (batch, prompt), device=study.device)
            start = time.perf_counter()
            _generated(model, ids, size.decoded)
            first = time.perf_counter() - start
            rates = [_generated(model, ids, size.decoded) for _ in range(3)]
            row = {"model": name, "context": prompt + size.decoded, "batch": batch}
            rows.append(row | {"decode_tokens_per_second": statistics.median(rates), "first_call_seconds": first})
            say(f"speed-compiled: {rows[-1]}")
    return {"layers": list(layers), "rows": rows, "dtype": str(study.used_dtype).removeprefix("torch.")}


def _generated(model: Any, ids: torch.Tensor, count: int) -> float:
    """Tokens per second of the `count` tokens that follow `ids` `[B, T]`, but for the first."""
    times: list[float] = []

    def clock(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        stopping_criteria=[clock],
    )
    return len(ids) * (len(times) - 1) / (times[-1] - times[0])


@torch.no_grad()
def _timed(study: Study, model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the prefill of `ids` and of the greedy steps after it."""

    def now() -> float:
        if study.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with AS_LOADED.running(study.device):
        start = now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        middle = now()
        for _ in range(study.size.decoded):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return middle - start, now() - middle


def state_window(study: Study) -> int:
    """Tokens of keys and values that take the bytes of one layer's recurrent state."""
    config = study.teacher.config
    width = config.hidden_size // config.num_attention_heads
    state = 4 * config.num_attention_heads * width * width  # fp32
    return state // (2 * 2 * config.num_key_value_heads * width)  # keys and values in bf16


def setting(study: Study, name: str, layers: list[int], changed: dict[str, Any]) -> dict[str, Any]:
    """The uniform hybrid, distilled with these settings in place of the recipe's."""
    student = study.hybrid(layers)
    trained = study.distil(name, student, study.size.tokens, **changed)
    return {"changed": changed} | trained | {"kl": study.kl(student)}


def scored(study: Study, method: str, k: int | None, tokens: int, name: str | None = None) -> dict[str, Any]:
    """Scores all layers with one method, and says what that cost."""
    name = name or (f"score-{method}" if k is None else f"score-{method}-{k}")
    start = time.perf_counter()
    of_run, select = study.run / ARTEFACTS["score"], study.recipe.select
    if of_run.is_file() and study.recipe.score.method == method and select.k == k:
        scores = hh.LayerScores.load(of_run)
        scores.save(study.folder / f"{name}.scores.json")
        seconds = read_json(study.run / "seconds.json")["score"]
        return costs(scores, k, seconds)
    scores = score_layers(study, study.aligned(), method, k, tokens, name)
    scores.save(study.folder / f"{name}.scores.json")
    return costs(scores, k, time.perf_counter() - start)


def score_layers(study: Study, student: Any, method: str, k: int | None, tokens: int, name: str) -> hh.LayerScores:
    """The scores of all layers of `student`, whose mixers are aligned, with one method."""
    return hh.score_layers(
        student,
        study.teacher,
        study.train,
        study.score,
        args=study.arguments(name, tokens),
        tokens_per_layer=tokens,
        method=method,
        k=k,
        output_dir=study.run / "compared" / name,
        # Not the hundreds of steps in between.
        steps=lambda done, total, text: say(f"{name}: {done:.0f} of {total}, {text}") if done == int(done) else None,
    )


def costs(scores: hh.LayerScores, k: int | None, seconds: float) -> dict[str, Any]:
    """What a method chose, the best layer first where it ranks them, and what that took."""
    ranking = scores.ranking if k is None else scores.top(k)
    tokens = {"tokens_forward_backward": scores.tokens, "tokens_forward": scores.tokens_forward}
    return {"method": scores.method, "k": k, "ranking": ranking, **tokens, "seconds": round(seconds, 2)}


def hybrid(study: Study, layers: Iterable[int], names: list[str], tokens: int) -> dict[str, Any]:
    """One hybrid, distilled and measured, its curve included."""
    student = study.hybrid(layers)
    trained = study.distil(_named(layers), student, tokens, at=(0.125, 0.25, 0.5))
    return {"layers": list(layers), "selectors": names, "mixer": "gated_deltanet"} | trained | study.measure(student)


def other_mixer(study: Study, name: str, mixer: str, options: dict[str, Any], layers: Iterable[int]) -> dict[str, Any]:
    """The hybrid of `layers` with another mixer, which is aligned first, as the run's was."""
    student = study.converted(mixer, options)
    tune(study, student)
    size, stage = study.size, study.recipe.align
    block = stage.block_size or size.block_size
    train = CutRows(load_rows(study.run / ARTEFACTS["data"])["train"], block, study.prefix)
    if mixer != "sliding_window":  # which has nothing to calibrate; the run's students were calibrated too
        rows = _first(train, max(1, 16_384 // block))
        hh.calibrate(student, study.teacher, rows, batch_size=stage.batch_size, precision=study.precision)
    steps = max(1, round(stage.tokens / (stage.batch_size * block)))
    values = {
        field.name: getattr(study.arguments(f"align-{name}", 1), field.name)
        for field in dataclasses.fields(AlignmentConfig)
        if field.init and field.name in ("output_dir", "bf16", "use_cpu", "seed", "report_to", "save_strategy")
    }
    args = AlignmentConfig(
        **values,
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        disable_tqdm=True,
        logging_steps=max(1, steps // 20),
    )
    set_seed(study.seed)
    trainer = AlignmentTrainer(model=student, teacher=study.teacher, args=args, train_dataset=train)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    student.set_full_attention_layers(list(layers), study.teacher)
    trained = study.distil(f"mixer-{name}", student, size.tokens)
    about = {"layers": list(layers), "mixer": mixer, "mixer_options": options}
    about["align_tokens"] = steps * stage.batch_size * block
    return about | trained | study.measure(student)


def chosen_for(study: Study, name: str, mixer: str, options: dict[str, Any], k: int) -> dict[str, Any]:
    """The hybrid of the `k` layers that `verified` chooses for a mixer that has nothing to learn before."""
    scores = score_layers(
        study, study.converted(mixer, options), "verified", k, study.size.score_tokens, f"score-{name}"
    )
    return {"selectors": ["verified"]} | other_mixer(study, name, mixer, options, scores.top(k))


def untrained(study: Study, mixer: str, options: dict[str, Any], layers: Iterable[int]) -> dict[str, Any]:
    """The hybrid of `layers` as conversion leaves it, with a mixer that has nothing to learn."""
    about = {"layers": list(layers), "mixer": mixer, "mixer_options": options, "align_tokens": 0, "tokens": 0}
    return about | study.measure(study.converted(mixer, options, layers))


def tune(study: Study, student: Any) -> None:
    """Kernels made ready before the first step."""
    rows = study.size.micro_batch_size
    tune_kernels(student, rows=rows, packed=True, precision=study.precision, say=say, tokens=study.size.block_size)


def command() -> str:
    """What this process was called with, without the folders of this machine."""
    words = [f".../{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/smollm2/compare.py", *words])


def say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


class Work:
    """The jobs of a study that this process does; other processes may do others of the same study at the same time."""

    def __init__(self, study: Study, wanted: list[str]) -> None:
        self.study = study
        self.wanted = wanted  # patterns of the jobs' names
        self.names: dict[str, None] = {}  # of all jobs, in their order
        self.slowest: dict[str, float] = {}  # seconds of each kind of job, the longest so far
        self.left: list[str] = []

    def do_all(self) -> None:
        elsewhere: list[str] = []
        for job in itertools.chain(jobs(self.study), [None]):
            if job is None:
                for name in elsewhere:
                    self.wait_for(name)
                elsewhere = []
            elif self.is_wanted(job[0]) and not self.do(job):
                elsewhere.append(job[0])
        if missed := [pattern for pattern in self.wanted if not fnmatch.filter(self.names, pattern)]:
            raise ValueError(f"--jobs {' '.join(missed)} names no job; there are {', '.join(self.names)}.")
        say(f"left for another call: {', '.join(self.left)}" if self.left else "all jobs are done")

    def is_wanted(self, name: str) -> bool:
        self.names[name] = None
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.wanted)

    def do(self, job: tuple[str, str, Callable[[Study], dict[str, Any]]]) -> bool:
        """Does a job that nobody did; returns False where another process is at it."""
        name, kind, work = job
        with self.claim(name) as mine:
            if not mine:
                return False
            if self.file(name).is_file() or name in self.left:
                return True
            deadline = self.study.deadline
            if deadline is not None and time.monotonic() + self.slowest.get(kind, 0.0) > deadline:
                self.left.append(name)
                return True
            say(f"{name} ...")
            start = time.perf_counter()
            result = work(self.study)
            seconds = time.perf_counter() - start
            self.slowest[kind] = max(seconds, self.slowest.get(kind, 0.0))
            self.keep(name, seconds, result)
        return True

    def keep(self, name: str, seconds: float, result: dict[str, Any]) -> None:
        """The record of a job that is done."""
        study, on_gpu = self.study, self.study.device.type == "cuda"
        about = {"job": name, "seed": study.seed, "total_seconds": round(seconds, 2), "trial": study.trial}
        about |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "command": command()}
        write_json(self.file(name), about | {"size": dataclasses.asdict(study.size)} | result)
        shown = f"KL {result['kl']['mean']:.4f} ± {result['kl']['sem']:.4f}" if "kl" in result else ""
        say(f"{name}: {seconds:.1f} s {shown}{result.get('ranking', '')}")
        if on_gpu:
            torch.cuda.empty_cache()

    def file(self, name: str) -> Path:
        return self.study.folder / f"{name}.json"

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the job is this process's for now; the claim of a process that was killed is gone with it."""
        folder = self.study.run / "compared" / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def wait_for(self, name: str) -> None:
        """Until nobody is at the job any more, or this process's time is up."""
        deadline, said = self.study.deadline, False
        while deadline is None or time.monotonic() < deadline:
            with self.claim(name) as free:
                if free:
                    return
            if not said:
                say(f"waits for {name}, which another process does")
                said = True
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run with the aligned student")
    parser.add_argument("--held-out", type=Path, required=True, help="folder with one .jsonl file for each domain")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, a JSON file for each job")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all budgets of tokens (default: all)")
    parser.add_argument("--minutes", type=float, help="start no job that would end later than this")
    parser.add_argument("--jobs", nargs="+", default=["*"], metavar="PATTERN", help="only these, such as 'mixer-*'")
    parser.add_argument("--trial", action="store_true", help="each step once, as small as can be")
    args = parser.parse_args()
    study = Study(args)
    say(describe_kernels(study.device, study.recipe.kernel))
    tune(study, study.aligned())
    Work(study, args.jobs).do_all()


if __name__ == "__main__":
    main()
