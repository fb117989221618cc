"""Trainers of the two distillation stages and the layer scores built on them."""

from .alignment import AlignmentConfig, AlignmentTrainer
from .calibration import calibrate
from .distillation import DistillationConfig, DistillationTrainer
from .held_out import HeldOutKL, held_out_kl
from .hybrid_trainer import HybridTrainer, HybridTrainingArguments
from .scoring import LayerScore, LayerScores, score_layers
from .teacher_pass import write_teacher_topk


__all__ = [
    "AlignmentConfig",
    "AlignmentTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "HeldOutKL",
    "HybridTrainer",
    "HybridTrainingArguments",
    "LayerScore",
    "LayerScores",
    "calibrate",
    "held_out_kl",
    "score_layers",
    "write_teacher_topk",
]
