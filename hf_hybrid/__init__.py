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
    from .card import save_model
    from .conversion import ConversionReport, convert
    from .evaluation import Evaluation, evaluate_model
    from .exporting.export import ExportReport, export, import_native, layouts_of
    from .hub import push
    from .run.recipe import Recipe
    from .run.runner import run_recipe
    from .selection import select_layers, uniform_layers
    from .teacher.embedded import embedded_teacher, embedded_tokenizer
    from .teacher.loading import load_pair

__version__ = "0.3.0"

# Where each public name lives. Imported on first use: torch and transformers take seconds, `--help` must not.
_HOME = {
    "AdapterCoverage": "adapters",
    "AlignmentConfig": "trainers",
    "AlignmentTrainer": "trainers",
    "ConversionReport": "conversion",
    "DistillationConfig": "trainers",
    "DistillationTrainer": "trainers",
    "Evaluation": "evaluation",
    "ExportReport": "exporting.export",
    "HybridConfig": "modeling",
    "HybridForCausalLM": "modeling",
    "HybridTrainer": "trainers",
    "HybridTrainingArguments": "trainers",
    "LayerScores": "trainers",
    "Recipe": "run.recipe",
    "adapter_coverage": "adapters",
    "calibrate": "trainers",
    "convert": "conversion",
    "embedded_teacher": "teacher.embedded",
    "embedded_tokenizer": "teacher.embedded",
    "evaluate_model": "evaluation",
    "export": "exporting.export",
    "held_out_kl": "trainers",
    "import_native": "exporting.export",
    "layouts_of": "exporting.export",
    "load_pair": "teacher.loading",
    "lora_config": "adapters",
    "lora_targets": "adapters",
    "push": "hub",
    "run_recipe": "run.runner",
    "save_model": "card",
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
    "Evaluation",
    "ExportReport",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridTrainer",
    "HybridTrainingArguments",
    "LayerScores",
    "Recipe",
    "adapter_coverage",
    "calibrate",
    "convert",
    "embedded_teacher",
    "embedded_tokenizer",
    "evaluate_model",
    "export",
    "held_out_kl",
    "import_native",
    "layouts_of",
    "load_pair",
    "lora_config",
    "lora_targets",
    "push",
    "run_recipe",
    "save_model",
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
