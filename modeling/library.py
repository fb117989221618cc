"""What differs between the releases of transformers that this package runs with. Nothing else here asks which it is.

- 5.24 renamed the argument and the output `past_key_values` to `cache`, in models, attention, masks and generation.
  Its own models still take the old name, with a warning, and its outputs have both. Code that is called with the
  cache, as hooks and attention modules are, gets it under the one name or the other: [`take_cache`]. Code that hands
  it on uses the name that the callee's signature has: [`cache_argument`].
- 5.24 lets a model that checkpoints activations make a cache where gradients are off; earlier releases never do, and
  neither does a hybrid, whichever the release.
"""

import inspect
from typing import Any

from transformers.cache_utils import Cache


CACHE_NAMES = ("cache", "past_key_values")
# What [`cache_argument`] found, which compiled steps read: of a `functools.cache` they would trace the function.
_CACHE_ARGUMENTS: dict[Any, str] = {}


def cache_argument(module_class: Any) -> str:
    """The name of the argument by which the forward of `module_class` takes a cache."""
    if module_class not in _CACHE_ARGUMENTS:
        _CACHE_ARGUMENTS[module_class] = _look_for_cache_argument(module_class)
    return _CACHE_ARGUMENTS[module_class]


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Takes the cache out of the keyword arguments `kwargs`, by whichever name it came; None where there is none."""
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them.")
    return caches[0] if caches else None


def _look_for_cache_argument(module_class: Any) -> str:
    named = inspect.signature(module_class.forward).parameters
    for name in CACHE_NAMES:
        if name in named:
            return name
    raise ValueError(
        f"{module_class.__name__}.forward has none of {CACHE_NAMES} among its arguments {list(named)[1:]}."
    )
