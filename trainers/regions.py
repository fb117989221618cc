"""torch.compile of what repeats in a model: in every decoder layer, all but its attention.

The whole model is not compiled. Losses call backbones, layers and mixers one by one, each with hooks before it, and
fla's kernels are left out of any graph. What lies around the attention, norms and MLP, is elementwise work between
matrix products, one launch each where it is not compiled, and is the same code in every layer, so a few graphs serve
all of them. In linear layers fla's kernels do the elementwise work of the mixer, see `modeling/kernels.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from .losses import KL_OF_CHUNK


# Graphs of one piece of code: all modules share `nn.Module`'s, and each of their kinds is compiled with and without
# gradients and autocast. torch gives up silently at 8.
_GRAPHS = 64


def regions(model: Any) -> list[nn.Module]:
    """The modules of `model` that are compiled."""
    return [
        child
        for layer in decoder_layers(model)
        for child in layer.children()
        if child is not layer.self_attn and not isinstance(child, nn.ModuleList)
    ]


@contextlib.contextmanager
def compiled_regions(*models: Any, backend: str = "inductor", mode: str | None = None) -> Iterator[None]:
    """
    Inside, the regions of `models` and the KL of a chunk of logits run compiled, however and by whomever they are
    called; what someone compiled before stays as it is.

    Args:
        models: causal language models, with or without linear layers.
        backend, mode: as of `torch.compile`.
    """
    found = [KL_OF_CHUNK, *(module for model in models for module in regions(model))]
    found = [module for module in found if module._compiled_call_impl is None]
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS, skip_nnmodule_hook_guards=False):
        for module in found:
            module.compile(backend=backend, mode=mode)
        try:
            yield
        finally:
            for module in found:
                module._compiled_call_impl = None
