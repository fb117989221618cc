"""Training and evaluation mode, of every module by itself: PEFT and users set some apart from the rest."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def modes_kept(*models: Any) -> Iterator[None]:
    """Puts every module of `models` back into the mode that it is in now."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Puts `models` in eval mode, and each of their modules back."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield
