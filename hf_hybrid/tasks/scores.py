"""What a model scored in tasks, with standard errors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_hybrid.trainers.held_out import standard_error


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
        return sum(differences) / len(differences), standard_error(differences)


@dataclass
class Figure:
    """A mean over prompts and its standard error."""

    mean: float
    sem: float


@dataclass
class GenerationSample:
    """What a model, and its teacher, wrote behind one prompt."""

    prompt: str
    text: str
    teacher_text: str | None = None


@dataclass
class GenerationScore:
    """
    Free greedy generation.

    Args:
        prompts, new_tokens (`int`): how many prompts, and tokens behind each, at most.
        agreement (`Figure`, *optional*): share of tokens that are the teacher's at the same place.
        common_prefix (`Figure`, *optional*): tokens until the first that is not the teacher's.
        repetition, teacher_repetition (`Figure`): share of runs of four tokens that were in the text before.
        looping, teacher_looping (`Figure`): share of texts that end in a loop.
        samples (`list[GenerationSample]`): the texts.
    """

    prompts: int
    new_tokens: int
    agreement: Figure | None = None
    common_prefix: Figure | None = None
    repetition: Figure | None = None
    looping: Figure | None = None
    teacher_repetition: Figure | None = None
    teacher_looping: Figure | None = None
    samples: list[GenerationSample] = field(default_factory=list)


def share_error(scores: Sequence[float]) -> float:
    """
    The standard error of the mean of `scores` between 0 and 1, of independent cases.

    Two cases of score 1 and two of score 0 are added first (Agresti and Coull, 1998), so that a task in which every
    case went right, or none did, is not without any doubt.
    """
    added = [*scores, 1.0, 1.0, 0.0, 0.0]
    center = sum(added) / len(added)
    return float((sum((score - center) ** 2 for score in added) / len(added) / len(added)) ** 0.5)
