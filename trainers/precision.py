"""
In which dtype models run: one policy, which training, alignment, scoring and every measurement go through.

Weights that train are fp32. Under mixed precision (`bf16=True` or `fp16=True` of the training arguments) what runs of
them, and of the teacher beside them, runs under autocast. A measurement that decides about training (a layer's score,
a held-out KL on the way, the teacher's top k) runs as training does, teacher and student alike. One of a finished
model runs as it is loaded: in the dtype of its own weights.

Whatever runs a model takes a [`Precision`] and has no default for it. Functions for users, which measure finished
models, default to [`AS_LOADED`]. `tests/test_architecture.py` pins both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .sharding import is_sharded


_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """
    How models run.

    Args:
        autocast (`torch.dtype`, *optional*): that of autocast; None to run each model in the dtype of its own weights.
    """

    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, args: Any) -> "Precision":
        """What a Trainer with these `TrainingArguments`, under whatever launched it, trains in."""
        if args.mixed_precision not in _AUTOCAST:
            raise ValueError(
                f"mixed precision {args.mixed_precision!r} is not supported; choose one of {list(_AUTOCAST)}."
            )
        return cls(_AUTOCAST[args.mixed_precision])

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """
        Models run as this says, and not as the surroundings do. Entered again inside itself it changes nothing, and
        the outermost keeps the casts of weights: enter it once around what uses a weight often.
        """
        enabled = self.autocast is not None
        if not enabled and not torch.is_autocast_enabled(device.type):
            yield
            return
        with torch.autocast(device.type, dtype=self.autocast, enabled=enabled):
            yield

    def of_models(self, **models: nn.Module | None) -> str:
        """This, with the dtype of the weights of `models`, by their names; None for one that there is not."""
        dtypes = [f"{name} {_name(next(model.parameters()).dtype)}" for name, model in models.items() if model]
        return f"{self} ({', '.join(dtypes)})"

    def __str__(self) -> str:
        return "that of the weights" if self.autocast is None else f"{_name(self.autocast)} autocast"


AS_LOADED = Precision()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_trainable(model: nn.Module) -> None:
    """
    Raises a `ValueError` where parameters that train are in half precision. At a learning rate of 7e-6 AdamW moves a
    weight by less than half of the distance to the next bf16 number, so that 98% of them never change.
    """
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    half = [name for name, dtype in trained.items() if dtype in _HALF]
    if half:
        named = (
            f"{len(half)} of {len(trained)} parameters that train are in {_name(trained[half[0]])}, such as {half[0]}"
        )
        raise ValueError(
            f"{named}: most updates are smaller than the distance of two such numbers and would be lost. Train in "
            "fp32, under autocast for speed: model.float(), and bf16=True in the arguments. What is saved can be "
            "loaded in half precision."
        )


@contextmanager
def unprepared_afterwards(module: nn.Module) -> Iterator[None]:
    """
    Takes from `module` at the end what accelerate leaves on a model that it prepares: under mixed precision a forward
    that enters autocast for good, and the mark that it is not to be prepared again. The trainers here enter autocast
    themselves, and a model that outlives its trainer is to compute as it did before. What is sharded stays prepared.
    """
    restore = restoring_forward(module)
    left = {"_original_forward", "_is_accelerate_prepared"} - set(module.__dict__)
    try:
        yield
    finally:
        if not is_sharded(module):
            restore()
            for name in left:
                module.__dict__.pop(name, None)


def restoring_forward(module: nn.Module) -> Callable[[], None]:
    """What gives `module` the forward that it has now, its class's or one of its own."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    return restore
