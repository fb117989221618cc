"""
Ways to score layers that exist to be compared with: `hh.score_layers(..., method=COMPARED["gates"])`.

They have the interface of the package's own methods, and docs/selection.md says how good their sets are.
"""

from hf_hybrid.trainers.scoring.scoring_method import ScoringMethod

from .distill import AVG_S2, GR_S2
from .gates import GATES, PATH_GRADIENT
from .sets import DISTILLED_GREEDY, SHARED, ZERO_SHOT_GREEDY
from .smart import SMART
from .teacher import ABLATION_PPL, ABLATION_RECALL, ATTENTION_MSE, BLOCK_INFLUENCE


COMPARED: dict[str, ScoringMethod] = {
    method.name: method
    for method in (
        GR_S2,
        AVG_S2,
        SHARED,
        DISTILLED_GREEDY,
        ZERO_SHOT_GREEDY,
        GATES,
        PATH_GRADIENT,
        SMART,
        ABLATION_PPL,
        ABLATION_RECALL,
        ATTENTION_MSE,
        BLOCK_INFLUENCE,
    )
}
