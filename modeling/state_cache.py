"""The library's cache with recurrent states in it: has it a place for each, and how many tokens has it seen?"""

from typing import Any

from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer


class TokenCountingLinearAttentionLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc, override]
    """Cache layer for a model without any softmax layer: a recurrent state has no length, so someone has to count."""

    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, **kwargs)
        self.is_initialized = False
        self.tokens_seen = 0

    def count(self, num_tokens: int) -> None:
        self.tokens_seen += num_tokens

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a linear-attention layer caches no keys and values; call update_recurrent_state.")

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.tokens_seen = 0

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens_seen + query_length, 0


def count_tokens_in(cache: Cache) -> Cache:
    """Makes `cache` know its length: puts a counting layer first where no layer keeps keys. Returns `cache`."""
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        first: Any = cache.layers[0]
        cache.layers[0] = TokenCountingLinearAttentionLayer(number_of_states=first.number_of_states)
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
