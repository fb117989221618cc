"""What reaches fla: the right operator by name, arguments by keyword, packed rows as cumulative lengths."""

import importlib
import types

import pytest
import torch
from recurrences import assert_close, seq_idx_of

from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hf_hybrid.modeling.gla import chunk_gla, recurrent_gla
from hf_hybrid.modeling.kda import chunk_kda, recurrent_kda


ENTRIES = {
    "gated_delta_rule": (kernels.gated_delta_rule, chunk_gated_delta_rule, recurrent_gated_delta_rule),
    "gla": (kernels.gated_linear_attention, chunk_gla, recurrent_gla),
    "kda": (kernels.kimi_delta_attention, chunk_kda, recurrent_kda),
}
# The names of the operators' arguments, in their order, in fla 0.6.0.
ARGUMENTS = {
    "chunk_gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "fused_recurrent_gated_delta_rule": ("q", "k", "v", "g", "gk", "gv", "beta"),
    "chunk_gla": ("q", "k", "v", "g"),
    "fused_recurrent_gla": ("q", "k", "v", "gk", "gv"),
    "chunk_kda": ("q", "k", "v", "g", "beta"),
    "fused_recurrent_kda": ("q", "k", "v", "g", "beta", "A_log", "dt_bias"),
}


@pytest.fixture
def called(monkeypatch):
    """Stands in for `fla.ops`: our torch forms behind fla's arguments. Holds the names of the operators called."""
    names = []

    def operator(name, form):
        def call(*, scale, output_final_state, initial_state=None, cu_seqlens=None, **inputs):
            names.append(name)
            assert set(inputs) <= set(ARGUMENTS[name]) and output_final_state
            assert initial_state is None or initial_state.dtype == torch.float32
            if "gk" in inputs:
                inputs["g"] = inputs.pop("gk")
            if cu_seqlens is None:
                return form(**inputs, scale=scale, initial_state=initial_state)
            assert inputs["q"].shape[0] == 1 and cu_seqlens.dtype == torch.int64 and initial_state is None
            parts = [{n: x[:, a:b] for n, x in inputs.items()} for a, b in cu_seqlens.unfold(0, 2, 1).tolist()]
            results = [form(**part, scale=scale) for part in parts]
            return torch.cat([o for o, _ in results], 1), torch.cat([state for _, state in results])

        return call

    def import_module(name):
        kind = name.removeprefix("fla.ops.")
        _, chunked, recurrent = ENTRIES[kind]
        pairs = {f"chunk_{kind}": chunked, f"fused_recurrent_{kind}": recurrent}
        return types.SimpleNamespace(**{n: operator(n, form) for n, form in pairs.items()})

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(kernels, "use_fla", lambda device, kernel="auto": kernel == "fla")
    return names


def make_inputs(kind, tokens):
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, tokens, 3, 8) / 3 for name in "qkv"}
    inputs["g"] = -torch.rand(2, tokens, 3) if kind == "gated_delta_rule" else -torch.rand(2, tokens, 3, 8)
    return inputs if kind == "gla" else inputs | {"beta": torch.rand(2, tokens, 3)}


def both(entry, **inputs):
    return [dict(zip("os", entry(**inputs, kernel=kernel), strict=True)) for kernel in ("fla", "torch")]


@pytest.mark.parametrize("kind", ENTRIES)
class TestFla:
    def test_arguments_and_choice_of_operator(self, called, kind):
        entry, state = ENTRIES[kind][0], torch.randn(2, 3, 8, 8)
        for tokens, grad in ((1, False), (70, False), (1, True), (20, True)):
            inputs = make_inputs(kind, tokens) | {"initial_state": state}
            inputs["v"].requires_grad_(grad)
            assert_close(*both(entry, **inputs), 1e-5) if not grad else both(entry, **inputs)
        inputs = make_inputs(kind, 5) | {"initial_state": state.clone().requires_grad_()}
        both(entry, **inputs)  # a gradient of the state alone is one too
        assert called == [f"fused_recurrent_{kind}"] + [f"chunk_{kind}"] * 4

    def test_packed_rows(self, called, kind):
        seq_idx = torch.stack([seq_idx_of([3, 60, 7]), seq_idx_of([70])])
        assert_close(*both(ENTRIES[kind][0], **make_inputs(kind, 70), seq_idx=seq_idx), 1e-5)
        with pytest.raises(ValueError, match="start from no state"):
            ENTRIES[kind][0](
                **make_inputs(kind, 70), seq_idx=seq_idx, initial_state=torch.zeros(2, 3, 8, 8), kernel="fla"
            )

    def test_half_precision_state_is_widened(self, called, kind):
        inputs = make_inputs(kind, 70) | {"initial_state": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)}
        assert_close(*both(ENTRIES[kind][0], **inputs), 1e-5)


@pytest.mark.parametrize("kind", ENTRIES)
def test_cpu_tensors_never_reach_fla(kind):
    inputs = make_inputs(kind, 3)
    ENTRIES[kind][0](**inputs)
    with pytest.raises(RuntimeError, match="tensors are on 'cpu'"):
        ENTRIES[kind][0](**inputs, kernel="fla")
