"""
Tasks that a model is measured on with lm-evaluation-harness, offline. They need `pip install "hf_hybrid[eval]"`.

`cases.py` draws the tasks after RULER, `language_model.py` runs a model in memory for lm-eval, `harness.py` puts the
two together.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .cases import OFFLINE, RULER_TASKS, Case, ruler_cases
    from .generation import free_generation
    from .harness import ruler, run_tasks
    from .scores import TaskScore

_HOME = {
    "OFFLINE": "cases",
    "RULER_TASKS": "cases",
    "Case": "cases",
    "TaskScore": "scores",
    "free_generation": "generation",
    "ruler": "harness",
    "ruler_cases": "cases",
    "run_tasks": "harness",
}

__all__ = ["OFFLINE", "RULER_TASKS", "Case", "TaskScore", "free_generation", "ruler", "ruler_cases", "run_tasks"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] in ("generation", "harness") and find_spec("lm_eval") is None:
        raise ValueError('the tasks need lm-evaluation-harness; install it: pip install "hf_hybrid[eval]".')
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
