"""Held-out measurements on fixed batches: the same rows, in the same order, for every model that is compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .distillation import final_hidden_states, kl_of_batch
from .losses import masked_mean
from .modes import evaluating
from .precision import AS_LOADED, Precision
from .processes import gathered, num_processes, share_of
from .teacher_trainer import call_through, model_inputs


# The teacher's final hidden states of the held-out rows are kept in host memory up to this size.
_REFERENCE_BYTES = 2**32


@dataclass
class HeldOutKL:
    """
    `KL(teacher || student)` on held-out rows.

    Args:
        per_sequence (`list[float]`): mean of each row's tokens, nats per token.
        tokens (`int`): tokens measured.
    """

    per_sequence: list[float]
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token, the mean over rows."""
        return sum(self.per_sequence) / len(self.per_sequence)

    @property
    def sem(self) -> float:
        """Standard error of `mean` over rows; 0 for a single row."""
        return standard_error(self.per_sequence)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent `values`; 0 for fewer than two."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    return (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5


@torch.no_grad()
def held_out_kl(
    student: Any,
    teacher: Any,
    dataset: Any,
    batch_size: int = 8,
    precision: Precision = AS_LOADED,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOutKL:
    """
    Measures `KL(teacher || student)` on every row of `dataset`, in order.

    Where a launcher started several processes, all of them must call this: each measures its share of the batches and
    all return the same.

    Args:
        student, teacher: causal language models with one vocabulary; they are put in eval mode and back.
        dataset (`datasets.Dataset`): rows with `input_ids`, optionally `attention_mask` and `position_ids`.
        batch_size (`int`): rows at once; rows of one batch must be of one length.
        precision ([`Precision`]): what both run in, by default each in the dtype of its weights. `Precision.of(args)`
            measures as a Trainer with `args` trains.
        progress (`Callable`, *optional*): called with how many rows are done, and how many there are.
    """
    held_out = HeldOut(dataset, teacher, batch_size, precision)
    return HeldOutKL(held_out.kl(student, progress), held_out.tokens)


def batches(dataset: Any, batch_size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the rows of `dataset` in order, `batch_size` at a time, as tensors on `device`."""
    if len(dataset) == 0:
        raise ValueError("the evaluation dataset is empty; pass at least one row of input_ids.")
    for start in range(0, len(dataset), batch_size):
        rows = dataset[start : start + batch_size]
        if not isinstance(rows, dict) or "input_ids" not in rows:
            there = f"columns {sorted(rows)}" if isinstance(rows, dict) else f"a {type(dataset).__name__}"
            raise ValueError(
                f"the evaluation dataset has no input_ids ({there}); pass a datasets.Dataset of tokenised rows."
            )
        lengths = {len(row) for row in rows["input_ids"]}
        if len(lengths) != 1:
            raise ValueError(
                f"rows {start} to {start + batch_size - 1} of the evaluation dataset have lengths {sorted(lengths)}; "
                "pack them to one length, or pad them and pass an attention_mask."
            )
        batch = {key: torch.as_tensor(value).to(device) for key, value in model_inputs(rows).items()}
        for i, mask in enumerate(batch.get("attention_mask", [])):
            if not mask.any():
                raise ValueError(
                    f"row {start + i} of the evaluation dataset is nothing but padding, so it has no mean; leave "
                    "empty texts out."
                )
        yield batch


class HeldOut:
    """
    The held-out rows, the same for everything that is compared.

    Processes share the batches out and gather the results, so that each has all of them. `answers` `[rows, T]` marks
    the tokens that a task asks for; a batch then has a column of that name. Whatever is compared runs in `precision`,
    teacher and students alike.
    """

    def __init__(
        self,
        dataset: Any,
        teacher: Any,
        batch_size: int,
        precision: Precision,
        answers: torch.Tensor | None = None,
    ) -> None:
        self.teacher = teacher
        self.precision = precision
        self.batches = list(batches(dataset, batch_size, torch.device("cpu")))
        if answers is not None:
            for batch, marks in zip(self.batches, answers.split(batch_size), strict=True):
                batch["answers"] = marks
        self.rows = sum(len(batch["input_ids"]) for batch in self.batches)
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in self.batches]
        self.tokens = sum(int(mask.sum()) for mask in masks)
        self._reference: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0

    @torch.no_grad()
    def measure(
        self,
        of_batch: Callable[[int, dict[str, torch.Tensor]], list[Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """
        `of_batch(index, batch)` gives one entry a row; returns those of all rows, in order, on every process.
        `progress` is called with how many rows are done, and how many there are.
        """
        # Sharded models need all processes in every forward pass, so where the batches do not come out even, some
        # measure the last one once more.
        last = len(self.batches) - 1
        found: list[list[Any]] = []
        for number in share_of(-(-len(self.batches) // num_processes()) * num_processes()):
            index = min(number, last)
            batch = {name: tensor.to(self.teacher.device) for name, tensor in self.batches[index].items()}
            found.append(of_batch(index, batch))
            if progress is not None:
                progress(sum(len(batch["input_ids"]) for batch in self.batches[: index + 1]), self.rows)
        return [row for rows in gathered(found)[: last + 1] for row in rows]

    def kl(self, student: Any, progress: Callable[[int, int], None] | None = None) -> list[float]:
        """`KL(teacher || student)` of each row, the mean over its tokens, in nats per token."""

        def of_batch(index: int, batch: dict[str, torch.Tensor]) -> list[float]:
            reference = self.reference(index, batch)
            given = (student, self.teacher, batch, self.precision, None, reference)
            kl = call_through(student, student, kl_of_batch, *given)
            return row_means(kl, batch.get("attention_mask"))

        with evaluating(student):
            return self.measure(of_batch, progress)

    def reference(self, index: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The teacher's final hidden states of a batch."""
        if index in self._reference:
            return self._reference[index].to(self.teacher.device)
        with evaluating(self.teacher), torch.no_grad():
            given = (self.teacher, model_inputs(batch), self.precision)
            hidden = call_through(self.teacher, self.teacher, final_hidden_states, *given)
        if self._kept_bytes + hidden.nbytes <= _REFERENCE_BYTES:
            self._reference[index] = hidden.cpu()
            self._kept_bytes += hidden.nbytes
        return hidden


def row_means(values: torch.Tensor, mask: torch.Tensor | None) -> list[float]:
    """Mean of each row of `values` `[B, T]` over the tokens that are not padding."""
    return [masked_mean(row, None if mask is None else mask[i]).item() for i, row in enumerate(values)]
