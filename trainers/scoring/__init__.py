"""
Which layers are worth their softmax attention: [`score_layers`] and the methods that it can run.

`methods.py` has the entry and the table of methods, `job.py` what every method works with and keeps,
`scoring_method.py` the record that describes a method, `scores.py` its result. The methods: `distill.py` (GA-S2, the
paper's), `verified.py`, `zero_shot.py`, `teacher.py` (what the teacher alone says), `rules.py` (positions).
"""

from .both_attentions import BothAttentions
from .methods import METHODS, method_of, score_layers
from .scores import LayerScore, LayerScores
from .scoring_method import Range, ScoringMethod


__all__ = [
    "METHODS",
    "BothAttentions",
    "LayerScore",
    "LayerScores",
    "Range",
    "ScoringMethod",
    "method_of",
    "score_layers",
]
