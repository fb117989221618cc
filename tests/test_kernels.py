"""
What reaches fla: the right operator by name, arguments by keyword, operands of one dtype, packed rows as cumulative
lengths. And what does not: dtypes and widths that its kernels cannot do.
"""

import importlib
import types

import pytest
import torch
from recurrences import assert_close, seq_idx_of
from teachers import tiny_teacher
from teachers import tokens as random_ids
from torch.utils._python_dispatch import TorchDispatchMode

import hf_hybrid as hh
from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.ops_common import unit
from hf_hybrid.modeling.ops_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hf_hybrid.modeling.ops_gla import chunk_gla, recurrent_gla
from hf_hybrid.modeling.ops_kda import chunk_kda, recurrent_kda


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


def rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False, eps=1e-6):
    """What fla's function of this name computes, by its arguments."""
    assert bias is residual is None and not prenorm and activation in ("silu", "sigmoid") and x.shape == g.shape
    gate = getattr(torch.nn.functional, activation)(g)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * gate


@pytest.fixture
def called(monkeypatch):
    """Stands in for `fla.ops`: our torch forms behind fla's arguments. Holds the names of the operators called."""
    names = []

    def operator(name, form):
        def call(*, scale, output_final_state, initial_state=None, cu_seqlens=None, **inputs):
            names.append(name)
            if inputs.pop("use_gate_in_kernel", False):
                assert inputs.pop("use_qk_l2norm_in_kernel") and inputs.pop("use_beta_sigmoid_in_kernel")
                rate, bias = inputs.pop("A_log"), inputs.pop("dt_bias")
                step = torch.nn.functional.softplus(inputs["g"].float() + bias.view(inputs["g"].shape[2:]))
                inputs["g"] = -rate.exp().view(-1, *(1,) * (step.ndim - 3)) * step
                inputs |= {n: unit(inputs[n]) for n in "qk"}
                inputs["beta"] = inputs["beta"].sigmoid()
            assert set(inputs) <= set(ARGUMENTS[name]) and output_final_state
            assert initial_state is None or initial_state.dtype == torch.float32
            # "tl.dot: Both operands must be same dtype", and what the kernels were made for.
            assert len({x.dtype for n, x in inputs.items() if n not in ("g", "gk")}) == 1
            assert inputs["v"].dtype in (torch.float32, torch.bfloat16, torch.float16)
            assert inputs.get("g", inputs.get("gk")).dtype == torch.float32
            assert all(x.is_contiguous() for x in (*inputs.values(), initial_state) if x is not None)
            if "gk" in inputs:
                inputs["g"] = inputs.pop("gk")
            if cu_seqlens is None:
                return form(**inputs, scale=scale, initial_state=initial_state)
            assert inputs["q"].shape[0] == 1 and cu_seqlens.dtype == torch.int64
            assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
            parts = [{n: x[:, a:b] for n, x in inputs.items()} for a, b in cu_seqlens.unfold(0, 2, 1).tolist()]
            states = [None] * len(parts) if initial_state is None else initial_state.split(1)
            results = [form(**part, scale=scale, initial_state=s) for part, s in zip(parts, states, strict=True)]
            return torch.cat([o for o, _ in results], 1), torch.cat([state for _, state in results])

        return call

    real = importlib.import_module

    def import_module(name, package=None):
        if not name.startswith("fla."):
            return real(name, package)
        if name == "fla.modules.norm.fused_norm_gate":
            return types.SimpleNamespace(rms_norm_gated=rms_norm_gated)
        kind = name.removeprefix("fla.ops.")
        _, chunked, recurrent = ENTRIES[kind]
        pairs = {f"chunk_{kind}": chunked, f"fused_recurrent_{kind}": recurrent}
        return types.SimpleNamespace(**{n: operator(n, form) for n, form in pairs.items()})

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(kernels, "use_fla", lambda device, kernel="auto": kernel == "fla")
    return names


WIDTH = 16


def make_inputs(kind, tokens, width=WIDTH):
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, tokens, 3, width) / 3 for name in "qkv"}
    inputs["g"] = -torch.rand(2, tokens, 3) if kind == "gated_delta_rule" else -torch.rand(2, tokens, 3, width)
    return inputs if kind == "gla" else inputs | {"beta": torch.rand(2, tokens, 3)}


def both(entry, **inputs):
    return [dict(zip("os", entry(**inputs, kernel=kernel), strict=True)) for kernel in ("fla", "torch")]


