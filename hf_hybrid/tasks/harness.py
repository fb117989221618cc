"""Our tasks as tasks of lm-evaluation-harness, which is the one engine for them and for its own."""

import contextlib
import dataclasses
import logging
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from hf_hybrid.trainers.precision import AS_LOADED, Precision

from .answers import Answers
from .cases import OFFLINE, RULER_TASKS, Case, Slot, ruler_cases
from .language_model import ModelLM
from .repetition import repetition
from .scores import TaskScore, share_error


FORMS = ("likelihood", "generation")


def ruler(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (512, 1024, 2048),
    cases: int | Sequence[Case] = 50,
    seed: int = 0,
    form: str = "likelihood",
    texts: Sequence[str] | None = None,
    batch_size: int | None = None,
    precision: Precision = AS_LOADED,
    progress: Callable[[int, int], None] | None = None,
    answers: Answers | None = None,
) -> list[TaskScore]:
    """
    Measures a model in memory on the tasks after RULER, in the order of `tasks` and `lengths`.

    Args:
        model (`PreTrainedModel`), tokenizer: the model, on its device, and its tokenizer.
        tasks, lengths, seed, texts: as in [`ruler_cases`].
        cases (`int` or `list[Case]`): how many for each task and length; or those that [`ruler_cases`] drew, which
            are then measured as they are: several models are compared without drawing them again.
        form (`str`): `likelihood`: whether greedy decoding would give the answers, each behind those before it, in one
            forward pass. `generation`: what share of the answers is in the text that the model writes.
        batch_size (`int`, *optional*): rows at once, by default as many as have 32,768 tokens.
        precision ([`Precision`]): what the model runs in, by default the dtype of its weights; `Precision(
            torch.bfloat16)` for autocast.
        progress (`Callable`, *optional*): called with how many rows are done, and how many there are.
        answers ([`Answers`], *optional*): a file of answers that a killed evaluation goes on behind.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is neither of {' and '.join(FORMS)}.")
    if isinstance(cases, int):
        cases = ruler_cases(tokenizer, tasks=tasks, lengths=lengths, cases=cases, seed=seed, texts=texts)
    sets: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        sets.setdefault((case.task, case.length), []).append(case)
    made = {f"{name}_{length}": CaseTask(f"{name}_{length}", some, form) for (name, length), some in sets.items()}
    lm = ModelLM(model, tokenizer, batch_size=batch_size, precision=precision, progress=progress, answers=answers)
    samples = run_lm_eval(lm, made)["samples"]
    found = []
    for (name, length), key in zip(sets, made, strict=True):
        ordered = sorted(samples[key], key=lambda sample: sample["doc_id"])
        scores = [float(sample["score"]) for sample in ordered]
        repeated = [sample["repetition"] for sample in ordered] if form == "generation" else None
        score = TaskScore(name, form, mean(scores), share_error(scores), len(scores), length, scores)
        score.repetition = None if repeated is None else mean(repeated)
        found.append(score)
    return found


def run_lm_eval(lm: ModelLM, tasks: dict[str, Task], **options: Any) -> dict[str, Any]:
    """What lm-eval's `evaluate` returns, for tasks by their names. The random state of the process is left alone."""
    with _quiet():
        found: Any = evaluator.evaluate(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, **options)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells of errors only, and what its tasks print while they are made is not in the way of our output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


