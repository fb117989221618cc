"""A sliding window with sinks, against softmax attention with a plain mask: whole rows, pieces, padding, packing."""

import pytest
import torch
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.modeling.adopted_attention import AttentionCall
from hf_hybrid.modeling.modeling_hybrid import decoder_layers


WINDOW, SINKS = 6, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def hybrid(family: str = "qwen3", window: int = WINDOW, sinks: int = SINKS):
    torch.manual_seed(1)
    options = {"window": window, "sinks": sinks}
    return hh.convert(tiny_teacher(family, torch.float64), [1], mixer="sliding_window", mixer_options=options)


def seen_by_each(valid: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """`[B, T, T]`, by loops: what each token attends to."""
    mask = torch.zeros(*valid.shape, valid.shape[1], dtype=torch.bool)
    for b, row in enumerate(valid.tolist()):
        for t in range(len(row)):
            same = [j for j in range(t + 1) if row[j] and documents[b, j] == documents[b, t]]
            for j in same[:SINKS] + [j for j in same if j > t - WINDOW]:
                mask[b, t, j] = True
            mask[b, t, t] = True
    return mask


def reference(mixer, query, key, value, mask: torch.Tensor) -> torch.Tensor:
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", query, key) * mixer.scale
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 29, 64, 65])
@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
def test_outputs_and_gradients_are_those_of_a_mask(length: int, kind: str) -> None:
    mixer = decoder_layers(hybrid())[0].self_attn
    heads = mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads
    parts = [torch.randn(2, length, n, mixer.head_dim, dtype=torch.float64, requires_grad=True) for n in heads]
    valid, documents = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.long)
    if kind == "left":
        valid[1, : length // 3] = False
    elif kind == "right":
        valid[1, length - length // 3 :] = False
    elif kind == "packed":
        documents[0], documents[1] = torch.arange(length) // 9, torch.arange(length) // 20
    call = AttentionCall(
        torch.zeros(2, length, mixer.hidden_size, dtype=torch.float64),
        padding_mask=None if valid.all() else valid.double(),
        seq_idx=documents if kind == "packed" else None,
    )
    expected = reference(mixer, *parts, seen_by_each(valid, documents))
    found = mixer.attend(*parts, call)
    torch.testing.assert_close(found[valid], expected[valid])
    weights = torch.randn_like(expected) * valid[..., None, None]
    for own, theirs in zip(
        torch.autograd.grad((found * weights).sum(), parts),
        torch.autograd.grad((expected * weights).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("cuts", [(3, 4, 5, 40), (1, 2, 3, 20, 21, 40), (25, 26, 27, 40), (40,)])
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_pieces_with_a_cache_are_the_whole_row(cuts: tuple[int, ...], padding: int) -> None:
    model, ids = hybrid(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    start, cache, pieces = 0, None, []
    for stop in cuts:
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        start, cache = stop, out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], **CLOSE)


@torch.no_grad()
def test_packed_documents_are_rows_of_their_own() -> None:
    model, ids = hybrid(), tokens(1, 40)
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in (ids[:, :17], ids[:, 17:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **CLOSE)


@torch.no_grad()
def test_generation_and_beams_are_those_without_a_cache() -> None:
    model, ids = hybrid(), tokens(2, 20)
    for beams in (1, 3):
        settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@torch.no_grad()
def test_sinks_change_what_lies_beyond_the_window_alone() -> None:
    ids = tokens(1, 40)
    plain, sinks = hybrid(sinks=0)(ids).logits, hybrid()(ids).logits
    torch.testing.assert_close(plain[:, :WINDOW], sinks[:, :WINDOW], **CLOSE)
    assert not torch.allclose(plain[:, -1], sinks[:, -1], **CLOSE)


@pytest.mark.parametrize("sinks", [-1, True])
def test_what_is_no_number_of_tokens_is_refused(sinks: int) -> None:
    with pytest.raises(ValueError, match=r"mixer_options\['sinks'\]"):
        hybrid(sinks=sinks)
