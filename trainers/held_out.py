"""Held-out measurements on fixed batches: the same rows, in the same order, for every model that is compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .distillation import kl_of_batch
from .losses import masked_mean
from .teacher_trainer import model_inputs


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
def held_out_kl(student: Any, teacher: Any, dataset: Any, batch_size: int = 8) -> HeldOutKL:
    """
    Measures `KL(teacher || student)` on every row of `dataset`, in order.

    Args:
        student, teacher: causal language models with one vocabulary; they are put in eval mode and back.
        dataset (`datasets.Dataset`): rows with `input_ids`, optionally `attention_mask` and `position_ids`.
        batch_size (`int`): rows at once; rows of one batch must be of one length.
    """
    modes = student.training, teacher.training
    student.eval()
    teacher.eval()
    per_sequence: list[float] = []
    tokens = 0
    for batch in batches(dataset, batch_size, student.device):
        mask = batch.get("attention_mask")
        kl = kl_of_batch(student, teacher, batch)
        for i, row in enumerate(kl):
            row_mask = None if mask is None else mask[i]
            per_sequence.append(masked_mean(row, row_mask).item())
        tokens += kl.numel() if mask is None else int(mask.sum())
    student.train(modes[0])
    teacher.train(modes[1])
    return HeldOutKL(per_sequence, tokens)


def batches(dataset: Any, batch_size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the rows of `dataset` in order, `batch_size` at a time, as tensors on `device`."""
    if len(dataset) == 0:
        raise ValueError("the evaluation dataset is empty; pass at least one row of input_ids.")
    for start in range(0, len(dataset), batch_size):
        rows = dataset[start : start + batch_size]
        lengths = {len(row) for row in rows["input_ids"]}
        if len(lengths) != 1:
            raise ValueError(
                f"rows {start} to {start + batch_size - 1} of the evaluation dataset have lengths {sorted(lengths)}; "
                "pack them to one length, or pad them and pass an attention_mask."
            )
        yield {key: torch.as_tensor(value).to(device) for key, value in model_inputs(rows).items()}
