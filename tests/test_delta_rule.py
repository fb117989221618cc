"""The chunked gated delta rule against the token-by-token one, which is checked against the paper's equation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_hybrid.modeling.ops_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule


FORMS = [recurrent_gated_delta_rule, chunk_gated_delta_rule]
BATCH, HEADS, KEY, VALUE = 2, 3, 8, 12


def make_inputs(tokens: int, *, state: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64, **dims: int):
    """q, k, v, g, beta and, if asked for, initial_state."""
    torch.manual_seed(seed)
    batch, heads = dims.get("batch", BATCH), dims.get("heads", HEADS)
    key, value = dims.get("key", KEY), dims.get("value", VALUE)
    inputs = {
        "q": F.normalize(torch.randn(batch, tokens, heads, key, dtype=dtype), dim=-1),
        "k": F.normalize(torch.randn(batch, tokens, heads, key, dtype=dtype), dim=-1),
        "v": torch.randn(batch, tokens, heads, value, dtype=dtype),
        "g": -torch.rand(batch, tokens, heads, dtype=dtype),
        "beta": 2 * torch.rand(batch, tokens, heads, dtype=dtype),
    }
    if state:
        inputs["initial_state"] = torch.randn(batch, heads, key, value, dtype=dtype)
    return inputs


def run(form, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state, and the gradients of a loss that both contribute to."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    named = {name: x for name, x in leaves.items() if name not in "qkv"}
    o, final_state = form(leaves["q"], leaves["k"], leaves["v"], **named, **options)
    torch.manual_seed(99)
    weights = torch.randn(o.shape, dtype=torch.float64), torch.randn(final_state.shape, dtype=torch.float64)
    loss = (o * weights[0].to(o.dtype)).sum() + (final_state * weights[1].to(final_state.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    result = {"o": o.detach(), "final_state": final_state.detach()}
    return result | {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        bound = tolerance * (1 + x.abs().max().item())
        torch.testing.assert_close(actual[name].to(x.dtype), x, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_recurrent_form_is_the_paper_equation():
    inputs = make_inputs(5, batch=1, heads=1)
    o, final_state = recurrent_gated_delta_rule(**inputs)
    q, k, v, g, beta, state = (x[0, ..., 0, :] if x.dim() == 4 else x[0, :, 0] for x in inputs.values())
    state = inputs["initial_state"][0, 0]
    for t in range(5):
        # Eq. 10 has the state as [V, K]; this is its transpose.
        transition = g[t].exp() * (torch.eye(KEY, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t]))
        state = transition @ state + beta[t] * torch.outer(k[t], v[t])
        torch.testing.assert_close(o[0, t, 0], KEY**-0.5 * state.T @ q[t], rtol=0, atol=1e-12)
    torch.testing.assert_close(final_state[0, 0], state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "initial_state"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 63, 64, 65, 500])
def test_chunk_equals_recurrent(tokens, state):
    inputs = make_inputs(tokens, state=state)
    assert_close(run(chunk_gated_delta_rule, inputs), run(recurrent_gated_delta_rule, inputs))


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_chunk_size_and_scale(chunk_size):
    inputs = make_inputs(150)
    expected = run(recurrent_gated_delta_rule, inputs, scale=0.7)
    assert_close(run(chunk_gated_delta_rule, inputs, scale=0.7, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("dims", [{"key": 5, "value": 3}, {"key": 32, "value": 8}, {"batch": 3, "heads": 12}])
def test_other_shapes(dims):
    # The last one has more rows than are worked on at once.
    inputs = make_inputs(70, **dims)
    assert_close(run(chunk_gated_delta_rule, inputs), run(recurrent_gated_delta_rule, inputs))


@pytest.mark.parametrize("used", ["o", "final_state"])
def test_gradient_from_one_result_only(used):
    gradients = []
    for form in FORMS:
        leaves = {name: x.requires_grad_() for name, x in make_inputs(70).items()}
        o, final_state = form(**leaves)
        loss = (o if used == "o" else final_state).square().sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients.append(dict(zip(leaves, found, strict=True)))
    assert_close(gradients[1], gradients[0])


# Document lengths: boundaries at chunk edges, several documents within a chunk, one token, and longer than a chunk.
PACKINGS = {
    "edges": [64, 64, 128, 1],
    "many in a chunk": [3, 1, 7, 1, 1, 20, 40, 5, 2],
    "off the edges": [63, 2, 130, 62],
    "one": [100],
    "first token": [1, 99],
}


def seq_idx_of(lengths: list[int]) -> Tensor:
    # Not increasing, and values reappear: only a change marks a boundary.
    return torch.cat([torch.full((length,), 5 if i % 2 else 3) for i, length in enumerate(lengths)])


def run_documents_alone(inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """What `run` gives, from one call of the recurrent form per document."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs, start = [], 0
    final_state = torch.empty(0)
    for length in lengths:
        part = {name: x[:, start : start + length] for name, x in leaves.items() if name != "initial_state"}
        o, final_state = recurrent_gated_delta_rule(**part, initial_state=None if start else leaves["initial_state"])
        outputs.append(o)
        start += length
    o = torch.cat(outputs, dim=1)
    torch.manual_seed(99)
    weights = torch.randn(o.shape, dtype=torch.float64), torch.randn(final_state.shape, dtype=torch.float64)
    loss = (o * weights[0]).sum() + (final_state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    result = {"o": o.detach(), "final_state": final_state.detach()}
    return result | {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_documents_alone(form, lengths):
    inputs = make_inputs(sum(lengths), batch=1)
    seq_idx = seq_idx_of(lengths).unsqueeze(0)
    assert_close(run(form, inputs, seq_idx=seq_idx), run_documents_alone(inputs, lengths))


def test_rows_are_packed_independently():
    rows = [PACKINGS["many in a chunk"] + [20], [33, 67]]
    seq_idx = torch.stack([seq_idx_of(lengths) for lengths in rows])
    inputs = make_inputs(100)
    expected = run(recurrent_gated_delta_rule, inputs, seq_idx=seq_idx)
    assert_close(run(chunk_gated_delta_rule, inputs, seq_idx=seq_idx.to(torch.int32)), expected)
    for row, lengths in enumerate(rows):
        alone = run_documents_alone({name: x[row : row + 1] for name, x in inputs.items()}, lengths)
        torch.testing.assert_close(expected["o"][row], alone["o"][0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_no_leak_between_documents(form):
    """What one document contains changes nothing in the others, to the last bit, nor do gradients cross."""
    lengths = [20, 60, 70]
    inputs = make_inputs(150, batch=1)
    seq_idx = seq_idx_of(lengths).unsqueeze(0)
    first = form(**inputs, seq_idx=seq_idx)
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v", "beta", "g"):
        changed[name][:, 20:80] *= 0.3
    second = form(**changed, seq_idx=seq_idx)
    assert torch.equal(first[0][:, :20], second[0][:, :20])
    assert not torch.equal(first[0][:, 20:80], second[0][:, 20:80])
    assert torch.equal(first[0][:, 80:], second[0][:, 80:])
    assert torch.equal(first[1], second[1])

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, _ = form(**leaves, seq_idx=seq_idx)
    o[:, 80:].sum().backward()
    for name in ("q", "k", "v", "beta", "g"):
        gradient = leaves[name].grad
        assert gradient is not None
        assert gradient[:, :80].eq(0).all(), name
    assert leaves["initial_state"].grad is None or leaves["initial_state"].grad.eq(0).all()


DECAYS = {
    "none": lambda g: g * 0,
    "near 1": lambda g: g * 1e-6,
    "near 0": lambda g: g - 15,
    "forgets all": lambda g: torch.where(g < g.median(), -torch.inf, g),
    "-50 per token": lambda g: g * 0 - 50,
    "-1e4 per token": lambda g: g * 0 - 1e4,
    "strong bursts": lambda g: torch.where(g < -0.7, -50.0, g * 0.01),
}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
def test_decay_range(decay):
    inputs = make_inputs(130)
    inputs["g"] = decay(inputs["g"])
    assert_close(run(chunk_gated_delta_rule, inputs), run(recurrent_gated_delta_rule, inputs), 1e-11)


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_decay_range_in_float32(decay, packed):
    # 3e-6: rounding of 130 float32 updates; cumulative decays are in float64 and add nothing, however strong.
    inputs = make_inputs(130)
    inputs["g"] = decay(inputs["g"])
    seq_idx = seq_idx_of([10, 54, 3, 63]).expand(BATCH, -1) if packed else None
    expected = run(recurrent_gated_delta_rule, inputs, seq_idx=seq_idx)
    found = run(chunk_gated_delta_rule, {name: x.float() for name, x in inputs.items()}, seq_idx=seq_idx)
    assert_close(found, expected, 3e-6)


@pytest.mark.parametrize(("beta", "tolerance"), [(1.0, 1e-5), (1.99, 1e-4)])
def test_identical_keys(beta, tolerance):
    """The worst case for the inverse of the triangular system: its Neumann powers overflow, its entries do not."""
    inputs = make_inputs(256, key=64, value=64, heads=2)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).clone()
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    inputs["g"] *= 1e-4
    expected = run(recurrent_gated_delta_rule, inputs)
    assert_close(run(chunk_gated_delta_rule, inputs), expected, 1e-9)
    assert_close(run(chunk_gated_delta_rule, {name: x.float() for name, x in inputs.items()}), expected, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_zero_beta_has_a_gradient(form):
    inputs = make_inputs(70)
    inputs["beta"] = inputs["beta"] * (inputs["beta"] > 1)
    assert_close(run(form, inputs), run(recurrent_gated_delta_rule, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype):
    # Computed in float32 from rounded inputs, so that only the rounding of results remains: 2^-8 for bfloat16.
    inputs = make_inputs(100, dtype=torch.float32)
    half = {name: x.to(dtype) if name in ("q", "k", "v", "beta") else x for name, x in inputs.items()}
    found = run(form, half)
    assert found["o"].dtype == found["d_q"].dtype == dtype
    assert found["final_state"].dtype == found["d_g"].dtype == torch.float32
    expected = run(recurrent_gated_delta_rule, {name: x.double() for name, x in half.items()})
    assert_close(found, expected, 1e-2)
    assert_close({"s": found["final_state"]}, {"s": expected["final_state"]}, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_products(form):
    inputs = make_inputs(70, dtype=torch.float32)
    expected = form(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = form(**inputs)
        gradients = run(chunk_gated_delta_rule, inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert_close(gradients, run(chunk_gated_delta_rule, inputs), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [1, 64, 100])
def test_split_sequence_carries_the_state(form, cut):
    inputs = make_inputs(150)
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}
    start = inputs["initial_state"].clone()
    o, state = form(**inputs)
    head, between = form(**{name: x[:, :cut] for name, x in tokens.items()}, initial_state=inputs["initial_state"])
    tail, end = form(**{name: x[:, cut:] for name, x in tokens.items()}, initial_state=between)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), o, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, state, rtol=0, atol=1e-12)
    assert torch.equal(inputs["initial_state"], start)  # nothing is done in place to the caller's state


def test_prefill_then_decode():
    inputs = make_inputs(70)
    o, final_state = recurrent_gated_delta_rule(**inputs)
    state = inputs.pop("initial_state")
    found, state = chunk_gated_delta_rule(**{name: x[:, :65] for name, x in inputs.items()}, initial_state=state)
    steps = [found]
    for t in range(65, 70):
        one = {name: x[:, t : t + 1] for name, x in inputs.items()}
        step, state = recurrent_gated_delta_rule(**one, initial_state=state)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, dim=1), o, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form, tokens):
    inputs = {name: x[:0] for name, x in make_inputs(tokens).items()}
    found = run(form, inputs)
    assert found["o"].shape == inputs["v"].shape and found["d_k"].shape == inputs["k"].shape


def test_views_are_accepted():
    """Strided inputs (as slices of one projection) and an expanded gradient of the output."""
    inputs = make_inputs(70)
    mixed = torch.cat([inputs["q"], inputs["k"], inputs["v"]], dim=-1)
    q, k, v = mixed.split([KEY, KEY, VALUE], dim=-1)
    g = inputs["g"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    o, _ = chunk_gated_delta_rule(q, k, v, g=g, beta=inputs["beta"])
    o.sum().backward()
    expected_g = inputs["g"].clone().requires_grad_()
    plain = {name: inputs[name] for name in ("q", "k", "v", "beta")}
    expected, _ = recurrent_gated_delta_rule(**plain, g=expected_g)
    expected.sum().backward()
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(g.grad, expected_g.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    inputs = make_inputs(70)

    def checkpointed(q, k, v, *, g, beta, initial_state):
        def positional(*args):
            return chunk_gated_delta_rule(*args[:3], g=args[3], beta=args[4], initial_state=args[5])

        return checkpoint(positional, q, k, v, g, beta, initial_state, use_reentrant=reentrant)

    expected = run(chunk_gated_delta_rule, inputs)
    if reentrant:  # it allows backward() only
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        o, final_state = checkpointed(*leaves[:3], g=leaves[3], beta=leaves[4], initial_state=leaves[5])
        torch.manual_seed(99)
        loss = (o * torch.randn(o.shape, dtype=torch.float64)).sum()
        (loss + (final_state * torch.randn(final_state.shape, dtype=torch.float64)).sum()).backward()
        found = {"o": o.detach(), "final_state": final_state.detach()}
        found |= {f"d_{name}": leaf.grad for name, leaf in zip(inputs, leaves, strict=True)}
    else:
        found = run(checkpointed, inputs)
    assert_close(found, expected, 1e-13)


def test_second_backward_raises():
    inputs = {name: x.requires_grad_() for name, x in make_inputs(20).items()}
    o, _ = chunk_gated_delta_rule(**inputs)
    (gradient,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


WRONG = {
    "no tokens": ({name: (2, 0, 3, 8) for name in "qkv"} | {"g": (2, 0, 3), "beta": (2, 0, 3)}, "at least one token"),
    "heads not split": ({"q": (2, 10, 24)}, "split the heads"),
    "fewer key heads": ({"q": (2, 10, 1, 8), "k": (2, 10, 1, 8)}, "repeat_interleave"),
    "k": ({"k": (2, 9, 3, 8)}, r"k has shape \(2, 9, 3, 8\), expected \(2, 10, 3, 8\)"),
    "g": ({"g": (2, 3, 10)}, r"g has shape \(2, 3, 10\), expected \(2, 10, 3\)"),
    "beta": ({"beta": (2, 10, 3, 1)}, "one write strength per token and head"),
    "state": ({"initial_state": (2, 3, 12, 8)}, "transpose a state"),
    "seq_idx": ({"seq_idx": (10,)}, "one document index per token"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shapes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_shapes(form, shapes, message):
    inputs = make_inputs(10) | {name: torch.zeros(shape) for name, shape in shapes.items() if name != "seq_idx"}
    if "seq_idx" in shapes:
        inputs["seq_idx"] = torch.zeros(shapes["seq_idx"], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        form(**inputs)


def test_other_wrong_arguments():
    inputs = make_inputs(10)
    with pytest.raises(ValueError, match="power of 2"):
        chunk_gated_delta_rule(**inputs, chunk_size=48)
    with pytest.raises(ValueError, match="expected integers"):
        chunk_gated_delta_rule(**inputs, seq_idx=torch.zeros(BATCH, 10))
