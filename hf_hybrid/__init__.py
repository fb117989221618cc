"""Turn a softmax-attention language model into a hybrid of softmax and linear attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .conversion import ConversionReport, convert
    from .embedded import embedded_teacher, embedded_tokenizer
    from .modeling import HybridConfig, HybridForCausalLM
    from .selection import select_layers, uniform_layers
    from .trainers import (
        AlignmentConfig,
        AlignmentTrainer,
        DistillationConfig,
        DistillationTrainer,
        LayerScores,
        held_out_kl,
        score_layers,
    )

__version__ = "0.1.0"

# Where each public name lives. Imported on first use: torch and transformers take seconds, `--help` must not.
_HOME = {
    "AlignmentConfig": "trainers",
    "AlignmentTrainer": "trainers",
    "ConversionReport": "conversion",
    "DistillationConfig": "trainers",
    "DistillationTrainer": "trainers",
    "HybridConfig": "modeling",
    "HybridForCausalLM": "modeling",
    "LayerScores": "trainers",
    "convert": "conversion",
    "embedded_teacher": "embedded",
    "embedded_tokenizer": "embedded",
    "held_out_kl": "trainers",
    "score_layers": "trainers",
    "select_layers": "selection",
    "uniform_layers": "selection",
}

__all__ = [
    "AlignmentConfig",
    "AlignmentTrainer",
    "ConversionReport",
    "DistillationConfig",
    "DistillationTrainer",
    "HybridConfig",
    "HybridForCausalLM",
    "LayerScores",
    "convert",
    "embedded_teacher",
    "embedded_tokenizer",
    "held_out_kl",
    "score_layers",
    "select_layers",
    "uniform_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