class CaseTask(Task):
    """A task of lm-eval with the cases of one task and length, in one of [`FORMS`]."""

    VERSION = 1

    def __init__(self, name: str, cases: Sequence[Case], form: str) -> None:
        self.OUTPUT_TYPE = "loglikelihood" if form == "likelihood" else "generate_until"
        # What each case says in full; without any here lm-eval would warn of its own.
        options = {"do_sample": False, "until": []} if form == "generation" else None
        self._config = TaskConfig(task=name, num_fewshot=0, output_type=self.OUTPUT_TYPE, generation_kwargs=options)
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]
        self._instances: list[Instance] | None = None
        self.docs = [dataclasses.asdict(case) for case in cases]

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return self.docs

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        text: str = doc["prompt"]
        return text

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return "".join(slot["given"] + slot["answer"] for slot in doc["slots"])

    def build_all_requests(self, **options: Any) -> None:
        """The requests of all cases, without a progress bar for each set of cases."""
        self._instances = [
            request
            for i, doc in enumerate(self.docs)
            for request in self.construct_requests(doc, self.doc_to_text(doc), metadata=(self.config.task, i, 1))
        ]

    def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> list[Instance]:
        metadata = options["metadata"]
        if self.OUTPUT_TYPE == "generate_until":
            asked = (ctx, {"do_sample": False, "until": [], "max_gen_toks": doc["new_tokens"]})
            return [Instance("generate_until", doc, asked, 0, metadata)]
        requests, text = [], ctx
        for i, slot in enumerate(Slot(**slot) for slot in doc["slots"]):
            text += slot.given
            requests.append(Instance("loglikelihood", doc, (text, slot.answer), i, metadata))
            text += slot.answer
        return requests

    def process_results(self, doc: dict[str, Any], results: Iterable[Any]) -> dict[str, float]:
        results = list(results)
        if self.OUTPUT_TYPE == "loglikelihood":
            return {"score": mean([float(is_greedy) for _, is_greedy in results])}
        return {"score": found_share(doc["task"], doc["answers"], results[0]), "repetition": repetition(results[0])}

    def aggregation(self) -> dict[str, Any]:
        return {"score": mean, "repetition": mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {"score": True, "repetition": False}


def found_share(task: str, answers: Sequence[str], text: str) -> float:
    """The share of `answers` that are in a generated `text`, as whole words or numbers."""
    found = {match.casefold() for match in re.findall(RULER_TASKS[task].answer, text)}
    return mean([float(answer.casefold() in found) for answer in answers])


def check_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Which tasks `names` ask for: ours, with `ruler` for all of them, and lm-eval's own; each once. Whether lm-eval has
    a task of that name is told when it is loaded.
    """
    ours = [one for name in names for one in (RULER_TASKS if name == "ruler" else [name]) if one in RULER_TASKS]
    theirs = [name for name in names if name != "ruler" and name not in RULER_TASKS]
    return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    lengths: Sequence[int] = (512, 1024, 2048),
    cases: int = 50,
    seed: int = 0,
    forms: Sequence[str] = FORMS[:1],
    texts: Sequence[str] | None = None,
    drawn: Sequence[Case] | None = None,
    batch_size: int | None = None,
    precision: Precision = AS_LOADED,
    progress: Callable[[int, int], None] | None = None,
    answers: Answers | None = None,
) -> list[TaskScore]:
    """
    Measures a model in memory on tasks by their names: `ruler` for all after RULER, one of these, or one of lm-eval's
    own, most of which fetch their data from the Hub.

    Args:
        model, tokenizer, lengths, seed, texts, batch_size, precision, progress, answers: as in [`ruler`].
        names (`Sequence[str]`): the tasks.
        cases (`int`): how many for each task and length; of a task of lm-eval, the first.
        forms (`Sequence[str]`): in which of [`FORMS`] ours are asked; lm-eval's have their own.
        drawn (`list[Case]`, *optional*): the cases of ours, which [`ruler_cases`] drew before: for a second model.
    """
    ours, theirs = check_names(names)
    found: list[TaskScore] = []
    common: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "progress": progress}
    common["answers"] = answers
    if ours:
        if drawn is None:
            drawn = ruler_cases(tokenizer, tasks=ours, lengths=lengths, cases=cases, seed=seed, texts=texts)
        for form in forms:
            found += ruler(model, tokenizer, cases=drawn, form=form, **common)
    if theirs:
        found += lm_eval_tasks(ModelLM(model, tokenizer, **common), theirs, lengths=lengths, cases=cases, seed=seed)
    return found


def lm_eval_tasks(
    lm: ModelLM, names: Sequence[str], *, lengths: Sequence[int], cases: int, seed: int
) -> list[TaskScore]:
    """What a model scores in tasks that lm-eval brings, of each the first `cases`, and each metric by itself."""
    state = random.getstate()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        # lm-eval's own tasks after RULER load a tokenizer by name, and draw from the random state of the process.
        lm.tokenizer.save_pretrained(folder)
        manager = TaskManager(metadata={"max_seq_lengths": list(lengths), "tokenizer": folder})
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise ValueError(
                f"there is no task {unknown[0]!r}; see hf-hybrid evaluate --tasks list, or lm-eval ls tasks."
            )
        random.seed(seed)
        try:
            tasks = manager.load(list(names))["tasks"]
        finally:
            random.setstate(state)
    found = []
    for name, task in tasks.items():
        task.set_fewshot_seed(seed)
        options: dict[str, Any] = {"limit": cases}
        if name in OFFLINE:
            # They hold as many cases of the first length, then as many of the next.
            docs = [doc["max_length"] for doc in task.eval_docs]
            starts = [docs.index(length) for length in dict.fromkeys(docs)]
            options = {"samples": {name: [start + i for start in starts for i in range(cases)]}}
        measured = run_lm_eval(lm, {name: task}, **options)
        found += _of_lengths(name, measured, lengths) if name in OFFLINE else _of_metrics(name, measured)
    return found


def _of_lengths(name: str, measured: dict[str, Any], lengths: Sequence[int]) -> list[TaskScore]:
    """lm-eval's tasks after RULER have a metric for each length, which is -1 or missing in cases of another one."""
    found = []
    for length in lengths:
        of_cases = [sample.get(str(length), -1) for sample in measured["samples"][name]]
        scores = [float(score) for score in of_cases if score != -1]
        found.append(TaskScore(name, "generation", mean(scores), share_error(scores), len(scores), length, scores))
    return found


def _of_metrics(name: str, measured: dict[str, Any]) -> list[TaskScore]:
    result, samples, found = measured["results"][name], measured["samples"][name], []
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        scores = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        # Where a metric is no mean of numbers, such as a perplexity, there is none for each case.
        scores = [float(score) for score in scores] if all(isinstance(score, int | float) for score in scores) else []
        sem = result.get(f"{metric}_stderr,{kind}")
        sem = float(sem) if isinstance(sem, int | float) else None
        found.append(TaskScore(name, metric, float(value), sem, len(samples), None, scores))
    return found
