"""Synthetic token-level tasks that measure in-context retrieval with any vocabulary.

Linear attention keeps a state of fixed size, so what a hybrid loses first is retrieval. Three tasks show it:

- `associative_recall` (multi-query associative recall): `k1 v1 k2 v2 ... k2 v2 k1 v1`; given a key, name its value.
- `chained_recall`: `b c a b ... a a c`; a key that is doubled asks for the value of its value. That takes two
  retrievals, one on top of the other, which no single attention layer can do.
- `copying`: a random segment that repeats; continue it.

All return `(input_ids, answer_mask)`. `answer_mask[b, t]` says that token `t` follows from the tokens before it, so it
is the token to be predicted by the logits at `t - 1`. All other tokens are random. Draws come from a `torch.Generator`
alone: the same seed on the same kind of device gives the same batch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_hybrid.trainers.precision import AS_LOADED, Precision


def ordinary_token_ids(tokenizer: Any, exclude: Iterable[int] = ()) -> Tensor:
    """
    The ids that the tasks may draw from: the tokenizer's vocabulary without its special and added tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer of the transformers library.
        exclude (`Iterable[int]`, *optional*): Further ids to leave out.

    Returns:
        `Tensor`: sorted int64 ids of shape `[n]`.
    """
    left_out = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ())) | set(exclude)
    return torch.tensor(sorted(set(tokenizer.get_vocab().values()) - left_out), dtype=torch.int64)


def _checked_token_ids(token_ids: Tensor, needed: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """`token_ids` on the generator's device, or a ValueError that says what is wrong with the arguments."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator (got {type(generator).__name__}): seed one yourself.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if token_ids.dim() != 1 or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(
            "token_ids must be a 1-D integer tensor of allowed token ids, "
            f"got shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}."
        )
    distinct = token_ids.unique().numel()
    if distinct != token_ids.numel():
        raise ValueError(
            f"token_ids must be distinct, got {token_ids.numel()} ids of which {distinct} differ: pass .unique()."
        )
    if distinct < needed:
        raise ValueError(
            f"too few token ids: this task needs at least {needed}, got {distinct}. "
            "Pass more token_ids or ask for a shorter length."
        )
    return token_ids.to(device=generator.device, dtype=torch.int64)


