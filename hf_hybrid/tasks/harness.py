"""Our tasks as tasks of lm-evaluation-harness, which is the one engine for them and for its own."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble

from hf_hybrid.trainers.held_out import standard_error
from hf_hybrid.trainers.precision import AS_LOADED, Precision

from .cases import RULER_TASKS, Case, Slot, ruler_cases
from .language_model import ModelLM
from .repetition import repetition


FORMS = ("likelihood", "generation")


@dataclass
class TaskScore:
    """
    What a model scored in one task.

    Args:
        task (`str`): its name.
        form (`str`): `likelihood`, `generation`, or the name of lm-eval's metric.
        mean, sem (`float`): the mean over cases and its standard error, see [`share_error`]; None where there is none.
        count (`int`): cases.
        length (`int`, *optional*): tokens of a case.
        scores (`list[float]`): of each case, in an order that is the same for all models with one tokenizer, so that
            differences between models can be taken case by case.
        repetition (`float`, *optional*): of generated texts, the mean of [`repetition`].
    """

    task: str
    form: str
    mean: float
    sem: float | None
    count: int
    length: int | None = None
    scores: list[float] = field(default_factory=list)
    repetition: float | None = None

    def minus(self, other: "TaskScore") -> tuple[float, float]:
        """How much more this scored than `other` on the same cases, and the standard error of that, paired."""
        ours, theirs = (self.task, self.form, self.length), (other.task, other.form, other.length)
        if ours != theirs or len(self.scores) != len(other.scores) or not self.scores:
            raise ValueError(
                f"{ours} with {len(self.scores)} cases and {theirs} with {len(other.scores)} are not the same cases; "
                "compare scores of one task, form, length, seed and number of cases."
            )
        differences = [a - b for a, b in zip(self.scores, other.scores, strict=True)]
        return mean(differences), standard_error(differences)


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
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is neither of {' and '.join(FORMS)}.")
    if isinstance(cases, int):
        cases = ruler_cases(tokenizer, tasks=tasks, lengths=lengths, cases=cases, seed=seed, texts=texts)
    sets: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        sets.setdefault((case.task, case.length), []).append(case)
    made = {f"{name}_{length}": CaseTask(f"{name}_{length}", some, form) for (name, length), some in sets.items()}
    lm = ModelLM(model, tokenizer, batch_size=batch_size, precision=precision)
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


def share_error(scores: Sequence[float]) -> float:
    """
    The standard error of the mean of `scores` between 0 and 1, of independent cases.

    Two cases of score 1 and two of score 0 are added first (Agresti and Coull, 1998), so that a task in which every
    case went right, or none did, is not without any doubt.
    """
    added = [*scores, 1.0, 1.0, 0.0, 0.0]
    center = mean(added)
    return float((sum((score - center) ** 2 for score in added) / len(added) / len(added)) ** 0.5)


def run_lm_eval(lm: ModelLM, tasks: dict[str, Task], **options: Any) -> dict[str, Any]:
    """What lm-eval's `evaluate` returns, for tasks by their names. The random state of the process is left alone."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        found: Any = evaluator.evaluate(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, **options)
    finally:
        logger.setLevel(level)
    return found


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
