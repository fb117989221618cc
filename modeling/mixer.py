"""What every mixer has, whatever it puts in the place of the teacher's softmax: options, and a place in the cache."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import nn
from transformers.cache_utils import Cache

from .adopted_attention import AdoptedAttention
from .state_cache import TokenCountingLinearAttentionLayer


@dataclass
class MixerOptions:
    """Options of a mixer, `config.mixer_options`; a mixer's own are the fields of a subclass."""

    @classmethod
    def from_dict(cls, options: dict[str, Any] | None, mixer: str | None = None) -> Self:
        """The options in a dict; `mixer` is only named in the error about those that it does not have."""
        known = [field.name for field in fields(cls) if field.init]
        unknown = sorted(set(options or {}) - set(known))
        if unknown:
            raise ValueError(
                f"mixer_options {unknown} are unknown to {mixer or cls.__name__}; choose from {known}. Of several "
                "mixers, options of one go under its name, in a dict of their own."
            )
        kinds = get_type_hints(cls)
        for name, value in (options or {}).items():
            # In Python True is a 1, and every number that is not 0 is true.
            if not isinstance(value, kinds[name]) or isinstance(value, bool) != (kinds[name] is bool):
                kind = kinds[name].__name__ if isinstance(kinds[name], type) else kinds[name]
                raise ValueError(f"mixer_options[{name!r}]={value!r} is of type {type(value).__name__}; pass {kind}.")
        return cls(**(options or {}))


class Mixer(AdoptedAttention):
    """
    The teacher's attention with something else in the place of its softmax. A subclass says what, in
    [`AdoptedAttention.attend`].

    Args:
        attention (`nn.Module`): the teacher's `self_attn` of this layer.
        config (`HybridConfig`): the hybrid's config; `text_config`, `mixer`, `mixer_options` and `kernel` are read.
        layer_idx (`int`): the layer's index, which is also its index in the cache.
    """

    options_class: ClassVar[type[MixerOptions]] = MixerOptions
    # Names of parameters that are never in half precision.
    decay_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, layer_idx)
        name = config.layer_mixers[layer_idx]
        self.options: Any = self.options_class.from_dict(config.options_of(name), name)
        self.hybrid_config = config

    @property
    def kernel(self) -> str:
        """`config.kernel` as it is now."""
        return self.hybrid_config.kernel

    def init_weights(self) -> None:
        """Initialises what the teacher does not have; called after the library's own initialisation."""

    def count_tokens(self, cache: Cache, tokens: torch.Tensor) -> None:
        """Lets `cache` know of `tokens` `[B, T, ...]` more, where this layer is the one by which it counts them."""
        layer = cache.layers[self.layer_idx]
        if isinstance(layer, TokenCountingLinearAttentionLayer):
            layer.count(tokens.shape[1], tokens.device)
