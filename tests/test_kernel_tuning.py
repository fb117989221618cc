"""What is run to make kernels ready; that they are is seen on a GPU, with `make gpu-check`."""

import pytest
import torch
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.run.kernel_tuning import run_once, tune_kernels
from hf_hybrid.trainers.precision import Precision


MIXERS = ["gated_deltanet", "gated_linear_attention", "kimi_delta_attention"]
PRECISIONS = [Precision(), Precision(torch.bfloat16)]


def test_there_is_nothing_to_do_on_a_cpu() -> None:
    said: list[str] = []
    student = hh.convert(tiny_teacher(), [])
    assert not tune_kernels(student, rows=1, packed=False, precision=Precision(), say=said.append)
    assert said == []


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_recurrence_is_called_as_training_calls_it(
    mixer: str, packed: bool, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dtypes, widths and documents of the tensors that reach the kernels, with gradients and without."""
    module = decoder_layers(hh.convert(tiny_teacher(), [], mixer=mixer))[0].self_attn
    seen = []
    prepare = kernels.to_one_dtype

    def watch(inputs: dict, state: torch.Tensor | None) -> tuple:
        operands = prepare(inputs, state)
        seen.append({name: (x.dtype, tuple(x.shape), x.requires_grad) for name, x in operands[0].items()})
        return operands

    monkeypatch.setattr(kernels, "to_one_dtype", watch)
    before = torch.get_rng_state()
    run_once(module, rows=2, packed=packed, precision=precision, tokens=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.parameters())
    half = precision.autocast or torch.float32
    for gradients, call in zip((True, False), seen, strict=True):
        for name in ("q", "k", "v"):
            assert call[name] == (half, (2, 192, 4, 24 if name != "v" else 24), gradients)
        assert call["g"][0] == torch.float32
    seen.clear()
    run_once(module, rows=1, packed=packed, precision=precision, gradients=(False,), tokens=300)
    assert seen[0]["v"][1] == (1, 300, 4, 24)
