"""Turn a softmax-attention language model into a hybrid of softmax and linear attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
    from hf_hybrid.trainers import (
        AlignmentConfig,
        AlignmentTrainer,
        DistillationConfig,
        DistillationTrainer,
        HybridTrainer,
        HybridTrainingArguments,
        LayerScores,
        calibrate,
        held_out_kl,
        score_layers,
        write_teacher_topk,
    )

    from .adapters import AdapterCoverage, adapter_coverage, lora_config, lora_targets
    from .conversion import ConversionReport, convert
    from .exporting.export import ExportReport, export, import_native, layouts_of
    from .selection import select_layers, uniform_layers
    from .teacher.embedded import embedded_teacher, embedded_tokenizer

__version__ = "0.2.0"

# Where each public name lives. Imported on first use: torch and transformers take seconds, `--help` must not.
_HOME = {
    "AdapterCoverage": "adapters",
    "AlignmentConfig": "trainers",
    "AlignmentTrainer": "trainers",
    "ConversionReport": "conversion",
    "ExportReport": "exporting.export",
    "DistillationConfig": "trainers",
    "DistillationTrainer": "trainers",
    "HybridConfig": "modeling",
    "HybridForCausalLM": "modeling",
    "HybridTrainer": "trainers",
    "HybridTrainingArguments": "trainers",
    "LayerScores": "trainers",
    "adapter_coverage": "adapters",
    "calibrate": "trainers",
    "convert": "conversion",
    "embedded_teacher": "teacher.embedded",
    "embedded_tokenizer": "teacher.embedded",
    "export": "exporting.export",
    "held_out_kl": "trainers",
    "import_native": "exporting.export",
    "layouts_of": "exporting.export",
    "lora_config": "adapters",
    "lora_targets": "adapters",
    "score_layers": "trainers",
    "select_layers": "selection",
    "uniform_layers": "selection",
    "write_teacher_topk": "trainers",
}

__all__ = [
    "AdapterCoverage",
    "AlignmentConfig",
    "AlignmentTrainer",
    "ConversionReport",
    "DistillationConfig",
    "DistillationTrainer",
    "ExportReport",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridTrainer",
    "HybridTrainingArguments",
    "LayerScores",
    "adapter_coverage",
    "calibrate",
    "convert",
    "embedded_teacher",
    "embedded_tokenizer",
    "export",
    "held_out_kl",
    "import_native",
    "layouts_of",
    "lora_config",
    "lora_targets",
    "score_layers",
    "select_layers",
    "uniform_layers",
    "write_teacher_topk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