@pytest.mark.parametrize("kind", ENTRIES)
class TestFla:
    def test_arguments_and_choice_of_operator(self, called, kind):
        entry, state = ENTRIES[kind][0], torch.randn(2, 3, WIDTH, WIDTH)
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
        state = torch.randn(2, 3, WIDTH, WIDTH)
        assert_close(*both(ENTRIES[kind][0], **make_inputs(kind, 70), seq_idx=seq_idx, initial_state=state), 1e-5)

    def test_half_precision_state_is_widened(self, called, kind):
        inputs = make_inputs(kind, 70) | {"initial_state": torch.zeros(2, 3, WIDTH, WIDTH, dtype=torch.bfloat16)}
        assert_close(*both(ENTRIES[kind][0], **inputs), 1e-5)

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [5, 70])
    @pytest.mark.parametrize("packed", [False, True])
    def test_mixed_dtypes_become_those_of_v(self, called, kind, half, tokens, packed):
        """What rotary embeddings and norms give under autocast: q and k in fp32, v in half precision."""
        inputs = make_inputs(kind, tokens)
        inputs["v"] = inputs["v"].to(half)
        if packed:
            inputs["seq_idx"] = torch.stack([seq_idx_of([2, tokens - 2]), seq_idx_of([tokens])])
        for grad in (False, True):
            for name in ("q", "k", "g"):
                inputs[name].requires_grad_(grad)
            fla, plain = both(ENTRIES[kind][0], **inputs)
            assert fla["o"].dtype == plain["o"].dtype == half
            assert fla["s"].dtype == plain["s"].dtype == torch.float32
            assert_close(fla, plain, torch.finfo(half).eps)
        found = []
        for result in (fla, plain):
            leaves = [inputs[name] for name in ("q", "k", "g")]
            found.append(torch.autograd.grad(result["o"].float().square().sum() + result["s"].sum(), leaves))
        for x, y, leaf in zip(*found, leaves, strict=True):
            assert x.dtype == leaf.dtype and x.abs().sum() > 0
            torch.testing.assert_close(x, y, rtol=0, atol=4 * torch.finfo(half).eps * float(y.abs().max()))

    def test_transposed_operands_are_made_contiguous(self, called, kind):
        inputs = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in make_inputs(kind, 20).items()}
        assert not inputs["q"].is_contiguous()
        assert_close(*both(ENTRIES[kind][0], **inputs), 1e-5)

    @pytest.mark.parametrize(
        ("change", "width", "reason"),
        [
            (lambda x: x.double(), WIDTH, "the operands are float64"),
            (lambda x: x, 8, "fla needs 16 channels or more, and heads have 8 key and 8 value channels"),
            (lambda x: x.bfloat16(), 17, "even widths in 16 bits"),
            (lambda x: x, 512, "takes 256 key channels at most, and heads have 512 key"),
        ],
        ids=["fp64", "narrow", "odd", "wide"],
    )
    def test_what_fla_cannot_do(self, called, monkeypatch, kind, change, width, reason):
        """`auto` takes the torch form with a word to it, `fla` refuses, and both on the CPU as on a GPU."""
        inputs = {name: change(x) for name, x in make_inputs(kind, 3, width).items()}
        entry = ENTRIES[kind][0]
        if kind == "gla" and width == 512:
            entry(**inputs, kernel="fla")
            assert called == ["fused_recurrent_gla"]
            return
        with pytest.raises(ValueError, match=reason):
            entry(**inputs, kernel="fla")
        warned = []
        monkeypatch.setattr(kernels, "use_fla", lambda device, kernel: kernel == "auto")
        monkeypatch.setattr(kernels.logger, "warning_once", warned.append)
        o, state = entry(**inputs, kernel="auto")
        assert not called and len(warned) == 1 and reason in warned[0]
        assert o.dtype == inputs["v"].dtype
        assert state.dtype == (torch.float64 if o.dtype == torch.float64 else torch.float32)

    def test_wrong_operands_are_refused(self, called, kind):
        entry, inputs = ENTRIES[kind][0], make_inputs(kind, 3)
        for kernel in ("torch", "fla"):
            with pytest.raises(ValueError, match="k has dtype torch.int64, expected a floating-point dtype"):
                entry(**inputs | {"k": inputs["k"].long()}, kernel=kernel)
            with pytest.raises(ValueError, match=r"k is on 'meta' and v on 'cpu'"):
                entry(**inputs | {"k": inputs["k"].to("meta")}, kernel=kernel)
            with pytest.raises(ValueError, match="g has shape"):
                entry(**inputs | {"g": inputs["g"][:, :2]}, kernel=kernel)
        with pytest.raises(ValueError, match="kernel='triton' is unknown; choose one of 'auto', 'torch', 'fla'"):
            entry(**inputs, kernel="triton")


@pytest.mark.parametrize("kind", ENTRIES)
def test_cpu_tensors_never_reach_fla(kind):
    inputs = make_inputs(kind, 3)
    ENTRIES[kind][0](**inputs)
    with pytest.raises(ValueError, match="tensors are on 'cpu'"):
        ENTRIES[kind][0](**inputs, kernel="fla")


class CountedSearches(TorchDispatchMode):
    """Counts the operations that make a host wait for the device to know the shape of what comes out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("mixer", ["gated_deltanet", "gated_linear_attention", "kimi_delta_attention"])
def test_documents_are_read_off_once_for_all_layers(called, mixer):
    """Also where layers are computed again in the backward pass; the gradients are those of the torch form."""
    gradients, searches = {}, {}
    positions = torch.cat([torch.arange(9), torch.arange(20), torch.arange(11)])[None].repeat(2, 1)
    positions[1] = torch.cat([torch.arange(25), torch.arange(15)])
    for kernel in ("torch", "fla"):
        torch.manual_seed(0)
        student = hh.convert(tiny_teacher("llama"), [1], mixer=mixer, kernel=kernel).train()
        student.gradient_checkpointing_enable()
        with CountedSearches() as counted:
            student(random_ids(2, 40), position_ids=positions).logits.square().mean().backward()
        gradients[kernel] = {name: parameter.grad for name, parameter in student.named_parameters()}
        searches[kernel] = counted.count
    assert len(called) == 2 * 3 and searches["fla"] == 1, searches
    for name, gradient in gradients["torch"].items():
        bound = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(gradients["fla"][name], gradient, rtol=1e-4, atol=bound)


def test_documents_of_a_tensor_that_changes_are_read_again():
    seq_idx = torch.stack([seq_idx_of([2, 3]), seq_idx_of([5])])
    found = kernels.documents_of(seq_idx)
    assert found.offsets.tolist() == [0, 2, 5, 10] and found.first.tolist() == [0, 2] and found.last.tolist() == [1, 2]
    assert found.most == 2 and kernels.documents_of(seq_idx) is found
    seq_idx[1, 4] = 7
    assert kernels.documents_of(seq_idx).offsets.tolist() == [0, 2, 5, 9, 10]
    with torch.inference_mode():
        assert kernels.documents_of(seq_idx.clone()).most == 2
