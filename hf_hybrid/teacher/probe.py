"""Logits on a few tokens, by which two models that should be one are compared."""

from typing import Any

import torch

from hf_hybrid.trainers.modes import evaluating
from hf_hybrid.trainers.precision import AS_LOADED, Precision


PROBE_TOKENS = 16


@torch.no_grad()
def probe(model: Any, precision: Precision) -> torch.Tensor:
    """Logits in fp32 `[1, tokens, vocabulary]` over a few tokens from all over the vocabulary."""
    length = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS)
    ids = torch.arange(length, device=model.device) * (model.config.vocab_size // length)
    with evaluating(model), precision.running(model.device):
        return model(ids[None], use_cache=False).logits.float()


def sound_logits(teacher: Any) -> tuple[torch.Tensor, Precision]:
    """The teacher's logits, and what it runs in: under autocast only where its layers of several dtypes need that."""
    precision = AS_LOADED
    try:
        try:
            logits = probe(teacher, precision)
        except RuntimeError:
            precision = Precision(torch.bfloat16)
            logits = probe(teacher, precision)
    except Exception as error:  # whatever its code makes of a config that cannot be
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the teacher does not run on {PROBE_TOKENS} tokens ({type(error).__name__}: {reason}); check its config."
        ) from error
    if not torch.isfinite(logits).all():
        raise ValueError("the teacher's logits are not finite; give a sound teacher, or another dtype.")
    return logits, precision
