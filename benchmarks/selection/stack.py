"""Many students of one architecture as one module: every parameter of shape `[...]` becomes one of `[N, ...]`.

A step of such a small model is bound by kernel launches, so N students that see the same rows are computed together.
Their rows are stacked along the batch, `[N * B, T, ...]`, students outermost, and whatever holds parameters multiplies
every student's rows with that student's own. The modules' own code runs in between: nothing of a mixer or of a
teacher's attention is written a second time.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def stack(module: nn.Module, n: int) -> dict[str, Tensor]:
    """
    Makes `module` compute `n` students at once, in place, and takes its parameters out of it.

    Known are linear layers, embeddings, norms with one weight per channel, and vectors that a mixer broadcasts against
    `[B, T, ...]`. Afterwards embeddings take tokens `[B, T]`, the same for every student, and return `[n * B, T, H]`;
    everything else takes and returns `[n * B, ...]`.

    Returns:
        The parameters, `[n, ...]`, by the names that `module.named_parameters()` had; tied ones once.

    Raises:
        ValueError: if a module holds parameters of another kind.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    stacked = {
        id(parameter): parameter.detach().expand(n, *parameter.shape).clone().requires_grad_()
        for parameter in module.parameters()
    }
    for part in list(module.modules()):
        own = {name: stacked[id(parameter)] for name, parameter in part.named_parameters(recurse=False)}
        if not own:
            continue
        if isinstance(part, nn.Linear):
            part.forward = functools.partial(_linear, own["weight"], own.get("bias"))
        elif isinstance(part, nn.Embedding):
            part.forward = functools.partial(_embedding, own["weight"])
        elif list(own) == ["weight"] and own["weight"].dim() == 2 and not list(part.children()):
            part.forward = functools.partial(_norm, part, own["weight"], part.forward)
        elif all(value.dim() == 2 for value in own.values()):
            part.register_forward_pre_hook(functools.partial(_spread, own))
        else:
            shapes = {name: tuple(value.shape[1:]) for name, value in own.items()}
            raise ValueError(f"{type(part).__name__} holds parameters {shapes}, which stacking does not know.")
        part._parameters.clear()
    return {names[key]: parameter for key, parameter in stacked.items()}


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    flat = x.reshape(len(weight), -1, x.shape[-1])
    out = flat @ weight.mT if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
    return out.view(*x.shape[:-1], -1)


def _embedding(weight: Tensor, ids: Tensor) -> Tensor:
    n, vocabulary, width = weight.shape
    offsets = torch.arange(0, n * vocabulary, vocabulary, device=ids.device)
    all_ids = (offsets[:, None, None] + ids).flatten(0, 1)
    return nn.functional.embedding(all_ids, weight.reshape(n * vocabulary, width))


def _norm(part: Any, weight: Tensor, forward: Callable[..., Tensor], x: Tensor, *gate: Any) -> Tensor:
    """`gate`, where there is one, is what a mixer's norm takes beside x: the gate, and how it is activated."""
    part.weight, shape = weight[:, None], (len(weight), -1, x.shape[-1])
    if gate and gate[0] is not None:
        gate = gate[0].reshape(shape), *gate[1:]
    return forward(x.reshape(shape), *gate).view(x.shape)


def _spread(own: dict[str, Tensor], part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for name, value in own.items():
        rows = len(inputs[0]) // len(value)
        setattr(part, name, value.repeat_interleave(rows, dim=0, output_size=len(inputs[0]))[:, None])