def associative_recall(
    batch_size: int,
    length: int,
    token_ids: Tensor,
    generator: torch.Generator,
    num_pairs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Multi-query associative recall: pairs of key and value are defined, then every key is asked exactly once.

    A block is `k1 v1 ... kn vn` followed by the same n pairs in a random order, `4 * num_pairs` tokens. A row is
    `length / (4 * num_pairs)` blocks one after the other, each with new pairs, so nothing is padding. For each row,
    `token_ids` is split into two random halves: keys come from the first (all keys of a row differ, across its blocks
    too, so a key is defined once and asked once), values from the second (drawn independently, so values may repeat).

    Args:
        batch_size (`int`): Number of rows.
        length (`int`): Tokens per row, a multiple of `4 * num_pairs`.
        token_ids (`Tensor`): Distinct allowed ids, 1-D, at least `length / 2` of them.
        generator (`torch.Generator`): Source of all randomness; the result lies on its device.
        num_pairs (`int`, *optional*): Pairs per block. Defaults to `length / 4`: one block that fills the row.

    Returns:
        `tuple[Tensor, Tensor]`: `input_ids` (int64) and `answer_mask` (bool, true at the value behind each asked key),
        both of shape `[batch_size, length]`.
    """
    if num_pairs is None:
        if length < 4 or length % 4:
            raise ValueError(f"length must be a positive multiple of 4 when num_pairs is not given, got {length}.")
        num_pairs = length // 4
    if num_pairs < 1 or length < 1 or length % (4 * num_pairs):
        raise ValueError(
            f"length must be a positive multiple of 4 * num_pairs (a definition and a question take 2 tokens each), "
            f"got length={length} and num_pairs={num_pairs}."
        )
    token_ids = _checked_token_ids(token_ids, length // 2, batch_size, generator)
    device, shape = generator.device, (batch_size, length // (4 * num_pairs), num_pairs)
    half = token_ids.numel() // 2

    shuffled = token_ids[torch.rand(batch_size, token_ids.numel(), generator=generator, device=device).argsort(-1)]
    keys = shuffled[:, : length // 4].view(shape)
    drawn = torch.randint(half, token_ids.numel(), (batch_size, length // 4), generator=generator, device=device)
    values = shuffled.gather(1, drawn).view(shape)

    order = torch.rand(shape, generator=generator, device=device).argsort(-1)
    definitions = torch.stack((keys, values), -1)
    questions = torch.stack((keys.gather(-1, order), values.gather(-1, order)), -1)
    input_ids = torch.stack((definitions, questions), 2)  # [batch, block, definitions | questions, pair, key | value]
    answer_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    answer_mask[:, :, 1, :, 1] = True
    return input_ids.view(batch_size, length), answer_mask.view(batch_size, length)


def chained_recall(
    batch_size: int,
    length: int,
    token_ids: Tensor,
    generator: torch.Generator,
    num_chains: int | None = None,
    hops: int = 2,
) -> tuple[Tensor, Tensor]:
    """
    Recall of several hops. Two: the pairs `a b` and `b c` of every chain are defined, then `a a` asks for `c`.

    A block is the `hops * num_chains` pairs in a random order, followed by one question for each chain, the chain's
    first token `hops` times and its last (`a a c`), again in a random order: `(3 * hops + 1) * num_chains` tokens. A
    row is filled with such blocks, each with new chains, and the last block is cut where the row ends, so nothing is
    padding. All tokens of all chains of a row differ, and the doubled `a` tells the question from one of
    `associative_recall`.

    Args:
        batch_size (`int`): Number of rows.
        length (`int`): Tokens per row, at least `(3 * hops + 1) * num_chains`.
        token_ids (`Tensor`): Distinct allowed ids, 1-D, at least `hops + 1` for each chain of a row.
        generator (`torch.Generator`): Source of all randomness; the result lies on its device.
        num_chains (`int`, *optional*): Chains per block. Defaults to as many as fit, `length // 7` for two hops.
        hops (`int`, *optional*, defaults to 2): Retrievals on top of one another that a question takes.

    Returns:
        `tuple[Tensor, Tensor]`: `input_ids` (int64) and `answer_mask` (bool, true at the `c` of each question), both
        of shape `[batch_size, length]`.
    """
    if hops < 1:
        raise ValueError(f"hops must be at least 1, got {hops}.")
    size = 3 * hops + 1
    num_chains = length // size if num_chains is None else num_chains
    if num_chains < 1 or length < size * num_chains:
        raise ValueError(
            f"length must hold a block of {size} * num_chains tokens ({2 * hops} to define each chain and {hops + 1} "
            f"to ask for it) and num_chains must be at least 1, got length={length} and num_chains={num_chains}."
        )
    blocks = -(-length // (size * num_chains))
    token_ids = _checked_token_ids(token_ids, (hops + 1) * num_chains * blocks, batch_size, generator)
    device = generator.device

    shuffled = token_ids[torch.rand(batch_size, token_ids.numel(), generator=generator, device=device).argsort(-1)]
    chains = shuffled[:, : (hops + 1) * num_chains * blocks].view(batch_size, blocks, hops + 1, num_chains)
    first, last = chains[:, :, 0], chains[:, :, -1]
    left, right = chains[:, :, :-1].flatten(2), chains[:, :, 1:].flatten(2)
    order = torch.rand(left.shape, generator=generator, device=device).argsort(-1)
    definitions = torch.stack((left.gather(-1, order), right.gather(-1, order)), -1).flatten(2)
    order = torch.rand(first.shape, generator=generator, device=device).argsort(-1)
    asked = first.gather(-1, order)
    questions = torch.stack((*[asked] * hops, last.gather(-1, order)), -1).flatten(2)
    input_ids = torch.cat((definitions, questions), -1)
    answer_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    answer_mask[..., 2 * hops * num_chains + hops :: hops + 1] = True
    return input_ids.flatten(1)[:, :length].contiguous(), answer_mask.flatten(1)[:, :length].contiguous()


def copying(
    batch_size: int,
    length: int,
    token_ids: Tensor,
    generator: torch.Generator,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """
    A random segment, repeated until the row is full.

    The tokens of a segment are drawn independently, so a token may occur in it more than once, and the continuation
    then depends on more than one earlier token. Marked are all tokens of the second and later copies but the first
    token of each copy: nothing says where a segment ends until its first token comes again.

    Args:
        batch_size (`int`): Number of rows.
        length (`int`): Tokens per row, a multiple of `segment`.
        token_ids (`Tensor`): Distinct allowed ids, 1-D, at least 2.
        generator (`torch.Generator`): Source of all randomness; the result lies on its device.
        segment (`int`, *optional*): Tokens per copy, at least 2. Defaults to `length / 2`: two copies.

    Returns:
        `tuple[Tensor, Tensor]`: `input_ids` (int64) and `answer_mask` (bool), both of shape `[batch_size, length]`.
    """
    if segment is None:
        if length < 4 or length % 2:
            raise ValueError(f"length must be even and at least 4 when segment is not given, got {length}.")
        segment = length // 2
    if segment < 2 or length < 2 * segment or length % segment:
        raise ValueError(
            f"segment must be at least 2 and length a multiple of it with at least two copies, "
            f"got length={length} and segment={segment}."
        )
    token_ids = _checked_token_ids(token_ids, 2, batch_size, generator)
    drawn = torch.randint(token_ids.numel(), (batch_size, segment), generator=generator, device=generator.device)
    answer_mask = torch.ones(batch_size, length // segment, segment, dtype=torch.bool, device=generator.device)
    answer_mask[:, 0] = False
    answer_mask[:, :, 0] = False
    return token_ids[drawn].repeat(1, length // segment), answer_mask.view(batch_size, length)


@torch.no_grad()
def task_accuracy(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    batch_size: int = 16,
    precision: Precision = AS_LOADED,
) -> float:
    """
    Top-1 accuracy at the marked tokens under teacher forcing: the logits at `t - 1` predict token `t`.

    Args:
        model (`nn.Module`): A causal language model: has `.device`, and its output has `.logits`. It is evaluated in
            eval mode and its training flag is restored afterwards.
        input_ids (`Tensor`): Tokens, `[rows, length]`, on any device.
        answer_mask (`Tensor`): Which tokens count, bool, same shape. The first token of a row has no prediction.
        batch_size (`int`, *optional*, defaults to 16): Rows per forward pass.
        precision ([`~hf_hybrid.trainers.precision.Precision`]): What the model runs in, by default the dtype of its
            weights.

    Returns:
        `float`: the share of marked tokens that were predicted right.
    """
    if input_ids.dim() != 2 or input_ids.shape != answer_mask.shape or answer_mask.dtype != torch.bool:
        raise ValueError(
            "expected input_ids [rows, length] and a bool answer_mask of the same shape, "
            f"got {tuple(input_ids.shape)} and {tuple(answer_mask.shape)} of {answer_mask.dtype}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if answer_mask[:, 0].any() or not answer_mask.any():
        raise ValueError("answer_mask must mark at least one token and never the first, which nothing predicts.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    correct = 0
    try:
        for rows, marked in zip(input_ids.split(batch_size), answer_mask.split(batch_size), strict=True):
            rows, marked = rows.to(model.device), marked.to(model.device)[:, 1:]
            with precision.running(rows.device):
                predicted = model(input_ids=rows, use_cache=False).logits[:, :-1].argmax(-1)
            correct += int((predicted == rows[:, 1:])[marked].sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return correct / int(answer_mask.sum())
