"""How likely a model finds each next token: what perplexity and the scores of a teacher alone are made of."""

from typing import Any

import torch

from .distillation import final_hidden_states, through_head
from .losses import LogitFunction, tokens_per_chunk, widen
from .precision import Precision
from .teacher_trainer import model_inputs


def predict(model: Any, batch: dict[str, torch.Tensor], precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Negative log likelihood `[B, T - 1]` of every token but the first, in nats, and whether it was the most likely. No
    more than a chunk of logits is held.
    """
    hidden = final_hidden_states(model, model_inputs(batch), precision)[:, :-1]
    targets = batch["input_ids"][:, 1:].long()
    chunk = tokens_per_chunk(model.config.get_text_config().vocab_size, hidden.device)

    def of_chunks(hidden: torch.Tensor, logits_of: LogitFunction) -> tuple[torch.Tensor, torch.Tensor]:
        nll, right = [], []
        for part, target in zip(hidden.split(chunk), targets.flatten().split(chunk), strict=True):
            logits = widen(logits_of(part))
            nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            right.append(logits.argmax(-1) == target)
        return torch.cat(nll).view_as(targets), torch.cat(right).view_as(targets)

    return through_head(model, precision, of_chunks, hidden.flatten(0, 1))


def predicted_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which of the tokens but the first, `[B, T - 1]`, have one before them in their document, neither padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    predicted = counts[:, 1:] & counts[:, :-1]
    if "position_ids" in batch:
        predicted = predicted & (batch["position_ids"].diff(dim=-1) == 1)
    return predicted
