"""What is run to make kernels ready; that they are is seen on a GPU, with `make gpu-check`."""

import fcntl
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.run.kernel_tuning import alone_on_the_device, lock_file, run_once, side_by_side, tune_kernels
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


class TestCompilingAhead:
    """Triton's autotuner and kernels, as far as tuning touches them, in the place of Triton itself."""

    @pytest.fixture
    def triton(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        compiled: list[tuple[str, int]] = []
        launched: list[tuple[str, int]] = []

        class JITFunction:
            def __init__(self, name: str) -> None:
                self.name = name

            def run(self, *args: Any, grid: Any, warmup: bool, block: int = 0) -> None:
                (compiled if warmup else launched).append((self.name, block))

        class Config:
            def __init__(self, block: int) -> None:
                self.block = block

            def all_kwargs(self) -> dict[str, int]:
                return {"block": self.block}

        class Autotuner:
            arg_names, keys = ("x", "width"), ("width",)

            def __init__(self, name: str, blocks: tuple[int, ...]) -> None:
                self.fn, self.configs = JITFunction(name), [Config(block) for block in blocks]
                self.nargs: dict[str, Any] | None = None

            def prune_configs(self, kwargs: dict[str, Any]) -> list[Config]:
                return self.configs

            def run(self, *args: Any, **kwargs: Any) -> None:
                self.nargs = dict(zip(self.arg_names, args, strict=True))
                best = self.prune_configs(kwargs)[0]
                self.fn.run(*args, **kwargs, **best.all_kwargs())

        modules = {
            "triton": ModuleType("triton"),
            "triton.runtime": SimpleNamespace(driver=SimpleNamespace(active=type("Driver", (), {})())),
            "triton.runtime.autotuner": SimpleNamespace(Autotuner=Autotuner),
            "triton.runtime.jit": SimpleNamespace(JITFunction=JITFunction),
            "triton.testing": SimpleNamespace(do_bench=None),
        }
        type(modules["triton.runtime"].driver.active).get_benchmarker = None
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return SimpleNamespace(Autotuner=Autotuner, JITFunction=JITFunction, compiled=compiled, launched=launched)

    def test_every_configuration_is_compiled_and_nothing_is_launched(self, triton: SimpleNamespace) -> None:
        tuned, plain = triton.Autotuner("tuned", (16, 32, 64)), triton.JITFunction("plain")
        call = {"grid": (1,), "warmup": False}
        methods = triton.Autotuner.run, triton.Autotuner.prune_configs, triton.JITFunction.run
        with side_by_side() as compiling_only:
            with compiling_only():
                for _ in range(2):  # as of q and of k: once is enough
                    tuned.run(torch.zeros(2), 128, **call)
                tuned.run(torch.zeros(2).double(), 128, **call)
                plain.run(torch.zeros(2), **call)
            assert triton.launched == []
            assert sorted(triton.compiled) == [("plain", 0), *sorted(2 * [("tuned", n) for n in (16, 32, 64)])]
            tuned.run(torch.zeros(2), 128, **call)
            assert triton.launched == [("tuned", 16)]
        assert (triton.Autotuner.run, triton.Autotuner.prune_configs, triton.JITFunction.run) == methods

    def test_what_does_not_compile_is_left_to_its_call(self, triton: SimpleNamespace) -> None:
        def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of registers")

        triton.JITFunction.run = refuse
        with side_by_side() as compiling_only:
            with compiling_only():
                triton.Autotuner("tuned", (16, 32)).run(torch.zeros(2), 128, grid=(1,), warmup=False)
            with pytest.raises(RuntimeError, match="out of registers"):
                triton.JITFunction("plain").run(grid=(1,), warmup=False)
        assert triton.JITFunction.run is refuse


UUIDS = ["c2f1d3aa-0000-4e5f-9d3b-1a2b3c4d5e6f", "0b7c9e11-2222-4a1b-8c7d-6f5e4d3c2b1a"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[SimpleNamespace]:
    """The properties of the GPUs that this process sees, the first of which it works on; locks go to `tmp_path`."""
    seen = [SimpleNamespace(uuid=uuid) for uuid in UUIDS]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return seen


def is_free(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_turns_are_taken_on_each_gpu_by_itself(gpus: list[SimpleNamespace]) -> None:
    first, second, cpu = (lock_file(torch.device(name)) for name in ("cuda", "cuda:1", "cpu"))
    with alone_on_the_device():
        assert not is_free(first) and is_free(second) and is_free(cpu)
        with alone_on_the_device("cuda:1"), alone_on_the_device("cpu"):
            assert not is_free(second) and not is_free(cpu)
    assert is_free(first) and is_free(second) and is_free(cpu)
    gpus.reverse()  # as another process sees them
    assert (lock_file(torch.device("cuda:1")), lock_file(torch.device("cuda"))) == (first, second)


@pytest.mark.parametrize("without", ["", "00000000-0000-0000-0000-000000000000", None])
def test_a_gpu_without_a_uuid_is_the_one_that_the_process_was_given(
    without: str | None, gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus[:] = [SimpleNamespace() if without is None else SimpleNamespace(uuid=without) for _ in gpus]
    first, second = lock_file(torch.device("cuda")), lock_file(torch.device("cuda:1"))
    assert first != second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, MIG-7/3")
    assert lock_file(torch.device("cuda")) == second
    assert lock_file(torch.device("cuda:1")).name.endswith("cuda-MIG-7-3.lock")


def test_a_lock_that_cannot_be_opened_breaks_nothing(
    gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lock_file(torch.device("cuda"))
    path.mkdir()  # what not even root opens for writing, as a user does not open another's file
    ran = False
    with (
        pytest.warns(UserWarning, match=r"cannot be locked \(.*disturb each other; set TMPDIR"),
        alone_on_the_device(),
    ):
        ran = True
    assert ran
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert lock_file(torch.device("cuda")) != path
