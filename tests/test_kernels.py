"""Which kernel runs, and what fla's kernels are handed; the kernels themselves need a GPU."""

import types

import pytest
import torch

from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.delta_rule import recurrent_gated_delta_rule


def inputs(batch=2, length=40, heads=3, width=8):
    q, k = (torch.nn.functional.normalize(torch.randn(batch, length, heads, width), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, 5)
    return (q, k, v), {"g": -torch.rand(batch, length, heads), "beta": torch.rand(batch, length, heads)}


@pytest.fixture
def fla(monkeypatch):
    """A stand-in for fla's module with fla's signatures; computes by our reference and records which op was called."""
    calls = []

    def op(name):
        def run(q, k, v, *, g, beta, scale, initial_state=None, output_final_state, cu_seqlens=None):
            calls.append(name)
            assert output_final_state
            if cu_seqlens is None:
                return recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, scale=scale, initial_state=initial_state)
            assert q.shape[0] == 1 and initial_state is None and cu_seqlens.dtype == torch.int64
            pieces = []
            for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
                part = [x[:, start:stop] for x in (q, k, v, g, beta)]
                pieces.append(recurrent_gated_delta_rule(*part[:3], g=part[3], beta=part[4], scale=scale))
            return torch.cat([o for o, _ in pieces], 1), torch.cat([state for _, state in pieces])

        return run

    names = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    module = types.SimpleNamespace(**{name: op(name) for name in names})
    monkeypatch.setattr(kernels, "use_fla", lambda device, kernel="auto": True)
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: module)
    return calls


class TestChoice:
    def test_cpu_tensors_never_go_to_fla(self):
        assert not kernels.use_fla(torch.device("cpu"), "auto")
        assert not kernels.use_fla(torch.device("cuda"), "torch")

    def test_forced_fla_says_why_not(self):
        with pytest.raises(RuntimeError, match="tensors are on 'cpu'"):
            kernels.use_fla(torch.device("cpu"), "fla")

    def test_reason(self, monkeypatch):
        kernels.why_not_fla.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert kernels.why_not_fla() == "torch sees no CUDA device"
        with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
            kernels.use_fla(torch.device("cuda"), "fla")
        assert not kernels.use_fla(torch.device("cuda"), "auto")

    @pytest.mark.parametrize(
        ("version", "broken"), [("3.3.1", False), ("3.5.0", True), ("3.7.0", True), ("3.7.1", False)]
    )
    def test_triton_versions_with_wrong_gradients_on_hopper(self, monkeypatch, version, broken):
        kernels.why_not_fla.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: version)
        monkeypatch.setattr(kernels.importlib, "import_module", lambda name: None)
        reason = kernels.why_not_fla()
        kernels.why_not_fla.cache_clear()
        assert (reason is not None and "wrong gradients on Hopper" in reason) == broken


class TestCalls:
    def test_plain_rows(self, fla):
        tensors, options = inputs()
        got = kernels.gated_delta_rule(*tensors, **options)
        for x, y in zip(got, recurrent_gated_delta_rule(*tensors, **options), strict=True):
            torch.testing.assert_close(x, y)

    def test_packed_rows_become_one_row_of_documents(self, fla):
        tensors, options = inputs()
        seq_idx = torch.zeros(2, 40, dtype=torch.int32)
        seq_idx[0, 11:], seq_idx[0, 12:], seq_idx[1, 30:] = 1, 2, 1
        got = kernels.gated_delta_rule(*tensors, **options, seq_idx=seq_idx)
        for x, y in zip(got, recurrent_gated_delta_rule(*tensors, **options, seq_idx=seq_idx), strict=True):
            torch.testing.assert_close(x, y)

    @pytest.mark.parametrize(
        ("length", "grad", "recurrent"), [(1, False, True), (64, False, True), (65, False, False), (1, True, False)]
    )
    def test_recurrent_kernel_only_without_gradients(self, fla, length, grad, recurrent):
        (q, k, v), options = inputs(length=length)
        kernels.gated_delta_rule(q.requires_grad_(grad), k, v, **options)
        assert fla == ["fused_recurrent_gated_delta_rule" if recurrent else "chunk_gated_delta_rule"]

    def test_packed_rows_start_from_no_state(self, fla):
        tensors, options = inputs()
        with pytest.raises(ValueError, match="start from no state"):
            kernels.gated_delta_rule(
                *tensors,
                **options,
                seq_idx=torch.zeros(2, 40, dtype=torch.int32),
                initial_state=torch.zeros(2, 3, 8, 5),
            )
