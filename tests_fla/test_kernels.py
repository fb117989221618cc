"""Our torch forms and what `modeling/kernels.py` hands to fla, against fla's own kernels.

Everything is compared with the token-by-token torch form in float64, which tests/ checks against the papers: our
chunked form in fp32, and fla's kernels in fp32 as `modeling/kernels.py` calls them.
"""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_chunk_gated_delta_rule
from fla.ops.gla import chunk_gla as fla_chunk_gla
from fla.ops.kda import chunk_kda as fla_chunk_kda
from recurrences import assert_close, run, seq_idx_of
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.linear_attention import HeadRMSNorm
from hf_hybrid.modeling.ops_delta_rule import recurrent_gated_delta_rule
from hf_hybrid.modeling.ops_gla import recurrent_gla
from hf_hybrid.modeling.ops_kda import recurrent_kda
from hf_hybrid.modeling.short_convolution import ShortConvolution


# Our entry, its reference, and fla's chunked operator.
ENTRIES = {
    "gated_delta_rule": (kernels.gated_delta_rule, recurrent_gated_delta_rule, fla_chunk_gated_delta_rule),
    "gla": (kernels.gated_linear_attention, recurrent_gla, fla_chunk_gla),
    "kda": (kernels.kimi_delta_attention, recurrent_kda, fla_chunk_kda),
}
# Keys and values differ in width, so that a transposed state does not pass. The interpreter takes one row
# after the other: there are two where tokens are few or rows are packed.
HEADS, KEY, VALUE = 2, 16, 32
DECAYS = {"near 1": lambda g: g * 1e-4, "near 0": lambda g: g - 8}
# fp32: what both chunked forms lose grows with the decay summed over a chunk.
TOLERANCE = 2e-5
# fp16 has 11 bits.
HALF_TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets `kernel="fla"` run on CPU tensors, and holds the names of fla's operators that were called."""
    names: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.module = importlib.import_module(name)

        def __getattr__(self, name: str) -> Any:
            names.append(name)
            return getattr(self.module, name)

    monkeypatch.setattr(kernels, "use_fla", lambda device, kernel="auto": kernel == "fla")
    monkeypatch.setattr(kernels, "importlib", types.SimpleNamespace(import_module=Recorded))
    return names


