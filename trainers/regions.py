"""torch.compile of what repeats in a model: norms, MLP and attention of every decoder layer.

The whole model is not compiled. Losses call backbones, layers and mixers one by one, each with hooks before it, and
fla's kernels are left out of any graph. The parts of a layer are elementwise work between matrix products, one launch
each where it is not compiled, and the same code in every layer, so a few graphs serve all of them. Of a linear layer
that is what comes before and after the mixer's own part; in that, fla's kernels do the elementwise work, see
`modeling/kernels.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_hybrid.modeling.adopted_attention import AdoptedAttention
from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from .losses import KL_OF_CHUNK


# Graphs of one piece of code: all modules share `nn.Module`'s, and each of their kinds is compiled with and without
# gradients and autocast. torch gives up silently at 8.
_GRAPHS = 64


def regions(model: Any, *, softmax: bool = True) -> list[nn.Module]:
    """The modules of `model` that are compiled; `softmax` says whether softmax attention is among them."""
    found = []
    for layer in decoder_layers(model):
        for child in layer.children():
            mixers = [module for module in child.modules() if isinstance(module, AdoptedAttention)]
            # Not what holds modules and is never called, nor what wraps a mixer, as adapters may.
            if isinstance(child, nn.ModuleList) or (mixers and mixers[0] is not child):
                continue
            if child is not layer.self_attn or mixers or softmax:
                found.append(child)
    return found


@contextlib.contextmanager
def compiled_regions(
    *models: Any, backend: str = "inductor", mode: str | None = None, softmax: bool = True
) -> Iterator[None]:
    """
    Inside, the regions of `models` and the KL of a chunk of logits run compiled, however and by whomever they are
    called; what someone compiled before stays as it is.

    Args:
        models: causal language models, with or without linear layers.
        backend, mode: as of `torch.compile`.
        softmax: whether softmax attention is compiled, too: not where hooks come and go on it.
    """
    found: list[Any] = [KL_OF_CHUNK, *(module for model in models for module in regions(model, softmax=softmax))]
    found = [module for module in found if module._compiled_call_impl is None]
    mixers = [module for module in found if isinstance(module, AdoptedAttention)]
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS, skip_nnmodule_hook_guards=False):
        for mixer in mixers:  # the graph ends before its own part, and another begins after it
            mixer.__dict__["replace_softmax"] = torch.compiler.disable(mixer.replace_softmax)
        for module in found:
            module.compile(backend=backend, mode=mode)
        try:
            yield
        finally:
            for module in found:
                module._compiled_call_impl = None
            for mixer in mixers:
                del mixer.__dict__["replace_softmax"]
