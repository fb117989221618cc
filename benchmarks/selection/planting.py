"""
Heads planted in a new teacher, so that it recalls after hundreds of steps where a plain start needs thousands.

A model that recalls has a head which writes down at each token what the token before was, and in a later layer heads
that look for the place where their own token was written down so, and copy the token there (Olsson et al. 2022,
"In-context learning and induction heads", arXiv 2209.11895). [`plant`] draws such weights for the layers it is given.
Nothing is held fixed: training decides what becomes of them. All else keeps the library's initialisation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


STILL, QUICK = 0.012, 0.15  # radians a token: slower rotary pairs hardly turn in a row, quicker ones tell neighbours
EMBEDDING = 5.0  # how much larger embeddings are than the library draws them: what is copied then shows in the output
POSITION, MATCH = 36.0, 24.0  # logit of what a planted head looks for, nats


@torch.no_grad()
def plant(model: Any, previous: int, matching: Sequence[int], seed: int, enlarge: bool = True) -> None:
    """
    Plants a head of the token before in layer `previous` and heads that match and copy in each of `matching`.

    The first of `matching` asks with its own token, each later one with what the one before it found, as the next hop
    of a chain does. `model` is a Llama, Qwen2 or Qwen3 as it is initialised, with tied embeddings; `enlarge` makes
    them larger, once for all circuits.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, dim = model.config.hidden_size, model.config.head_dim
    speeds = model.model.rotary_emb.inv_freq
    still = torch.cat((speeds, speeds)) < STILL
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q.T
    # The direction `common` is in all embeddings: what reads it depends on positions alone.
    common, own, before = basis[0], basis[1 : 1 + dim], _directions(dim, hidden, generator)
    found = _directions(dim, hidden, generator)
    embeddings = model.get_input_embeddings().weight
    if enlarge:
        embeddings *= EMBEDDING
    size = embeddings.norm(dim=1).mean()
    embeddings += 0.7 * size * common
    write = 1.5 * size / dim**0.5

    quick = (speeds >= QUICK).float()
    ask = torch.cat((quick, 0 * quick))
    seen = torch.cat((quick * speeds.cos(), quick * speeds.sin()))  # `ask`, turned by one position
    layer = model.model.layers[previous].self_attn
    _look(layer, 0, torch.outer(ask, common), torch.outer(seen, common), POSITION)
    _copy(layer, 0, own, before.T * write, dim)

    asked = own
    for index in matching:
        layer = model.model.layers[index].self_attn
        for head, target in ((0, own), (1, found)):
            query, key = torch.zeros(dim, hidden), torch.zeros(dim, hidden)
            query[still], key[still] = asked[: still.sum()], before[: still.sum()]
            _look(layer, head, query, key, MATCH)
            _copy(layer, head, own, target.T * write, dim)
        asked = found


def _directions(dim: int, hidden: int, generator: torch.Generator) -> Tensor:
    """`[dim, hidden]`, rows orthonormal."""
    return torch.linalg.qr(torch.randn(hidden, dim, generator=generator)).Q.T


def _look(layer: Any, head: int, query: Tensor, key: Tensor, logit: float) -> None:
    """Makes `head` of attention `layer` look with `query` and `key` `[dim, hidden]`."""
    kv, dim = head // layer.num_key_value_groups, len(query)
    # A row of length 1 reads about 1 of a normed input.
    strength = (logit * dim**0.5 / query.norm().square()) ** 0.5
    if layer.config.model_type == "qwen3":
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.fill_((logit / dim**0.5) ** 0.5)
    layer.q_proj.weight[head * dim : (head + 1) * dim] = query * strength
    layer.k_proj.weight[kv * dim : (kv + 1) * dim] = key * strength


def _copy(layer: Any, head: int, read: Tensor, write: Tensor, dim: int) -> None:
    """Makes `head` of attention `layer` read with `read` `[dim, hidden]` and write with `write` `[hidden, dim]`."""
    kv = head // layer.num_key_value_groups
    layer.v_proj.weight[kv * dim : (kv + 1) * dim] = read
    layer.o_proj.weight[:, head * dim : (head + 1) * dim] = write