def make_inputs(kind: str, tokens: int, *, batch: int = 1, state: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = (batch, tokens, HEADS)
    inputs = {
        "q": F.normalize(torch.randn(*shape, KEY), dim=-1),
        "k": F.normalize(torch.randn(*shape, KEY), dim=-1),
        "v": torch.randn(*shape, VALUE),
        "g": -torch.rand(*shape) if kind == "gated_delta_rule" else -torch.rand(*shape, KEY),
    }
    if kind != "gla":
        inputs["beta"] = torch.rand(*shape)
    if state:
        inputs["initial_state"] = torch.randn(batch, HEADS, KEY, VALUE)
    return inputs


def check(kind: str, inputs: dict[str, Tensor], **options: Tensor) -> None:
    """Outputs, final states and gradients of our chunked form and of fla's, against the reference in float64."""
    entry, reference, _ = ENTRIES[kind]
    expected = run(reference, {name: x.double() for name, x in inputs.items()}, **options)
    for kernel in ("torch", "fla"):
        found = run(entry, inputs, kernel=kernel, **options)
        assert found["o"].dtype == found["final_state"].dtype == torch.float32
        assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("kind", ENTRIES)
class TestAgainstFla:
    @pytest.mark.parametrize(("tokens", "batch", "state"), [(1, 2, True), (63, 2, False), (130, 1, True)])
    def test_training(self, called: list[str], kind: str, tokens: int, batch: int, state: bool) -> None:
        check(kind, make_inputs(kind, tokens, batch=batch, state=state))
        assert called == [f"chunk_{kind}"]

    @pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
    def test_decays(self, kind: str, decay: Callable[[Tensor], Tensor]) -> None:
        inputs = make_inputs(kind, 65)
        inputs["g"] = decay(inputs["g"])
        check(kind, inputs)

    @pytest.mark.parametrize(("tokens", "batch", "state"), [(1, 2, True), (5, 2, False), (64, 1, True), (65, 1, True)])
    @torch.no_grad()
    def test_inference(self, called: list[str], kind: str, tokens: int, batch: int, state: bool) -> None:
        """Short calls without gradients go to fla's recurrent operator, whose arguments are ordered otherwise."""
        entry, reference, _ = ENTRIES[kind]
        inputs = make_inputs(kind, tokens, batch=batch, state=state)
        expected = dict(zip("os", reference(**{n: x.double() for n, x in inputs.items()}), strict=True))
        for kernel in ("torch", "fla"):
            found = dict(zip("os", entry(**inputs, kernel=kernel), strict=True))
            assert_close(found, expected, TOLERANCE)
        assert called == [f"chunk_{kind}" if tokens > 64 else f"fused_recurrent_{kind}"]

    def test_packed_rows(self, kind: str) -> None:
        """Two rows, which fla gets as one with cumulative lengths; the states returned are the rows' last ones."""
        seq_idx = torch.stack([seq_idx_of([3, 60, 7]), seq_idx_of([69, 1])])
        check(kind, make_inputs(kind, 70, batch=2, state=False), seq_idx=seq_idx)

    @torch.no_grad()
    def test_packed_rows_without_gradients(self, called: list[str], kind: str) -> None:
        entry, reference, _ = ENTRIES[kind]
        seq_idx = torch.stack([seq_idx_of([3, 6, 1]), seq_idx_of([9, 1])])
        inputs = make_inputs(kind, 10, batch=2, state=False)
        found = dict(zip("os", entry(**inputs, seq_idx=seq_idx, kernel="fla"), strict=True))
        expected = reference(**{n: x.double() for n, x in inputs.items()}, seq_idx=seq_idx)
        assert_close(found, dict(zip("os", expected, strict=True)), TOLERANCE)
        assert called == [f"fused_recurrent_{kind}"]

    @pytest.mark.parametrize(("tokens", "packed"), [(20, False), (70, True)])
    def test_dtypes_that_autocast_mixes(self, called: list[str], kind: str, tokens: int, packed: bool) -> None:
        """
        q and k in fp32 from rotary embeddings and norms, v in half precision: the kernels get v's dtype, and gradients
        come back in each input's own. fp16 stands for bf16, of which the interpreter computes with the raw bits.
        """
        entry, reference, _ = ENTRIES[kind]
        inputs = make_inputs(kind, tokens, batch=1 + packed, state=not packed)
        rounded = {name: x if name in ("g", "initial_state") else x.half() for name, x in inputs.items()}
        options = {"seq_idx": torch.stack([seq_idx_of([3, tokens - 3]), seq_idx_of([tokens])])} if packed else {}
        expected = run(reference, {name: x.double() for name, x in rounded.items()}, **options)
        mixed = rounded | {name: rounded[name].float() for name in ("q", "k")}
        for kernel in ("torch", "fla"):
            found = run(entry, mixed, kernel=kernel, **options)
            assert found["o"].dtype == torch.float16 and found["final_state"].dtype == torch.float32
            assert all(found[f"d_{name}"].dtype == x.dtype for name, x in mixed.items())
            assert_close(found, expected, HALF_TOLERANCE)
        assert called == [f"chunk_{kind}"]

    @torch.no_grad()
    def test_half_precision_token_by_token(self, called: list[str], kind: str) -> None:
        entry, reference, _ = ENTRIES[kind]
        inputs = make_inputs(kind, 5)
        mixed = inputs | {"v": inputs["v"].half()}
        expected = reference(**{name: x.double() for name, x in mixed.items()})
        found = entry(**mixed, kernel="fla")
        assert found[0].dtype == torch.float16 and found[1].dtype == torch.float32
        assert_close(dict(zip("os", found, strict=True)), dict(zip("os", expected, strict=True)), HALF_TOLERANCE)
        assert called == [f"fused_recurrent_{kind}"]

    @torch.no_grad()
    def test_prefill_by_one_and_decoding_by_the_other(self, kind: str) -> None:
        """States have one layout, so that either implementation goes on from the other's."""
        entry, reference, _ = ENTRIES[kind]
        inputs = make_inputs(kind, 68, state=False)
        expected, state = reference(**{name: x.double() for name, x in inputs.items()})
        head, tail = ({n: x[:, part] for n, x in inputs.items()} for part in (slice(66), slice(66, None)))
        for first, second in (("torch", "fla"), ("fla", "torch")):
            _, between = entry(**head, kernel=first)
            o, end = entry(**tail, initial_state=between, kernel=second)
            assert_close({"o": o, "s": end}, {"o": expected[:, 66:], "s": state}, TOLERANCE)

    def test_reference_against_fla_called_plainly(self, kind: str) -> None:
        """Without our dispatch in between: the documented call of fla's chunked operator."""
        _, reference, operator = ENTRIES[kind]
        inputs = make_inputs(kind, 65)
        expected = reference(**{name: x.double() for name, x in inputs.items()}, scale=0.3)
        found = operator(**inputs, scale=0.3, output_final_state=True)
        assert_close(dict(zip("os", found, strict=True)), dict(zip("os", expected, strict=True)), TOLERANCE)


LOGIT_KINDS = {"gated_delta_rule": 1, "kda": KEY}


def of_logits(kind: str, batch: int, tokens: int) -> dict[str, Tensor]:
    """What [`delta_rule_of_logits`] gets: q and k of any length, decay and write before they are activated."""
    torch.manual_seed(1)
    channels = (KEY,) if kind == "kda" else ()
    new = torch.randn
    return {
        "q": new(batch, tokens, HEADS, KEY),
        "k": 3 * new(batch, tokens, HEADS, KEY),
        "v": new(batch, tokens, HEADS, VALUE),
        "decay": new(batch, tokens, HEADS, *channels),
        "write": new(batch, tokens, HEADS),
        "A_log": torch.rand(HEADS),
        "dt_bias": new(HEADS * LOGIT_KINDS[kind]),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_gates_and_unit_length_in_the_kernels(called: list[str], kind: str, packed: bool) -> None:
    """Outputs, states and the gradients of all, the decay's parameters among them, against the torch form in fp64."""
    inputs = of_logits(kind, 2, 70)
    options = {"seq_idx": torch.stack([seq_idx_of([3, 67]), seq_idx_of([70])])} if packed else {}
    entry = functools.partial(kernels.delta_rule_of_logits, kind)
    expected = run(entry, {name: x.double() for name, x in inputs.items()}, kernel="torch", **options)
    found = run(entry, inputs, kernel="fla", **options)
    # These two are sums over all tokens, of terms that cancel: their rounding is that of the terms, and processors
    # differ in it.
    bound = TOLERANCE * (1 + expected["d_decay"].norm().item())
    for name in ("d_A_log", "d_dt_bias"):
        torch.testing.assert_close(found.pop(name).double(), expected.pop(name), rtol=0, atol=bound)
    assert_close(found, expected, TOLERANCE)
    assert called == [f"chunk_{kind}"]


@torch.no_grad()
@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_gates_and_unit_length_token_by_token(called: list[str], kind: str) -> None:
    inputs = of_logits(kind, 2, 3)
    state = torch.randn(2, HEADS, KEY, VALUE)
    found = kernels.delta_rule_of_logits(kind, **inputs, initial_state=state, kernel="fla")
    wide = {name: x.double() for name, x in inputs.items()}
    expected = kernels.delta_rule_of_logits(kind, **wide, initial_state=state.double(), kernel="torch")
    assert_close(dict(zip("os", found, strict=True)), dict(zip("os", expected, strict=True)), TOLERANCE)
    assert called == [f"fused_recurrent_{kind}"]


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm_and_gate_in_one(called: list[str], activation: str) -> None:
    torch.manual_seed(0)
    norm = HeadRMSNorm(VALUE, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x, gate, slope = torch.randn(3, 2, 5, HEADS, VALUE)
    found = []
    for kernel in ("torch", "fla"):
        leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        output = norm(*leaves, activation, kernel)
        gradients = torch.autograd.grad(output, [*leaves, norm.weight], slope)
        found.append(dict(enumerate([output.detach(), *gradients])))
    assert called == ["rms_norm_gated"]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "taps"), [(1, 4), (3, 4), (63, 2), (64, 3), (65, 4), (130, 6)])
def test_convolution(called: list[str], tokens: int, taps: int, packed: bool) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(20, taps)
    torch.nn.init.normal_(conv.weight)
    x, slope = torch.randn(2, 2, tokens, 20)
    seq_idx = None
    if packed:  # a document of one token between two of the same number
        seq_idx = torch.stack([seq_idx_of([tokens]), seq_idx_of([tokens // 3, 1, tokens - tokens // 3 - 1])])
    found = []
    for kernel, dtype in (("torch", torch.float64), ("fla", torch.float32)):
        leaf, weights = x.to(dtype).requires_grad_(), conv.to(dtype)
        output = weights(leaf, seq_idx=seq_idx, kernel=kernel)
        gradients = torch.autograd.grad(output, [leaf, weights.weight], slope.to(dtype))
        found.append(dict(enumerate([output.detach(), *gradients])))
    assert called == ["causal_conv1d"]
    assert_close(found[1], found[0], TOLERANCE)


def test_what_a_convolution_carries_on(called: list[str]) -> None:
    """A prompt by fla, and what follows on it by torch, is the whole text by torch."""
    torch.manual_seed(0)
    conv, x = ShortConvolution(20, 4), torch.randn(2, 9, 20)
    torch.nn.init.normal_(conv.weight)
    cache = Cache(layers=[LinearAttentionLayer()])
    parts = [conv(x[:, :6], cache, 0, kernel="fla")]
    parts += [conv(x[:, i : i + 1], cache, 0, kernel="fla") for i in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), conv(x, kernel="torch"), rtol=1e-5, atol=1e-5)
    assert called == ["causal_conv1d"]


def test_norms_are_tuned_once_for_each_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each number of vectors, which every length of a prompt changes."""
    monkeypatch.setattr(kernels, "importlib", importlib)
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate")
    unit_length = importlib.import_module("fla.modules.norm.l2norm")
    tuners = [gated.layer_norm_gated_fwd_kernel.fn, unit_length.l2norm_fwd_kernel, unit_length.l2norm_bwd_kernel]
    kernels.tune_norms_by_width.cache_clear()
    for tuner in tuners:
        tuner.keys = ["D", "NB"]
    kernels.tune_norms_by_width()
    assert [tuner.keys for tuner in tuners] == [["D"]] * 3
