"""The library's cache with recurrent states in it: has it a place for each, and how many tokens has it seen?"""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticCache,
)


class TokenCountingLinearAttentionLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc, override]
    """
    Cache layer for a model without any softmax layer: a recurrent state has no length, so someone has to count.

    Args:
        static (`bool`): whether the count is a tensor that is written in place, as in the library's static layers: a
            compiled step would be compiled again for every other number.
    """

    is_sliding = False

    def __init__(self, static: bool = False, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, **kwargs)
        self.is_initialized = False
        self.static = static
        self.tokens_seen: Any = 0

    def count(self, num_tokens: int, device: torch.device) -> None:
        if self.static and not isinstance(self.tokens_seen, torch.Tensor):
            self.tokens_seen = torch.tensor(self.tokens_seen, device=device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.tokens_seen)
        if self.static:
            self.tokens_seen.add_(num_tokens)
        else:
            self.tokens_seen += num_tokens

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a linear-attention layer caches no keys and values; call update_recurrent_state.")

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.tokens_seen *= 0

    def get_seq_length(self) -> Any:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Backbones make a mask whether a layer wants it or not: of this call's tokens, for none looks at others.
        return query_length, 0


def count_tokens_in(cache: Cache) -> Cache:
    """Makes `cache` know its length: puts a counting layer first where no layer keeps keys. Returns `cache`."""
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        first: Any = cache.layers[0]
        static = isinstance(cache, StaticCache)
        cache.layers[0] = TokenCountingLinearAttentionLayer(static, number_of_states=first.number_of_states)
    return cache


def check_cache(cache: Cache, linear_layers: list[int]) -> None:
    """Raises a `ValueError` where `cache` has no place for a recurrent state in one of `linear_layers`."""
    for i in linear_layers:
        if i >= len(cache.layers) or not isinstance(cache.layers[i], LinearAttentionCacheLayerMixin):
            found = type(cache.layers[i]).__name__ if i < len(cache.layers) else "nothing"
            raise ValueError(
                f"the cache has {found} for layer {i}, which is a linear-attention layer; make the cache from the "
                "model's config: DynamicCache(config=model.config)."
            )
